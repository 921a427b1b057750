"""Folds for decoding: which labelled windows train a decoder and which test it.

A fold never holds windows of one group (a run, a subject) on both sides; :func:`check_folds` refuses a fold
that does, whoever built it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from brainflow.data.splits import Split
from brainflow.optional import requires
from brainflow.storage.text import counted

with requires("decoding", "report"):
    from sklearn.model_selection import GroupKFold, LeaveOneGroupOut

SplitName = Literal["leave-one-run-out", "leave-one-subject-out", "k-fold", "subject-wise"]


@dataclass(frozen=True, kw_only=True)
class Fold:
    """One fold: positions of the windows that train, that test and, if any, that choose among weights.

    Positions are int64 and ascending.
    """

    name: str
    train: NDArray[np.int64]
    test: NDArray[np.int64]
    validation: NDArray[np.int64] | None = None


def make_folds(
    split: str,
    *,
    runs: NDArray,
    subjects: NDArray,
    labels: NDArray[np.int64],
    classes: Sequence[str],
    folds: int = 5,
    train_subjects: int | None = None,
    validation_subjects: int = 0,
    test_subjects: int | None = None,
    seed: int = 0,
    unit: str = "subject",
) -> list[Fold]:
    """Return the folds of a split.

    Parameters
    ----------
    split
        `leave-one-run-out`: each run tests once. `leave-one-subject-out`: each subject tests once.
        `k-fold`: whole subjects (whole runs where there is one subject) are dealt into `folds` parts.
        `subject-wise`: one fold with so many subjects in each part.
    runs, subjects
        Run and subject of each window, `[windows]`.
    labels
        Class of each window, `[windows]`, positions in `classes`.
    classes
        Names of the classes, for messages.
    folds
        Number of parts of `k-fold`.
    train_subjects, validation_subjects, test_subjects, seed
        Parts of `subject-wise` (all the rest, none, a fifth of all subjects) and the seed of the deal.
    unit
        What messages and folds call a subject, where `subjects` holds something else, as sites.

    Raises
    ------
    ValueError
        If there are too few groups, or a fold would test a class that it never trained on.
    """
    if split not in get_args(SplitName):
        raise ValueError(f"split: got {split!r}, expected one of {', '.join(get_args(SplitName))}")
    if split == "subject-wise":
        return [
            _subject_wise(subjects, labels, classes, train_subjects, validation_subjects, test_subjects, seed)
        ]
    by_subject = split == "leave-one-subject-out" or (split == "k-fold" and len(np.unique(subjects)) > 1)
    groups, unit = (subjects, unit) if by_subject else (runs, "run")
    count = len(np.unique(groups))
    needed = folds if split == "k-fold" else 2
    if needed < 2:
        raise ValueError(f"folds: got {folds}, expected at least 2")
    if count < needed:
        raise ValueError(
            f"split: {split} needs at least {needed} {unit}s with labels, got {count}; "
            "choose another split or label more data"
        )
    # GroupKFold deals by size and draws nothing.
    splitter = GroupKFold(n_splits=folds) if split == "k-fold" else LeaveOneGroupOut()
    result = []
    for number, (train, test) in enumerate(splitter.split(labels, labels, groups)):
        left_out = "+".join(str(group) for group in np.unique(groups[test]))
        name = f"{unit} {left_out}" if split != "k-fold" else f"part {number}"
        fold = Fold(name=name, train=train.astype(np.int64), test=test.astype(np.int64))
        unseen = np.setdiff1d(labels[test], labels[train])
        if len(unseen):
            raise ValueError(
                f"split: the classes {[classes[i] for i in unseen]} stand in {name} alone, so the fold that "
                f"tests it never trains on them; drop them or choose a split other than {split}"
            )
        result.append(fold)
    check_folds(result, groups, unit=unit)
    return result


def _subject_wise(
    subjects: NDArray,
    labels: NDArray[np.int64],
    classes: Sequence[str],
    train: int | None,
    validation: int,
    test: int | None,
    seed: int,
) -> Fold:
    """Deal whole subjects to training, validation and test."""
    names = np.random.default_rng(seed).permutation(np.unique(subjects))
    if test is None:
        test = max(1, len(names) // 5)
    if train is None:
        train = max(1, len(names) - test - validation)
    for name, count, least in (("train", train, 1), ("validation", validation, 0), ("test", test, 1)):
        if count < least:
            raise ValueError(f"{name}_subjects: got {count}, expected at least {least}")
    if train + validation + test > len(names):
        raise ValueError(
            f"split: subject-wise was asked for {train} training, {validation} validation and {test} test "
            f"subjects, but {len(names)} subjects have labels; ask for fewer or choose another split"
        )
    # test and validation come first, so that they stay the same when more subjects train
    parts = np.split(names, [test, test + validation, test + validation + train])
    rows = [np.flatnonzero(np.isin(subjects, part)).astype(np.int64) for part in parts[:3]]
    fold = Fold(
        name=f"{test} subjects", train=rows[2], test=rows[0], validation=rows[1] if validation else None
    )
    return _checked(fold, subjects, labels, classes, "take more training subjects or another split_seed")


def _checked(
    fold: Fold, subjects: NDArray, labels: NDArray[np.int64], classes: Sequence[str], advice: str
) -> Fold:
    """Return the only fold of a split by subject, or say what is wrong with it."""
    unseen = np.setdiff1d(labels[fold.test], labels[fold.train])
    if len(unseen):
        raise ValueError(
            f"split: no training subject has the classes {[classes[i] for i in unseen]} that test subjects "
            f"have; {advice}"
        )
    check_folds([fold], subjects, unit="subject", once=False)
    return fold


def read_split(name: str) -> Split | None:
    """Return the split file that a task names, None if it names a way to make folds.

    Raises
    ------
    ValueError
        If it is neither, or not by subject.
    """
    if name in get_args(SplitName):
        return None
    if not os.path.lexists(name):
        raise ValueError(
            f"split: got {name!r}, expected one of {', '.join(get_args(SplitName))}, or a file of "
            "`brainflow split`"
        )
    split = Split.load(name)
    if split.by != "subject":
        raise ValueError(
            f"split: {name} puts runs into parts, so that one person may stand in several, expected one by "
            "subject; make one with `brainflow split`"
        )
    return split


def people_fold(
    split: Split, *, subjects: NDArray, labels: NDArray[np.int64], classes: Sequence[str]
) -> Fold:
    """Return the one fold of a split file: windows of its test people test, those of the others train.

    Parameters
    ----------
    split
        The split file.
    subjects
        `dataset/subject` of each window, `[windows]`.
    labels, classes
        As in :func:`make_folds`.

    Raises
    ------
    ValueError
        If one side is empty, or a test person has a class that nobody else has.
    """
    train, test = split.sides(subjects)
    name = f"{len(np.unique(subjects[test]))} test subjects"
    fold = Fold(name=name, train=train, test=test)
    return _checked(fold, subjects, labels, classes, "take other test people with `brainflow split`")


def check_folds(folds: Sequence[Fold], groups: NDArray, *, unit: str = "group", once: bool = True) -> None:
    """Refuse folds in which a group stands on both sides, or (with `once`) a window is tested twice or never.

    Parameters
    ----------
    folds
        What trains, tests and chooses.
    groups
        What has to stay on one side, `[windows]`.
    unit
        What messages call a group.
    once
        Whether each window has to be tested exactly once.

    Raises
    ------
    ValueError
        Naming the fold and the groups that leak.
    """
    tested = np.zeros(len(groups), dtype=np.int64)
    for fold in folds:
        leak = np.intersect1d(groups[fold.train], groups[fold.test])
        if fold.validation is not None:
            chosen_by = groups[fold.validation]
            leak = np.union1d(leak, np.intersect1d(chosen_by, groups[fold.test]))
            leak = np.union1d(leak, np.intersect1d(chosen_by, groups[fold.train]))
        if len(leak):
            raise ValueError(
                f"folds: in the fold of {fold.name} the {unit}s {leak.tolist()} are in the training and in "
                f"the test set, so the score would measure memory; keep all windows of a {unit} on one side"
            )
        np.add.at(tested, fold.test, 1)
    if once and (tested != 1).any():
        raise ValueError(
            f"folds: {counted(int((tested == 0).sum()), 'window is', 'windows are')} never tested and "
            f"{int((tested > 1).sum())} more "
            "than once, expected each exactly once"
        )
