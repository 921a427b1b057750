"""Which modules make up a suite, and running their measurements one by one.

A module of a suite has one function, `measurements(quick, device)`, which returns name → a function without
arguments that measures and returns rows. Nothing is measured or allocated before that function is called.
"""

from __future__ import annotations

import importlib
import math
import sys
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatch
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .timing import Row, Timing

SUITES: dict[str, tuple[str, ...]] = {
    "ceilings": ("ceilings",),
    "loader": ("loader",),
    "kernels": ("kernels", "kernels_compile"),
    "frameworks": ("frameworks", "data_wait", "throughput", "loop", "time_to_loss", "learning"),
    "scaling": ("scaling",),
    "prepare": ("prepare",),
}
PASSES = {
    "loader: store": 17,
    "loader: encodings": 5,
    "kernels: masked_loss/position": 25,
    "kernels: *": 15,
    "kernels_compile: *": 21,
    "frameworks: *": 5,
    "scaling: *": 7,
}
"""How often a full run repeats a measurement, by the first pattern that fits; others it makes once.

The more a measurement differs from process to process, the more it needs for two full runs to agree: drawn
from the processes of three runs (docs/log.md), two medians of so many differ by more than 15 % in 3 of 100
draws or fewer.
"""
ALL = ("ceilings", "loader", "kernels", "frameworks", "scaling")
"""Suites of `all`: what is run for every training. A dataset is prepared once."""


def measure(
    plan: Mapping[str, Sequence[str]], quick: bool, device: str, only: str | None, failures: list[str]
) -> dict[str, list[Row]]:
    """Run the measurements of some suites and return the rows of each.

    With `quick` all run once, here. Otherwise each has a process of its own, in which nothing else has
    computed before (the ceilings are measured first, and handed on), and those in `PASSES` have several: some
    figures differ by a quarter and more from process to process, or for minutes at a time, so each number is
    the median over processes that are spread over the whole run.

    A measurement that raises gives no row: it is named on stderr and in `failures`, and the others go on. A
    row whose value is not finite (what was to be reached was not) is left out: JSON has no such number.

    Parameters
    ----------
    plan
        Suite → names of modules of this package.
    quick, device
        Handed to the modules.
    only
        Pattern that a measurement's name must fit, e.g. "masked_loss/*"; None for all.
    failures
        Gets a line for each measurement that raised.
    """
    from rich.console import Console
    from rich.progress import Progress

    # These import torch: not before the command line is known to be right.
    from .ceilings import KNOWN
    from .fresh import in_a_fresh_process
    from .timing import WrongResultError, medians

    functions: dict[tuple[str, str], Callable[[], list[Row]]] = {}
    for suite, modules in plan.items():
        for module in modules:
            for name, function in load(module, quick, device).items():
                if only is not None and not fnmatch(name, only):
                    continue
                if not quick and module != "ceilings":
                    function = partial(in_a_fresh_process, _measure_alone, module, name, device, KNOWN)
                functions[suite, f"{module}: {name}"] = function
    turns = list(functions) if quick else spread(functions)
    found: dict[tuple[str, str], list[list[Row]]] = {key: [] for key in functions}
    console = Console(stderr=True)
    # Drawn between measurements alone: a thread that draws would take time from what is measured.
    with Progress(console=console, auto_refresh=False, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(turns))
        for key in turns:
            progress.update(task, description=key[1], refresh=True)
            began = time.perf_counter()
            try:
                if key in found:
                    found[key].append([row for row in functions[key]() if math.isfinite(row.value)])
            except WrongResultError as error:
                failures.append(f"{key[1]}: wrong result, so no speed: {error}")
                del found[key]
            except Exception as error:
                traceback.print_exc()
                failures.append(f"{key[1]}: failed, so no speed: {type(error).__name__}: {error}")
                del found[key]
            progress.update(task, advance=1, refresh=True)
            if not console.is_terminal:
                print(f"{key[1]}: {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
    rows: dict[str, list[Row]] = {suite: [] for suite in plan}
    for (suite, _), runs in found.items():
        rows[suite] += medians(runs)
    return rows


def spread(keys: Collection[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return each key (suite, "module: name") as often as `PASSES` says, its turns evenly over the whole run.

    The keys of `ceilings`, which the others need, come first. What has one turn fills the time between the
    passes: were all of that in the first pass, the others would fall into the last minutes of the run.
    """
    first = [key for key in keys if key[1].startswith("ceilings: ")]
    passes = {key: _passes(key[1]) for key in keys if key not in first}
    once = [key for key, count in passes.items() if count == 1]
    places = [((i + 0.5) / len(once), key) for i, key in enumerate(once)]
    for key, count in passes.items():
        places += [((i + 0.5) / count, key) for i in range(count) if count > 1]
    return first + [key for _, key in sorted(places, key=lambda place: place[0])]


def _passes(name: str) -> int:
    return next((count for pattern, count in PASSES.items() if fnmatch(name, pattern)), 1)


def load(module: str, quick: bool, device: str) -> dict[str, Callable[[], list[Row]]]:
    """Return the measurements of a module of this package."""
    found: dict[str, Callable[[], list[Row]]] = importlib.import_module(
        f".{module}", __package__
    ).measurements(quick, device)
    return found


def _measure_alone(
    module: str, name: str, device: str, ceilings: Mapping[tuple[object, ...], Timing]
) -> list[Row]:
    from .allocator import keep_memory
    from .ceilings import KNOWN

    keep_memory()
    KNOWN.update(ceilings)
    return load(module, quick=False, device=device)[name]()
