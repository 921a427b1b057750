"""Measure this machine: windows/s, steps/s and kernel times beside what a user would run instead.

Every comparison is interleaved in one process, so trust the ratios; absolute times belong to the
machine that is named above the table. A case whose result is wrong prints no speed.

Examples
--------
  brainflow bench --quick
  brainflow bench kernels --json kernels.json
  brainflow bench kernels --only 'masked_loss/*'
  brainflow bench kernels --static          # registers, spills, load widths: needs no GPU
  brainflow bench all --quick --gate
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from . import gate
from .registry import SUITES, measure


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `brainflow bench`."""

    suite: Annotated[Literal["loader", "kernels", "frameworks", "scaling", "all"], tyro.conf.Positional] = (
        "all"
    )
    """Suite to run."""
    quick: bool = False
    """Small inputs and few repeats: minutes instead of tens of minutes."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is one."""
    threads: int = 1
    """Threads of torch on the CPU. With several, other work on the machine decides the figures."""
    only: str | None = None
    """Run only measurements whose name fits this pattern, e.g. 'masked_loss/*'."""
    loop: bool = False
    """`frameworks` only: the overhead of the training loop over the bare model step, and nothing else."""
    time_to_loss: bool = False
    """`frameworks` only: how much sooner dense CSM reaches single-position CSM's loss, and nothing else."""
    json: Path | None = None
    """Write the rows to this file (a list of objects, each with the environment)."""
    gate: bool = False
    """Exit with 1 if a ratio is below its floor in benchmarks/floors.json."""
    static: bool = False
    """`kernels` only: compile for sm_80, 90, 100 and print registers, spills and load widths."""

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ValueError(f"--threads: got {self.threads}, expected at least 1")
        for name in ("loop", "time_to_loss"):
            if getattr(self, name) and self.suite != "frameworks":
                raise ValueError(f"--{name.replace('_', '-')}: belongs to the suite frameworks")


def run(args: Args) -> int:
    """Run the suites, print a table each, and return the exit code."""
    if args.static:
        return _static()
    failures: list[str] = []
    rows = _measure(args, failures)
    if args.json is not None:
        _write_json(args.json, rows)
    if args.gate:
        missed = gate.failures(rows, complete=_complete(args))
        failures += [f"gate: {line}" for line in missed]
        print(f"gate: {'failed' if failures else 'passed'}", file=sys.stderr)
    for line in failures:
        print(line, file=sys.stderr)
    return 1 if failures else 0


def _measure(args: Args, failures: list[str]) -> list[dict[str, Any]]:
    import torch

    from .environment import environment

    device = args.device if args.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: got cuda, but torch sees no CUDA device; use --device cpu")
    torch.set_num_threads(args.threads)
    env = environment(device)
    print(", ".join(f"{k} {v}" for k, v in env.items() if v is not None), file=sys.stderr)
    rows = []
    for suite, modules in _plan(args).items():
        found = [
            row.to_dict(env)
            for part in measure(modules, args.quick, device, args.only, failures)
            for row in part
        ]
        _print(suite, found)
        rows += found
    return rows


def _plan(args: Args) -> dict[str, tuple[str, ...]]:
    """Return suite → modules to run, the machine's ceilings first."""
    if args.loop:
        return {"frameworks": ("loop",)}
    if args.time_to_loss:
        return {"frameworks": ("time_to_loss",)}
    if args.suite == "all":
        return SUITES
    chosen: dict[str, tuple[str, ...]] = {args.suite: SUITES[args.suite]}
    return chosen if args.only else {"ceilings": SUITES["ceilings"], **chosen}


def _complete(args: Args) -> bool:
    return not (args.only or args.loop or args.time_to_loss)


def _write_json(path: Path, rows: list[dict[str, Any]]) -> None:
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _print(suite: str, rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{suite}: medians; ratio = ours over the baseline, larger is better")
    for column in ("case", "metric", "value", "p20–p80 ms", "baseline", "ratio", "of the floor"):
        table.add_column(column, justify="left" if column in ("case", "metric", "baseline") else "right")
    for row in rows:
        p20, p80, ratio, share = row["p20"], row["p80"], row["ratio"], row["floor_share"]
        table.add_row(
            row["case"],
            row["metric"],
            f"{row['value']:,.4g} {row['unit']}",
            "" if p20 is None or p80 is None else f"{p20 * 1e3:.2f}–{p80 * 1e3:.2f}",
            row["baseline"],
            "" if ratio is None else f"{ratio:.2f}×",
            "" if share is None else f"{share:.0%}",
        )
    Console(width=None if sys.stdout.isatty() else 130).print(table)


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
