"""How a process begins that measures for another one."""

from __future__ import annotations

import ctypes
import signal
import sys

import torch

_SET_SIGNAL_AT_PARENTS_DEATH = 1  # PR_SET_PDEATHSIG, linux/prctl.h


def begin_worker(threads: int) -> None:
    """Set up a process that measures: so many threads, and it ends with its parent."""
    torch.set_num_threads(threads)
    if sys.platform == "linux":  # a killed run must leave nothing that computes beside the next one
        ctypes.CDLL(None).prctl(_SET_SIGNAL_AT_PARENTS_DEATH, signal.SIGKILL)
