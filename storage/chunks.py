"""Rows of chunks that cannot be mapped, compressed or remote: each is fetched and decoded once a batch.

Zarr's own codec pipeline, and `zarrs` in its place, decode the same chunks; both were slower than
handing the chunks of a whole batch to the codec ourselves (`docs/format.md`), so no pipeline is asked.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
from numcodecs import Zstd

from .errors import DamagedChunk
from .layout import Grid

# Rows of `statistics`, the scales of integer stores, are asked for window by window.
_KEPT_ROWS = 4096
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


class DecodedRows:
    """Reads windows of an array chunk by chunk.

    Parameters
    ----------
    grid
        Layout of the array.
    fetch
        Gives the stored bytes of chunks by number.
    """

    def __init__(self, grid: Grid, fetch: Callable[[list[int]], Mapping[int, np.ndarray]]) -> None:
        self._grid = grid
        self._fetch = fetch
        self._zstd = Zstd().decode
        self._pool: tuple[int, ThreadPoolExecutor] | None = None
        # Of this reader alone: as a decorator it would serve all of them, and keep them alive.
        self.row = lru_cache(_KEPT_ROWS)(self._row)

    def windows(self, starts: np.ndarray, lengths: np.ndarray) -> Iterator[np.ndarray]:
        """Yield rows of each window, [length, *row_shape]."""
        chunk_rows, spans = self._grid.chunk_rows, self._grid.spans(starts, lengths)
        stored = self._fetch(chunks_of(spans))
        decoded = self._decoded(stored)
        for span, start, length in zip(spans, starts.tolist(), lengths.tolist(), strict=True):
            rows = [decoded[chunk] for chunk in span]
            joined = rows[0] if len(rows) == 1 else np.concatenate(rows)
            yield joined[start - span[0] * chunk_rows :][:length]

    def copy(self, starts: np.ndarray, lengths: np.ndarray, out: np.ndarray) -> None:
        """Copy the rows of each window behind one another into all of `out`."""
        np.concatenate(list(self.windows(starts, lengths)), out=out)

    def _row(self, row: int) -> np.ndarray:
        # A copy: a view would keep its whole chunk in the cache.
        return next(self.windows(np.array([row]), np.array([1])))[0].copy()

    def _decoded(self, stored: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
        """Return chunks, [chunk_rows, *row_shape] each, side by side: the codec lets go of the GIL."""
        if self._grid.compression is None:
            return {chunk: self.decode(chunk, data) for chunk, data in stored.items()}
        if self._pool is None or self._pool[0] != os.getpid():  # threads do not survive a fork
            self._pool = os.getpid(), ThreadPoolExecutor(len(os.sched_getaffinity(0)), "brainflow-decode")
        return dict(zip(stored, self._pool[1].map(self.decode, stored, stored.values()), strict=True))

    def decode(self, chunk: int, stored: np.ndarray) -> np.ndarray:
        """Return the rows of a chunk, [chunk_rows, *row_shape], from its stored bytes.

        Raises
        ------
        DamagedChunk
            If it says that it is of another size than a chunk has, or cannot be decoded.
        """
        grid = self._grid
        data: Any = stored
        if grid.compression is not None:
            # A frame's header has at most 18 bytes.
            # Before anything is allocated: a frame of some bytes may declare terabytes.
            if zstd_content_bytes(stored[:18].tobytes()) != grid.chunk_bytes:
                raise DamagedChunk(chunk, f"not one zstd frame of {grid.chunk_bytes} bytes")
            try:
                data = self._zstd(stored)
            except (RuntimeError, ValueError) as error:
                raise DamagedChunk(chunk, "cannot be decoded") from error
        if len(data) != grid.chunk_bytes:
            raise DamagedChunk(chunk, f"{len(data)} bytes, expected {grid.chunk_bytes}")
        return np.frombuffer(data, grid.dtype).reshape(grid.chunk_rows, *grid.row_shape)


def zstd_content_bytes(frame: bytes) -> int | None:
    """Return the bytes that a zstd frame declares to hold (RFC 8878, 3.1.1), None if it declares none."""
    if len(frame) < 5 or frame[:4] != _ZSTD_MAGIC:
        return None
    flag, single_segment = frame[4] >> 6, frame[4] >> 5 & 1
    size = (single_segment, 2, 4, 8)[flag]
    begin = 5 + (1 - single_segment) + (0, 1, 2, 4)[frame[4] & 3]
    field = frame[begin : begin + size]
    if size == 0 or len(field) < size:
        # A field of two bytes begins to count at 256.
        return None
    return int.from_bytes(field, "little") + (256 if size == 2 else 0)


def chunks_of(spans: list[range]) -> list[int]:
    """Return numbers in any of some ranges, ascending, each once."""
    return sorted({chunk for span in spans for chunk in span})
