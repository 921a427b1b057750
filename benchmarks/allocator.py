"""Where large blocks come from: kept by the process, or new from the operating system.

glibc gives a block back when it is freed, or keeps it for the next, by thresholds that follow earlier calls.
A naive masked loss of a usual batch, which allocates 90 MB a call, is then twice as slow in one process as
in another, or in another minute of the same. So a comparison settles which of the two it is.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of mallopt's parameters, malloc.h
_FIRST_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD = 2**17, 2**25


def keep_memory() -> None:
    """Let glibc keep freed memory, as in a training that has run for a while; on Linux, else no change."""
    _mallopt({_MMAP_THRESHOLD: _LARGEST_MMAP_THRESHOLD, _TRIM_THRESHOLD: 2**31 - 1})


def fresh_memory() -> None:
    """Let every block of 128 KiB or more come from the operating system; on Linux, else no change.

    A process begins like that, and one whose blocks are larger than 32 MiB stays like that, since those glibc
    never keeps: such as a batch of 192 windows x 50 time points x 1,024 networks in float32.
    """
    _mallopt({_MMAP_THRESHOLD: _FIRST_MMAP_THRESHOLD})


def _mallopt(values: dict[int, int]) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for name, value in values.items():
            mallopt(name, value)
