"""Read all of a store and name every damaged chunk and every run that it touches.

Examples
--------
  brainflow verify store
  brainflow verify store --json
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Annotated

import tyro

from brainflow.progress import progress_bar
from brainflow.storage import verify
from brainflow.storage.text import counted, printable


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `brainflow verify`."""

    store: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")]
    """Store to read."""
    json: bool = False
    """Print one JSON object."""


def run(args: Args) -> int:
    """Verify, print what is wrong, and return 1 if anything is."""
    with progress_bar("verify", quiet=args.json) as progress:
        report = verify(args.store, progress)
    if args.json:
        print(json.dumps({"store": args.store, "ok": report.ok, **dataclasses.asdict(report)}, indent=1))
    else:
        for error in report.errors:
            print(f"BAD {printable(error)}")
        for note in report.notes:
            print(f"note: {printable(note)}")
        store = printable(args.store)
        if report.ok:
            print(f"{store}: good, {counted(report.chunks, 'chunk')} read")
        elif not report.chunks:
            print(f"{store}: {counted(len(report.errors), 'error')}; no chunk was read")
        else:
            print(
                f"{store}: {counted(len(report.errors), 'error')}; "
                f"{counted(len(report.bad_runs), 'run is', 'runs are')} touched"
            )
    return 0 if report.ok else 1
