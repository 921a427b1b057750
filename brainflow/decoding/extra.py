"""One message for the optional packages that decoding needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def requires_report(what: str) -> Iterator[None]:
    """Turn a failed import of an optional package into an error that says how to get it.

    Parameters
    ----------
    what
        What needs the package, as the first words of the message.

    Raises
    ------
    ImportError
        In place of the original error, naming the missing package and the extra.
    """
    try:
        yield
    except ImportError as error:
        missing = error.name or str(error)
        raise ImportError(
            f"{what} needs {missing}, which is not installed; pip install 'brainflow-fmri[report]'",
            name=error.name,
        ) from error
