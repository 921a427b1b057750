"""How many bytes a source may be and may become; asked before memory is taken for it."""

from __future__ import annotations

import math
import stat
from pathlib import Path

from ..errors import StoreError

EXPANSION = 2
ALLOWANCE = 256 * 2**20
TEXT_BYTES = 8 * 2**20
"""Largest table of segments: text takes a hundred times its size once it is parsed."""


def regular_size(path: Path, largest: float = math.inf) -> int:
    """Return bytes of a regular file.

    Raises
    ------
    FileNotFoundError
        If there is none.
    StoreError
        If it is a directory, FIFO or device, which could be read forever, or larger than `largest`.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise StoreError(f"{path}: is no regular file; give the file itself")
    if status.st_size > largest:
        raise StoreError(f"{path}: has {status.st_size} bytes, expected at most {largest:.0f}")
    return status.st_size


def budget(size: int) -> int:
    """Return bytes of numbers that a compressed file or a text of `size` bytes may hold."""
    return EXPANSION * size + ALLOWANCE
