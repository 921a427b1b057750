"""Measuring in a process of its own, whose memory is the operating system's affair.

`bench` keeps freed memory (see allocator.py). A script that does nothing but call the naive form gets, with
glibc's defaults, most of its 90 MB a call from the kernel anew, page by page; so does whoever tries it out.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def in_a_fresh_process(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Return what a function of a module returns in a new process, with as many threads as here."""
    threads = torch.get_num_threads()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        return pool.submit(function, *args, **kwargs).result()
