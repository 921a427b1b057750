"""What a decoder named, how good that was, and the files that say so."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainflow.decoding.baselines import BaselineName, flatten, predict_folds
from brainflow.decoding.scores import Interval, Scores, paired_difference, score
from brainflow.decoding.task import DecodingTask


@dataclass(frozen=True, kw_only=True)
class Result:
    """Predictions of one decoder for every window of a task, each from the fold that did not train on it.

    Attributes
    ----------
    name
        What the decoder is called in tables.
    predictions
        int64 `[windows]`, the class named.
    probabilities
        float32 `[windows, classes]`, or None where the decoder has none.
    scores
        See :class:`~brainflow.decoding.scores.Scores`.
    details
        Whatever else is worth keeping, ready for JSON.
    """

    name: str
    predictions: NDArray[np.int64]
    probabilities: NDArray[np.float32] | None
    scores: Scores
    details: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return name, scores and details, ready for JSON."""
        return {"name": self.name, **self.scores.to_dict(), **self.details}


def judge(
    task: DecodingTask,
    name: str,
    predictions: NDArray[np.int64],
    *,
    probabilities: NDArray[np.float32] | None = None,
    details: dict[str, Any] | None = None,
) -> Result:
    """Score a decoder's predictions on a task."""
    scores = score(task.labels, predictions, groups=task.groups, classes=len(task.classes))
    return Result(
        name=name, predictions=predictions, probabilities=probabilities, scores=scores, details=details or {}
    )


def baseline(task: DecodingTask, name: BaselineName) -> Result:
    """Fit a decoder without a pretrained model on the windows and folds of a task."""
    features = flatten(*task.read())
    return judge(task, name, predict_folds(name, features, task.labels, task.folds))


def difference(task: DecodingTask, first: Result, second: Result) -> Interval:
    """Return the accuracy of `first` minus that of `second` with its interval over groups."""
    return paired_difference(
        task.labels, first.predictions, second.predictions, groups=task.groups, classes=len(task.classes)
    )


def write_results(task: DecodingTask, result: Result, baselines: list[Result], folder: Path) -> None:
    """Write the files of a decoding.

    `scores.json` (everything, baselines included), `confusion_matrix.csv`, `predictions.csv` (a row a
    window), and under the published names `test_metrics.csv`, `test_predictions.npy` (class probabilities
    `[windows, classes]`), `test_label_ids.npy` (classes `[windows]`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    scores = result.scores
    summary = {
        "target": task.config.target,
        "split": task.config.split,
        "hrf_shift": task.config.hrf_shift,
        "classes": list(task.classes),
        "windows": len(task.labels),
        "groups": {"kind": task.group_kind, "count": len(np.unique(task.groups))},
        "folds": [fold.name for fold in task.folds],
        "store_snapshot": task.store.snapshot,
        "decoder": result.to_dict(),
        "baselines": [entry.to_dict() for entry in baselines],
    }
    (folder / "scores.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    metrics = {
        "test_accuracy": scores.accuracy.value,
        "test_balanced_accuracy": scores.balanced_accuracy.value,
        "test_macro_f1": scores.macro_f1.value,
    }
    if result.probabilities is not None:
        chosen = result.probabilities[np.arange(len(task.labels)), task.labels]
        metrics["test_loss"] = float(-np.log(np.maximum(chosen, 1e-12)).mean())
        np.save(folder / "test_predictions.npy", result.probabilities)
    np.save(folder / "test_label_ids.npy", task.labels)
    _write_csv(folder / "test_metrics.csv", list(metrics), [list(metrics.values())])
    rows = [[name, *counts] for name, counts in zip(task.classes, scores.confusion.tolist(), strict=True)]
    _write_csv(folder / "confusion_matrix.csv", ["true class", *task.classes], rows)
    windows = [
        [run, subject, task.folds[fold].name, task.classes[label], task.classes[named]]
        for run, subject, fold, label, named in zip(
            task.runs, task.subjects, task.fold_of, task.labels, result.predictions, strict=True
        )
    ]
    _write_csv(folder / "predictions.csv", ["run", "subject", "fold", "label", "prediction"], windows)


def _write_csv(path: Path, header: list[str], rows: list[list[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(header)
        writer.writerows(rows)
