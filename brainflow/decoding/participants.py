"""What is known of people: a table as BIDS has it (`participants.tsv`), joined with the people of a store."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainflow.data.splits import listed
from brainflow.files import read_json, read_text

MISSING = ("", "n/a", "nan")
PERSON, DATASET = "participant_id", "dataset"
MOST_TABLE = 2**28
LARGEST = 1e100


@dataclass(frozen=True, kw_only=True)
class Participants:
    """A table of people, a row for each person of a store that it knows.

    Attributes
    ----------
    path
        Where it was read.
    people
        "dataset/subject" of each row, str `[rows]`, in the order that was asked for.
    columns
        Name → the values of these people as text.
    levels
        Columns that a `participants.json` beside the table says name categories (`Levels`).
    absent
        People who were asked for and have no row.
    """

    path: Path
    people: NDArray
    columns: dict[str, list[str]]
    levels: frozenset[str] = frozenset()
    absent: tuple[str, ...] = ()

    def column(self, name: str, argument: str) -> list[str | None]:
        """Return the texts of a column, None where BIDS' `n/a` (or nothing, or NaN) stands.

        Raises
        ------
        ValueError
            If there is no such column; the message begins with the argument that named it.
        """
        if name not in self.columns:
            raise ValueError(
                f"{argument}: got {name!r}, expected a column of {self.path} ({', '.join(self.columns)})"
            )
        return [None if text.lower() in MISSING else text for text in self.columns[name]]


def read_participants(path: Path, people: Sequence[str]) -> Participants:
    """Read the rows of some people.

    Parameters
    ----------
    path
        Table with tabs between columns (with commas if it is called `.csv`) and the column `participant_id`:
        a subject's label with or without `sub-`, or "dataset/subject"; a column `dataset` says it, too.
    people
        Whom to find, named as "dataset/subject".

    Raises
    ------
    ValueError
        If the table is not of this form, two rows mean one person, one row may mean two, or it knows nobody.
    """
    lines = _lines(path)
    header = [name.strip() for name in lines[0]] if lines else []
    if PERSON not in header or len(set(header)) != len(header):
        raise ValueError(
            f"participants: {path} has the columns {', '.join(header) or 'none'}, expected {PERSON} among "
            "them, each once, with tabs between columns (commas in a .csv)"
        )
    known: dict[str, list[str]] = {}
    for person in people:
        dataset, _, subject = person.rpartition("/")
        for key in (_label(subject), f"{dataset}/{_label(subject)}"):
            known.setdefault(key, []).append(person)
    found: dict[str, dict[str, str]] = {}
    for number, line in enumerate(lines[1:], start=2):
        if not any(cell.strip() for cell in line):
            continue
        if len(line) != len(header):
            raise ValueError(
                f"participants: line {number} of {path} has {len(line)} values, expected {len(header)}; "
                f"write n/a where a value is missing"
            )
        row = dict(zip(header, (cell.strip() for cell in line), strict=True))
        dataset, _, subject = row[PERSON].rpartition("/")
        named = row.get(DATASET, "")
        dataset = dataset or ("" if named.lower() in MISSING else named)
        meant = known.get(f"{dataset}/{_label(subject)}" if dataset else _label(subject), [])
        if len(meant) > 1:
            raise ValueError(
                f"participants: {row[PERSON]!r} of {path} may be {' or '.join(meant)}; name it so, or add a "
                f"column {DATASET}"
            )
        if meant and meant[0] in found:
            raise ValueError(
                f"participants: {path} has two rows for {meant[0]}, expected one; targets of sessions are "
                "not targets of people"
            )
        found.update(dict.fromkeys(meant, row))
    if not found:
        raise ValueError(
            f"participants: {path} knows nobody of the store, which holds {listed(sorted(people))}; the "
            f"column {PERSON} holds their labels"
        )
    order = [person for person in people if person in found]
    return Participants(
        path=path,
        people=np.array(order, dtype=np.str_),
        columns={name: [found[person][name] for person in order] for name in header},
        levels=_levels(path.with_suffix(".json")),
        absent=tuple(person for person in people if person not in found),
    )


def numbers(values: Sequence[str]) -> NDArray[np.float64] | None:
    """Return texts as float64, None if one of them is no number.

    Raises
    ------
    ValueError
        If one is infinite, or so large that its square may be.
    """
    if any("_" in text for text in values):  # Python's own way to write numbers, which no table has
        return None
    try:
        found = np.array([float(text) for text in values])
    except ValueError:
        return None
    for text, value in zip(values, found, strict=True):
        if not abs(value) < LARGEST:
            raise ValueError(
                f"got {text[:40]!r}, expected finite numbers below {LARGEST:g}, n/a where one is missing"
            )
    return found


def _lines(path: Path) -> list[list[str]]:
    text = io.StringIO(read_text(path, most=MOST_TABLE).removeprefix("\ufeff"), newline="")
    # BIDS knows no quotes in tables with tabs: one is part of a text.
    comma: Any = (
        {"delimiter": ","}
        if path.suffix.lower() == ".csv"
        else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    )
    try:
        return list(csv.reader(text, **comma))
    except csv.Error as error:
        raise ValueError(f"participants: {path} is no table of text ({error})") from None


def _label(subject: str) -> str:
    return subject.removeprefix("sub-")


def _levels(path: Path) -> frozenset[str]:
    """Return which columns a BIDS sidecar says name categories."""
    if not path.is_file():
        return frozenset()
    described: dict[str, Any] = read_json(path)
    return frozenset(
        name for name, about in described.items() if isinstance(about, dict) and "Levels" in about
    )
