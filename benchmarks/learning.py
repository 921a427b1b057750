"""What pretraining is worth, measured: decoding and forecast on the story and on simulated people.

Every part pretrains and adapts by the package's defaults in a process of its own with one thread, as many
parts at once as there are cores; the rows are written after each of them. Nothing here is timed but
`quality`, by CPU seconds.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from brainflow.devices import begin_worker
from brainflow.progress import Remaining
from brainflow.storage.files import write_text

from . import peers
from .ablation import ablation_part
from .coverage import coverage_part
from .people import (
    order_part,
    oscillator_part,
    permuted_part,
    steps_part,
    story_part,
    transfer_part,
)
from .plan import Plan, Row
from .quality import quality_part
from .show import console

Part = Callable[[Plan, Path], list[Row]]


def parts(plan: Plan) -> dict[str, Part]:
    """Return name → part, those that take longest first."""
    others = [framework for framework in plan.frameworks if framework != plan.frameworks[0]]
    first, largest = plan.frameworks[0], plan.order_people[-1]
    # Else a long part would run alone at the end, beside cores without work.
    found: dict[str, Part] = {"order": partial(order_part, people=largest, framework=first)}
    for framework in plan.frameworks:
        found[f"story/{framework}"] = partial(story_part, framework=framework)
    if not plan.quick:
        for framework in others:
            found[f"order/{framework}"] = partial(order_part, people=largest, framework=framework)
        for share in (1 / 4, 1 / 2):
            found[f"order/steps/{share:g}"] = partial(steps_part, share=share)
    # The largest number is the first part.
    for people in plan.order_people[-2::-1]:
        found[f"order/people/{people}"] = partial(order_part, people=people, framework=first)
    for kind in ("drive", "regime"):
        found[kind] = partial(oscillator_part, kind=kind)
    if not plan.quick:
        found["transfer"] = transfer_part
        found["permuted"] = permuted_part
        for data in ("story", "order"):
            found[f"ablation/{data}"] = partial(ablation_part, data=data)
        for framework in plan.frameworks:
            found[f"quality/{framework}"] = partial(quality_part, framework=framework)
    for name in peers.FAST if plan.quick else (*peers.SLOW, *peers.FAST):
        found[f"peers/{name}"] = partial(peers.peers_part, name=name)
    found["coverage"] = coverage_part
    return found


def measure(
    plan: Plan,
    *,
    only: str | None = None,
    env: Mapping[str, Any] | None = None,
    json_file: Path | None = None,
) -> tuple[list[Row], list[str]]:
    """Run the parts whose name fits the pattern `only` and return rows and what failed.

    Raises
    ------
    ValueError
        If no part fits.
    """
    chosen = {name: part for name, part in parts(plan).items() if only is None or fnmatch(name, only)}
    if not chosen:
        raise ValueError(f"--only: got {only!r}, expected a pattern of some of {', '.join(parts(plan))}")
    rows: dict[str, list[Row]] = {}
    failures: list[str] = []
    facts = {**(env or {}), **plan.facts()}
    left = Remaining(len(chosen), at_once=_workers(chosen))
    with tempfile.TemporaryDirectory(prefix="brainflow-learning-") as folder:
        for name, done in _finished(chosen, plan, Path(folder)):
            left.advance(left.done + 1)
            try:
                rows[name], seconds = done.result()
            except BrokenProcessPool:
                failures.append(f"{name}: its process ended at once, e.g. because memory ran out")
                continue
            # Whatever a part raised, the hours of the others are kept.
            except Exception as error:
                traceback.print_exception(error)
                failures.append(f"{name}: failed, so no row: {type(error).__name__}: {error}")
                continue
            so_far = f"{left.done} of {len(chosen)} parts, {left} left"
            print(f"learning: {name}: {seconds:.0f} s ({so_far})", file=sys.stderr, flush=True)
            if json_file is not None:
                text = json.dumps([one.to_dict(facts) for one in _ordered(chosen, rows)], indent=1)
                write_text(json_file, text + "\n")
    return _ordered(chosen, rows), failures


def _workers(chosen: Mapping[str, Part]) -> int:
    return min(len(chosen), len(os.sched_getaffinity(0)))


def _ordered(chosen: Mapping[str, Part], rows: Mapping[str, list[Row]]) -> list[Row]:
    """Return rows in the order of their parts, whichever was done first."""
    return [one for name in chosen for one in rows.get(name, [])]


def _finished(
    chosen: Mapping[str, Part], plan: Plan, folder: Path
) -> Iterator[tuple[str, Future[tuple[list[Row], float]]]]:
    """Yield each part's name and future as it is done."""
    workers = _workers(chosen)
    context = multiprocessing.get_context("spawn")
    settings: Any = {"initializer": begin_worker, "initargs": (1,), "max_tasks_per_child": 1}
    with ProcessPoolExecutor(workers, context, **settings) as pool:
        running: dict[Future[tuple[list[Row], float]], str] = {}
        for name, part in chosen.items():
            running[pool.submit(_one, part, plan, folder, name)] = name
        for done in as_completed(running):
            yield running[done], done


def _one(part: Part, plan: Plan, folder: Path, name: str) -> tuple[list[Row], float]:
    """Run a part in a folder of its own under `folder` and return its rows and how long it took."""
    print(f"learning: {name}: begins", file=sys.stderr, flush=True)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="part-", dir=folder) as own:
        return part(plan, Path(own)), time.perf_counter() - began


def print_rows(rows: list[Row]) -> None:
    """Print a table a kind of case."""
    for kind in dict.fromkeys(one.case.partition("/")[0] for one in rows):
        table = Table(title=kind, title_justify="left", title_style="bold")
        for column in ("case", "metric", "value", "95 %", "note"):
            table.add_column(column, justify="right" if column in ("value", "95 %") else "left")
        for one in rows:
            # The low end stands in the interval already.
            if one.case.partition("/")[0] == kind and not one.metric.endswith("_low"):
                ends = "" if one.low is None or one.high is None else f"{one.low:.3f} … {one.high:.3f}"
                table.add_row(one.case, one.metric, f"{one.value:.3f}", ends, one.note)
        console().print(table)
