"""The package `transformers`, kept from taking our `kernels/` folder for the package of that name.

transformers asks for a package `kernels` when it is first used. In a checkout whose root is on the path it
finds ours, imports it a second time under that name, and so registers every operator of `brainflow.kernels`
again: the first registration is freed, and the next call of an operator crashes the process. torchvision is not
needed here, and one that was built for another torch fails to import.
"""

from __future__ import annotations

import sys
from types import ModuleType

HIDDEN = ("kernels", "torchvision")


def import_transformers() -> ModuleType:
    """Return `transformers` with its model classes loaded.

    Raises
    ------
    ModuleNotFoundError
        If it is not installed.
    """
    hidden = [name for name in HIDDEN if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # "not installed" to whoever asks
    try:
        import transformers  # optional dependency
        import transformers.models.bert.modeling_bert
        import transformers.models.gpt2.modeling_gpt2
    finally:
        for name in hidden:
            del sys.modules[name]
    return transformers


transformers = import_transformers()
