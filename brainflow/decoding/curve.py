"""Learning curves: the same folds and test windows, fewer and fewer training subjects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from brainflow.decoding.result import FEW_GROUPS, Result, gains, judge, results_html, write_csv
from brainflow.decoding.splits import Fold
from brainflow.decoding.task import DecodingTask
from brainflow.storage.text import counted


@dataclass(frozen=True, kw_only=True)
class Point:
    """One point: the task with few training groups, their number, and the decoders' results on it."""

    groups: int
    task: DecodingTask
    results: list[Result]

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        return results_html(self.results, counted(self.groups, f"training {self.task.group_kind}"))


def learning_curve(
    task: DecodingTask,
    counts: Sequence[int],
    decoders: Callable[[DecodingTask], Sequence[Result]],
    *,
    draws: int = 1,
    seed: int = 0,
) -> list[Point]:
    """Judge decoders that are trained on few groups: subjects, or runs where there is one subject.

    Within a draw the groups of a smaller count are among those of a larger one, and every point tests the
    same windows. What several draws say is pooled, and intervals hold for other draws, too.

    Parameters
    ----------
    task
        Full task.
    counts
        Numbers of training groups.
    decoders
        Judges them all on a task, in the same order each time.
    draws
        How often the training groups of each count are drawn; once where a count takes all of them.
    seed
        Draws the groups of each fold.

    Raises
    ------
    ValueError
        If a count is larger than the number of training groups of a fold, or `draws` is below 1.
    """
    if draws < 1:
        raise ValueError(f"draws: got {draws}, expected at least 1")
    # every count is checked before the first fit
    reduced = {
        count: [reduce_task(task, count, seed=seed, draw=draw) for draw in range(draws)]
        for count in sorted(set(counts))
    }
    for count, tasks in reduced.items():
        # Who takes everybody draws the same people each time: copies of one fit are not several draws.
        if all(len(np.unique(task.groups[fold.train])) == count for fold in task.folds):
            del tasks[1:]
    judged: dict[int, list[list[Result]]] = {count: [] for count in reduced}
    # Draw by draw, because counts differ in what they take: after the first draw it is known what is left.
    for draw in range(draws):
        for count, tasks in reduced.items():
            judged[count] += [list(decoders(one)) for one in tasks[draw : draw + 1]]
    points = []
    for count, tasks in reduced.items():
        # one that needs two windows of a class, as nilearn's, may be missing in a draw: then it is left out
        named = [{result.name: result for result in one} for one in judged[count]]
        shared = [name for name in named[0] if all(name in one for one in named)]
        # Of the full task: all draws test the same windows.
        results = [_pooled(task, [one[name] for one in named]) for name in shared]
        points.append(Point(groups=count, task=tasks[0], results=results))
    return points


def _pooled(task: DecodingTask, draws: Sequence[Result]) -> Result:
    """Return what several draws of the training groups say, as one result."""
    if len(draws) == 1:
        return draws[0]
    known: list[Any] = [result.probabilities for result in draws]
    chances = None if any(one is None for one in known) else np.mean(known, axis=0)
    return judge(
        task,
        draws[0].name,
        np.concatenate([np.atleast_2d(result.predictions) for result in draws]),
        probabilities=chances,
        details=draws[0].details,
        draws=len(draws),
    )


def reduce_task(task: DecodingTask, count: int, *, seed: int = 0, draw: int = 0) -> DecodingTask:
    """Return the task with `count` training groups in each fold.

    Parameters
    ----------
    task
        Full task.
    count
        Training groups in each fold.
    seed, draw
        Draw them; the groups of a smaller count are among those of a larger one.

    Raises
    ------
    ValueError
        If a fold has fewer training groups, or those drawn hold fewer than two classes.
    """
    folds = []
    for number, fold in enumerate(task.folds):
        groups = task.groups[fold.train]
        names = np.unique(groups)
        if not 1 <= count <= len(names):
            raise ValueError(
                f"learning_curve: got {count} training {task.group_kind}s, expected 1 to {len(names)}, the "
                f"training {task.group_kind}s of the fold of {fold.name}"
            )
        # The count is no part of the seed: whom a smaller one takes, a larger one takes, too.
        order = np.random.default_rng([seed, draw, number]).permutation(names)
        train = fold.train[np.isin(groups, order[:count])]
        if len(np.unique(task.labels[train])) < 2:
            raise ValueError(
                f"learning_curve: {count} training {task.group_kind}s hold fewer than 2 classes in the fold "
                f"of {fold.name}; begin with more"
            )
        folds.append(Fold(name=fold.name, train=train, test=fold.test, validation=fold.validation))
    return replace(task, folds=folds)


def curve_dict(
    task: DecodingTask, points: Sequence[Point], *, draws: int = 1, pair: bool = False
) -> dict[str, Any]:
    """Return a curve ready for JSON.

    With `pair` the results begin with a pretrained and a fresh model: `gains` then holds their paired
    difference and that from the best decoder without a model, by number of training groups.
    """
    rows = [(point.groups, result) for point in points for result in point.results]
    tested = len(np.unique(task.groups[task.tested]))
    return {
        "unit": task.group_kind,
        "interval_over": f"{task.group_kind}s" + (" and draws of training ones" if draws > 1 else ""),
        "draws": draws,
        "tested": tested,
        "too_narrow": tested < FEW_GROUPS,
        "points": [
            {
                "decoder": result.name,
                "train": groups,
                **result.to_dict()["accuracy"],
                "chance": result.scores.chance,
            }
            for groups, result in rows
        ],
        "gains": {
            str(point.groups): gains(point.task, point.results[0], point.results[1], point.results[2:])
            for point in points
            if pair
        },
    }


def write_curve(curve: dict[str, Any], path: Path) -> None:
    """Write `learning_curve.csv`: a row a point with its 95 % interval."""
    header = ["decoder", f"train_{curve['unit']}s", "accuracy", "low", "high", "chance"]
    keys = ("decoder", "train", "value", "low", "high", "chance")
    write_csv(path, header, [[point[key] for key in keys] for point in curve["points"]])
