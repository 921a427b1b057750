"""Writing the shard files of one array, front to back, a run at a time."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numcodecs import Zstd

from .files import naming, sync_directory
from .layout import ZSTD_LEVEL, Grid, crc32c

_BUFFER = 2**21  # the kernel keeps what is written at once in pages of up to this size, which map faster


class ShardWriter:
    """Appends blocks of rows to new shards of an array; never opens a shard that is already committed.

    Parameters
    ----------
    root
        Directory of the store.
    grid
        Layout of the array.
    first_row
        Where the first block goes, a multiple of `grid.shard_rows`.

    Attributes
    ----------
    row
        int, the row after the last one written.
    checksums
        {chunk number: CRC-32C of its stored bytes}, of the chunks written so far.
    """

    def __init__(self, root: Path, grid: Grid, first_row: int) -> None:
        self.root = root
        self.grid = grid
        self.row = first_row
        self.checksums: dict[int, int] = {}
        self._encode = Zstd(level=ZSTD_LEVEL).encode if grid.compression == "zstd" else None
        self._file: BinaryIO | None = None
        self._entries: list[tuple[int, int]] = []
        self._offset = 0
        self._carry = np.zeros((grid.chunk_rows, *grid.row_shape), grid.dtype)
        self._carried = 0

    def append(self, block: np.ndarray) -> int:
        """Write a block of rows, in the next shard if the present one has no room for it.

        Parameters
        ----------
        block
            [rows, *row_shape] of the array's element type, at most `shard_rows` rows.

        Returns
        -------
        int
            The row at which the block starts.
        """
        grid = self.grid
        # A run lies in one file, so that each of its windows is one piece of it.
        if self.row % grid.shard_rows + len(block) > grid.shard_rows:
            self.close_shard()
        if self._file is None:
            path = self.root / grid.shard_path(self.row // grid.shard_rows)
            path.parent.mkdir(parents=True, exist_ok=True)
            # x: what exists may be committed, and is never opened for writing.
            self._file = open(path, "xb", buffering=_BUFFER)  # noqa: SIM115  closed by close_shard or abort
        start = self.row
        self.row += len(block)
        if self._carried:
            taken = min(grid.chunk_rows - self._carried, len(block))
            self._carry[self._carried : self._carried + taken] = block[:taken]
            self._carried += taken
            block = block[taken:]
            if self._carried == grid.chunk_rows:
                self._write_chunk(self._carry)
                self._carried = 0
        while len(block) >= grid.chunk_rows:
            self._write_chunk(np.ascontiguousarray(block[: grid.chunk_rows]))
            block = block[grid.chunk_rows :]
        if len(block):
            self._carry[: len(block)] = block
            self._carried = len(block)
        if self.row % grid.shard_rows == 0:
            self.close_shard()
        return start

    def close_shard(self) -> None:
        """Fill the last chunk with zeros, write the index, flush; the next block starts a new shard."""
        if self._file is None:
            return
        grid = self.grid
        if self._carried:
            self._carry[self._carried :] = 0
            self._write_chunk(self._carry)
            self._carried = 0
        shard = self.root / grid.shard_path((self.row - 1) // grid.shard_rows)
        with naming(shard):
            self._file.write(grid.pack_index(self._entries))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        # Flushed bytes are lost all the same if a crash forgets the name of their file, or of its folder.
        for directory in list(shard.parents)[: len(grid.row_shape) + 1]:  # up to and with `c`
            sync_directory(directory)
        self._file = None
        self._entries = []
        self._offset = 0
        self.row = -(-self.row // grid.shard_rows) * grid.shard_rows

    def abort(self) -> None:
        """Close the open file without finishing it."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # closing flushes; what is lost was not to be kept
                self._file.close()
            self._file = None

    def _write_chunk(self, chunk: np.ndarray) -> None:
        """Store one chunk and note its place and checksum. `row` has already moved past the whole block."""
        data = memoryview(chunk.reshape(-1).view(np.uint8).data)
        if self._encode is not None:
            data = memoryview(self._encode(data))
        shard = (self.row - 1) // self.grid.shard_rows
        self.checksums[shard * self.grid.chunks_per_shard + len(self._entries)] = crc32c(data)
        self._entries.append((self._offset, data.nbytes))
        self._offset += data.nbytes
        assert self._file is not None
        with naming(self.root / self.grid.shard_path(shard)):
            self._file.write(data)
