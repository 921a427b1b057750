"""Optional dependencies: imported where they are used, with one message that says how to get them."""

from __future__ import annotations

import importlib
from typing import Any


def need(module: str, purpose: str, extra: str) -> Any:
    """Import an optional module.

    Parameters
    ----------
    module
        Its full name, such as "nilearn.signal".
    purpose
        What it is needed for: the beginning of the error message.
    extra
        Which extra of `brainflow-fmri` brings it.

    Raises
    ------
    ImportError
        If it cannot be imported, saying which extra to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        # What is missing may be a package that the module needs in its turn.
        package = (error.name or module).split(".")[0]
        raise ImportError(
            f"{purpose} needs {package}, which is not installed ({error}); "
            f"pip install 'brainflow-fmri[{extra}]'",
            name=error.name,
        ) from error
