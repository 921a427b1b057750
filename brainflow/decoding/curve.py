"""Learning curves: the same folds and test windows, fewer and fewer training subjects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from brainflow.decoding.result import Result, write_csv
from brainflow.decoding.splits import Fold
from brainflow.decoding.task import DecodingTask


@dataclass(frozen=True, kw_only=True)
class Point:
    """One point: the decoder, its training groups a fold, and its result."""

    groups: int
    result: Result


def learning_curve(
    task: DecodingTask,
    counts: Sequence[int],
    decoders: Callable[[DecodingTask], Sequence[Result]],
    *,
    seed: int = 0,
) -> list[Point]:
    """Judge decoders that are trained on few groups: subjects, or runs where there is one subject.

    The groups of a smaller count are among those of a larger one, and every point tests the same windows.

    Parameters
    ----------
    task
        Full task.
    counts
        Numbers of training groups.
    decoders
        Judges them all on a task.
    seed
        Draws the groups of each fold.

    Raises
    ------
    ValueError
        If a count is larger than the number of training groups of a fold.
    """
    # every count is checked before the first fit
    reduced_tasks = [(count, reduce_task(task, count, seed=seed)) for count in sorted(set(counts))]
    return [
        Point(groups=count, result=result) for count, reduced in reduced_tasks for result in decoders(reduced)
    ]


def reduce_task(task: DecodingTask, count: int, *, seed: int = 0) -> DecodingTask:
    """Return the task with `count` training groups in each fold."""
    folds = []
    for number, fold in enumerate(task.folds):
        groups = task.groups[fold.train]
        names = np.unique(groups)
        if not 1 <= count <= len(names):
            raise ValueError(
                f"learning_curve: got {count} training {task.group_kind}s, expected 1 to {len(names)}, the "
                f"training {task.group_kind}s of the fold of {fold.name}"
            )
        order = np.random.default_rng([seed, number]).permutation(names)
        train = fold.train[np.isin(groups, order[:count])]
        if len(np.unique(task.labels[train])) < 2:
            raise ValueError(
                f"learning_curve: {count} training {task.group_kind}s hold fewer than 2 classes in the fold "
                f"of {fold.name}; begin with more"
            )
        folds.append(Fold(name=fold.name, train=train, test=fold.test, validation=fold.validation))
    return replace(task, folds=folds)


def curve_dict(task: DecodingTask, points: Sequence[Point]) -> dict[str, Any]:
    """Return a curve ready for JSON."""
    return {
        "unit": task.group_kind,
        "interval_over": f"{task.group_kind}s",
        "points": [
            {
                "decoder": point.result.name,
                "train": point.groups,
                **point.result.to_dict()["accuracy"],
                "chance": point.result.scores.chance,
            }
            for point in points
        ],
    }


def write_curve(curve: dict[str, Any], path: Path) -> None:
    """Write `learning_curve.csv`: a row a point with its 95 % interval."""
    header = ["decoder", f"train_{curve['unit']}s", "accuracy", "low", "high", "chance"]
    keys = ("decoder", "train", "value", "low", "high", "chance")
    write_csv(path, header, [[point[key] for key in keys] for point in curve["points"]])
