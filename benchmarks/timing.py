"""Interleaved timing: A B A B in one process, medians with spread, warm-up apart.

On a shared CPU only ratios taken in one interleaved run mean anything, so this module has no way to
time one function alone and compare it with a figure from another day.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds per call: the 20th, 50th and 80th percentile over the repeats."""

    p20: float
    p50: float
    p80: float
    repeats: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure of record. Its field names are stable: other tools read them.

    `ratio` is ours over `baseline` with larger = better; `floor_share` the share of the hardware
    floor that was reached (1.0 = at the floor). p20, p50, p80 are seconds per call.
    """

    suite: str
    case: str
    metric: str
    value: float
    unit: str
    baseline: str = ""
    ratio: float | None = None
    floor_share: float | None = None
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None

    def to_dict(self, env: Mapping[str, Any]) -> dict[str, Any]:
        """Return the row as a JSON-ready dict with the environment that it was measured in."""
        return {**asdict(self), "env": dict(env)}


def interleave(
    functions: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 7,
    warmup: int = 1,
    device: str = "cpu",
) -> dict[str, Timing]:
    """Time several functions against each other, one call of each in turn.

    Parameters
    ----------
    functions
        Name → callable without arguments. What a callable returns is dropped.
    repeats
        Timed rounds; every round calls each function once, alternating the order.
    warmup
        Rounds that are run first and not counted.
    device
        "cpu" reads the wall clock; "cuda" uses device events around each call.

    Returns
    -------
    dict
        Name → :class:`Timing` (seconds per call).

    Examples
    --------
    >>> t = interleave({"a": lambda: sum(range(10)), "b": lambda: sum(range(10_000))}, repeats=5)
    >>> t["b"].p50 > t["a"].p50
    True
    """
    if repeats < 1:
        raise ValueError(f"repeats: got {repeats}, expected at least 1")
    clock = _cuda_seconds if device == "cuda" else _wall_seconds
    names = list(functions)
    for _ in range(warmup):
        for name in names:
            functions[name]()
    samples: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(repeats):
        for name in names if round_ % 2 == 0 else reversed(names):
            samples[name].append(clock(functions[name]))
    return {name: _summary(values) for name, values in samples.items()}


def _wall_seconds(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def _cuda_seconds(function: Callable[[], object]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    function()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def _summary(values: list[float]) -> Timing:
    p20, p50, p80 = (float(v) for v in np.percentile(values, [20, 50, 80]))
    return Timing(p20=p20, p50=p50, p80=p80, repeats=len(values))
