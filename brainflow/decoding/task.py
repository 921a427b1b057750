"""A decoding task: labelled windows of a store, and the folds that every decoder is judged on."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from brainflow.batch import Windows
from brainflow.data.loader import HostLoader
from brainflow.data.sampler import SegmentSampler
from brainflow.data.splits import Split, SplitWarning, listed
from brainflow.decoding.splits import Fold, make_folds, people_fold, read_split
from brainflow.decoding.windows import ArrayWindows
from brainflow.files import is_number
from brainflow.storage import BoldStore

if TYPE_CHECKING:
    import torch

    from brainflow.batch import PackedBatch

MISSING_INTEGER = np.iinfo(np.int64).min
BACKGROUND = 10_000
"""Time points without labels that are read at most."""
ROWS = 4_096
"""Time points that are compared at once."""


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What is decoded and how it is judged."""

    target: str
    """Label column to decode."""
    split: str = "leave-one-run-out"
    """Which windows test a decoder that the others train: each run once, each subject once
    (`leave-one-subject-out`), `k-fold` over whole subjects (whole runs where there is one subject), or
    `subject-wise`: some subjects train, others choose the weights, others test, as published. Else a file of
    `brainflow split`: its test people test, the others train, and people of no part do neither."""
    folds: int = 5
    """Number of parts of `k-fold`."""
    train_subjects: int | None = None
    """Training subjects of `subject-wise`; by default all that neither validate nor test."""
    validation_subjects: int = 0
    """Validation subjects of `subject-wise`: they choose among the weights of a fit."""
    test_subjects: int | None = None
    """Test subjects of `subject-wise`; by default a fifth of all, at least 1."""
    split_seed: int = 0
    """Deals subjects to the parts of `subject-wise`."""
    hrf_shift: float = 0.0
    """Seconds by which every labelled segment is moved later, to where its BOLD response is (about 3 to 6;
    0 where the store's segments were moved before, as `brainflow prepare` does)."""
    classes: int | tuple[str, ...] | None = None
    """Number or names of the classes that the column must hold; by default what is found there is taken."""


@dataclass(frozen=True, kw_only=True)
class DecodingTask:
    """Labelled windows and their folds; built by :func:`load_task`, read by every decoder.

    Attributes
    ----------
    store
        The open store.
    config
        What was asked for.
    segments
        int64 `[windows]`, rows of `store.segments`.
    labels
        int64 `[windows]`, positions in `classes`.
    classes
        Names of the classes, sorted.
    runs, subjects
        Run key and `dataset/subject` of each window, str `[windows]`.
    folds
        Folds that test each window once (`subject-wise` and split files: the test subjects' windows once,
        others never).
    people
        The split file that the folds come from, if they do.
    move
        Time points by which windows begin later than their segments, as far as their runs go.
    """

    store: BoldStore
    config: TaskConfig
    segments: NDArray[np.int64]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    runs: NDArray
    subjects: NDArray
    folds: list[Fold] = field(default_factory=list)
    people: Split | None = None
    move: int = 0

    @property
    def split_name(self) -> str:
        """What the folds are called in results: of a split file not its path, but what it is."""
        return "split file" if self.people else self.config.split

    @property
    def hrf_shift(self) -> float | None:
        """Seconds from the events to the windows, the store's shift and this task's; None: not known."""
        stored = stored_shift(self.store.attributes)
        return None if stored is None else stored + self.config.hrf_shift

    @property
    def groups(self) -> NDArray:
        """What is resampled for intervals: subjects, or runs where there is one subject."""
        return self.subjects if len(np.unique(self.subjects)) > 1 else self.runs

    @property
    def group_kind(self) -> str:
        """`subject` or `run`: what :attr:`groups` holds."""
        return "subject" if len(np.unique(self.subjects)) > 1 else "run"

    @property
    def fold_of(self) -> NDArray[np.int64]:
        """int64 `[windows]`: the fold that tests each window."""
        result = np.full(len(self.labels), -1, dtype=np.int64)
        for number, fold in enumerate(self.folds):
            result[fold.test] = number
        return result

    @property
    def tested(self) -> NDArray[np.int64]:
        """int64, ascending: the windows that some fold tests."""
        return np.flatnonzero(self.fold_of >= 0)

    @contextmanager
    def loader(
        self,
        windows: NDArray[np.int64],
        *,
        batch: int,
        shuffle: bool,
        seed: int,
        device: torch.device,
        jitter: int = 0,
    ) -> Iterator[Iterator[PackedBatch]]:
        """Open batches of some windows: endless if shuffled, else one pass in order.

        With `jitter`, onsets move by up to so many time points within their run, drawn anew each time.
        """
        sampler = self.sampler(windows, batch=batch, shuffle=shuffle, seed=seed, jitter=jitter)
        loader = HostLoader(self.store, sampler, device=device)
        try:
            yield iter(loader)
        finally:
            loader.close()

    def moved(self, by: int) -> DecodingTask:
        """Return the task with windows that begin `by` time points later, inside their runs."""
        return replace(self, move=self.move + by)

    def sampler(
        self, windows: NDArray[np.int64], *, batch: int, shuffle: bool, seed: int = 0, jitter: int = 0
    ) -> SegmentSampler:
        """Return a sampler over some of the task's windows (positions in `labels`).

        Parameters
        ----------
        windows
            Positions in `labels`.
        batch
            Windows a batch.
        shuffle
            Endless in random order, else one pass.
        seed, jitter
            See :meth:`loader`.
        """
        return MovedSegments(
            self.store,
            jitter=jitter,
            move=self.move,
            segments=self.segments[windows],
            labels=self.labels[windows],
            batch=batch,
            shuffle=shuffle,
            hrf_shift=self.config.hrf_shift,
            seed=seed,
        )

    def read(self) -> tuple[NDArray, NDArray[np.int32]]:
        """Return all windows end to end `[tokens, networks]` and their lengths `[windows]`."""
        windows = self._everything()
        return self.store.windows(windows.starts, windows.lengths), windows.lengths

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Time points of each window, `[windows]`."""
        return self._everything().lengths

    def background(self, fold: Fold | None = None) -> ArrayWindows | None:
        """Return windows without labels, as long as the labelled ones, of people whom a fold does not test.

        None if there are none.

        Parameters
        ----------
        fold
            Left out are runs of which it tests a window, and all runs of people of whom it trains on none;
            of a split file whoever tests, also where `fold` is None.
        """
        runs, length = self.store.runs, int(np.median(self.lengths))
        names = np.array([f"{a}/{b}" for a, b in zip(runs.dataset, runs.subject, strict=True)])
        kept = np.ones(len(runs), dtype=bool)
        if self.people is not None:
            kept &= ~np.isin(names, [name for name, part in self.people.people.items() if part == "test"])
        if fold is not None:
            unseen = np.setdiff1d(self.subjects[fold.test], self.subjects[fold.train])
            kept &= ~(np.isin(runs.key, self.runs[fold.test]) | np.isin(names, unseen))
        counts = np.where(kept, np.asarray(runs.length) // length, 0)
        if not counts.any():
            return None
        owner = np.repeat(np.arange(len(runs)), counts)
        onset = length * np.concatenate([np.arange(count) for count in counts])
        few = min(len(owner), max(1, BACKGROUND // length))
        # Spread evenly: the first ones would be of a few people.
        pick = np.linspace(0, len(owner) - 1, few).astype(int)
        owner, onset = owner[pick], onset[pick]
        starts = np.asarray(runs.start, np.int64)[owner] + onset
        rows = self.store.windows(starts, np.full(few, length, dtype=np.int32))
        return ArrayWindows(list(rows.reshape(few, length, -1)), t_r=np.asarray(runs.t_r)[owner])

    def _everything(self) -> Windows:
        everything = np.arange(len(self.labels))
        return self.sampler(everything, batch=len(everything), shuffle=False).batch(0)


def stored_shift(attributes: Mapping[str, Any]) -> float | None:
    """Return the seconds by which a store's segments were moved for the haemodynamic lag; None: not known.

    Parameters
    ----------
    attributes
        Of the store; `brainflow prepare` writes `preprocessing.hrf_shift`.
    """
    shift: Any = (attributes.get("preprocessing") or {}).get("hrf_shift")
    return float(shift) if is_number(shift) else None


class MovedSegments(SegmentSampler):
    """Segments that begin `move` time points later, give or take up to `jitter`, inside their run.

    The jitter of a window is drawn from the seed and the step.
    """

    def __init__(self, store: BoldStore, *, jitter: int, move: int, **settings: Any) -> None:
        super().__init__(store, **settings)
        self._jitter, self._move = jitter, move
        self._runs = np.asarray(store.runs.start, np.int64), np.asarray(store.runs.length, np.int64)

    def batch(self, step: int) -> Windows:
        """Return the segments of batch `step`."""
        windows = super().batch(step)
        if not self._jitter and not self._move:
            return windows
        # NumPy takes no negative seeds.
        rng = np.random.default_rng([self.seed % 2**64, step])
        moved = windows.starts + self._move
        moved += rng.integers(-self._jitter, self._jitter, len(windows), endpoint=True)
        begin, length = (column[windows.runs] for column in self._runs)
        # At an end of its run a window moves less, so that it keeps its length.
        return replace(windows, starts=np.clip(moved, begin, begin + length - windows.lengths))


def load_task(store: BoldStore, config: TaskConfig, *, allow_mismatch: bool = False) -> DecodingTask:
    """Find the labelled windows of a store and deal them into folds.

    Segments without a value in the target column are left out.

    Parameters
    ----------
    store
        Store with labelled segments.
    config
        What is decoded and how it is judged.
    allow_mismatch
        Move segments that were moved for the haemodynamic lag when the store was prepared once more.

    Raises
    ------
    ValueError
        If there is no such column, it holds fewer than two classes or another number than was asked for, the
        split cannot be made, or segments would be moved twice.
    """
    _check_shift(store, config.hrf_shift, allow=allow_mismatch)
    table = store.segments
    if config.target not in table.columns:
        known = ", ".join(sorted(table.columns)) or "none, no segment is labelled"
        raise ValueError(
            f"target: got {config.target!r}, expected one of the store's label columns ({known})"
        )
    values = np.asarray(table.columns[config.target])
    segments = np.flatnonzero(_present(values)).astype(np.int64)
    people = read_split(config.split)
    everybody = np.array(
        [f"{d}/{s}" for d, s in zip(store.runs.dataset, store.runs.subject, strict=True)], dtype=np.str_
    )
    if people is not None:
        segments = _of_known_people(people, segments, everybody[np.asarray(table.run)[segments]])
    found, labels = np.unique(values[segments], return_inverse=True)
    classes = tuple(_name(value) for value in found)
    if len(classes) < 2:
        raise ValueError(
            f"target: column {config.target!r} holds only {list(classes)}, expected at least 2 classes"
        )
    if config.classes is not None:
        others = {name: _count(column) for name, column in table.columns.items() if name != config.target}
        check_classes(config.classes, classes, origin="classes", column=config.target, others=others)
    run = np.asarray(table.run)[segments]
    subjects = everybody[run]
    runs = np.asarray(store.runs.key, dtype=np.str_)[run]
    labels = labels.astype(np.int64)
    if people is not None:
        folds = [people_fold(people, subjects=subjects, labels=labels, classes=classes)]
    else:
        folds = make_folds(
            config.split,
            runs=runs,
            subjects=subjects,
            labels=labels,
            classes=classes,
            folds=config.folds,
            train_subjects=config.train_subjects,
            validation_subjects=config.validation_subjects,
            test_subjects=config.test_subjects,
            seed=config.split_seed,
        )
    task = DecodingTask(
        store=store,
        config=config,
        segments=segments,
        labels=labels,
        classes=classes,
        runs=runs,
        subjects=subjects,
        folds=folds,
        people=people,
    )
    windows = task.sampler(np.arange(len(labels)), batch=len(labels), shuffle=False).batch(0)
    refuse_copies(store, windows.starts + windows.lengths // 2, runs, folds, what="windows")
    return task


def _check_shift(store: BoldStore, shift: float, *, allow: bool) -> None:
    stored = stored_shift(store.attributes)
    if not stored or not shift or allow:
        return
    raise ValueError(
        f"hrf_shift: got {shift:g} s, but the segments of {store.path} were moved by {stored:g} s already "
        f"(preprocessing.hrf_shift), {stored + shift:g} s in all; leave --hrf-shift out, or prepare the "
        f"store again with another --hrf-shift, or move them by {shift:g} s more with --allow-mismatch"
    )


def _of_known_people(split: Split, segments: NDArray[np.int64], people: NDArray) -> NDArray[np.int64]:
    """Return the segments of people whom a split file knows; say who are the others."""
    known = np.isin(people, list(split.people))
    others = listed(sorted({str(one) for one in people[~known]}))
    if not known.any():
        raise ValueError(
            f"split: the file knows nobody who has labels in this store ({others}); use the split of this "
            "store, or make one with `brainflow split`"
        )
    if not known.all():
        warnings.warn(
            f"split: the file does not know {others}: their "
            "labelled windows neither train nor test. To use them, make a new file: brainflow split STORE "
            "--test OLD.json --out NEW.json",
            SplitWarning,
            stacklevel=3,
        )
    return segments[known]


def refuse_copies(
    store: BoldStore, middle: NDArray[np.int64], runs: NDArray, folds: Sequence[Fold], *, what: str
) -> None:
    """Refuse a fold that tests a copy of what it trains on, as of a subject with two names.

    Parameters
    ----------
    store
        Where both are read.
    middle
        Row of the time point in the middle of each window (or run): these are compared. One with one value in
        all networks is no evidence.
    runs
        Key of the run of each.
    folds
        Positions of what trains and tests.
    what
        "windows" or "runs", for the message.

    Raises
    ------
    ValueError
        Naming the runs.
    """
    content = np.zeros(len(middle), dtype=np.uint64)
    for begin in range(0, len(middle), ROWS):
        part = middle[begin : begin + ROWS]
        for i, row in enumerate(store.windows(part, np.ones(len(part), dtype=np.int32)), start=begin):
            digest = blake2b(row.tobytes(), digest_size=8).digest() if (row != row[0]).any() else b"\0" * 8
            content[i] = int.from_bytes(digest, "little")
    for fold in folds:
        # Whoever chooses among weights has been learnt from, too.
        trained = fold.train if fold.validation is None else np.append(fold.train, fold.validation)
        # 0 stands for no evidence.
        shared = np.setdiff1d(np.intersect1d(content[trained], content[fold.test]), [0])
        if len(shared):
            tested = fold.test[np.isin(content[fold.test], shared)]
            source = trained[content[trained] == content[tested[0]]][0]
            raise ValueError(
                f"store: {len(tested)} of {len(fold.test)} {what} that the fold of {fold.name} tests are "
                f"copies of {what} that it trains on (run {runs[tested[0]]} repeats run "
                f"{runs[source]}), so the score would measure memory; keep one copy of a recording"
            )


def check_classes(
    expected: int | tuple[str, ...],
    found: tuple[str, ...],
    *,
    origin: str,
    column: str,
    others: Mapping[str, int] | None = None,
) -> None:
    """Refuse a label column whose classes are not those expected.

    Parameters
    ----------
    expected
        Number or names of the classes.
    found
        Names of those that the column holds.
    origin
        Who expects them, the first words of the message.
    column
        Name of the label column.
    others
        Number of classes of the store's other label columns, to say which one may be meant.

    Raises
    ------
    ValueError
        Naming the labels that are missing and those that are too many.
    """
    if isinstance(expected, int):
        if expected != len(found):
            raise ValueError(
                f"{origin}: got {expected}, but column {column!r} holds {len(found)}: "
                f"{', '.join(found)}; is this the right label column?"
                + "".join(f" {name!r} holds {n}." for name, n in (others or {}).items() if n == expected)
            )
        return
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    if missing or extra:
        raise ValueError(
            f"{origin}: expected {len(expected)} classes, but column {column!r} holds {len(found)}; missing "
            f"in the column: {', '.join(missing) or 'none'}; not expected: {', '.join(extra) or 'none'}; is "
            "this the right label column?"
        )


def _present(values: NDArray) -> NDArray[np.bool_]:
    """Return which values of a label column are there (a store marks absent ones by type)."""
    if values.dtype.kind == "f":
        return np.isfinite(values)
    if values.dtype.kind in "iu":
        return values != MISSING_INTEGER
    return np.asarray(values, dtype=np.str_) != ""


def _count(values: Any) -> int:
    values = np.asarray(values)
    return len(np.unique(values[_present(values)]))


def _name(value: Any) -> str:
    """Return a class's name: 3.0 in a column of floats is `3`."""
    number = value.item() if isinstance(value, np.generic) else value
    return str(int(number)) if isinstance(number, float) and number.is_integer() else str(number)
