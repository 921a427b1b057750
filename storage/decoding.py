"""Reading rows of compressed chunks, which cannot be mapped: every chunk is decoded once a batch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numcodecs import Zstd

from .mapping import MappedShards


class DecodedRows:
    """Reads windows of an array whose chunks are compressed with zstd.

    Parameters
    ----------
    shards : its mapped shards
    """

    def __init__(self, shards: MappedShards) -> None:
        self._shards = shards
        self._decode = Zstd().decode

    def windows(self, starts: np.ndarray, lengths: np.ndarray) -> Iterator[np.ndarray]:
        """Rows of each window, [length, *row_shape]."""
        chunk_rows = self._shards.grid.chunk_rows
        decoded: dict[int, np.ndarray] = {}
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            first, last = start // chunk_rows, (start + length - 1) // chunk_rows
            for chunk in range(first, last + 1):
                if chunk not in decoded:
                    decoded[chunk] = self._chunk(chunk)
            rows = [decoded[chunk] for chunk in range(first, last + 1)]
            joined = rows[0] if len(rows) == 1 else np.concatenate(rows)
            yield joined[start - first * chunk_rows :][:length]

    def copy(self, starts: np.ndarray, lengths: np.ndarray, ends: list[int], out: np.ndarray) -> None:
        """Copy the rows of each window into `out`, up to the row in `ends`."""
        position = 0
        for rows, end in zip(self.windows(starts, lengths), ends, strict=True):
            out[position:end] = rows
            position = end

    def _chunk(self, chunk: int) -> np.ndarray:
        """One chunk, [chunk_rows, *row_shape]."""
        grid = self._shards.grid
        data = self._decode(self._shards.stored(chunk))
        return np.frombuffer(data, grid.dtype).reshape(grid.chunk_rows, *grid.row_shape)
