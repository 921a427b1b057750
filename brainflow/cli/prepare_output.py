"""What `brainflow prepare` shows: the plan, its progress, and the runs that were left out."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from brainflow.storage.text import printable

if TYPE_CHECKING:
    from brainflow.prepare.run import Job
    from brainflow.storage.ingest.report import IngestReport

_SHOWN = 10
_OUTCOMES = {"done": "prepared", "excluded": "excluded", "failed": "failed"}


def print_plan(jobs: Sequence[Job], todo: Sequence[Job], processes: int) -> None:
    """Print each run with what would be done, and the memory that this takes."""
    from brainflow.prepare.memory import worker_bytes

    waiting = {job.files.key for job in todo}
    for job in jobs:
        files = job.files
        state = "prepare" if files.key in waiting else "ready"
        lacks = [
            name for name, there in (("confounds", files.confounds), ("sidecar", files.sidecars)) if not there
        ]
        note = f"  (no {', no '.join(lacks)})" if lacks else ""
        print(f"{state:8} {printable(files.key)}  {printable(files.images[0].name)}{note}")
    print(
        f"{len(todo)} of {len(jobs)} runs to prepare, atlas {', '.join(jobs[0].atlas_labels)}; "
        f"{processes} processes of at most {worker_bytes(jobs) / 1e9:.1f} GB each; nothing was done"
    )


def counts(records: Sequence[dict[str, Any]]) -> str:
    """How many runs were prepared, excluded and failed, in words."""
    totals = {
        name: sum(record["status"] == status for record in records) for status, name in _OUTCOMES.items()
    }
    return ", ".join(f"{total} {name}" for name, total in totals.items() if total)


def print_left_out(records: Sequence[dict[str, Any]]) -> bool:
    """Print a table of the runs that were left out; True if one of them failed."""
    left_out = [record for record in records if record["status"] != "done"]
    if left_out:
        width = max(len(record["key"]) for record in left_out)
        print(f"\n{'status':8}  {'run':{width}}  reason")
        for record in sorted(left_out, key=lambda record: (record["status"], record["key"])):
            print(f"{record['status']:8}  {printable(record['key']):{width}}  {printable(record['reason'])}")
    return any(record["status"] == "failed" for record in left_out)


def print_rounded(report: IngestReport) -> None:
    """Print the runs that rounding to the element type of the store changed; at most ten by name."""
    for key, what in list(report.rounded.items())[:_SHOWN]:
        print(f"ROUNDED {printable(key)}: {what}")
    if report.rounded:
        print(
            f"{len(report.rounded)} of {len(report.runs)} runs lost more than 0.1 % of a standard deviation "
            "to rounding; z-score the runs, or choose dtype float32"
        )


class Progress:
    """A bar with the remaining time in a terminal, plain lines elsewhere; on stderr."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._began = total, 0, time.monotonic()
        self._bar: Bar | None = None
        if sys.stderr.isatty() and total:
            self._bar = Bar(
                TextColumn("prepare"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def show(self, record: dict[str, Any]) -> None:
        """Count a run."""
        self._done += 1
        if self._bar:
            self._bar.update(self._task, completed=self._done, description=escape(printable(record["key"])))
            return
        reason = f": {printable(record['reason'])}" if record["reason"] else ""
        left = (time.monotonic() - self._began) / self._done * (self._total - self._done)
        eta = f"{left / 60:.0f} min left" if left >= 60 else f"{left:.0f} s left"
        sys.stderr.write(
            f"{self._done}/{self._total} ({eta}) {record['status']} {printable(record['key'])}{reason}\n"
        )
        sys.stderr.flush()
