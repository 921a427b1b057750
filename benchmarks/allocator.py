"""Memory that stays with the process, as in a training that has run for a while.

By default glibc gives a large block back when it is freed, or not, depending on what was allocated before. A
naive masked loss, which allocates 90 MB a call, then takes 28 ms or 51, according to what ran before it.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of mallopt's parameters, malloc.h


def keep_memory() -> None:
    """Let glibc keep freed memory for the next call, on Linux; elsewhere nothing changes."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 2**25)  # the most that it takes
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
