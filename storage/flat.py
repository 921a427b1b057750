"""All shards of a raw array side by side in the address space, so that row r of the store is row r in memory.

A library that gathers rows of one array (DALI) then reads a store without knowing of shards.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref

import numpy as np

from .layout import Grid

_HUGE_PAGE = 2**21
_PROT_NONE, _MAP_FIXED, _MAP_NORESERVE = 0, 0x10, 0x4000
_FAILED = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class FlatRows:
    """Addresses kept free for a whole array, into which its shard files are mapped one by one.

    Parameters
    ----------
    grid : layout of an array of raw chunks whose shards are whole pages
    shards : shards of the array, gaps included

    Raises
    ------
    OSError : if the addresses cannot be had

    Attributes
    ----------
    rows : read-only [shards · shard_rows, *row_shape]; touch no row of a shard that has not been added
    """

    def __init__(self, grid: Grid, shards: int) -> None:
        self._shard_bytes = grid.shard_rows * grid.row_bytes
        size = shards * self._shard_bytes
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
