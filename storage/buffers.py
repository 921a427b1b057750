"""Memory that windows are copied into."""

from __future__ import annotations

import mmap

import numpy as np


def aligned_empty(rows: int, columns: int, dtype: np.dtype) -> np.ndarray:
    """An uninitialised array [rows, columns] that begins on a cache line, 512 bytes behind a page.

    NumPy's own arrays begin 16 bytes behind a cache line, and some processors (seen on an AMD EPYC) then copy
    a window at two thirds of the speed. On a page, where rows of a mapped store begin too, another (Zen 2)
    was 2 % slower, perhaps since what is written and what is read next then differ by a multiple of 4 KiB.
    """
    size = rows * columns * dtype.itemsize
    memory = np.empty(size + mmap.PAGESIZE + 512, np.uint8)  # NumPy asks for huge pages, torch does not
    begin = -memory.ctypes.data % mmap.PAGESIZE + 512
    return memory[begin : begin + size].view(dtype).reshape(rows, columns)
