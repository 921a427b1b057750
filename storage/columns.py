"""The tables of runs and segments while they grow: checks of each new row, and the columns of a commit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote, unquote

import numpy as np

from .errors import StoreError
from .tables import MISSING_INTEGER, NO_CENSOR, RUN_STRINGS, Label, Segment, decode_strings, encode_strings

MAX_TEXT_BYTES = 255
MAX_NAME_BYTES = 255  # a label's column is a directory
MAX_LABEL_BYTES = 1024
MAX_LABEL_COLUMNS = 1000  # each is a few files of every index
EXACT = 2**53  # whole numbers up to here are exact in float64
_SHOWN = 80
RUN_NUMBERS = {"start": "<i8", "length": "<i4", "t_r": "<f8", "slot": "<i8", "censor": "<i8"}
SEGMENT_NUMBERS = {"run": "<i4", "onset": "<i4", "length": "<i4"}

Columns = Mapping[str, np.ndarray]


def check_segments(segments: Iterable[Segment], key: str, length: int) -> list[Segment]:
    """Return the segments of a run, each inside it and with labels that an index can hold.

    Raises
    ------
    ValueError, TypeError
        Naming run, segment and label.
    """
    checked = list(segments)
    for i, segment in enumerate(checked):
        where = f"run {shown(key)}: segment {i}"
        for name in ("onset", "length"):
            if not isinstance(value := getattr(segment, name), int | np.integer) or isinstance(value, bool):
                raise TypeError(f"{where}: {name} is {shown(value)}, expected a whole number of time points")
        if segment.onset < 0 or segment.length < 1 or segment.onset + segment.length > length:
            raise ValueError(
                f"{where} (onset={shown(segment.onset)}, length={shown(segment.length)}) does not lie inside "
                f"the run of {length} time points"
            )
        for label, value in segment.labels.items():
            _check_name(label, where)
            _check_value(value, f"{where}: label {shown(label)!r}")
    return checked


def shown(value: object) -> str:
    """Return a value for an error message: at most 80 characters of it."""
    try:
        text = str(value)
    except ValueError:  # a whole number of thousands of digits
        return "a huge number"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _check_name(name: object, where: str) -> None:
    """Refuse a label whose column cannot be a directory of the index."""
    if not isinstance(name, str):
        raise TypeError(f"{where}: a label is named {shown(name)}, expected a text")
    if not is_utf8(name) or name in ("", ".", "..", "zarr.json"):
        raise ValueError(f"{where}: a label may not be named {shown(name)!r}; rename it in the source")
    if len(column_name(name)) > MAX_NAME_BYTES:
        raise ValueError(
            f"{where}: the name of label {shown(name)!r} is too long, expected at most {MAX_NAME_BYTES} "
            "bytes with all but letters and digits percent-encoded; rename it in the source"
        )


def _check_value(value: object, where: str) -> None:
    if not isinstance(value, str | int | float | np.integer | np.floating):
        raise TypeError(f"{where} is a {type(value).__name__}, expected str, int or float")
    # The smallest int64 stands for an absent value.
    if isinstance(value, int | np.integer) and not MISSING_INTEGER < int(value) <= np.iinfo(np.int64).max:
        raise ValueError(f"{where} = {shown(value)} does not fit 64 bits")
    if not isinstance(value, str):
        return
    if "\0" in value or not is_utf8(value):
        raise ValueError(f"{where} holds a zero byte, or is not Unicode text")
    # Characters first: encoding a text of gigabytes would take as many again.
    if len(value) > MAX_LABEL_BYTES or len(value.encode()) > MAX_LABEL_BYTES:
        raise ValueError(
            f"{where} is a text of {len(value)} characters, expected at most {MAX_LABEL_BYTES} bytes: a "
            "column is as wide as its longest text; shorten it in the source"
        )


def is_utf8(text: str) -> bool:
    """Whether a text can be written in UTF-8: it holds no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def column_name(label: str) -> str:
    """Return the directory of a label's column in the index."""
    return quote(label, safe=" ")


class LabelKinds:
    """What each label column holds so far: texts, floats, and whole numbers that float64 can hold or not.

    A column is either all texts or all numbers, and a whole number that float64 would round is in no column
    with floats, which would make it one.
    """

    def __init__(self, columns: Columns | None = None) -> None:
        self._kinds = {unquote(name): _column_kinds(column) for name, column in (columns or {}).items()}

    def check(self, segments: Iterable[Segment], key: str) -> None:
        """Refuse labels that do not fit their columns.

        Raises
        ------
        ValueError
            Naming run and label.
        """
        new: dict[str, set[str]] = {}
        for name, value in ((name, value) for segment in segments for name, value in segment.labels.items()):
            kinds = new.get(name)
            if kinds is None:
                kinds = new[name] = set(self._kinds.get(name, ()))
            kinds.add(_kind(value))
            where = f"run {shown(key)}: label {shown(name)!r} = {shown(value)!r}"
            if "text" in kinds and len(kinds) > 1:
                elsewhere = "numbers" if isinstance(value, str) else "texts"
                raise ValueError(f"{where}: this column holds {elsewhere} elsewhere; make it one of them")
            if kinds >= {"float", "long"}:
                raise ValueError(
                    f"{where}: this column holds floats and whole numbers that these would round; write them "
                    "as texts, or all as floats"
                )
        columns = len(self._kinds.keys() | new.keys())
        if columns > MAX_LABEL_COLUMNS and not new.keys() <= self._kinds.keys():
            raise ValueError(
                f"run {shown(key)}: the store would have {columns} label columns, expected at most "
                f"{MAX_LABEL_COLUMNS}; make what differs from segment to segment a value, not a name"
            )

    def add(self, segments: Iterable[Segment]) -> None:
        """Note labels that have been checked."""
        for segment in segments:
            for name, value in segment.labels.items():
                self._kinds.setdefault(name, set()).add(_kind(value))


def _kind(value: Label) -> str:
    if isinstance(value, str):
        return "text"
    if isinstance(value, float | np.floating):
        return "float"
    return "whole" if int(float(value)) == int(value) else "long"


def _column_kinds(column: np.ndarray) -> set[str]:
    """Return kinds of the labels of a committed column."""
    if column.dtype.kind != "i":
        return {"text" if column.dtype == np.uint8 else "float"}
    # Only these can be long; they are few enough to be looked at one by one.
    present = column[column != MISSING_INTEGER]
    far = present[(present > EXACT) | (present < -EXACT)].tolist()
    return {"whole", *map(_kind, far)}


class PendingRuns:
    """All runs of a store: the columns of the committed ones, and rows that wait for the next commit.

    Parameters
    ----------
    committed
        {group: {column: array}} of the groups `runs`, `segments` and `labels`, or None for a new store.
    """

    def __init__(self, committed: Mapping[str, Columns] | None = None) -> None:
        self._committed = committed or {"runs": {}, "segments": {}, "labels": {}}
        self._keys: set[str] = set()
        self._runs = self._segments = self._censor_bytes = 0
        if committed is not None:
            self._keys = set(decode_strings(committed["runs"]["key"]).tolist())
            self._runs = len(committed["runs"]["start"])
            self._segments = len(committed["segments"]["run"])
            self._censor_bytes = len(committed["runs"]["censor_bits"])
        self._labels = LabelKinds(self._committed["labels"])
        self._clear()

    def _clear(self) -> None:
        self._new_runs: dict[str, list[Any]] = {name: [] for name in (*RUN_NUMBERS, *RUN_STRINGS)}
        # Something to join where no run has censor bits.
        self._new_censor: list[np.ndarray] = [np.zeros(0, np.uint8)]
        self._new_segments: dict[str, list[int]] = {name: [] for name in SEGMENT_NUMBERS}
        self._new_labels: list[Mapping[str, Label]] = []

    def __len__(self) -> int:
        return self._runs

    @property
    def segments(self) -> int:
        """Number of segments."""
        return self._segments

    def check(
        self,
        *,
        key: str,
        t_r: float,
        censor: np.ndarray | None,
        length: int,
        segments: list[Segment],
        **entities: str,
    ) -> None:
        """Refuse a run that cannot be added.

        Raises
        ------
        StoreError
            If the key is taken.
        ValueError, TypeError
            If an entity, the TR, the censor bits or a label are not usable.
        """
        for name, text in {"key": key, **entities}.items():
            if not isinstance(text, str):
                raise TypeError(f"run {shown(key)}: {name} must be a str, got {type(text).__name__}")
            if not is_utf8(text) or len(text.encode()) > MAX_TEXT_BYTES or "\0" in text:
                raise ValueError(
                    f"run {shown(key)}: {name} must be Unicode text of at most {MAX_TEXT_BYTES} bytes and "
                    "hold no zero byte"
                )
        if not key:
            raise ValueError("key: must not be empty")
        if not math.isfinite(t_r) or t_r <= 0:
            raise ValueError(f"run {shown(key)}: t_r must be a positive number of seconds, got {t_r}")
        if censor is not None and np.shape(censor) != (length,):
            raise ValueError(
                f"run {shown(key)}: censor must have shape [{length}], got {list(np.shape(censor))}"
            )
        self._labels.check(segments, key)
        self.check_new(key)

    def check_new(self, key: str) -> None:
        """Refuse a key that is taken (StoreError)."""
        if key in self._keys:
            raise StoreError(
                f"run {key}: is in the store already; leave it out, give another key=, or write the "
                "store anew with "
                "overwrite=True (--overwrite)"
            )

    def add(
        self, *, key: str, length: int, censor: np.ndarray | None, segments: list[Segment], **others: Any
    ) -> int:
        """Add a run that has been checked; returns its index."""
        run = self._runs
        offset = NO_CENSOR
        if censor is not None:
            packed = np.packbits(np.asarray(censor, bool))
            offset, self._censor_bytes = self._censor_bytes, self._censor_bytes + len(packed)
            self._new_censor.append(packed)
        for name, value in {"key": key, "length": length, "censor": offset, **others}.items():
            self._new_runs[name].append(value)
        for segment in segments:
            self._new_segments["run"].append(run)
            self._new_segments["onset"].append(int(segment.onset))
            self._new_segments["length"].append(int(segment.length))
            self._new_labels.append(segment.labels)
        self._labels.add(segments)
        self._keys.add(key)
        self._runs += 1
        self._segments += len(segments)
        return run

    def merge(self) -> dict[str, dict[str, np.ndarray]]:
        """Return the columns of the groups `runs`, `segments` and `labels`, old and new rows.

        Raises
        ------
        ValueError
            If a label is a number in some segments and a text in others.
        """
        new: dict[str, dict[str, np.ndarray]] = {"runs": {}, "segments": {}, "labels": {}}
        for name, dtype in RUN_NUMBERS.items():
            new["runs"][name] = np.array(self._new_runs[name], dtype)
        for name in RUN_STRINGS:
            new["runs"][name] = encode_strings(self._new_runs[name])
        new["runs"]["censor_bits"] = np.concatenate(self._new_censor)
        for name, dtype in SEGMENT_NUMBERS.items():
            new["segments"][name] = np.array(self._new_segments[name], dtype)
        names = sorted({name for labels in self._new_labels for name in labels})
        for name in names:
            new["labels"][column_name(name)] = _label_column(
                name, [row.get(name) for row in self._new_labels]
            )
        merged = {
            group: {name: _join(self._committed[group].get(name), column) for name, column in columns.items()}
            for group, columns in new.items()
            if group != "labels"
        }
        merged["labels"] = self._merge_labels(new["labels"])
        return merged

    def committed(self, columns: Mapping[str, Columns]) -> None:
        """Note that `columns`, from `merge`, are now on disk."""
        self._committed = columns
        self._clear()

    def _merge_labels(self, new: Columns) -> dict[str, np.ndarray]:
        old = self._committed["labels"]
        before, after = self._segments - len(self._new_labels), len(self._new_labels)
        merged = {}
        for name in sorted({*old, *new}):
            one, other = old.get(name), new.get(name)
            if one is None:
                assert other is not None
                one = _missing(other, before)
            elif other is None:
                other = _missing(one, after)
            if (one.dtype == np.uint8) != (other.dtype == np.uint8):
                raise ValueError(
                    f"label {name!r}: is a text in some runs and a number in others; make it one of them"
                )
            if one.dtype != other.dtype:
                one, other = _as_float(one), _as_float(other)
            merged[name] = _join(one, other)
        return merged


def _join(old: np.ndarray | None, new: np.ndarray) -> np.ndarray:
    """Return rows of `old`, then of `new`; texts [n, bytes] are padded to the longer."""
    if old is None:
        return new
    if old.ndim == 2:
        width = max(old.shape[1], new.shape[1])
        old, new = (np.pad(part, ((0, 0), (0, width - part.shape[1]))) for part in (old, new))
    return np.concatenate([old, new])


def _label_column(name: str, values: list[Label | None]) -> np.ndarray:
    """Return a label as a column: texts as uint8 [n, bytes], whole numbers as int64, others as float64."""
    present = [value for value in values if value is not None]
    if any(isinstance(value, str) for value in present):
        if not all(isinstance(value, str) for value in present):
            raise ValueError(
                f"label {name!r}: is a text in some segments and a number in others; make it one of them"
            )
        return encode_strings(["" if value is None else str(value) for value in values])
    if all(isinstance(value, int | np.integer) for value in present):
        return np.array([MISSING_INTEGER if value is None else int(value) for value in values], "<i8")
    return np.array([math.nan if value is None else float(value) for value in values], "<f8")


def _missing(like: np.ndarray, rows: int) -> np.ndarray:
    """Return `rows` rows without a value, of the kind of `like`."""
    fill = {"u": 0, "i": MISSING_INTEGER, "f": math.nan}[like.dtype.kind]
    return np.full((rows, *like.shape[1:]), fill, like.dtype)


def _as_float(column: np.ndarray) -> np.ndarray:
    """Return a whole-number label column as float64, absent values as NaN."""
    if column.dtype.kind == "f":
        return column
    return np.where(column == MISSING_INTEGER, math.nan, column.astype("<f8"))
