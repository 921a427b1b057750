"""Reading runs from array files, with a small TOML file that says which is which run; see `docs/format.md`.

    [store]            # keyword arguments of StoreWriter.create, and `normalise`
    [defaults]         # what all runs share: t_r, dataset, task, array, layout, …
    [[files]]          # one or more: a glob relative to the TOML file, and what differs from the defaults

What is wrong in it is an error of every run, so it is found before anything is written. The file is the
user's own: its regular expressions and globs may still take as long as they like.
"""

from __future__ import annotations

import csv
import math
import os
import re
import string
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..attributes import StoreAttributes
from ..columns import MAX_LABEL_COLUMNS, shown
from ..errors import StoreError
from ..layout import CHUNK_ROWS, SHARD_ROWS
from ..normalise import KINDS
from ..tables import Label, Segment
from .limits import TEXT_BYTES, regular_size
from .loading import load_array
from .session import IngestReport, IngestSession

ENTITIES = ("dataset", "subject", "session", "task", "run")
LAYOUTS = ("time network", "network time")
FIELDS = (*ENTITIES, "stem")
"""What a template may hold, as `{subject}`."""
_TEXTS = ("key", "array", "layout", "pattern", "segments", "glob")
_STORE: dict[str, type] = {
    "dtype": str,
    "parcellation": str,
    "network_names": list,
    "network_coordinates": list,
    "preprocessing": dict,
    "normalisation": str,
    "normalise": str,
    "provenance": dict,
    "compression": str,
}
_EXPECTED = {"str": "a text", "list": "a list", "dict": "a table"}
MAX_SEGMENTS = 2**18
_BIDS = re.compile(r"(?:^|[_/])(ds|sub|ses|task|run)-([A-Za-z0-9]+)")
_BIDS_NAMES = dict(zip(("ds", "sub", "ses", "task", "run"), ENTITIES, strict=True))


def read_config(path: Path) -> tuple[dict[str, Any], list[tuple[Path, dict[str, Any]]]]:
    """Return arguments for the store, and every file with its options, by entry and then by name.

    Raises
    ------
    StoreError
        If the file is not TOML, a key is unknown, a value cannot be used or a glob finds nothing; file, key
        and what was expected are named.
    """
    if path.exists() and not path.is_file():
        raise StoreError(f"{path}: expected a TOML file, got something that is no regular file")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise StoreError(f"{path}: cannot be read as TOML ({error})") from error
    store, defaults, entries = (content.get(name, {}) for name in ("store", "defaults", "files"))
    _refuse_unknown(f"{path}: the file", content, ("store", "defaults", "files"))
    _refuse_unknown(f"{path}: [store]", store, _STORE)
    _refuse_unknown(f"{path}: [defaults]", defaults, (*ENTITIES, *_TEXTS, "t_r"))
    _check_store(f"{path}: [store]", store)
    if not isinstance(entries, list) or not entries:
        raise StoreError(f'{path}: expected at least one [[files]] with glob = "…"')
    jobs = []
    for i, entry in enumerate(entries):
        where = f"{path}: [[files]] number {i + 1}"
        _refuse_unknown(where, entry, (*ENTITIES, *_TEXTS, "t_r"))
        options = {**defaults, **entry}
        _check_options(where, options)
        jobs += [(file, options) for file in _find(where, path.parent, options.get("glob", ""))]
    return store, jobs


def fill(template: str, values: Mapping[str, str]) -> str:
    """Return a template with its `{names}` filled in.

    Nothing but plain names is read: `str.format` would also take attributes apart and pad to any width.

    Raises
    ------
    ValueError
        If the template holds anything else.
    """
    parts = []
    for text, field, width, conversion in string.Formatter().parse(template):
        parts.append(text)
        if field is None:
            continue
        if field not in values or width or conversion:
            raise ValueError(f"{{{shown(field)}}}: expected one of {', '.join(f'{{{n}}}' for n in values)}")
        parts.append(values[field])
    return "".join(parts)


def _check_store(where: str, store: Mapping[str, Any]) -> None:
    for name, value in store.items():
        if not isinstance(value, _STORE[name]):
            raise StoreError(
                f"{where}: {name}: got {shown(value)}, expected {_EXPECTED[_STORE[name].__name__]}"
            )
    for name in store.get("network_names", []):
        if not isinstance(name, str):
            raise StoreError(f"{where}: network_names: got {shown(name)}, expected texts")
    kind = store.get("normalise", "none")
    if kind not in KINDS:
        raise StoreError(f"{where}: normalise: got {shown(kind)!r}, expected one of {', '.join(KINDS)}")
    if kind != "none" and store.get("normalisation"):
        raise StoreError(
            f"{where}: normalisation, normalise: got both, expected one: normalisation says what was done to "
            "the files already, normalise what is to be done"
        )
    widths = [len(store[name]) for name in ("network_names", "network_coordinates") if name in store]
    given: dict[str, Any] = dict.fromkeys(("network_names", "network_coordinates", "compression"))
    given |= {"networks": widths[0] if widths else 1, "dtype": "float16", "chunk_rows": CHUNK_ROWS}
    given |= {"parcellation": "", "preprocessing": {}, "normalisation": "", "provenance": {}}
    try:
        known = {name: value for name, value in store.items() if name != "normalise"}
        StoreAttributes.build(**{**given, "shard_rows": SHARD_ROWS, **known})
    except (ValueError, TypeError, RecursionError) as error:
        raise StoreError(f"{where}: {error}") from error


def _check_options(where: str, options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        good = (str, int) if name in ENTITIES else (float, int) if name == "t_r" else (str,)
        if not isinstance(value, good) or isinstance(value, bool):
            expected = "a number of seconds" if name == "t_r" else "a text"
            raise StoreError(f"{where}: {name}: got {shown(value)}, expected {expected}")
    if "t_r" not in options:
        raise StoreError(f"{where}: t_r: the repetition time in seconds is not given; it is never guessed")
    if not 0 < options["t_r"] < math.inf:
        raise StoreError(f"{where}: t_r: got {shown(options['t_r'])}, expected a positive number of seconds")
    if options.get("layout", LAYOUTS[0]) not in LAYOUTS:
        raise StoreError(
            f'{where}: layout: got {shown(options["layout"])!r}, expected "time network" or "network time"'
        )
    try:
        re.compile(options.get("pattern", ""))
    except (re.error, RecursionError, OverflowError) as error:
        raise StoreError(f"{where}: pattern: is no regular expression ({error})") from error
    for name in ("key", "segments"):
        try:
            fill(options.get(name, ""), dict.fromkeys(FIELDS, ""))
        except ValueError as error:
            raise StoreError(f"{where}: {name}: {error}") from error


def _find(where: str, folder: Path, glob: str) -> list[Path]:
    try:
        found = sorted(folder.glob(glob)) if glob else []
    except (ValueError, NotImplementedError, OSError, RecursionError) as error:
        raise StoreError(
            f"{where}: glob {shown(glob)!r} cannot be used ({error}); expected a pattern relative to the "
            "TOML file"
        ) from error
    if not found:
        raise StoreError(f"{where}: glob {shown(glob)!r} finds no file")
    return found


def _refuse_unknown(where: str, table: Any, known: Iterable[str]) -> None:
    if not isinstance(table, dict):
        raise StoreError(f"{where}: expected a table")
    for name in table:
        if name not in known:
            raise StoreError(
                f"{where}: unknown key {shown(name)!r}, expected one of {', '.join(sorted(known))}"
            )


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
    config
        The TOML file.
    store_path
        Runs are added if the store exists.
    overwrite
        Replace the store.
    progress
        Called with (files done, files in all).

    Returns
    -------
    IngestReport
        A file that cannot be read is in `failures`, and nothing of it is in the store.

    Raises
    ------
    StoreError
        If the TOML file is wrong, or the store cannot be written.
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
    """Yield the one run of a file, as keyword arguments of `StoreWriter.append`."""
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
    """Return entities from the options, else from `pattern`, else from `sub-…`, `task-…` in the path."""
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
    """Return segments of a .csv or .tsv with the columns onset and length in time points; others are labels.

    A table may be of several runs: where a column is named after an entity, a run takes its own rows.
    """
    regular_size(path, TEXT_BYTES)
    segments: list[Segment] = []
    try:
        # -sig: spreadsheets put a byte order mark in front.
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
    """Return a label: a number where the text is one, as in 3, -1.5 or nan; `1_0` is none."""
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
