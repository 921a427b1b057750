"""Rows as tables: on the terminal, and as Markdown in a page."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .compare import changes, only_in_one
from .history import Rows

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def figures(row: dict[str, Any]) -> list[str]:
    """Return case, metric, value, spread, baseline, ratio and share of the ceiling of a row as text."""
    p20, p80, ratio, share = row["p20"], row["p80"], row["ratio"], row["floor_share"]
    return [
        row["case"],
        row["metric"],
        f"{number(row['value'])} {row['unit']}",
        "" if p20 is None or p80 is None else f"{number(p20 * 1e3)}–{number(p80 * 1e3)}",
        row["baseline"],
        "" if ratio is None else f"{number(ratio)}×",
        "" if share is None else f"{share:.0%}",
    ]


def number(value: float) -> str:
    """Return three significant digits without an exponent: 0.0123, 4.56, 789, 1,230,000."""
    if value == 0 or not abs(value) < float("inf"):
        return str(value)
    digits = f"{value:.3g}"
    return f"{float(digits):,.0f}" if abs(value) >= 100 else digits if "e" not in digits else f"{value:.6f}"


HEADER = ["case", "metric", "value", "p20–p80 ms", "baseline", "ratio", "of the ceiling"]


def print_rows(suite: str, rows: Rows) -> None:
    """Print the rows of a suite as a table."""
    table = Table(title=f"{suite}: medians; ratio = ours over the baseline, larger is better")
    for column in HEADER:
        table.add_column(column, justify="left" if column in ("case", "metric", "baseline") else "right")
    for row in rows:
        table.add_row(*figures(row))
    _console().print(table)


def print_changes(a: Rows, b: Rows) -> None:
    """Print what changed from run `a` to run `b` beyond noise, and how much did not."""
    found = changes(a, b)
    real = [change for change in found if change.real]
    table = Table(title=f"{len(real)} of {len(found)} figures changed beyond noise")
    for column in ("figure", "before", "after", "change", "noise"):
        table.add_column(column, justify="left" if column == "figure" else "right")
    for change in real:
        verdict = "better" if change.better > 1 else "worse"
        times = max(change.better, 1 / change.better)
        table.add_row(
            change.name,
            f"{number(change.before)} {change.unit}",
            f"{number(change.after)} {change.unit}",
            f"{times:.2f}× {verdict}",
            f"{change.noise:.0%}",
        )
    console = _console()
    console.print(table if real else table.title)
    for which, names in zip(("first", "second"), only_in_one(a, b), strict=True):
        if names:
            console.print(f"only in the {which} run: {', '.join(names)}", highlight=False)


def markdown(rows: Rows) -> str:
    """Return the rows as Markdown, a table for each suite, under the machine's name."""
    env = rows[0]["env"]
    machine = ", ".join(f"{key} {value}" for key, value in env.items() if value is not None)
    place = "on a CPU only" if env.get("device") == "cpu" else f"on {env.get('gpu')}"
    lines = [f"Measured {place}: {machine}.", ""]
    for suite in dict.fromkeys(row["suite"] for row in rows):
        lines += [f"### {suite}", ""]
        lines += [_line(HEADER), _line(["---"] * 2 + ["--:", "--:", "---", "--:", "--:"])]
        lines += [_line(figures(row)) for row in rows if row["suite"] == suite]
        lines.append("")
    return "\n".join(lines)


def write_table(page: Path, rows: Rows) -> None:
    """Put the rows between the marks of a Markdown page.

    Raises
    ------
    ValueError
        If the page has not both marks once, in their order.
    """
    text = page.read_text(encoding="utf-8")
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"--table: {page} has no lines {BEGIN} and {END}, between which the table goes")
    page.write_text(f"{head}{BEGIN}\n\n{markdown(rows)}\n{END}{tail}", encoding="utf-8")


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 150)
