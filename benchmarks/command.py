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
  brainflow bench all --json today.json --report page
  brainflow bench frameworks --time-to-loss --store rest.store
  brainflow bench --compare 2 1             # the run before the last with the last
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from . import gate, history
from .registry import ALL, SUITES, measure


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `brainflow bench`."""

    suite: Annotated[
        Literal["loader", "kernels", "frameworks", "scaling", "prepare", "all"], tyro.conf.Positional
    ] = "all"
    """Suite to run; `all` are the first four."""
    quick: bool = False
    """Small inputs and few repeats: minutes instead of tens of minutes."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is one."""
    threads: int = 0
    """Threads of torch on the CPU; 0: as many as training takes, a core each. Take 1 where other work shares
    the cores: with several threads it decides the figures."""
    only: str | None = None
    """Run only measurements whose name fits this pattern, e.g. 'masked_loss/*'."""
    loop: bool = False
    """`frameworks` only: the overhead of the training loop over the bare model step, and nothing else."""
    time_to_loss: bool = False
    """`frameworks` only: how much sooner dense CSM reaches single-position CSM's loss, and nothing else."""
    store: str | None = None
    """With --time-to-loss: train on this store, for longer, instead of on the example recordings."""
    json: Path | None = None
    """Write the rows to this file (a list of objects, each with the environment)."""
    gate: bool = False
    """Exit with 1 if a ratio is below its floor in benchmarks/floors.json."""
    report: Path | None = None
    """Write a page with the charts into this folder: index.html, which needs no network, and its PNGs."""
    table: Path | None = None
    """Put the rows as Markdown tables between the marks of this page, e.g. benchmarks/README.md."""
    rows: Path | None = None
    """Measure nothing: take the rows from this file, for --gate, --report and --table."""
    compare: tuple[str, str] | None = None
    """Measure nothing: print what changed beyond noise from run A to B. A run is a file that --json wrote,
    or how many runs back in the history: 1 is the newest."""
    history: Path = field(default_factory=history.default_path)
    """File to which each run is added as one line."""
    static: bool = False
    """`kernels` only: compile for sm_80, 90, 100 and print registers, spills and load widths."""

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise ValueError(
                f"--threads: got {self.threads}, expected 0 (a core each) or a number of threads"
            )
        for name in ("loop", "time_to_loss"):
            if getattr(self, name) and self.suite != "frameworks":
                raise ValueError(f"--{name.replace('_', '-')}: belongs to the suite frameworks")
        if self.store is not None and not self.time_to_loss:
            raise ValueError("--store: got a store without --time-to-loss, which is what uses it")


def run(args: Args) -> int:
    """Run the suites, print a table each, and return the exit code."""
    if args.static:
        return _static()
    if args.compare is not None:
        from .show import print_changes

        print_changes(*(history.read(source, args.history) for source in args.compare))
        return 0
    failures: list[str] = []
    if args.rows is not None:
        rows = history.read(str(args.rows), args.history)
    else:
        rows = _measure(args, failures)
        if rows:
            history.append(args.history, rows, " ".join(sys.argv[1:]))
    if args.json is not None:
        history.write_json(args.json, rows)
    if args.table is not None:
        from .show import write_table

        write_table(args.table, rows)
    if args.report is not None:
        from .report import write_report

        print(f"report: {write_report(rows, args.report)}", file=sys.stderr)
    if args.gate:
        missed = gate.failures(rows, complete=not (args.only or args.loop or args.time_to_loss))
        failures += [f"gate: {line}" for line in missed]
        print(f"gate: {'failed' if failures else 'passed'}", file=sys.stderr)
    for line in failures:
        print(line, file=sys.stderr)
    return 1 if failures else 0


def _measure(args: Args, failures: list[str]) -> history.Rows:
    import torch

    from .allocator import keep_memory
    from .environment import environment
    from .show import print_rows

    keep_memory()

    device = args.device if args.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: got cuda, but torch sees no CUDA device; use --device cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    env = environment(device)
    print(", ".join(f"{k} {v}" for k, v in env.items() if v is not None), file=sys.stderr)
    if args.store is not None:
        from . import time_to_loss

        steps = time_to_loss.QUICK_STEPS if args.quick else time_to_loss.STORE_STEPS
        raced = time_to_loss.measure(steps, device, args.store)
        rows = [row.to_dict(env) for row in raced]
        print_rows("frameworks", rows)
        return rows
    rows = []
    for suite, measured in measure(_plan(args), args.quick, device, args.only, failures).items():
        found = [row.to_dict(env) for row in measured]
        print_rows(suite, found)
        rows += found
    if args.only and not rows and not failures:
        raise ValueError(
            f"--only: got {args.only!r}, which gave no row in {args.suite}; expected a pattern of names"
        )
    return rows


def _plan(args: Args) -> dict[str, tuple[str, ...]]:
    """Return suite → modules to run, the machine's ceilings first."""
    if args.loop:
        return {"frameworks": ("loop",)}
    if args.time_to_loss:
        return {"frameworks": ("time_to_loss",)}
    if args.suite == "all":
        return {suite: SUITES[suite] for suite in ALL}
    chosen: dict[str, tuple[str, ...]] = {args.suite: SUITES[args.suite]}
    return chosen if args.only else {"ceilings": SUITES["ceilings"], **chosen}


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
