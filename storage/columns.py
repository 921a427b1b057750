"""The tables of runs and segments while they grow: checks of each new row, and the columns of a commit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote, unquote

import numpy as np

from .errors import StoreError
from .segments import MISSING_INTEGER, NO_CENSOR, RUN_STRINGS, Label, Segment, decode_strings, encode_strings

MAX_TEXT_BYTES = 255
RUN_NUMBERS = {"start": "<i8", "length": "<i4", "t_r": "<f8", "slot": "<i8", "censor": "<i8"}
SEGMENT_NUMBERS = {"run": "<i4", "onset": "<i4", "length": "<i4"}

Columns = Mapping[str, np.ndarray]


def check_segments(segments: Iterable[Segment], key: str, length: int) -> list[Segment]:
    """The segments of a run, each checked to lie inside it.

    Raises
    ------
    ValueError, TypeError : naming run and segment
    """
    checked = list(segments)
    for i, segment in enumerate(checked):
        if segment.onset < 0 or segment.length < 1 or segment.onset + segment.length > length:
            raise ValueError(
                f"run {key}: segment {i} (onset={segment.onset}, length={segment.length}) does not lie "
                "inside the "
                f"run of {length} time points"
            )
        for name, value in segment.labels.items():
            if not isinstance(value, str | int | float | np.integer | np.floating):
                raise TypeError(
                    f"run {key}: segment {i}: label {name!r} is a {type(value).__name__}, expected str, "
                    "int or float"
                )
            if (
                isinstance(value, int | np.integer)
                and not MISSING_INTEGER < int(value) <= np.iinfo(np.int64).max
            ):
                raise ValueError(f"run {key}: segment {i}: label {name!r} = {value} does not fit 64 bits")
            if isinstance(value, str) and "\0" in value:
                raise ValueError(f"run {key}: segment {i}: label {name!r} holds a zero byte")
    return checked


class PendingRuns:
    """All runs of a store: the columns of the committed ones, and rows that wait for the next commit.

    Parameters
    ----------
    committed : {group: {column: array}} of the groups `runs`, `segments` and `labels`, or None for a new
        store
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
        labels = self._committed["labels"].items()
        self._texts = {unquote(name): column.dtype == np.uint8 for name, column in labels}
        self._clear()

    def _clear(self) -> None:
        self._new_runs: dict[str, list[Any]] = {name: [] for name in (*RUN_NUMBERS, *RUN_STRINGS)}
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
        StoreError : if the key is taken
        ValueError, TypeError : if an entity, the TR, the censor bits or a label are not usable
        """
        for name, text in {"key": key, **entities}.items():
            if not isinstance(text, str):
                raise TypeError(f"run {key}: {name} must be a str, got {type(text).__name__}")
            if len(text.encode()) > MAX_TEXT_BYTES or "\0" in text:
                raise ValueError(
                    f"run {key}: {name} must have at most {MAX_TEXT_BYTES} bytes and no zero byte"
                )
        if not key:
            raise ValueError("key: must not be empty")
        if not math.isfinite(t_r) or t_r <= 0:
            raise ValueError(f"run {key}: t_r must be a positive number of seconds, got {t_r}")
        if censor is not None and np.shape(censor) != (length,):
            raise ValueError(f"run {key}: censor must have shape [{length}], got {list(np.shape(censor))}")
        texts = dict(self._texts)
        for name, value in ((name, value) for segment in segments for name, value in segment.labels.items()):
            if texts.setdefault(name, isinstance(value, str)) != isinstance(value, str):
                raise ValueError(
                    f"run {key}: label {name!r} = {value!r}: this column holds "
                    f"{'texts' if texts[name] else 'numbers'} elsewhere; make it one of them"
                )
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
            self._texts.update((name, isinstance(value, str)) for name, value in segment.labels.items())
        self._keys.add(key)
        self._runs += 1
        self._segments += len(segments)
        return run

    def merge(self) -> dict[str, dict[str, np.ndarray]]:
        """The columns of the groups `runs`, `segments` and `labels`, old and new rows.

        Raises
        ------
        ValueError : if a label is a number in some segments and a text in others
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
            new["labels"][quote(name, safe=" ")] = _label_column(
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
    """Rows of `old`, then of `new`; texts [n, bytes] are padded to the longer."""
    if old is None:
        return new
    if old.ndim == 2:
        width = max(old.shape[1], new.shape[1])
        old, new = (np.pad(part, ((0, 0), (0, width - part.shape[1]))) for part in (old, new))
    return np.concatenate([old, new])


def _label_column(name: str, values: list[Label | None]) -> np.ndarray:
    """A label as a column: texts as uint8 [n, bytes], whole numbers as int64, others as float64."""
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
    """`rows` rows without a value, of the kind of `like`."""
    fill = {"u": 0, "i": MISSING_INTEGER, "f": math.nan}[like.dtype.kind]
    return np.full((rows, *like.shape[1:]), fill, like.dtype)


def _as_float(column: np.ndarray) -> np.ndarray:
    """A whole-number label column as float64, absent values as NaN."""
    if column.dtype.kind == "f":
        return column
    return np.where(column == MISSING_INTEGER, math.nan, column.astype("<f8"))
