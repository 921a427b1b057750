"""The roofline: what this machine can do at most, in bytes moved and matrix products a second.

Both are measured once a process; every share of a ceiling or of the roofline is against these.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from . import timing
from .timing import Row, Timing, speed_rows

COPY_BYTES = 128 * 2**20
"""Bytes of the copied array: more than any cache holds."""
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def measurements(quick: bool, device: str) -> dict[str, Callable[[], list[Row]]]:
    """Return name → what measures it; `quick` makes no difference."""
    found: dict[str, Callable[[], list[Row]]] = {"memcpy": lambda: _copy_rows("memcpy", "cpu")}
    if device == "cuda":
        found["device_copy"] = lambda: _copy_rows("device_copy", "cuda")
    return found | {"matmul": lambda: _matmul_rows(device)}


def floor(nbytes: float, flops: float, device: str, dtype: torch.dtype = torch.float32) -> float:
    """Return the seconds below which the machine cannot go; data that stay in a cache can beat it.

    Parameters
    ----------
    nbytes
        Bytes that must be read or written.
    flops
        Floating-point operations in matrix products.
    device, dtype
        Where and in which type of numbers.
    """
    return max(nbytes / bandwidth(device), flops / matmul_rate(device, dtype) if flops else 0.0)


def roofline_rows(
    case: str, measured: Timing, nbytes: float, flops: float, device: str, dtype: torch.dtype = torch.float32
) -> list[Row]:
    """Return a kernel's bytes a second with its share of the copy's, and its share of the roofline.

    Without matrix products (`flops` 0) the roofline is the bandwidth and stands in no row of its own.

    Parameters
    ----------
    case
        Name of the rows.
    measured
        Time of the kernel.
    nbytes, flops, device, dtype
        As in :func:`floor`.
    """

    def row(metric: str, unit: str, work: float, lowest: float) -> list[Row]:
        return speed_rows(
            "kernels", case, {"ours": measured}, metric=metric, unit=unit, work=work / 1e9, floor=lowest
        )

    found = row("bytes_per_s", "GB/s", nbytes, floor(nbytes, 0, device))
    if flops:
        found += row("flops_per_s", "GFLOP/s", flops, floor(nbytes, flops, device, dtype))
    return found


def bandwidth(device: str) -> float:
    """Return the bytes a second, read and written together, of copying random bytes."""
    return 2 * COPY_BYTES / _copy(device).p50


def matmul_rate(device: str, dtype: torch.dtype = torch.float32) -> float:
    """Return the operations a second of a large square product."""
    return 2.0 * _side(device, dtype) ** 3 / _matmul(device, dtype).p50


@cache
def _copy(device: str) -> Timing:
    # Not zeros: pages that nobody wrote are all one page, which stays in the cache.
    source = torch.randint(-100, 100, (COPY_BYTES,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copy = {"copy": lambda: target.copy_(source)}
    return timing.interleave(copy, repeats=9, warmup=3, device=device, seconds=0.5)["copy"]


@cache
def _matmul(device: str, dtype: torch.dtype) -> Timing:
    side = _side(device, dtype)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    # Into memory that is there: page faults of a new result are no part of a product.
    call = {"matmul": lambda: torch.mm(a, b, out=product)}
    return timing.interleave(call, repeats=3, device=device, seconds=0.5)["matmul"]


def _side(device: str, dtype: torch.dtype) -> int:
    if device == "cuda":
        # A small product would not fill a GPU.
        return 8192
    return 1024 if dtype == torch.float32 else 512  # a CPU without units for bf16 takes seconds at 1,024


def _copy_rows(case: str, device: str) -> list[Row]:
    copy = {"ours": _copy(device)}
    return speed_rows("ceilings", case, copy, metric="bytes_per_s", unit="GB/s", work=2 * COPY_BYTES / 1e9)


def _matmul_rows(device: str) -> list[Row]:
    found = []
    for name in ("fp32", "bf16", "fp16") if device == "cuda" else ("fp32", "bf16"):
        work = 2 * _side(device, TYPES[name]) ** 3 / 1e9
        product = {"ours": _matmul(device, TYPES[name])}
        found += speed_rows(
            "ceilings", f"matmul/{name}", product, metric="flops_per_s", unit="GFLOP/s", work=work
        )
    return found
