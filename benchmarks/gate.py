"""The floors below which a ratio must not fall, `floors.json`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FLOORS = Path(__file__).with_name("floors.json")


def failures(rows: Iterable[dict[str, Any]], *, complete: bool) -> list[str]:
    """Return a line for every floor that is not reached.

    Parameters
    ----------
    rows
        Rows of record.
    complete
        Whether the rows are those of whole suites: a floor of such a suite without a row is then a failure.
    """
    rows = list(rows)
    measured = {_name(row): row["ratio"] for row in rows if row["ratio"] is not None}
    suites = {row["suite"] for row in rows}
    found = []
    for floor in json.loads(FLOORS.read_text(encoding="utf-8")):
        ratio = measured.get(_name(floor))
        if ratio is None:
            if complete and floor["suite"] in suites:
                found.append(f"{_name(floor)}: no figure, expected a ratio of at least {floor['ratio']}")
        elif not ratio >= floor["ratio"]:
            found.append(f"{_name(floor)}: ratio {ratio:.3g}, expected at least {floor['ratio']}")
    return found


def _name(row: dict[str, Any]) -> str:
    return f"{row['suite']} {row['case']} {row['metric']} over {row['baseline']}"
