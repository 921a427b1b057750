"""Optional dependencies: one message that names the missing package and the extra that brings it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def requires(purpose: str, extra: str) -> Iterator[None]:
    """Let a failed import in the block say how to get the package.

    Parameters
    ----------
    purpose
        What needs the package: the first words of the message.
    extra
        Which extra of `brainflow-fmri` brings it.

    Raises
    ------
    ImportError
        In place of the original error.
    """
    try:
        yield
    except ImportError as error:
        # A package that is there may lack what it needs in its turn, or fail to load.
        missing = (error.name or str(error)).split(".")[0]
        cause = (
            "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be imported ({error})"
        )
        raise ImportError(
            f"{purpose} needs {missing}, which {cause}; pip install 'brainflow-fmri[{extra}]'",
            name=error.name,
        ) from error


def need(module: str, purpose: str, extra: str) -> Any:
    """Import an optional module by its full name, such as "nilearn.signal"; else as `requires`.

    Parameters
    ----------
    module
        Full name.
    purpose, extra
        As in :func:`requires`.

    Raises
    ------
    ImportError
        If it cannot be imported; the message says how to get it.
    """
    with requires(purpose, extra):
        return importlib.import_module(module)
