"""brainflow: pretrain sequence models on fMRI and decode mental states with them.

Importing this package imports nothing else: the names in `__all__` are made on first use.
"""

from os.path import dirname, exists, isdir, join
from typing import Any

if not isdir(join(dirname(__file__), "kernels")):
    raise ImportError(
        "this copy of brainflow has lost its symbolic links (brainflow/kernels, storage, benchmarks lead to "
        "the folders beside it): clone it with `git clone -c core.symlinks=true`, on Windows inside WSL, or "
        "install the wheel: pip install brainflow-fmri"
    )
if exists(join(dirname(__file__), "board_shim.py")):
    raise ImportError(
        "two projects share this folder: `brainflow` (brain–computer interfaces) and `brainflow-fmri` have "
        "one import name, so keep one of them in an environment: pip uninstall brainflow, then pip install "
        "--force-reinstall brainflow-fmri"
    )

__all__ = [
    "BoldEncoder",
    "BoldRegressor",
    "MentalStateDecoder",
    "__version__",
    "embed",
    "from_pretrained",
    "load",
    "progress_bar",
    "push_to_hub",
    "save_pretrained",
]
_PLACES = {
    "embed": "brainflow.decoding.embed",
    "MentalStateDecoder": "brainflow.decoding.estimator",
    "BoldEncoder": "brainflow.decoding.estimator",
    "BoldRegressor": "brainflow.decoding.estimator",
    "from_pretrained": "brainflow.pretrained.hub",
    "progress_bar": "brainflow.progress",
    "push_to_hub": "brainflow.sharing",
}


def __getattr__(name: str) -> Any:
    if name in ("load", "save_pretrained"):
        from brainflow.pretrained import format

        return format.load_pretrained if name == "load" else format.save_pretrained
    if name in _PLACES:
        from importlib import import_module

        return getattr(import_module(_PLACES[name]), name)
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("brainflow-fmri")
        except PackageNotFoundError:  # run from a folder that was never installed
            return "0+unknown"
    raise AttributeError(f"module 'brainflow' has no attribute {name!r}")


# Names that are not made yet are to be completed, too.
def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
