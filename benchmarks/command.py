"""Measure this machine: windows/s, steps/s and kernel times beside what a user would run instead.

Every comparison is interleaved in one process, so trust the ratios; absolute times belong to the
machine that is named above the table. A case whose result is wrong prints no speed.

Examples
--------
  brainflow bench --quick
  brainflow bench kernels --json kernels.json
  brainflow bench kernels --static          # registers, spills, load widths: needs no GPU
  brainflow bench all --quick --gate
"""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from .timing import Row

SUITES = ("loader", "kernels", "frameworks")
FLOORS = Path(__file__).with_name("floors.json")


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `brainflow bench`."""

    suite: Annotated[Literal["loader", "kernels", "frameworks", "all"], tyro.conf.Positional] = "all"
    """Suite to run."""
    quick: bool = False
    """Small inputs and few repeats: minutes instead of tens of minutes."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is one."""
    json: Path | None = None
    """Write the rows to this file (a list of objects, each with the environment)."""
    gate: bool = False
    """Exit with 1 if a ratio is below its floor in benchmarks/floors.json."""
    static: bool = False
    """`kernels` only: compile for sm_80, 90, 100 and print registers, spills and load widths."""


def run(args: Args) -> int:
    """Run the suites, print a table each, and return the exit code."""
    if args.static:
        return _static()
    import torch

    from .environment import environment

    device = args.device if args.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: got cuda, but torch sees no CUDA device; use --device cpu")
    env = environment(device)
    print(", ".join(f"{k} {v}" for k, v in env.items() if v is not None), file=sys.stderr)
    rows: list[Row] = []
    for suite in SUITES if args.suite == "all" else (args.suite,):
        found = _suite(suite).run(args.quick, device)
        _print(suite, found)
        rows += found
    if args.json is not None:
        args.json.write_text(json.dumps([row.to_dict(env) for row in rows], indent=1) + "\n")
    return _gate(rows) if args.gate else 0


def _suite(name: str) -> Any:
    return importlib.import_module(f".{name}", __package__)


def _print(suite: str, rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{suite}: medians; ratio = ours over the baseline, larger is better")
    for column in ("case", "metric", "value", "p20–p80 ms", "baseline", "ratio", "of the floor"):
        table.add_column(column, justify="left" if column in ("case", "metric", "baseline") else "right")
    for row in rows:
        spread = "" if row.p20 is None or row.p80 is None else f"{row.p20 * 1e3:.2f}–{row.p80 * 1e3:.2f}"
        table.add_row(
            row.case,
            row.metric,
            f"{row.value:,.4g} {row.unit}",
            spread,
            row.baseline,
            "" if row.ratio is None else f"{row.ratio:.2f}×",
            "" if row.floor_share is None else f"{row.floor_share:.0%}",
        )
    Console(width=None if sys.stdout.isatty() else 130).print(table)


def _gate(rows: list[Row]) -> int:
    """Compare ratios with the committed floors; a floor without a row is a failure too."""
    measured = {(r.suite, r.case, r.metric, r.baseline): r.ratio for r in rows}
    suites = {r.suite for r in rows}
    failures = []
    for floor in json.loads(FLOORS.read_text()):
        if floor["suite"] not in suites:
            continue
        ratio = measured.get((floor["suite"], floor["case"], floor["metric"], floor["baseline"]))
        name = f"{floor['suite']} {floor['case']} {floor['metric']} over {floor['baseline']}"
        if ratio is None:
            failures.append(f"{name}: no figure, expected a ratio of at least {floor['ratio']}")
        elif ratio < floor["ratio"]:
            failures.append(f"{name}: ratio {ratio:.2f}, expected at least {floor['ratio']}")
    for failure in failures:
        print(f"gate: {failure}", file=sys.stderr)
    print(f"gate: {'failed' if failures else 'passed'}", file=sys.stderr)
    return 1 if failures else 0


def _static() -> int:
    from rich.console import Console
    from rich.table import Table

    rows: list[dict[str, Any]] = importlib.import_module(".static", __package__).table(("80", "90", "100"))
    table = Table(title="Triton kernels compiled ahead of time")
    for column in rows[0]:
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(width=None if sys.stdout.isatty() else 180).print(table)
    return 0
