"""Where the bytes of a store come from: here, a local directory. The other place is in `remote.py`."""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np

from .errors import StoreError
from .layout import Grid
from .manifest import MANIFEST
from .mapping import MappedShards
from .regular import open_regular

_SMALL_FILE = 2**16  # read rather than mapped


class LocalFiles:
    """Files of a store's directory, held open: it stays the same store if another takes its place.

    Parameters
    ----------
    path
        Absolute.

    Raises
    ------
    StoreError
        If there is no such directory.
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

    def announce(self, sizes: Mapping[str, Any]) -> None:
        """Do nothing: what is asked for next is on this machine."""

    def read(self, relative: str, limit: int) -> np.ndarray:
        """Return a whole file of at most `limit` bytes, uint8 [bytes]."""
        try:
            descriptor = open_regular(relative, self._directory, self.where)
        except StoreError as error:
            if relative == MANIFEST and isinstance(error.__cause__, FileNotFoundError):
                raise StoreError(
                    f"{self.where}/{MANIFEST}: no store here, or a damaged one; restore it from a copy"
                ) from error
            raise
        with os.fdopen(descriptor, "rb") as file:
            size = os.fstat(descriptor).st_size
            if size > limit:
                raise StoreError(
                    f"{self.where}/{relative}: has {size} bytes, expected at most {limit}; restore it from a "
                    "copy"
                )
            try:
                if size < _SMALL_FILE:
                    return np.frombuffer(file.read(size), np.uint8)
                return np.frombuffer(mmap.mmap(descriptor, size, prot=mmap.PROT_READ), np.uint8)
            except (OSError, ValueError) as error:  # the disk fails, or the file was just cut
                raise StoreError(
                    f"{self.where}/{relative}: cannot be read ({error}); restore it from a copy"
                ) from error

    def entries(self, relative: str) -> dict[str, str]:
        """Return what lies in a folder: {name: "folder", "file" or "other"}; nothing if it is a link."""
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            descriptor = os.open(relative, flags, dir_fd=self._directory)
        except OSError:
            return {}
        try:
            with os.scandir(descriptor) as found:
                return {entry.name: _kind(entry) for entry in found}
        finally:
            os.close(descriptor)

    def shards(self, grid: Grid, shards: np.ndarray, chunks: np.ndarray, sums: np.ndarray) -> MappedShards:
        """Return the shards of an array, mapped. Chunks are compared with `sums` by the store, once a run."""
        return MappedShards(self._directory, self.where, grid, shards, chunks)

    def zarr_store(self) -> str:
        """Return the store as Zarr opens it."""
        return self.where


def _kind(entry: os.DirEntry[str]) -> str:
    if entry.is_dir(follow_symlinks=False):
        return "folder"
    return "file" if entry.is_file(follow_symlinks=False) else "other"
