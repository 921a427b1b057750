"""Optional packages of this step, imported where they are used."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

NEEDED = ("nibabel", "nilearn", "pandas", "scipy", "threadpoolctl")
"""What preparing runs takes; scikit-learn comes with nilearn."""


def check_installed() -> None:
    """Refuse to begin without the packages that every run needs.

    Raises
    ------
    ImportError : saying which extra to install
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"prepare needs {', '.join(missing)}; pip install 'brainflow-fmri[bids]'")


def need(module: str, purpose: str, extra: str = "bids") -> Any:
    """Import an optional module.

    Parameters
    ----------
    module : such as "nilearn.signal"
    purpose : what it is needed for, the beginning of the error message
    extra : which extra brings it

    Raises
    ------
    ImportError : saying which extra to install
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise ImportError(
            f"{purpose} needs {package} ({error}); pip install 'brainflow-fmri[{extra}]'"
        ) from error
