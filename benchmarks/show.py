"""Rows on the terminal, beside an earlier run's, and against the floors of `floors.json`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .timing import WIDE, Row

FLOORS = Path(__file__).with_name("floors.json")
HEADER = ("case", "metric", "value", "p20–p80 ms", "baseline", "ratio", "of the ceiling")
FIELDS = ("suite", "case", "metric", "value", "unit", "baseline", "ratio", "env")


def print_rows(suite: str, rows: Iterable[Row]) -> None:
    """Print the rows of a suite as a table; a figure that several processes disagree about as a range."""
    table = Table(title=f"{suite}: medians; ratio = ours over the baseline, larger is better")
    for column in HEADER:
        justify: Any = "left" if column in ("case", "metric", "baseline") else "right"
        table.add_column(column, justify=justify, overflow="fold")
    rows = list(rows)
    noted = any(row.note for row in rows)
    if noted:
        table.add_column("note", overflow="fold")
    for row in rows:
        table.add_row(*figures(row), *([escape(row.note)] if noted else []))
    console().print(table)


def figures(row: Row) -> list[str]:
    """Return case, metric, value, spread, baseline, ratio and share of the ceiling of a row as text."""
    figure = number(row.figure)
    if row.wide and row.range is not None:
        figure = f"{number(row.range[0])}–{number(row.range[1])}"
    return [
        row.case,
        row.metric,
        f"{figure if row.ratio is None else number(row.value)} {row.unit}",
        "" if row.p20 is None or row.p80 is None else f"{number(row.p20 * 1e3)}–{number(row.p80 * 1e3)}",
        row.baseline,
        "" if row.ratio is None else f"{figure}×",
        "" if row.floor_share is None else f"{row.floor_share:.0%}",
    ]


def number(value: float) -> str:
    """Return three significant digits without an exponent: 0.0123, 4.56, 789, 1,230,000."""
    if value == 0 or not abs(value) < float("inf"):
        return str(value)
    digits = f"{value:.3g}"
    return f"{float(digits):,.0f}" if abs(value) >= 100 else digits if "e" not in digits else f"{value:.6f}"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file that `--json` wrote.

    Raises
    ------
    ValueError
        If the file holds something else.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is not a file that --json wrote: {error}") from error
    if not (isinstance(rows, list) and all(isinstance(r, dict) and set(FIELDS) <= r.keys() for r in rows)):
        raise ValueError(f"{path}: is not a list of rows as --json writes them")
    return rows


def print_changes(before: list[dict[str, Any]], now: Iterable[Row]) -> None:
    """Print the ratios that moved by more than 20 % from an earlier run; values belong to their machine."""
    earlier = {_name(row): row["ratio"] for row in before if row["ratio"]}
    both = {name: row.ratio for row in now if row.ratio and (name := _name(row.to_dict({}))) in earlier}
    table = Table(title=f"of {len(both)} ratios those that moved by more than {WIDE:.0%}")
    for column in ("ratio of", "before", "now", "now ÷ before"):
        table.add_column(column, justify="left" if column == "ratio of" else "right")
    for name, ratio in both.items():
        moved = ratio / earlier[name]
        if max(moved, 1 / moved) > 1 + WIDE:
            table.add_row(name, f"{number(earlier[name])}×", f"{number(ratio)}×", number(moved))
    console().print(table)


def below_floors(rows: Iterable[Row], *, complete: bool) -> list[str]:
    """Return a line for every floor that is not reached.

    Parameters
    ----------
    rows
        What was measured.
    complete
        Whether the rows are those of whole suites: a floor of such a suite without a row is then a failure.
    """
    rows = list(rows)
    measured = {_name(row.to_dict({})): row.ratio for row in rows if row.ratio is not None}
    suites = {row.suite for row in rows}
    found = []
    for floor in json.loads(FLOORS.read_text(encoding="utf-8")):
        ratio = measured.get(_name(floor))
        if ratio is None:
            if complete and floor["suite"] in suites:
                found.append(f"{_name(floor)}: no figure, expected a ratio of at least {floor['ratio']}")
        # Not `<`: a ratio that is NaN fails, too.
        elif not ratio >= floor["ratio"]:
            found.append(f"{_name(floor)}: ratio {ratio:.3g}, expected at least {floor['ratio']}")
    return found


def _name(row: dict[str, Any]) -> str:
    return f"{row['suite']} {row['case']} {row['metric']} over {row['baseline']}"


def console() -> Console:
    """Return the terminal, or a wide page where the output goes into a file."""
    # In a file rich would break lines after 80 columns.
    return Console(width=None if sys.stdout.isatty() else 150)
