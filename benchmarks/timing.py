"""Interleaved timing and the rows of record.

Functions are timed against each other, each in its turn (A B B A …) in one process, and a ratio is the median
over the rounds of the ratio within a round: what slows the machine for a while slows both. This module has no
way to time one function alone and compare it with a figure from another day.
"""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from brainflow.kernels.conformance import error_ratio

MOST_ROUNDS = 500
MOST_CALLS = 200
TURN = 0.1
"""Seconds that a function's turn lasts, or a call of the slowest function if that takes less."""
WIDE = 0.2
"""A row that lies further than this share from its median in any process is printed as a range."""


class WrongResultError(Exception):
    """What was to be timed computes something else than its specification: it gets no speed."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds per call, round by round; two timings of one :func:`interleave` are paired by round."""

    seconds: tuple[float, ...]

    @property
    def p20(self) -> float:
        """The 20th percentile in seconds."""
        return float(np.percentile(self.seconds, 20))

    @property
    def p50(self) -> float:
        """The median in seconds."""
        return float(np.median(self.seconds))

    @property
    def p80(self) -> float:
        """The 80th percentile in seconds."""
        return float(np.percentile(self.seconds, 80))

    def times_faster_than(self, other: Timing) -> float:
        """Return the median over the rounds of the other's time ÷ this time: 2.0 is twice as fast."""
        pairs = zip(other.seconds, self.seconds, strict=True)
        return float(np.median([theirs / ours for theirs, ours in pairs]))

    def per(self, count: float) -> Timing:
        """Return the timing of one of `count` equal parts of a call."""
        return Timing(seconds=tuple(s / count for s in self.seconds))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure of record. Its field names are stable: other tools read them.

    `ratio` is ours over `baseline` with larger = better; `floor_share` the share of the hardware
    floor that was reached (1.0 = at the floor). p20, p50, p80 are seconds per call. `range` is the lowest and
    highest :attr:`figure` of several processes.
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
    range: tuple[float, float] | None = None
    note: str = ""
    """What no number says: why there is none, where a step stops."""

    @property
    def figure(self) -> float:
        """The ratio where there is one, else the value: what a reader compares."""
        return self.value if self.ratio is None else self.ratio

    @property
    def wide(self) -> bool:
        """Whether the processes disagree about the figure by more than 20 % of it."""
        return (
            self.range is not None and max(abs(end - self.figure) for end in self.range) > WIDE * self.figure
        )

    def to_dict(self, env: Mapping[str, Any]) -> dict[str, Any]:
        """Return the row as a JSON-ready dict with the environment that it was measured in."""
        return {**asdict(self), "env": dict(env)}


def attempt(name: str, function: Callable[[], list[Row]]) -> tuple[list[Row], str | None]:
    """Return a measurement's rows, and what went wrong if something did; then there are no rows.

    A row whose value is not finite (what was to be reached was not) is left out: JSON has no such number.
    """
    rows, failure = [], None
    try:
        rows = finite(function())
    except WrongResultError as error:
        failure = f"{name}: wrong result, so no speed: {error}"
    except Exception as error:  # whatever it was, it takes no other measurement with it
        traceback.print_exc()
        failure = f"{name}: failed, so no speed: {type(error).__name__}: {error}"
    gc.collect()  # a large model must be gone before the next one comes
    return rows, failure


def finite(rows: Iterable[Row]) -> list[Row]:
    """Return the rows whose value is a number."""
    return [row for row in rows if math.isfinite(row.value)]


def merge(runs: Sequence[Sequence[Row]]) -> list[Row]:
    """Return one row for each row of several processes: the median of each number, and the figure's range."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in itertools.chain(*runs):
        found.setdefault((row.suite, row.case, row.metric, row.baseline), []).append(row)

    def middle(rows: list[Row], name: str) -> Any:
        values = [value for row in rows if (value := getattr(row, name)) is not None]
        return statistics.median(values) if values else None

    merged = []
    for rows in found.values():
        figures = sorted(row.figure for row in rows)
        ends = (figures[0], figures[-1]) if len(figures) > 1 else None
        numbers = {n: middle(rows, n) for n in ("value", "ratio", "floor_share", "p20", "p50", "p80")}
        merged.append(replace(rows[0], **numbers, range=ends))
    return merged


def speed_rows(
    suite: str,
    case: str,
    times: Mapping[str, Timing],
    *,
    ours: str = "ours",
    baselines: Iterable[str] | None = None,
    metric: str = "time",
    unit: str = "ms",
    work: float | Mapping[str, float] | None = None,
    floor: float | None = None,
) -> list[Row]:
    """Return one row for each baseline that `ours` was timed against, or one row if there is none.

    Parameters
    ----------
    suite, case, metric
        Names of the rows.
    times
        Name → :class:`Timing`, from one :func:`interleave`.
    ours
        Which of them is ours.
    baselines
        Which of them are baselines; default: all others.
    unit, work
        Without `work` the value is the median time in "ms" (or "s"). With it the value is work ÷ median
        time, and `unit` ends in "/s". One number, or one for each name where a call does different amounts.
    floor
        Seconds that the hardware needs at least, for `floor_share`.

    Examples
    --------
    >>> t = {"ours": Timing(seconds=(1.0, 1.0)), "naive": Timing(seconds=(4.0, 6.0))}
    >>> [(r.baseline, r.value, r.ratio) for r in speed_rows("kernels", "mask", t, unit="s")]
    [('naive', 1.0, 5.0)]
    """
    mine = times[ours]
    amount = work if isinstance(work, Mapping) else dict.fromkeys(times, work)
    done = amount[ours]
    value = mine.p50 * {"ms": 1e3, "s": 1.0}[unit] if done is None else done / mine.p50

    def row(baseline: str, ratio: float | None) -> Row:
        return Row(
            suite=suite, case=case, metric=metric, value=value, unit=unit, baseline=baseline, ratio=ratio,
            floor_share=None if floor is None else floor / mine.p50,
            p20=mine.p20, p50=mine.p50, p80=mine.p80,
        )  # fmt: skip

    others = [name for name in times if name != ours] if baselines is None else list(baselines)
    if not others:
        return [row("", None)]
    found = []
    for name in others:
        theirs = amount[name]
        scale = 1.0 if done is None or theirs is None else done / theirs
        found.append(row(name, mine.times_faster_than(times[name]) * scale))
    return found


def interleave(
    functions: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 7,
    warmup: int = 1,
    device: str = "cpu",
    seconds: float = 0.0,
    before: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, Timing]:
    """Time several functions against each other, each in its turn.

    A turn begins with a call that does not count, so that a function is timed after itself, as in a loop of
    its own, and not after another one, which leaves caches and freed memory in another state. Where one
    function is faster than another its turn is several calls, so that all turns last about as long: work
    beside it, which takes the processor for some milliseconds at a time, then slows all of them alike.

    Parameters
    ----------
    functions
        Name → callable without arguments. What a callable returns is dropped.
    repeats
        Timed rounds at least; in every round each function has a turn, in alternating order.
    warmup
        Rounds that are run first and not counted.
    device
        "cpu" reads the wall clock; "cuda" uses device events around each call.
    seconds
        Go on with more rounds until so much time was spent: for calls of a few milliseconds.
    before
        Name → what is called, untimed, right before each call. There are then exactly `repeats` rounds of one
        call a turn and no warm-up.

    Returns
    -------
    dict
        Name → :class:`Timing`: seconds per call, the mean over the calls of a turn.

    Raises
    ------
    ValueError
        If `repeats` is below 1.

    Examples
    --------
    >>> t = interleave({"a": lambda: sum(range(10)), "b": lambda: sum(range(10_000))}, repeats=5)
    >>> t["a"].times_faster_than(t["b"]) > 1
    True
    """
    if repeats < 1:
        raise ValueError(f"repeats: got {repeats}, expected at least 1")
    clock = _cuda_seconds if device == "cuda" else _wall_seconds
    names = list(functions)
    calls = dict.fromkeys(names, 1)
    if before is None:
        once = dict.fromkeys(names, 0.0)
        for _ in range(warmup):
            once = {name: clock(function) for name, function in functions.items()}
        if len(names) > 1:
            calls = _calls_a_turn(functions, once, clock)
    turns = {name: _turn(function, calls[name]) for name, function in functions.items()}
    samples: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.collect()
    # The collector would slow whichever function allocates when it is due.
    gc.disable()
    try:
        done, end = 0, time.perf_counter() + seconds
        while done < repeats or (done < MOST_ROUNDS and time.perf_counter() < end):
            # A B B A: what drifts slows each of them as often early as late.
            for name in names if done % 2 == 0 else reversed(names):
                if before is not None:
                    before[name]()
                elif len(names) > 1:
                    functions[name]()
                samples[name].append(clock(turns[name]) / calls[name])
            done += 1
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(seconds=tuple(values)) for name, values in samples.items()}


def _calls_a_turn(
    functions: Mapping[str, Callable[[], object]],
    once: Mapping[str, float],
    clock: Callable[[Callable[[], object]], float],
) -> dict[str, int]:
    # A first call may be slow for once; one that takes longer than a turn need not be known better.
    again = {name: took if took > TURN else clock(functions[name]) for name, took in once.items()}
    length = min(TURN, max(again.values()))
    return {name: min(MOST_CALLS, max(1, round(length / took))) for name, took in again.items()}


def require_close(
    case: str, actual: Sequence[Tensor], expected: Sequence[Tensor], bounds: Sequence[float]
) -> None:
    """Raise :class:`WrongResultError` unless each tensor's relative error (L2) is within its bound.

    Parameters
    ----------
    case
        Name, for the message.
    actual, expected
        Tensors in one order.
    bounds
        Largest relative error of each.

    Raises
    ------
    WrongResultError
        Naming the case and the error.
    """
    for got, want, bound in zip(actual, expected, bounds, strict=True):
        # Not `>`: NaN is wrong, too.
        if not (error := error_ratio(got, want)) <= bound:
            raise WrongResultError(f"{case}: error {error:.1e} above {bound:.0e}")


def peak_bytes(step: Callable[[], object], device: str) -> int:
    """Return how far tensor memory rises above its level before a call, in bytes, what it returns included.

    On the CPU from the profiler's record of every allocation, on CUDA from the allocator's own peak.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # With `acc_events`, or torch warns that a cycle clears the events of the one before: there is one.
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        result = step()
    returned = sum(leaf.nbytes for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
    del result
    level = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    # A gradient may lie in a map of its own, which the allocator, hence the profiler, does not see.
    return peak if peak >= returned else peak + returned


def _turn(function: Callable[[], object], calls: int) -> Callable[[], None]:
    def turn() -> None:
        for _ in range(calls):
            function()

    return turn


def _wall_seconds(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def _cuda_seconds(function: Callable[[], object]) -> float:
    # Events on the device: the host is done before it is.
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    function()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3
