"""Say what a store holds.

Examples
--------
  brainflow info store
  brainflow info store --json
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from brainflow.storage import BoldStore
from brainflow.storage.text import printable


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `brainflow info`."""

    store: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")]
    """Store to describe."""
    json: bool = False
    """Print one JSON object."""


def run(args: Args) -> int:
    """Print the description of the store."""
    if (Path(args.store) / "config.json").is_file():
        raise ValueError(
            f"{args.store}: holds a model, expected a store; its config.json says what it is, and "
            "`brainflow report` shows the run that trained it"
        )
    store = BoldStore.open(args.store)
    facts = describe(store)
    if args.json:
        print(json.dumps(facts, indent=1))
        return 0
    console = Console()
    table = Table(title=_plain(args.store), title_justify="left", show_header=False)
    for name, value in facts.items():
        if name not in ("datasets", "damage") and value not in (None, "", {}, []):
            table.add_row(name.replace("_", " "), _text(value))
    console.print(table)
    datasets = Table(title="datasets", title_justify="left")
    for column in ("dataset", "runs", "subjects", "tasks", "hours", "TR (s)", "time points a run"):
        datasets.add_column(column, justify="left" if column == "dataset" else "right")
    for row in facts["datasets"]:
        t_r = ", ".join(f"{value:g}" for value in row["t_r"])
        spread = f"{row['shortest']}–{row['longest']}"
        datasets.add_row(
            _plain(row["dataset"]),
            f"{row['runs']:,}",
            f"{row['subjects']:,}",
            f"{row['tasks']}",
            f"{row['hours']:.2f}",
            t_r,
            spread,
        )
    console.print(datasets)
    return 0


def describe(store: BoldStore) -> dict[str, Any]:
    """Return what a store holds, as JSON values."""
    runs, attributes = store.runs, store.attributes
    return {
        "generation": store.generation,
        "damage": store.damage,
        "snapshot": store.snapshot,
        "runs": len(runs),
        "time_points": int(runs.length.sum()),
        "networks": store.networks,
        "dtype": store.dtype.name,
        "compression": attributes["compression"],
        "bytes": int(runs.length.sum()) * store.networks * store.dtype.itemsize,
        "segments": len(store.segments),
        "labels": {name: len(np.unique(values)) for name, values in store.segments.columns.items()},
        "parcellation": attributes["parcellation"],
        "network_names": attributes["network_names"],
        "normalisation": attributes["normalisation"],
        "preprocessing": attributes["preprocessing"],
        "provenance": attributes["provenance"],
        "chunk_rows": attributes["chunk_rows"],
        "shard_rows": attributes["shard_rows"],
        "format_version": attributes["format_version"],
        "datasets": _datasets(store),
    }


def _datasets(store: BoldStore) -> list[dict[str, Any]]:
    runs = store.runs
    names, subjects, tasks = runs.dataset, runs.subject, runs.task
    rows = []
    for name in np.unique(names):
        here = names == name
        length, t_r = runs.length[here], runs.t_r[here]
        rows.append(
            {
                "dataset": str(name),
                "runs": int(here.sum()),
                "subjects": len(np.unique(subjects[here])),
                "tasks": len(np.unique(tasks[here])),
                "hours": float((length * t_r).sum() / 3600),
                "t_r": np.unique(t_r).tolist(),
                "shortest": int(length.min()),
                "longest": int(length.max()),
            }
        )
    return rows


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(_plain(f"{key}: {item}") for key, item in value.items())
    if isinstance(value, list):
        shown = _plain(", ".join(map(str, value[:4])))
        return shown + (f", … ({len(value)})" if len(value) > 4 else "")
    return f"{value:,}" if isinstance(value, int) else _plain(str(value))


def _plain(text: str) -> str:
    """Return a text of the store that rich takes for text: no markup, no control characters."""
    return escape(printable(text))
