"""The errors of this package: a store, part or source file cannot be used."""

from __future__ import annotations


class StoreError(ValueError):
    """Something on disk is missing, damaged or not what it should be; the message names file and remedy."""


class DamagedChunk(Exception):
    """Chunk `chunk` has a wrong checksum; whoever knows the runs turns it into a `StoreError`."""

    def __init__(self, chunk: int) -> None:
        super().__init__("is damaged (wrong checksum)")
        self.chunk = chunk
