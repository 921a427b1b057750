"""Shard files mapped into memory: raw chunks are read straight from the page cache, without a codec.

`MappedShards` finds the rows of windows, `FlatRows` lays all shards side by side in the address space,
`ReadHints` tells the kernel what is read next, and `aligned_empty` gives memory to copy windows into.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import stat
import weakref

import numpy as np

from .errors import StoreError, StoreUnavailable
from .layout import Grid
from .regular import open_regular, unusable

_REMEDY = "restore the file from a copy of the store, or write the store anew"
_HUGE_PAGE = 2**21  # bytes: rows that begin on one can be mapped by one entry of the processor's page table
_PROT_NONE, _MAP_FIXED, _MAP_NORESERVE = 0, 0x10, 0x4000
_FAILED = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_SAMPLE = 8  # windows of a batch that are looked at: each costs a system call
_QUIET_AFTER = 8  # batches
_LOOK_AGAIN = 32  # batches


class MappedShards:
    """Maps the shards of one array as they are needed.

    Parameters
    ----------
    directory
        File descriptor of the store's directory: it stays the same store if another takes its place.
    where
        The store's path, for messages.
    grid
        Layout of the array.
    shards, chunks
        int64 [shards], numbers of the shards that exist and the chunks in each.
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
        # Window by window: by row numbers (`take`) the same copy takes 1.3 times as long.
        np.concatenate(self.windows(starts, lengths), out=out)

    @property
    def flat(self) -> np.ndarray | None:
        """All rows of the array, read-only [rows, *row_shape], or None where they cannot lie side by side.

        Touch no row of a shard that has not been asked for with `rows` before: that kills the process.
        """
        return None if self._flat is None else self._flat.rows

    def windows(self, starts: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
        """Return views of the rows of each window, which lies in one shard; read-only [length, *row_shape].

        Shards as in `copy`.
        """
        if self._flat is not None:
            flat = self._flat.rows
            # Row r of the store is row r in memory: no shard has to be looked up.
            return [flat[a:b] for a, b in zip(starts.tolist(), (starts + lengths).tolist(), strict=True)]
        rows, shard_rows = self._rows, self.grid.shard_rows
        shards = starts // shard_rows
        firsts = starts - shards * shard_rows
        places = zip(shards.tolist(), firsts.tolist(), (firsts + lengths).tolist(), strict=True)
        return [rows[shard][first:stop] for shard, first, stop in places]

    def rows(self, shard: int) -> np.ndarray:
        """Return all rows of a shard of raw chunks, read-only [chunks · chunk_rows, *row_shape]."""
        if shard not in self._rows:
            self._rows[shard] = self._map_rows(shard)
        return self._rows[shard]

    def row(self, row: int) -> np.ndarray:
        """Return one row of an array of raw chunks, read-only [*row_shape]."""
        shard, position = divmod(row, self.grid.shard_rows)
        return self.rows(shard)[position]

    def fetch(self, chunks: list[int]) -> dict[int, np.ndarray]:
        """Return the stored bytes of some chunks, uint8 [bytes] each."""
        return {chunk: self.stored(chunk) for chunk in chunks}

    def stored(self, chunk: int) -> np.ndarray:
        """Return bytes of a chunk as they are stored, uint8 [bytes], compressed or not."""
        shard, position = divmod(chunk, self.grid.chunks_per_shard)
        mapped = self.map(shard)
        offset, size = self._indexes[shard][position].tolist()
        return np.frombuffer(mapped, np.uint8, size, offset)

    def map(self, shard: int) -> mmap.mmap:
        """Return the map of a shard file, made and its index checked at the first call.

        Raises
        ------
        StoreError
            If the file is missing or of another size, or its index is damaged.
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
        StoreError
            Naming the first such file.
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


class FlatRows:
    """Addresses kept free for a whole array, into which its shard files are mapped one by one.

    Row r of the store is then row r in memory, and a library that gathers rows of one array (DALI) reads a
    store without knowing of shards.

    Parameters
    ----------
    grid
        Layout of an array of raw chunks whose shards are whole pages.
    shards
        Shards of the array, gaps included.

    Raises
    ------
    OSError
        If the addresses cannot be had.

    Attributes
    ----------
    rows
        Read-only [shards · shard_rows, *row_shape]; touch no row of a shard that has not been added.
    """

    def __init__(self, grid: Grid, shards: int) -> None:
        self._shard_bytes = grid.shard_rows * grid.row_bytes
        size = shards * self._shard_bytes
        # Addresses alone: they take no memory, and count as none.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        begin = _map(None, size + _HUGE_PAGE, _PROT_NONE, flags, -1)
        self._address = -(-begin // _HUGE_PAGE) * _HUGE_PAGE
        memory = (ctypes.c_uint8 * size).from_address(self._address)
        free = weakref.finalize(memory, _libc.munmap, begin, size + _HUGE_PAGE)  # once no view of it is left
        free.atexit = False  # threads may still read
        rows = np.ctypeslib.as_array(memory).view(grid.dtype).reshape(-1, *grid.row_shape)
        rows.flags.writeable = False
        self.rows = rows

    @staticmethod
    def fits(grid: Grid) -> bool:
        """Whether the shards of an array are raw and whole pages."""
        return grid.compression is None and grid.shard_rows * grid.row_bytes % mmap.PAGESIZE == 0

    def add(self, shard: int, descriptor: int, size: int) -> None:
        """Map the first `size` bytes of a shard's file in its place."""
        # MAP_FIXED takes the place of what is mapped there, which is our own reservation.
        flags = mmap.MAP_SHARED | _MAP_FIXED
        _map(self._address + shard * self._shard_bytes, size, mmap.PROT_READ, flags, descriptor)

    def read_at_random(self, shard: int, size: int) -> None:
        """Tell the kernel to read no more of a shard than is asked for."""
        _libc.madvise(self._address + shard * self._shard_bytes, size, mmap.MADV_RANDOM)


def _map(address: int | None, size: int, protection: int, flags: int, descriptor: int) -> int:
    found = _libc.mmap(address, size, protection, flags, descriptor, 0)
    if found == _FAILED or found is None:
        number = ctypes.get_errno()
        raise OSError(number, f"cannot map {size} bytes")
    return int(found)


class ReadHints:
    """Advises the kernel about windows of mapped shards, and stops while the data are resident.

    Of every batch a few windows are looked at (mincore). After `_QUIET_AFTER` batches whose windows were all
    in memory, only every `_LOOK_AGAIN`-th batch is looked at, until one is not. Linux tells what is resident
    only to those who own a file or may write it, and says "all" to others: for them every batch is advised.

    Parameters
    ----------
    shards
        The mapped shards of an array of raw chunks.
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
        starts, lengths
            int64 [windows], valid windows.
        """
        self._calls += 1
        if self.quiet and self._calls % _LOOK_AGAIN:
            return
        grid = self._shards.grid
        shards = starts // grid.shard_rows
        first = (starts - shards * grid.shard_rows) * grid.row_bytes
        # The kernel takes advice for whole pages.
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


def aligned_empty(rows: int, columns: int, dtype: np.dtype) -> np.ndarray:
    """Return an uninitialised array [rows, columns] that begins on a cache line, 512 bytes behind a page.

    NumPy's own arrays begin 16 bytes behind a cache line, and some processors (seen on an AMD EPYC) then copy
    a window at two thirds of the speed. On a page, where rows of a mapped store begin too, another (Zen 2)
    was 2 % slower, perhaps since what is written and what is read next then differ by a multiple of 4 KiB.
    """
    size = rows * columns * dtype.itemsize
    memory = np.empty(size + mmap.PAGESIZE + 512, np.uint8)  # NumPy asks for huge pages, torch does not
    begin = -memory.ctypes.data % mmap.PAGESIZE + 512
    return memory[begin : begin + size].view(dtype).reshape(rows, columns)
