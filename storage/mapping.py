"""Shard files mapped into memory: raw chunks are read straight from the page cache, without a codec."""

from __future__ import annotations

import mmap
import os
import stat

import numpy as np

from .errors import StoreError, StoreUnavailable
from .flat import FlatRows
from .layout import Grid
from .regular import open_regular, unusable

_REMEDY = "restore the file from a copy of the store, or write the store anew"


class MappedShards:
    """Maps the shards of one array as they are needed.

    Parameters
    ----------
    directory : file descriptor of the store's directory: it stays the same store if another takes its place
    where : the store's path, for messages
    grid : layout of the array
    shards, chunks : int64 [shards], numbers of the shards that exist and the chunks in each
    """

    def __init__(
        self, directory: int, where: str, grid: Grid, shards: np.ndarray, chunks: np.ndarray
    ) -> None:
        self.grid = grid
        self._directory = directory
        self._where = where
        self._chunks = dict(zip(shards.tolist(), chunks.tolist(), strict=True))
        self._rows: dict[int, np.ndarray] = {}
        self._maps: dict[int, mmap.mmap] = {}
        self._indexes: dict[int, np.ndarray] = {}
        self._flat: FlatRows | None = None
        if FlatRows.fits(grid) and len(shards):
            try:
                self._flat = FlatRows(grid, int(shards[-1]) + 1)
            except OSError:  # a limit on the address space
                self._flat = None

    def copy(self, starts: np.ndarray, lengths: np.ndarray, out: np.ndarray) -> None:
        """Copy the rows of each window behind one another into all of `out`. The hot path of training.

        The shards that the windows lie in must have been asked for with `rows` before.
        """
        np.concatenate(self.windows(starts, lengths), out=out)

    @property
    def flat(self) -> np.ndarray | None:
        """All rows of the array, read-only [rows, *row_shape], or None where they cannot lie side by side.

        Touch no row of a shard that has not been asked for with `rows` before: that kills the process.
        """
        return None if self._flat is None else self._flat.rows

    def windows(self, starts: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
        """Views of the rows of each window, which lies in one shard; read-only [length, *row_shape].

        Shards as in `copy`.
        """
        if self._flat is not None:
            flat = self._flat.rows
            return [flat[a:b] for a, b in zip(starts.tolist(), (starts + lengths).tolist(), strict=True)]
        rows, shard_rows = self._rows, self.grid.shard_rows
        shards = starts // shard_rows
        firsts = starts - shards * shard_rows
        places = zip(shards.tolist(), firsts.tolist(), (firsts + lengths).tolist(), strict=True)
        return [rows[shard][first:stop] for shard, first, stop in places]

    def rows(self, shard: int) -> np.ndarray:
        """All rows of a shard of raw chunks, read-only [chunks · chunk_rows, *row_shape]."""
        if shard not in self._rows:
            self._rows[shard] = self._map_rows(shard)
        return self._rows[shard]

    def row(self, row: int) -> np.ndarray:
        """One row of an array of raw chunks, read-only [*row_shape]."""
        shard, position = divmod(row, self.grid.shard_rows)
        return self.rows(shard)[position]

    def fetch(self, chunks: list[int]) -> dict[int, np.ndarray]:
        """Stored bytes of some chunks, uint8 [bytes] each."""
        return {chunk: self.stored(chunk) for chunk in chunks}

    def stored(self, chunk: int) -> np.ndarray:
        """Bytes of a chunk as they are stored, uint8 [bytes], compressed or not."""
        shard, position = divmod(chunk, self.grid.chunks_per_shard)
        mapped = self.map(shard)
        offset, size = self._indexes[shard][position].tolist()
        return np.frombuffer(mapped, np.uint8, size, offset)

    def map(self, shard: int) -> mmap.mmap:
        """The map of a shard file, made and its index checked at the first call.

        Raises
        ------
        StoreError : if the file is missing or of another size, or its index is damaged
        """
        if shard in self._maps:
            return self._maps[shard]
        grid, path, chunks = self.grid, self.grid.shard_path(shard), self._chunks[shard]
        descriptor = open_regular(path, self._directory, self._where)
        try:
            size = os.fstat(descriptor).st_size
            self._check_size(path, chunks, size)
            # Not by the map, where touching one page reads up to megabytes around it.
            tail = os.pread(descriptor, grid.index_bytes, size - grid.index_bytes)
            index = grid.read_index(tail, chunks)
            if int(index[-1].sum()) != size - grid.index_bytes:
                raise ValueError("truncated, or holds more than its index names")
            mapped = mmap.mmap(descriptor, size, prot=mmap.PROT_READ)
            if self._flat is not None:
                self._flat.add(shard, descriptor, chunks * grid.chunk_bytes)
        except StoreError:
            raise
        except ValueError as error:
            raise StoreError(f"{self._where}/{path}: {error}; {_REMEDY}") from error
        except OSError as error:
            raise StoreUnavailable(
                f"{self._where}/{path}: cannot be mapped ({error}); check ulimit -v and the disk"
            ) from error
        finally:
            os.close(descriptor)
        self._maps[shard], self._indexes[shard] = mapped, index
        return mapped

    def read_at_random(self, shard: int) -> None:
        """Tell the kernel to read no more of a shard's file than is asked for."""
        self.map(shard).madvise(mmap.MADV_RANDOM)
        if self._flat is not None:
            self._flat.read_at_random(shard, self._chunks[shard] * self.grid.chunk_bytes)

    def is_ours(self, shard: int) -> bool:
        """Whether this process owns a shard's file or may write it."""
        path = self.grid.shard_path(shard)
        owner = os.stat(path, dir_fd=self._directory, follow_symlinks=False).st_uid
        return os.geteuid() in (0, owner) or os.access(
            path, os.W_OK, dir_fd=self._directory, effective_ids=True
        )

    def _map_rows(self, shard: int) -> np.ndarray:
        """Map a shard of raw chunks; its index says that chunk i lies at i · chunk_bytes."""
        grid, mapped = self.grid, self.map(shard)
        count = self._chunks[shard] * grid.chunk_bytes // grid.dtype.itemsize
        return np.frombuffer(mapped, grid.dtype, count).reshape(-1, *grid.row_shape)

    def check_sizes(self) -> None:
        """Refuse shard files that are missing or truncated, all of them before the first is mapped.

        Raises
        ------
        StoreError : naming the first such file
        """
        grid, raw = self.grid, self.grid.compression is None
        chunk_bytes, index_bytes = grid.chunk_bytes, grid.index_bytes  # a large store has thousands of shards
        for shard, chunks in self._chunks.items():
            path = grid.shard_path(shard)
            try:
                status = os.stat(path, dir_fd=self._directory, follow_symlinks=False)
            except FileNotFoundError as error:
                raise StoreError(f"{self._where}/{path}: this shard is missing; {_REMEDY}") from error
            except OSError as error:
                raise unusable(f"{self._where}/{path}", error) from error
            if not stat.S_ISREG(status.st_mode):
                raise StoreError(
                    f"{self._where}/{path}: is not a regular file (links are not followed); {_REMEDY}"
                )
            if not raw:
                self.map(shard)  # the index stands at the end: a truncated file has a wrong one
            elif status.st_size != chunks * chunk_bytes + index_bytes:
                self._check_size(path, chunks, status.st_size)

    def _check_size(self, path: str, chunks: int, size: int) -> None:
        expected = chunks * self.grid.chunk_bytes + self.grid.index_bytes
        if self.grid.compression is None and size != expected:
            raise StoreError(
                f"{self._where}/{path}: has {size} bytes, expected {expected} (truncated or not of this "
                f"store); {_REMEDY}"
            )
        if size < self.grid.index_bytes:
            raise StoreError(f"{self._where}/{path}: truncated; {_REMEDY}")
