"""A task of people: a store joined with a table of participants, and folds in which people stay whole."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainflow.data.splits import Split, listed
from brainflow.decoding.participants import Participants, numbers, read_participants
from brainflow.decoding.ridge import class_balance
from brainflow.decoding.splits import Fold, make_folds, people_fold, read_split
from brainflow.decoding.task import check_classes, refuse_copies
from brainflow.storage import BoldStore

TABLE = "participants.tsv"
SPLITS = ("k-fold", "leave-one-subject-out")
FEW_LEVELS = 10
"""A confound of fewer whole numbers may be a code of categories."""


class ConfoundWarning(UserWarning):
    """A confound may not be what it is taken for; the message says so."""


@dataclass(frozen=True, kw_only=True)
class PeopleConfig:
    """What is decoded of people and how it is judged."""

    target: str
    """Column of the table of participants: numbers are regressed; text, two different values, or anything
    with `classes`, are classes."""
    participants: str | None = None
    """The table; by default `participants.tsv` in the folder in which the store lies."""
    confounds: tuple[str, ...] = ()
    """Columns whose effect is taken away: numbers, or categories (in words, or `Levels` in the sidecar)."""
    split: str | None = None
    """`k-fold` over people (default), `leave-one-subject-out`, or a file of `brainflow split`. With
    `split_by`: each of its values is left out once (default), or `k-fold` over them."""
    split_by: str | None = None
    """Column whose values (sites, families) are kept on one side of each fold, and resampled as a whole."""
    folds: int = 5
    """Number of parts of `k-fold`."""
    classes: int | tuple[str, ...] | None = None
    """Number or names of the classes that the target must hold."""


@dataclass(frozen=True, kw_only=True)
class PeopleTask:
    """People with a target, and the folds that every decoder is judged on; built by :func:`load_people`.

    Attributes
    ----------
    store, config
        The open store, and what was asked for.
    table
        Where the targets come from.
    subjects
        "dataset/subject" of each person, str `[people]`.
    target
        float64 `[people]`; of classes int64, positions in `classes`.
    classes
        Names of the classes; none where numbers are regressed.
    confounds
        float64 `[people, columns]`: numbers, standardised, and indicators of categories.
    confound_kinds
        Confound → "number" or "category of …": how it was taken.
    units, unit
        What is kept whole, str `[people]`, and what it is called: "subject", or the column of `split_by`.
    runs, owner
        Rows of `store.runs` that are read, and the position of their person, int64 `[runs]`.
    left_out
        Why people of the store take no part → how many.
    """

    store: BoldStore
    config: PeopleConfig
    table: Path
    subjects: NDArray
    target: NDArray
    classes: tuple[str, ...]
    confounds: NDArray[np.float64]
    confound_kinds: dict[str, str]
    units: NDArray
    unit: str
    runs: NDArray[np.int64]
    owner: NDArray[np.int64]
    folds: list[Fold]
    people: Split | None = None
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def tested(self) -> NDArray[np.int64]:
        """int64, ascending: the people whom some fold tests."""
        return np.sort(np.concatenate([fold.test for fold in self.folds]))

    @property
    def split_name(self) -> str:
        """What the folds are called in results."""
        if self.people:
            return "split file"
        if self.config.split == "k-fold" or (self.config.split is None and not self.config.split_by):
            return "k-fold" + (f" over {self.unit}s" if self.config.split_by else "")
        return f"leave-one-{self.unit}-out"

    @property
    def expected(self) -> NDArray[np.float64]:
        """What training people have on average, or their confounds predict, of each tested person."""
        found = np.full(len(self.subjects), np.nan)
        for fold in self.folds:
            rest = self.without_confounds(self.target, fold)
            found[fold.test] = (self.target - rest)[fold.test]
        return found

    def without_confounds(self, values: NDArray, fold: Fold) -> NDArray[np.float64]:
        """Return values `[people, …]` less what mean and confounds predict, fitted to the training people.

        Classes count alike.
        """
        design = np.column_stack([np.ones(len(self.subjects)), self.confounds])
        values = np.asarray(values, dtype=np.float64)
        root = np.ones(len(fold.train))
        if self.classes:
            # Rows times the root of their weight: a least-squares fit then weighs them.
            root = np.sqrt(class_balance(self.target[fold.train]))
        known = (values[fold.train].T * root).T
        # By lstsq, because confounds may depend on each other.
        effects = np.linalg.lstsq(root[:, None] * design[fold.train], known, rcond=None)[0]
        rest: NDArray[np.float64] = values - design @ effects
        # what the confounds explain to the last digit is nothing afterwards, not noise of rounding
        size = np.sqrt(np.square(values[fold.train]).mean(axis=0))
        kept = np.sqrt(np.square(rest[fold.train]).mean(axis=0)) > 1e-9 * size
        return np.where(kept, rest, 0.0)


def load_people(store: BoldStore, config: PeopleConfig) -> PeopleTask:
    """Join a store with a table of participants and deal its people into folds.

    People without a row, or with `n/a` in a column that is needed, are left out and counted.

    Raises
    ------
    ValueError
        If table, columns or split cannot be used; the message says how to go on.
    """
    path = _table(store, config.participants)
    everybody = np.array(
        [f"{d}/{s}" for d, s in zip(store.runs.dataset, store.runs.subject, strict=True)], dtype=np.str_
    )
    table = read_participants(path, sorted(set(everybody.tolist())))
    left_out = {f"no row in {path.name}": len(table.absent)}
    needed = {"target": [config.target], "confounds": config.confounds}
    needed["split-by"] = [config.split_by] if config.split_by else []
    texts: dict[str, list[str | None]] = {}
    keep = np.ones(len(table.people), dtype=bool)
    for argument, names in needed.items():
        for name in names:
            texts[name] = table.column(name, argument)
            # Counted once, for the first column that lacks them.
            missing = keep & np.array([text is None for text in texts[name]])
            left_out[f"{name} is n/a"] = int(missing.sum())
            keep &= ~missing
    file = None if config.split in (None, *SPLITS) else read_split(config.split)
    if config.split not in (None, *SPLITS) and (file is None or config.split_by):
        raise ValueError(
            f"split: got {config.split!r} for targets of people"
            + (f" with split-by {config.split_by}" if config.split_by else "")
            + f", expected {', '.join(SPLITS)} or a file of `brainflow split`, which goes without split-by"
        )
    if config.split_by and config.split == "leave-one-subject-out":
        raise ValueError(
            f"split: got leave-one-subject-out with split-by {config.split_by}, whose values are left out in "
            "turn; leave one of them out"
        )
    if file is not None:
        unknown = keep & ~np.isin(table.people, list(file.people))
        left_out["the split file does not know them"] = int(unknown.sum())
        keep &= ~unknown
    rows = np.flatnonzero(keep)
    left_out = {why: count for why, count in left_out.items() if count}
    if len(rows) < 4:
        why = "; ".join(f"{count} left out: {why}" for why, count in left_out.items())
        raise ValueError(f"target: {len(rows)} people have {config.target!r}, expected at least 4 ({why})")
    target, classes = _target(config, table, [str(texts[config.target][row]) for row in rows])
    units = (
        np.array([str(texts[config.split_by][row]) for row in rows])
        if config.split_by
        else table.people[rows]
    )
    subjects = table.people[rows]
    labels = target if classes else np.zeros(len(rows), dtype=np.int64)
    if file is not None:
        folds = [people_fold(file, subjects=subjects, labels=labels, classes=classes)]
    else:
        split = config.split or ("leave-one-subject-out" if config.split_by else "k-fold")
        folds = make_folds(
            split,
            runs=units,
            subjects=units,
            labels=labels,
            classes=classes,
            folds=config.folds,
            unit=config.split_by or "subject",
        )
    place = {person: i for i, person in enumerate(subjects.tolist())}
    owner = np.array([place.get(person, -1) for person in everybody.tolist()], dtype=np.int64)
    runs = np.flatnonzero(owner >= 0)
    runs = runs[np.argsort(owner[runs], kind="stable")]
    texts_of = {name: [str(texts[name][row]) for row in rows] for name in config.confounds}
    made, kinds = _confounds(texts_of, table, folds, by=config.split_by)
    task = PeopleTask(
        store=store,
        config=config,
        table=path,
        subjects=subjects,
        target=target,
        classes=classes,
        confounds=np.column_stack(made) if made else np.zeros((len(rows), 0)),
        confound_kinds=kinds,
        units=units,
        unit=config.split_by or "subject",
        runs=runs,
        owner=owner[runs],
        folds=folds,
        people=file,
        left_out=left_out,
    )
    _check_runs(task)
    for fold in folds:
        needs = task.confounds.shape[1] + 3
        if len(fold.train) < needs:
            raise ValueError(
                f"split: the fold of {fold.name} trains on {len(fold.train)} people, expected at least "
                f"{needs}, 3 and one for each column of confounds; take fewer confounds or another split"
            )
        if not np.any(task.target[fold.train] != task.target[fold.train[0]]):
            raise ValueError(
                f"target: all training people of the fold of {fold.name} have one {config.target}"
            )
    return task


def _table(store: BoldStore, given: str | None) -> Path:
    if given is not None:
        return Path(given)
    path = Path(store.path).absolute().parent / TABLE
    if not path.is_file():
        raise ValueError(
            f"participants: there is no {path}; give the table of people with --participants FILE "
            "(BIDS: a column participant_id, and a column for each target)"
        )
    return path


def _target(
    config: PeopleConfig, table: Participants, texts: list[str]
) -> tuple[NDArray[Any], tuple[str, ...]]:
    """Return the target of each person, and the names of the classes, if it is one of classes."""
    name = config.target
    if name in config.confounds:
        raise ValueError(f"confounds: {name!r} is the target itself, of which nothing would be left")
    found = _numbers(texts, name, "target")
    if config.classes is None and name not in table.levels:
        _refuse_mixture(texts, name, "target", f"or --classes {len(set(texts))} if all of them are classes")
    distinct = len(set(texts)) if found is None else len(np.unique(found))
    if distinct < 2:
        raise ValueError(f"target: everybody has {texts[0]!r} in {name!r}, expected different values")
    if found is not None and config.classes is None and name not in table.levels and distinct > 2:
        return found, ()
    classes = tuple(sorted(set(texts)) if found is None else map(_name, np.unique(found)))
    named = texts if found is None else [_name(value) for value in found]
    if config.classes is not None:
        check_classes(config.classes, classes, origin="classes", column=name)
    labels = np.array([classes.index(text) for text in named], dtype=np.int64)
    few = [f"{c} ({n})" for c, n in zip(classes, np.bincount(labels), strict=True) if n < 2]
    if few:
        raise ValueError(
            f"target: the classes {', '.join(few[:5])} of {name!r} have one person each, expected at least "
            "2; if these are numbers written as text, correct them"
        )
    return labels, classes


def _name(value: float) -> str:
    return repr(float(value)).removesuffix(".0")  # all digits: two numbers are two names


def _refuse_mixture(texts: Sequence[str], name: str, argument: str, otherwise: str) -> None:
    """Refuse a column of which some texts are numbers: with one `NA` or `89+`, ages would be categories."""
    strange = [text for text in texts if numbers([text]) is None]
    if strange and (
        len(strange) < len(texts) or numbers([text.replace(",", ".") for text in texts]) is not None
    ):
        raise ValueError(
            f"{argument}: {name!r} holds numbers, and {listed(sorted(set(strange)))}, which is none; write "
            f"n/a where a value is missing, numbers with a point, {otherwise}"
        )


def _numbers(texts: Sequence[str], name: str, argument: str) -> NDArray[np.float64] | None:
    try:
        return numbers(texts)
    except ValueError as error:
        raise ValueError(f"{argument}: in the column {name!r}: {error}") from None


def _confounds(
    columns: dict[str, list[str]], table: Participants, folds: Sequence[Fold], *, by: str | None
) -> tuple[list[NDArray[np.float64]], dict[str, str]]:
    """Return columns of confounds, and confound → how it was taken.

    Numbers are standardised; categories become an indicator for each but the first.
    """
    made: list[NDArray[np.float64]] = []
    kinds = {}
    for name, texts in columns.items():
        if name == by:
            raise ValueError(
                f"confounds: {name!r} is what --split-by keeps whole, so that the effect of a value that is "
                "tested is unknown; name it in one of them"
            )
        found = None
        if name not in table.levels:
            found = _numbers(texts, name, "confounds")
            where = f"or Levels in {table.path.stem}.json if all of them are categories"
            _refuse_mixture(texts, name, "confounds", where)
        if found is not None:
            kinds[name] = "number"
            codes = np.unique(found)
            # Two codes are the same indicator either way.
            if 2 < len(codes) <= FEW_LEVELS and (codes == np.rint(codes)).all():
                shown = ", ".join(f"{code:g}" for code in codes)
                warnings.warn(
                    f"confounds: {name!r} holds a few whole numbers ({shown}), taken as a quantity; if they "
                    f"stand for categories, name these in words, or as Levels in {table.path.stem}.json",
                    ConfoundWarning,
                    stacklevel=3,
                )
            # Over all people, without a leak: a fit with an offset says the same whatever the scale.
            spread = found.std()
            made.append((found - found.mean()) / (spread if spread > 0 else 1.0))
            continue
        values = np.array(texts)
        kinds[name] = f"category of {len(np.unique(values))}"
        for fold in folds:
            unseen = np.setdiff1d(values[fold.test], values[fold.train])
            if len(unseen):
                raise ValueError(
                    f"confounds: {name!r} is {listed(unseen.tolist())} only among the test people of the "
                    f"fold of {fold.name}, so its effect is unknown; write n/a for these people, or take "
                    "another split"
                )
        made += [(values == value).astype(np.float64) for value in np.unique(values)[1:]]
    return made, kinds


def _check_runs(task: PeopleTask) -> None:
    """Refuse runs that are too short to be read, and test people whose runs are copies of training runs."""
    length = np.asarray(task.store.runs.length, dtype=np.int64)[task.runs]
    keys = np.asarray(task.store.runs.key, dtype=np.str_)[task.runs]
    if length.min() < 3:
        raise ValueError(
            f"store: run {keys[length.argmin()]} has {length.min()} time points, expected at least 3; "
            "remove it from the store"
        )
    middle = np.asarray(task.store.runs.start, dtype=np.int64)[task.runs] + length // 2
    sides = [
        Fold(
            name=fold.name,
            train=np.flatnonzero(np.isin(task.owner, fold.train)),
            test=np.flatnonzero(np.isin(task.owner, fold.test)),
        )
        for fold in task.folds
    ]
    refuse_copies(task.store, middle, keys, sides, what="runs")
