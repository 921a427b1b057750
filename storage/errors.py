"""The errors of this package: a store, part or source file cannot be used."""

from __future__ import annotations


class StoreError(ValueError):
    """Something on disk is missing, damaged or not what it should be; the message names file and remedy."""


class StoreUnavailable(StoreError):
    """A store cannot be used, though it need not be damaged: no access, no answer, a newer format.

    An older generation would be no remedy.
    """


class StoreWarning(UserWarning):
    """A store is damaged or a cache not safe, and something else is used; the message says what."""


class DamagedChunk(Exception):
    """Chunk `chunk` cannot be used; whoever knows the runs turns it into a `StoreError`."""

    def __init__(self, chunk: int, reason: str = "wrong checksum") -> None:
        super().__init__(f"is damaged ({reason})")
        self.chunk = chunk
        self.reason = reason
