"""See what pretraining is worth, in minutes on two cores: store, pretraining, decoding, pictures.

The data ship with the package: 24 people who listen to a story (Simony et al. 2016) and one participant of
Haxby et al. 2001; others are simulated, and called so. The same seed and number of threads give the same
numbers.

Examples
--------
  brainflow demo
  brainflow demo --open
  brainflow demo --out demo-out --json
"""

from __future__ import annotations

import json
import sys
import time
import webbrowser
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

SAID_EVERY = 20.0
"""Seconds after which a line comes in any case where no bar can be drawn."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `brainflow demo`."""

    out: Annotated[str, tyro.conf.arg(metavar="DIR")] = "demo-out"
    """Folder for the store, the run, the scores and the page; an earlier demo there is replaced."""
    seed: int = 0
    """Seeds weights, data order, dropout and resampling."""
    threads: int = 1
    """CPU threads; another number may change the last digits."""
    open: bool = False
    """Show the page in the web browser at the end."""
    json: bool = False
    """Print the figures as one JSON object on stdout; no progress on stderr."""


def run(args: Args) -> int:
    """Run the demo, print its table, write its page, and return the exit code."""
    began = time.perf_counter()
    try:
        return _run(args, began)
    except KeyboardInterrupt:
        print(
            f"\nbrainflow demo: interrupted; what is in {args.out} is incomplete. "
            "The same command starts over and replaces it.",
            file=sys.stderr,
        )
        return 130


def _run(args: Args, began: float) -> int:
    # torch and scikit-learn cost seconds that --help and a wrong command line need not pay
    from rich.console import Console

    from brainflow.cli.demo_page import demo_page, print_tables, summary
    from brainflow.demo.pipeline import DemoConfig, Stages, run_demo
    from brainflow.progress import ProgressLine, Remaining
    from brainflow.report.page import write_page
    from brainflow.training.interrupt import Preempted

    config = DemoConfig(out=Path(args.out), seed=args.seed, threads=args.threads)
    left, said = Remaining(), began
    with ProgressLine("demo", left, quiet=args.json) as bar:

        def say(line: str) -> None:
            nonlocal said
            said = time.perf_counter()
            text = f"[{said - began:5.1f} s] {line}"
            if bar.live:
                bar.print(text)
            elif not args.json:
                eta = f"  ETA {left}" if left.done else ""
                print(text + eta, file=sys.stderr, flush=True)

        def progress(done: int, total: int) -> None:
            left.advance(done, total)
            bar.update()
            if not bar.live and time.perf_counter() - said > SAID_EVERY:
                say(f"{100 * done // total} %")

        stages = Stages(say, progress)
        try:
            result = run_demo(config, stages)
        # Within pretraining Ctrl-C arrives as this.
        except Preempted as stopped:
            raise KeyboardInterrupt from stopped
        stages.begin("drawing", "")
        page = write_page(demo_page(result), config.out / "report")
    figures = {**summary(result), "page": str(page), "seconds": round(time.perf_counter() - began, 1)}
    (config.out / "demo.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if args.json:
        print(json.dumps(figures, indent=1))
    else:
        print_tables(result, Console())
        print(f"Pictures and one page that shows them: {page}  ({figures['seconds']:.0f} s)")
    if args.open and not webbrowser.open(page.resolve().as_uri()):
        print(f"brainflow demo: no web browser was found; open {page} with one", file=sys.stderr)
    return 0
