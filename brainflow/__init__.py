"""brainflow: pretrain sequence models on fMRI and decode mental states with them.

Importing this package imports nothing else: `brainflow.load` and `brainflow.__version__` are made on first
use.
"""

from typing import Any

__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from brainflow.models.pretrained import load_pretrained

        return load_pretrained
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("brainflow-fmri")
        except PackageNotFoundError:  # run from a folder that was never installed
            return "0+unknown"
    raise AttributeError(f"module 'brainflow' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
