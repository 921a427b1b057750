"""Reading runs from array files, with a small TOML file that says which file is which run."""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..columns import MAX_LABEL_COLUMNS, shown
from ..errors import StoreError
from ..tables import Label, Segment
from .limits import TEXT_BYTES, regular_size
from .listing import ENTITIES, fill, read_config
from .loading import load_array
from .session import IngestReport, IngestSession

MAX_SEGMENTS = 2**18
_BIDS = re.compile(r"(?:^|[_/])(ds|sub|ses|task|run)-([A-Za-z0-9]+)")
_BIDS_NAMES = dict(zip(("ds", "sub", "ses", "task", "run"), ENTITIES, strict=True))


def ingest_arrays(
    config: str | os.PathLike[str],
    store_path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> IngestReport:
    """Write the runs that a TOML file lists to a store.

    Parameters
    ----------
    config : the TOML file
    store_path : runs are added if the store exists
    overwrite : replace the store
    progress : called with (files done, files in all)

    Returns
    -------
    IngestReport : a file that cannot be read is in `failures`, and nothing of it is in the store

    Raises
    ------
    StoreError : if the TOML file is wrong, or the store cannot be written
    """
    path = Path(config)
    store, jobs = read_config(path)
    normalise = store.pop("normalise", "none")
    with IngestSession(store_path, store, overwrite=overwrite, normalise=normalise) as session:
        for done, (file, options) in enumerate(jobs):
            session.add(str(file), _runs(file, options, path.parent))
            if progress is not None:
                progress(done + 1, len(jobs))
    return session.report


def _runs(file: Path, options: Mapping[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
    """The one run of a file, as keyword arguments of `StoreWriter.append`."""
    try:
        array = load_array(file, options.get("array"))
    except ImportError as error:
        raise StoreError(str(error)) from error
    bold = array.T if options.get("layout") == "network time" else array
    entities = _entities(file, options)
    names = {**entities, "stem": file.stem}
    segments = []
    if options.get("segments"):
        segments = _segments(folder / fill(options["segments"], names), entities)
    keywords: dict[str, Any] = {"bold": bold, "t_r": float(options["t_r"]), "segments": segments, **entities}
    if options.get("key"):
        keywords["key"] = fill(options["key"], names)
    yield keywords


def _entities(file: Path, options: Mapping[str, Any]) -> dict[str, str]:
    """Entities from the options, else from `pattern`, else from `sub-…`, `task-…` in the path."""
    text = file.as_posix()
    found = {_BIDS_NAMES[name]: value for name, value in _BIDS.findall(text)}
    if options.get("pattern"):
        match = re.search(options["pattern"], text)
        if match is None:
            raise StoreError(f"{file}: pattern {options['pattern']!r} does not match the path")
        found = {name: value for name, value in match.groupdict().items() if name in ENTITIES and value}
    entities = {name: str(options.get(name, found.get(name, ""))) for name in ENTITIES}
    for name in ("dataset", "subject"):
        if not entities[name]:
            raise StoreError(f"{file}: {name} is not given; set it in the TOML file or by pattern")
    return entities


def _segments(path: Path, entities: Mapping[str, str]) -> list[Segment]:
    """Segments from a .csv or .tsv with the columns onset and length in time points; others are labels.

    A table may be of several runs: where a column is named after an entity, a run takes its own rows.
    """
    regular_size(path, TEXT_BYTES)
    segments: list[Segment] = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            names = rows.fieldnames or []
            if len(names) > MAX_LABEL_COLUMNS + 2 or len(set(names)) != len(names):
                raise StoreError(
                    f"{path}: has {len(names)} columns, expected at most {MAX_LABEL_COLUMNS} labels, each "
                    "once"
                )
            if not {"onset", "length"} <= set(names):
                advice = "; durations in seconds have to be divided by t_r" if "duration" in names else ""
                raise ValueError(f"a column is missing{advice}")
            table: list[dict[str, str]] = []
            for row in rows:
                if len(table) == MAX_SEGMENTS:
                    raise StoreError(f"{path}: has more than {MAX_SEGMENTS} segments")
                if None in row:
                    raise ValueError(f"row {len(table) + 1} has more cells than the header")
                table.append(row)
            for row in _rows_of(table, entities, path):
                onset, length = _whole(row.pop("onset")), _whole(row.pop("length"))
                labels = {name: _parse(text) for name, text in row.items() if text not in (None, "", "n/a")}
                segments.append(Segment(onset=onset, length=length, labels=labels))
    except StoreError:
        raise
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        reason = shown(f"{type(error).__name__}: {error}")
        raise StoreError(f"{path}: expected whole numbers in columns onset and length ({reason})") from error
    return segments


def _rows_of(table: list[dict[str, str]], entities: Mapping[str, str], path: Path) -> list[dict[str, str]]:
    """Return the rows of one run: of its subject, session, task and run, where the table has such columns.

    These columns are not among the rows' labels, but for the task, which may be what is decoded.
    """
    for short, name in _BIDS_NAMES.items():
        if not (table and name in table[0] and entities[name]):
            continue
        values = [(row[name] or "").removeprefix(f"{short}-") for row in table]
        if entities[name] in values:
            mine = [row for row, value in zip(table, values, strict=True) if value == entities[name]]
            kept = [column for column in table[0] if column != name or name == "task"]
            table = [{column: row[column] for column in kept} for row in mine]
        elif name == "subject":
            held = ", ".join(sorted(set(values))[:5])
            raise StoreError(
                f"{path}: has no row of subject {entities[name]!r} (it has {shown(held)}); write it as in "
                "the file's name, or leave `segments` out for runs without labels"
            )
    return table


def _whole(text: str) -> int:
    if "_" in text:  # int() takes 1_0 for 10
        raise ValueError(f"{shown(text)!r} is no whole number")
    return int(text)


def _parse(text: str) -> Label:
    """A label: a number where the text is one, as in 3, -1.5 or nan; `1_0` is none."""
    if "_" in text:
        return text
    try:
        return int(text)
    except ValueError:
        pass
    try:
        value = float(text)
    except ValueError:
        return text
    if math.isinf(value) and "inf" not in text.lower():
        raise ValueError(f"{shown(text)} is too large for a number")
    return value
