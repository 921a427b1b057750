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
  brainflow bench gpu --json gpu.json     # what is worth knowing first of a GPU, in at most eight minutes
  brainflow bench all --device cuda --json all.json
  brainflow bench frameworks --store rest.store
  brainflow bench learning --quick --json learning.json     # what pretraining is worth; not part of `all`
  brainflow bench loader --compare yesterday.json
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from .timing import Row

SUITES: dict[str, tuple[str, ...]] = {
    "ceilings": ("roofline",),
    "loader": ("loader", "storage"),
    "kernels": ("kernels", "attention"),
    "frameworks": ("recipe", "training", "race"),
    "scaling": ("scaling",),
    "prepare": ("prepare",),
}
"""Suite → modules of this package, each with a function `measurements(quick, device)`."""
ALL = ("ceilings", "loader", "kernels", "frameworks", "scaling")
"""Suites of `all`: what is run for every training; a dataset is prepared once."""
PROCESSES = 3
"""How many processes measure each suite in a full run; what they disagree about is printed as a range."""
PACKAGES = (
    *("torch", "triton", "numpy", "zarr", "numcodecs", "nvidia-dali-cuda130", "nvidia-dali-cuda120"),
    *("flash-attn", "flash-attn-4", "transformers", "webdataset", "zarrs", "tensorstore"),
)


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `brainflow bench`."""

    suite: Annotated[
        Literal["loader", "kernels", "frameworks", "scaling", "prepare", "learning", "gpu", "all"],
        tyro.conf.Positional,
    ] = "all"
    """Suite to run; `all` are the others but `prepare`, `learning` and `gpu`."""
    quick: bool = False
    """Small inputs, few repeats, one process: at most minutes."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is one."""
    threads: int = 0
    """Threads of torch on the CPU; 0: as many as training takes, a core each. Take 1 where other work shares
    the cores: with several threads it decides the figures."""
    only: str | None = None
    """Run only measurements whose name fits this pattern, e.g. 'masked_loss/*', of `learning` 'story/*'."""
    frameworks: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME …")] = ()
    """`learning` only: which to measure, by default all four; the first one decodes everywhere."""
    seeds: int | None = None
    """`learning` only: pretraining runs, which are pooled; by default 3, with --quick 1."""
    draws: int | None = None
    """`learning` only: draws of the labelled people; by default 10, with --quick 3."""
    store: str | None = None
    """`frameworks` only: race dense against single-position CSM on this store, and nothing else."""
    json: Path | None = None
    """Write the rows to this file (a list of objects, each with the environment)."""
    gate: bool = False
    """Exit with 1 if a ratio is below its floor in benchmarks/floors.json."""
    compare: Path | None = None
    """Also print which ratios moved since the run whose --json this file is."""
    static: bool = False
    """`kernels` only: compile for sm_80, 90, 100 and print registers, spills and load widths."""
    dry: bool = False
    """`gpu` only: run all of it at tiny sizes on the CPU, to see that it works; its figures mean nothing."""

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise ValueError(
                f"--threads: got {self.threads}, expected 0 (a core each) or a number of threads"
            )
        only_of = {"store": "frameworks", "static": "kernels", "dry": "gpu"}
        for name, suite in (only_of | dict.fromkeys(("frameworks", "seeds", "draws"), "learning")).items():
            value = getattr(self, name)
            if value not in (None, False, ()) and self.suite != suite:
                raise ValueError(f"--{name}: got the suite {self.suite}, expected `brainflow bench {suite}`")
            if type(value) is int and value < 1:
                raise ValueError(f"--{name}: got {value}, expected at least 1")
        if self.suite == "learning" and (self.gate or self.compare or self.device == "cuda"):
            raise ValueError("--gate, --compare, --device cuda: got one with learning, which times nothing")
        if self.suite == "gpu":
            given = [n for n in ("quick", "only", "gate", "compare") if getattr(self, n)]
            if given:
                raise ValueError(
                    f"--{given[0]}: got the suite gpu, which takes only --dry, --json and --threads"
                )
            if self.device != "auto":
                raise ValueError(
                    f"--device: got {self.device} with gpu, expected auto: the GPU, with --dry the CPU"
                )


def run(args: Args) -> int:
    """Run the suites, print a table each, and return the exit code."""
    if args.static:
        return _static()
    if args.suite == "learning":
        return _learning(args)
    if args.suite == "gpu":
        return _gpu(args)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else every look at memory prints two lines
    # Here, not above: `--help` should not wait for torch.
    import torch

    from brainflow.devices import resolve_device
    from brainflow.storage.files import write_text

    from . import show

    # Before anything is measured: a wrong file should not cost the run.
    before = None if args.compare is None else show.read_rows(args.compare)
    device = resolve_device(args.device).type
    if args.threads:
        torch.set_num_threads(args.threads)
    env = environment(device)
    print(", ".join(f"{k} {v}" for k, v in env.items() if v is not None), file=sys.stderr)
    failures: list[str] = []
    found = _measure(args, device, failures)
    rows = [row for suite in found.values() for row in suite]
    if args.only and not rows and not failures:
        raise ValueError(
            f"--only: got {args.only!r}, which gave no row in {args.suite}; expected a pattern of names"
        )
    if args.json is not None:
        write_text(args.json, json.dumps([row.to_dict(env) for row in rows], indent=1) + "\n")
    for suite, measured in found.items():
        show.print_rows(suite, measured)
    if before is not None:
        show.print_changes(before, rows)
    if args.gate:
        failures += [
            f"gate: {line}" for line in show.below_floors(rows, complete=not (args.only or args.store))
        ]
        print(f"gate: {'failed' if failures else 'passed'}", file=sys.stderr)
    for line in failures:
        print(line, file=sys.stderr)
    return 1 if failures else 0


def _learning(args: Args) -> int:
    """Measure what pretraining is worth; its rows hold accuracies, not times."""
    from .learning import measure, print_rows
    from .plan import FRAMEWORKS, make_plan

    unknown = sorted(set(args.frameworks) - set(FRAMEWORKS))
    if unknown:
        raise ValueError(f"--frameworks: got {unknown[0]!r}, expected some of {', '.join(FRAMEWORKS)}")
    plan = make_plan(
        quick=args.quick, frameworks=args.frameworks or FRAMEWORKS, seeds=args.seeds, draws=args.draws
    )
    rows, failures = measure(plan, only=args.only, env=environment("cpu"), json_file=args.json)
    print_rows(rows)
    for line in failures:
        print(line, file=sys.stderr)
    return 1 if failures else 0


def _gpu(args: Args) -> int:
    """Measure what is worth knowing first of a GPU."""
    if args.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # for the processes that measure: Triton is imported in them
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    import torch

    from .gpu import card, measure

    if not (args.dry or torch.cuda.is_available()):
        raise ValueError("gpu: torch sees no CUDA device; with --dry all of it runs on the CPU, tiny")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = "cpu" if args.dry else "cuda"
    env = environment(device) | {"nvidia_smi": card()}
    print(", ".join(f"{k} {v}" for k, v in env.items() if v is not None), file=sys.stderr)
    _, failures = measure(args.dry, device, env=env, json_file=args.json)
    for line in failures:
        print(line, file=sys.stderr)
    return 1 if failures else 0


def _measure(args: Args, device: str, failures: list[str]) -> dict[str, list[Row]]:
    """Return suite → rows; a full run goes over the suites again and again, each time in new processes."""
    from .timing import finite, merge

    if args.store is not None:
        from .race import time_to_loss

        rows = time_to_loss(240 if args.quick else 6000, device, args.store)
        return {"frameworks": finite(rows)}
    # What shares of a ceiling refer to belongs beside them.
    suites = ALL if args.suite == "all" else (args.suite,) if args.only else ("ceilings", args.suite)
    if args.quick:
        passes = [{suite: measure(suite, True, device, args.only, failures) for suite in suites}]
    else:
        # Not three times each: processes of one suite are minutes apart, and what slows the machine hits one.
        passes = [
            {suite: _in_a_process(suite, device, args.only, failures) for suite in suites}
            for _ in range(PROCESSES)
        ]
    # Wrong once is wrong: what other processes measured of it is dropped.
    failed = {line.partition(": ")[0] for line in failures}
    found: dict[str, list[Row]] = {}
    for suite in suites:
        names = dict.fromkeys(name for done in passes for name in done[suite] if name not in failed)
        runs = ([done[suite][name] for done in passes if name in done[suite]] for name in names)
        found[suite] = [row for run in runs for row in merge(run)]
    failures[:] = dict.fromkeys(failures)  # one line, though it failed in every process
    return found


def measure(
    suite: str, quick: bool, device: str, only: str | None, failures: list[str]
) -> dict[str, list[Row]]:
    """Run the measurements of a suite, one by one, and return name → rows.

    A measurement that raises gives no row: it is named on stderr and in `failures`, and the others go on.
    """
    from .timing import attempt

    found: dict[str, list[Row]] = {}
    for name, function in load(suite, quick, device).items():
        if only is not None and not fnmatch(name, only):
            continue
        began = time.perf_counter()
        rows, failure = attempt(name, function)
        if failure is None:
            found[name] = rows
        else:
            failures.append(failure)
        print(f"{suite}: {name}: {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
    return found


def load(suite: str, quick: bool, device: str) -> Mapping[str, Callable[[], list[Row]]]:
    """Return name → what measures it, of the modules of a suite; nothing is measured before it is called."""
    found: dict[str, Callable[[], list[Row]]] = {}
    for module in SUITES[suite]:
        found |= importlib.import_module(f".{module}", __package__).measurements(quick, device)
    return found


def _in_a_process(suite: str, device: str, only: str | None, failures: list[str]) -> dict[str, list[Row]]:
    """Measure a suite in a new process, in which no other suite has computed or allocated before."""
    import torch

    from brainflow.devices import begin_worker

    # Not forked: `environment` has woken CUDA here, which no fork can use.
    context = multiprocessing.get_context("spawn")
    threads = torch.get_num_threads()
    with ProcessPoolExecutor(1, context, initializer=begin_worker, initargs=(threads,)) as pool:
        try:
            found, failed = pool.submit(_measure_there, suite, device, only).result()
        except BrokenProcessPool:  # what other processes measured is kept
            found, failed = {}, [f"{suite}: its process ended at once, e.g. because memory ran out"]
    failures += failed
    return found


def _measure_there(suite: str, device: str, only: str | None) -> tuple[dict[str, list[Row]], list[str]]:
    failures: list[str] = []
    return measure(suite, False, device, only, failures), failures


def environment(device: str) -> dict[str, Any]:
    """Return CPU, GPU, threads and package versions as a JSON-ready dict."""
    import torch

    env: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "device": device,
        "cpu": _cpu_name(),
        # Those that this process may use, not those of the machine.
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
    }
    if device == "cuda":
        driver = Path("/proc/driver/nvidia/version")
        version = driver.read_text().splitlines()[0] if driver.exists() else None
        env |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "driver": version}
    return env | {name: version for name in PACKAGES if (version := _version(name)) is not None}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _static() -> int:
    """Print what every production configuration of the Triton kernels compiles to."""
    from rich.table import Table

    from brainflow.kernels import aot

    from .show import console

    def widths(accesses: Mapping[str, Mapping[int, int]], names: tuple[str, ...]) -> str:
        """Return for example "store 8×128" for eight accesses of 128 bits."""
        return ", ".join(
            f"{name} " + "+".join(f"{n}×{width}" for width, n in sorted(accesses[name].items()))
            for name in names
            if name in accesses
        )

    columns = (
        "kernel",
        "sm",
        "warps",
        "registers",
        "spills",
        "shared",
        "resident warps",
        "loads",
        "stores",
        "check",
    )
    table = Table(title="Triton kernels compiled ahead of time")
    for column in columns:
        table.add_column(column, no_wrap=True)
    for config, report in aot.compile_all([80, 90, 100]):
        numbers = (
            report.arch,
            report.num_warps,
            report.registers,
            report.spills,
            report.shared,
            report.resident_warps,
        )
        table.add_row(
            report.name,
            *map(str, numbers),
            widths(report.loads, config.wide),
            widths(report.stores, config.wide),
            "; ".join(aot.problems(config, report)) or "ok",
        )
    console().print(table)
    return 0
