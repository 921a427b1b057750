"""The device of a setting, and how a process begins that computes beside another one."""

from __future__ import annotations

import ctypes
import signal
import sys

import torch

_SET_SIGNAL_AT_PARENTS_DEATH = 1  # PR_SET_PDEATHSIG, linux/prctl.h


def resolve_device(name: str) -> torch.device:
    """Return the device that "auto", "cpu" or "cuda" means here; "auto" is CUDA where there is one.

    Raises
    ------
    ValueError
        If CUDA is asked for and not there.
    """
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise ValueError("device: got cuda, but torch sees no CUDA device; use --device cpu")
    return torch.device("cuda" if there and name != "cpu" else "cpu")


def begin_worker(threads: int) -> None:
    """Set up a process that computes for another one: so many threads, and it ends with its parent."""
    torch.set_num_threads(threads)
    if sys.platform == "linux":  # a killed command must leave nothing that computes beside the next one
        ctypes.CDLL(None).prctl(_SET_SIGNAL_AT_PARENTS_DEATH, signal.SIGKILL)
