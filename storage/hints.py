"""Telling the kernel which rows are read next, so that they are fetched while a batch is used."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np

from .mapping import MappedShards

_SAMPLE = 8
_QUIET_AFTER = 8
_LOOK_AGAIN = 32


class ReadHints:
    """Advises the kernel about windows of mapped shards, and stops while the data are resident.

    Of every batch a few windows are looked at (mincore). After `_QUIET_AFTER` batches whose windows were all
    in memory, only every `_LOOK_AGAIN`-th batch is looked at, until one is not. Linux tells what is resident
    only to those who own a file or may write it, and says "all" to others: for them every batch is advised.

    Parameters
    ----------
    shards : the mapped shards of an array of raw chunks
    """

    def __init__(self, shards: MappedShards) -> None:
        self._shards = shards
        self._random: set[int] = set()
        self._telling: dict[int, bool] = {}
        self._resident = 0
        self._calls = 0
        self._mincore = ctypes.CDLL(None, use_errno=True).mincore
        self._mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]

    @property
    def quiet(self) -> bool:
        """Whether hints have stopped because the data are in memory."""
        return self._resident >= _QUIET_AFTER

    def advise(self, starts: np.ndarray, lengths: np.ndarray) -> None:
        """Ask the kernel to read the rows of some windows soon; returns at once.

        Parameters
        ----------
        starts, lengths : int64 [windows], valid windows
        """
        self._calls += 1
        if self.quiet and self._calls % _LOOK_AGAIN:
            return
        grid = self._shards.grid
        shards = starts // grid.shard_rows
        first = (starts - shards * grid.shard_rows) * grid.row_bytes
        begin = first - first % mmap.PAGESIZE
        size = first + lengths * grid.row_bytes - begin
        windows = list(zip(shards.tolist(), begin.tolist(), size.tolist(), strict=True))
        step = max(1, len(windows) // _SAMPLE)
        if all(self._is_resident(*window) for window in windows[::step]):
            self._resident += 1
            if self.quiet:
                return
        else:
            self._resident = 0
        for shard, offset, length in windows:
            mapped = self._shards.map(shard)
            if shard not in self._random:  # no read-ahead beyond what is asked for
                self._shards.read_at_random(shard)
                self._random.add(shard)
            mapped.madvise(mmap.MADV_WILLNEED, offset, length)

    def _is_resident(self, shard: int, offset: int, length: int) -> bool:
        """Whether all pages of a stretch of a shard are in memory."""
        if shard not in self._telling:
            self._telling[shard] = self._shards.is_ours(shard)
        if not self._telling[shard]:
            return False
        mapped = self._shards.map(shard)
        pages = -(-length // mmap.PAGESIZE)
        state = ctypes.create_string_buffer(pages)
        address = np.frombuffer(mapped, np.uint8).ctypes.data + offset
        if self._mincore(address, length, state) != 0:
            return False
        return all(byte & 1 for byte in state.raw)
