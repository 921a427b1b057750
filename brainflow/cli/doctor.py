"""Say how far a store is from what a model saw, and what to do about it.

Examples
--------
  brainflow doctor store --for run
  brainflow doctor store --for run --json
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import tyro

NAMESAKE = (
    "the brain–computer-interface library `brainflow` is installed too and has the same import name; keep "
    "one of them in an environment: pip uninstall brainflow, then install brainflow-fmri again"
)


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `brainflow doctor`."""

    store: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")] = None
    """Store to compare; without it only the installation is looked at."""
    for_: Annotated[str | None, tyro.conf.arg(name="for", metavar="CKPT")] = None
    """Pretrained model."""
    json: bool = False
    """Print one JSON object."""


def run(args: Args) -> int:
    """Print the table; 1 if something must be repaired."""
    if (args.store is None) != (args.for_ is None):
        raise ValueError("store, --for: got one of them, expected both (or none: the installation alone)")
    rows = []
    if args.store is not None and args.for_ is not None:
        from brainflow.decoding.doctor import examine
        from brainflow.storage import BoldStore

        rows = examine(BoldStore.open(args.store), args.for_)
    namesake = namesake_installed()
    bad = namesake or any(row.verdict == "differs" for row in rows)
    if args.json:
        print(
            json.dumps({"rows": [vars(row) for row in rows], "namesake": namesake, "ok": not bad}, indent=1)
        )
        return int(bad)
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    if rows:
        table = Table(title=f"{args.store} for {args.for_}", title_justify="left", title_style="bold")
        for name in ("what", "the model saw", "the store has", "", "what to do"):
            table.add_column(name)
        for row in rows:
            cells = (row.what, row.model, row.store, row.verdict, row.advice)
            table.add_row(*(escape(cell) for cell in cells))
        Console().print(table)
    print(f"installation: {NAMESAKE if namesake else 'fine'}")
    return int(bad)


def namesake_installed() -> bool:
    """Whether the distribution `brainflow` of the same import name is installed."""
    try:
        version("brainflow")
    except PackageNotFoundError:
        return False
    return True
