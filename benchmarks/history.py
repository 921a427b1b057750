"""Rows of record on disk: a JSON file of one run, and the history with one line a run."""

from __future__ import annotations

import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]


def default_path() -> Path:
    """Return where the history is kept: the user's data folder."""
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data, "brainflow", "bench-history.jsonl")


def append(path: Path, rows: Rows, what: str) -> None:
    """Add a run to the history: one line {"time", "what", "env", "rows"}; `what` is the command line."""
    env = rows[0]["env"] if rows else {}
    short = [{key: value for key, value in row.items() if key != "env"} for row in rows]
    run = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "what": what, "env": env, "rows": short}
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(run) + "\n").encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line)  # one write: two runs that end together do not mix
    finally:
        os.close(descriptor)


def write_json(path: Path, rows: Rows) -> None:
    """Write the rows of a run as a JSON list, complete or not at all."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read(source: str, history: Path) -> Rows:
    """Return the rows of a JSON file, or of a run of the history.

    Parameters
    ----------
    source
        A file that `--json` wrote, or how many runs back: "1" is the newest of the history.
    history
        The history's file.

    Raises
    ------
    ValueError
        If there is no such file or run, or the file holds something else.
    """
    if source.isdecimal() and not Path(source).exists():
        runs = _runs(history)
        if not 1 <= int(source) <= len(runs):
            raise ValueError(f"got run {source}, but {history} has {len(runs)} runs; 1 is the newest")
        run = runs[-int(source)]
        return [{**row, "env": run["env"]} for row in run["rows"]]
    if not Path(source).is_file():
        raise ValueError(f"got {source!r}, expected a file that --json wrote, or 1, 2, … for runs back")
    try:
        rows = json.loads(Path(source).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{source}: is not a file that --json wrote: {error}") from error
    if not (
        isinstance(rows, list) and all(isinstance(r, dict) and {"suite", "env"} <= r.keys() for r in rows)
    ):
        raise ValueError(f"{source}: is not a list of rows as --json writes them")
    return rows


def _runs(history: Path) -> list[dict[str, Any]]:
    lines = history.read_text(encoding="utf-8").splitlines() if history.exists() else []
    runs = []
    for number, line in enumerate(lines, 1):
        try:
            runs.append(json.loads(line))
        except ValueError:
            print(f"{history}: line {number} is damaged and left out", file=sys.stderr)
    return runs
