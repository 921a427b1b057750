"""Where the bytes of a store come from: here, a local directory. The other place is in `remote.py`."""

from __future__ import annotations

import os
import weakref

import numpy as np

from .errors import StoreError
from .layout import Grid
from .manifest import MANIFEST
from .mapping import MappedShards

_SMALL_FILE = 2**16  # read rather than mapped


class LocalFiles:
    """Files of a store's directory, held open: it stays the same store if another takes its place.

    Parameters
    ----------
    path : absolute

    Raises
    ------
    StoreError : if there is no such directory
    """

    def __init__(self, path: str) -> None:
        self.where = path
        try:
            self._directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise StoreError(
                f"{path}: no store here ({error.strerror}); write one with `brainflow ingest` or StoreWriter"
            ) from error
        weakref.finalize(self, os.close, self._directory)

    def announce(self, relatives: list[str]) -> None:
        """Nothing to do: what is asked for next is on this machine."""

    def read(self, relative: str) -> np.ndarray:
        """A whole file, uint8 [bytes]."""
        try:
            descriptor = os.open(relative, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._directory)
        except OSError as error:
            what = (
                "no store here, or a damaged one"
                if relative == MANIFEST
                else "a file of the store is missing"
            )
            raise StoreError(
                f"{self.where}/{relative}: {what} ({error.strerror}); restore it from a copy"
            ) from error
        with os.fdopen(descriptor, "rb") as file:
            if os.fstat(descriptor).st_size < _SMALL_FILE:
                return np.frombuffer(file.read(), np.uint8)
            return np.memmap(file, np.uint8, "r").view(np.ndarray)

    def shards(self, grid: Grid, shards: np.ndarray, chunks: np.ndarray, sums: np.ndarray) -> MappedShards:
        """The shards of an array, mapped. Chunks are compared with `sums` by the store, once a run."""
        return MappedShards(self._directory, self.where, grid, shards, chunks)

    def zarr_store(self) -> str:
        """The store as Zarr opens it."""
        return self.where
