"""Tables of runs and of labelled segments as numpy columns, and the search for the run of a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import Any

import numpy as np

from .errors import StoreError

Label = str | int | float

MISSING_INTEGER = np.iinfo(np.int64).min
RUN_STRINGS = ("dataset", "subject", "session", "task", "run", "key")
NO_CENSOR = -1
_FEW = 2**14  # starts that fit the processor's cache


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A labelled stretch of a run.

    Parameters
    ----------
    onset, length
        In time points (TRs), from the start of the run; `length` is at least 1.
    labels
        Label columns of this segment, such as {"mental_state": "face"}.
    """

    onset: int
    length: int
    labels: Mapping[str, Label] = field(default_factory=dict)


class RunTable:
    """The runs of a store, one numpy column per property; `len(table)` is the number of runs.

    Attributes
    ----------
    start
        int64 [runs], first row in `bold`, ascending.
    length
        int32 [runs], time points.
    end
        int64 [runs], row behind the last one.
    t_r
        float64 [runs], repetition time in seconds.
    slot
        int64 [runs], row of the run in `statistics`.
    dataset, subject, session, task, run, key
        str [runs], decoded when asked for.
    """

    def __init__(self, columns: Mapping[str, np.ndarray]) -> None:
        self._columns = columns
        self.start = columns["start"]
        self.length = columns["length"]
        self.t_r = columns["t_r"]
        self.slot = columns["slot"]
        self.end = self.start + self.length

    @cached_property
    def _intervals(self) -> Intervals:
        return Intervals(self.start)

    def __len__(self) -> int:
        return len(self.start)

    @property
    def dataset(self) -> np.ndarray:
        """Dataset of each run, str [runs]."""
        return decode_strings(self._columns["dataset"])

    @property
    def subject(self) -> np.ndarray:
        """Subject label of each run without `sub-`, str [runs]."""
        return decode_strings(self._columns["subject"])

    @property
    def session(self) -> np.ndarray:
        """Session label of each run or "", str [runs]."""
        return decode_strings(self._columns["session"])

    @property
    def task(self) -> np.ndarray:
        """Task label of each run or "", str [runs]."""
        return decode_strings(self._columns["task"])

    @property
    def run(self) -> np.ndarray:
        """Run label of each run or "", str [runs]."""
        return decode_strings(self._columns["run"])

    @property
    def key(self) -> np.ndarray:
        """Key of each run, unique in the store, str [runs]."""
        return decode_strings(self._columns["key"])

    def to_frame(self) -> Any:
        """Return the table as a pandas DataFrame, one row a run, with the run's number as index.

        Raises
        ------
        ImportError
            If pandas is not installed.
        """
        names = (*RUN_STRINGS, "start", "length", "t_r")
        frame = _pandas().DataFrame({name: getattr(self, name) for name in names})
        frame.index.name = "number"
        return frame

    def key_of(self, run: int) -> str:
        """Return the key of one run, without decoding the others."""
        return self._columns["key"][run].tobytes().rstrip(b"\0").decode(errors="backslashreplace")

    def censor(self, run: int) -> np.ndarray | None:
        """Time points marked as bad by the preparation: bool [length] (True = bad), None if not recorded."""
        offset = int(self._columns["censor"][run])
        if offset == NO_CENSOR:
            return None
        length = int(self.length[run])
        packed = self._columns["censor_bits"][offset : offset + -(-length // 8)]
        return np.unpackbits(packed, count=length).astype(bool)

    def locate(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Run that each window lies in.

        Parameters
        ----------
        starts, lengths
            int64 [windows], absolute first row and number of rows.

        Returns
        -------
        int64 [windows]

        Raises
        ------
        ValueError
            If a window is empty or does not lie inside one run, naming the first such window.
        """
        runs = self.begun(starts) - 1
        self.check(starts, lengths, runs)
        return runs

    def begun(self, rows: np.ndarray) -> np.ndarray:
        """Return how many runs begin at or before each row, int64 [rows]."""
        return self._intervals.begun(rows)

    def check(self, starts: np.ndarray, lengths: np.ndarray, runs: np.ndarray) -> None:
        """Refuse windows that are empty or leave their run.

        Parameters
        ----------
        starts, lengths
            As in `locate`.
        runs
            int64 [windows], the last run that begins at or before each window, -1 if none does.

        Raises
        ------
        ValueError
            Naming the first such window.
        """
        if len(self) == 0:
            if len(starts):
                raise ValueError(
                    f"window 0 (start={starts[0]}, length={lengths[0]}): the store holds no runs"
                )
            return
        good = (lengths > 0) & (runs >= 0) & (starts + lengths <= self.end[runs])
        if not good.all():
            self._refuse(int(np.argmin(good)), starts, lengths, runs)

    def _refuse(self, window: int, starts: np.ndarray, lengths: np.ndarray, runs: np.ndarray) -> None:
        start, length, run = int(starts[window]), int(lengths[window]), int(runs[window])
        where = f"window {window} (start={start}, length={length})"
        if length <= 0:
            raise ValueError(f"{where}: length must be at least 1")
        if run < 0 or start >= self.end[run]:
            raise ValueError(f"{where}: row {start} belongs to no run; take starts from store.runs.start")
        raise ValueError(
            f"{where}: leaves run {run} ({self.key_of(run)}), which has rows {self.start[run]} to "
            f"{self.end[run] - 1}; a window must lie inside one run"
        )


class SegmentTable:
    """The labelled segments of a store; `len(table)` is their number.

    Attributes
    ----------
    run
        int32 [segments], the run that each lies in.
    onset, length
        int32 [segments], in time points from the start of the run.
    columns
        {label column: [segments]}; int64 (absent: -2⁶³), float64 (absent: NaN) or str (absent: "").
    """

    def __init__(self, columns: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray]) -> None:
        self.run = columns["run"]
        self.onset = columns["onset"]
        self.length = columns["length"]
        self.columns = {
            name: decode_strings(values) if values.ndim == 2 else values for name, values in labels.items()
        }

    def __len__(self) -> int:
        return len(self.run)

    def to_frame(self) -> Any:
        """Return the table as a pandas DataFrame, one row a segment; labels that it lacks are missing.

        A label column that is named as one of `run`, `onset`, `length` stands as `label_run`, ….

        Raises
        ------
        ImportError
            If pandas is not installed.
        """
        pandas = _pandas()
        columns: dict[str, Any] = {name: getattr(self, name) for name in ("run", "onset", "length")}
        for name, values in self.columns.items():
            column = pandas.Series(values)
            if values.dtype.kind == "i":
                column = column.astype("Int64").mask(values == MISSING_INTEGER)
            elif values.dtype.kind == "U":
                column = column.mask(values == "")
            columns[f"label_{name}" if name in columns else name] = column
        return pandas.DataFrame(columns)


def _pandas() -> Any:
    try:
        return import_module("pandas")
    except ImportError as error:
        raise ImportError(f"to_frame needs pandas ({error}); pip install 'brainflow-fmri[bids]'") from error


def encode_strings(values: list[str]) -> np.ndarray:
    """Return UTF-8 texts as uint8 [len(values), longest], padded with zero bytes."""
    if not values:
        return np.zeros((0, 1), np.uint8)
    encoded = np.array([value.encode() for value in values], dtype=bytes)
    width = max(1, encoded.dtype.itemsize)
    return encoded.astype(f"S{width}").view(np.uint8).reshape(len(values), width)


def decode_strings(encoded: np.ndarray) -> np.ndarray:
    """Undo `encode_strings`: uint8 [n, width] to str [n].

    Raises
    ------
    StoreError
        If a text is not UTF-8.
    """
    texts = np.ascontiguousarray(encoded).view(f"S{encoded.shape[1]}")[:, 0]
    try:
        # NumPy decodes ASCII only, but all texts at once; `np.char.decode` goes text by text.
        return texts.astype(f"U{encoded.shape[1]}") if len(texts) else np.zeros(0, "U1")
    except UnicodeDecodeError:
        pass
    try:
        return np.char.decode(texts, "utf-8")
    except UnicodeDecodeError as error:
        raise StoreError(
            f"a text of the index is not UTF-8 ({error.object!r:.60}), so it was not written by brainflow; "
            "write the store anew with StoreWriter"
        ) from error


class Intervals:
    """Intervals given by their ascending starts.

    A binary search over a million starts waits a dozen times for memory. A table says for equal stretches of
    numbers, about as many as there are starts, which starts lie in each, so that it waits two or three times.

    Parameters
    ----------
    starts
        int64 [intervals], ascending.
    """

    def __init__(self, starts: np.ndarray) -> None:
        self._starts = starts
        self._table: np.ndarray | None = None
        if len(starts) > _FEW:
            self._first, last = int(starts[0]), int(starts[-1])
            self._shift = max(0, ((last - self._first) // len(starts)).bit_length() - 1)
            bounds = np.arange(self._first, last + (2 << self._shift), 1 << self._shift)
            self._table = starts.searchsorted(bounds).astype(np.int32)
            self._rounds = int(np.diff(self._table).max()).bit_length()

    def begun(self, numbers: np.ndarray) -> np.ndarray:
        """Return how many intervals begin at or before each number: int64 [numbers]."""
        starts, table = self._starts, self._table
        if table is None:
            return starts.searchsorted(numbers, "right")
        stretch = ((numbers - self._first) >> self._shift).clip(0, len(table) - 2)
        low, high = table[stretch].astype(np.int64), table[stretch + 1].astype(np.int64)
        # As many rounds for all as the fullest stretch needs, so that no number has to be told from another.
        for _ in range(self._rounds):
            middle = (low + high) >> 1
            # clip: where the search is over, `middle` may lie behind the last start.
            begun = (starts.take(middle, mode="clip") <= numbers) & (middle < high)
            low, high = np.where(begun, middle + 1, low), np.where(begun, high, np.maximum(middle, low))
        return low
