"""The TOML file that says which array file is which run; see `docs/format.md`.

    [store]            # keyword arguments of StoreWriter.create, and `normalise`
    [defaults]         # what all runs share: t_r, dataset, task, array, layout, …
    [[files]]          # one or more: a glob relative to the TOML file, and what differs from the defaults

What is wrong in it is an error of every run, so it is found before anything is written. The file is the
user's own: its regular expressions and globs may still take as long as they like.
"""

from __future__ import annotations

import math
import re
import string
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..attributes import StoreAttributes
from ..columns import shown
from ..errors import StoreError
from ..layout import CHUNK_ROWS, SHARD_ROWS
from ..normalise import KINDS

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


def read_config(path: Path) -> tuple[dict[str, Any], list[tuple[Path, dict[str, Any]]]]:
    """Arguments for the store, and every file with its options, by entry and then by name.

    Raises
    ------
    StoreError : if the file is not TOML, a key is unknown, a value cannot be used or a glob finds nothing;
        file, key and what was expected are named
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
    """A template with its `{names}` filled in.

    Nothing but plain names is read: `str.format` would also take attributes apart and pad to any width.

    Raises
    ------
    ValueError : if the template holds anything else
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
