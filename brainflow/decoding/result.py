"""What a decoder named, how good that was, and the files that say so."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainflow.decoding.baselines import BASELINES, BaselineName, make_features, predict_folds
from brainflow.decoding.cache import keep, recall
from brainflow.decoding.finetune import History
from brainflow.decoding.scores import Calibration, Interval, Scores, calibration, paired_difference, score
from brainflow.decoding.task import DecodingTask
from brainflow.storage.files import replacing, write_text
from brainflow.storage.text import csv_cell, html_table


@dataclass(frozen=True, kw_only=True)
class Result:
    """Predictions of one decoder for every window of a task, each from the fold that did not train on it.

    Attributes
    ----------
    name
        What the decoder is called in tables.
    predictions
        int64 `[windows]` or `[seeds, windows]`, the class named; -1 where no fold tests the window.
    probabilities
        float32 `[windows, classes]`, means over seeds; zeros where no fold tests the window; None where the
        decoder has none.
    scores
        See :class:`~brainflow.decoding.scores.Scores`.
    calibration
        See :class:`~brainflow.decoding.scores.Calibration`; None without probabilities.
    per_subject
        `dataset/subject` → accuracy.
    details
        Whatever else is worth keeping, ready for JSON.
    draws
        Draws of training people that the predictions come from: rows `[draws · seeds, windows]`.
    histories
        (seed, name of the fold, course) of each fit that took optimizer steps.
    """

    name: str
    predictions: NDArray[np.int64]
    probabilities: NDArray[np.float32] | None
    scores: Scores
    calibration: Calibration | None = None
    per_subject: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    histories: list[tuple[int, str, History]] = field(default_factory=list)
    draws: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Return name, scores and details, ready for JSON."""
        calibrated = self.calibration.to_dict() if self.calibration else None
        extra = {"per_subject": self.per_subject, "calibration": calibrated}
        return {"name": self.name, **self.scores.to_dict(), **extra, **self.details}

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        return results_html([self])


def results_html(results: Sequence[Result], title: str = "") -> str:
    """Return a table with one decoder a row, for notebooks."""
    header = ["decoder", "accuracy [95 %]", "chance", "p", "balanced", "macro F1", "ECE"]
    rows = [
        [
            one.name,
            one.scores.accuracy,
            *(f"{value:.3f}" for value in (one.scores.chance, one.scores.permutation_p)),
            *(f"{value.value:.3f}" for value in (one.scores.balanced_accuracy, one.scores.macro_f1)),
            f"{one.calibration.error:.3f}" if one.calibration else "",
        ]
        for one in results
    ]
    return html_table(header, rows, title)


def judge(
    task: DecodingTask,
    name: str,
    predictions: NDArray[np.int64],
    *,
    probabilities: NDArray[np.float32] | None = None,
    details: dict[str, Any] | None = None,
    histories: Sequence[tuple[int, str, History]] = (),
    draws: int = 1,
) -> Result:
    """Score a decoder's predictions on the windows of a task that its folds test.

    Parameters
    ----------
    task
        Labels, groups and folds.
    name
        What the decoder is called in tables.
    predictions
        int64 `[windows]`, or a row for each seed or draw.
    probabilities
        `[windows, classes]`, means over the rows; None where there are none.
    details, histories, draws
        See :class:`Result`.
    """
    rows = task.tested
    labels, named = task.labels[rows], predictions[..., rows]
    scores = score(labels, named, groups=task.groups[rows], classes=len(task.classes), draws=draws)
    hits = np.atleast_2d(named == labels).mean(axis=0)
    subjects = task.subjects[rows]
    return Result(
        name=name,
        predictions=predictions,
        probabilities=probabilities,
        scores=scores,
        calibration=None if probabilities is None else calibration(labels, probabilities[rows]),
        per_subject={str(one): float(hits[subjects == one].mean()) for one in np.unique(subjects)},
        details=details or {},
        histories=list(histories),
        draws=draws,
    )


def baseline(task: DecodingTask, name: BaselineName) -> Result:
    """Fit a decoder without a pretrained model on the windows and folds of a task."""
    return _baseline(task, name, task.read)


def baselines(task: DecodingTask, *, cache: Path | None = None) -> list[Result]:
    """Fit every decoder without a pretrained model that these windows allow.

    With a folder as `cache`, what was fitted to the same windows and folds before is read from there, see
    :mod:`brainflow.decoding.cache`.
    """
    lengths = task.lengths
    left_out = set()
    if lengths.min() < 3:
        left_out |= {"connectome", "tangent", "log-variance"}  # there is nothing to correlate
    if min(np.unique(task.labels[f.train], return_counts=True)[1].min() for f in task.folds) < 2:
        left_out.add("nilearn")  # it chooses its regularisation by cross-validation in the training windows
    # Read once for all of them.
    read = lru_cache(task.read)
    return [_baseline(task, name, read, cache) for name in BASELINES if name not in left_out]


def _baseline(
    task: DecodingTask,
    name: BaselineName,
    read: Callable[[], tuple[NDArray, NDArray[np.int32]]],
    cache: Path | None = None,
) -> Result:
    kept = None if cache is None else recall(cache, task, name)
    if kept is None:
        bold, lengths = read()
        features = make_features(name, bold, lengths, task.store)
        kept = predict_folds(
            name,
            features,
            task.labels,
            task.folds,
            classes=len(task.classes),
            groups=task.groups,
            # Read by ridge alone, whose features are whole time points side by side.
            times=features.shape[1] // bold.shape[1],
        )
        if cache is not None:
            keep(cache, task, name, *kept)
    predictions, chances = kept
    return judge(task, name, predictions, probabilities=chances)


def difference(task: DecodingTask, first: Result, second: Result) -> Interval:
    """Return the accuracy of `first` minus that of `second` with its interval over groups.

    Parameters
    ----------
    task
        What both were judged on.
    first, second
        Results with equally many rows a draw.
    """
    rows = task.tested
    return paired_difference(
        task.labels[rows],
        first.predictions[..., rows],
        second.predictions[..., rows],
        groups=task.groups[rows],
        classes=len(task.classes),
        draws=first.draws,
    )


FEW_GROUPS = 5
"""With fewer an interval is too narrow: of 3 groups it covers 81 % in simulation, of 5 92 %."""


def gains(
    task: DecodingTask, pretrained: Result, scratch: Result, without: Sequence[Result]
) -> dict[str, Any]:
    """Return what pretraining is worth, ready for JSON: paired differences with intervals over groups.

    Parameters
    ----------
    task
        What all of them were judged on.
    pretrained, scratch
        The same way of decoding, from pretrained and from random weights.
    without
        Decoders without a model; the best of them in the test is the opponent, which favours it.
    """
    best = max(without, key=lambda result: result.scores.accuracy.value)
    found = {}
    for name, other in (("scratch", scratch), ("best baseline", best)):
        interval = difference(task, pretrained, other).to_dict()
        found[f"pretrained - {name}"] = {"of": pretrained.name, "and": other.name, **interval}
    return found


def write_results(
    task: DecodingTask,
    result: Result,
    others: list[Result],
    folder: Path,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write the files of a decoding; `extra` stands in `scores.json` too.

    `scores.json` (everything, other decoders included), `scores.csv` (a row a decoder),
    `per_subject.csv`, `confusion_matrix.csv`, `predictions.csv` (a row a tested window and seed), and
    under the published names `test_metrics.csv`, `test_predictions.npy` (class probabilities
    `[windows, classes]`), `test_label_ids.npy` (classes `[windows]`), `train_config.json`,
    `train_history.csv` and, with validation windows, `eval_history.csv` (a row a step of each fit, with its
    seed and fold behind the published columns).

    Parameters
    ----------
    task, result
        What was decoded, and the decoder that the files are about.
    others
        Decoders beside it.
    folder
        Made if absent.
    extra
        Further entries of `scores.json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scores, rows = result.scores, task.tested
    labels = task.labels[rows]
    summary = {
        "target": task.config.target,
        "split": task.split_name,
        "hrf_shift": task.config.hrf_shift,
        "hrf_shift_total": task.hrf_shift,
        "classes": list(task.classes),
        "windows": len(task.labels),
        "tested": len(rows),
        "groups": {"kind": task.group_kind, "count": len(np.unique(task.groups[rows]))},
        "folds": [fold.name for fold in task.folds],
        "store_snapshot": task.store.snapshot,
        "data": _data(task),
        "within_subject": within_subject(task),
        **_split_file(task),
        "decoder": result.to_dict(),
        "baselines": [entry.to_dict() for entry in others],
        **(extra or {}),
    }
    if "command" in summary:
        settings = json.dumps(summary["command"], indent=1)
        write_text(folder / "train_config.json", settings + "\n")
    write_text(folder / "scores.json", json.dumps(summary, indent=1) + "\n")
    metrics = {
        "test_accuracy": scores.accuracy.value,
        "test_balanced_accuracy": scores.balanced_accuracy.value,
        "test_macro_f1": scores.macro_f1.value,
    }
    if result.probabilities is not None:
        chances = result.probabilities[rows]
        chosen = chances[np.arange(len(rows)), labels]
        metrics["test_loss"] = float(-np.log(np.maximum(chosen, 1e-12)).mean())
        _write_array(folder / "test_predictions.npy", chances)
    _write_array(folder / "test_label_ids.npy", labels)
    write_csv(folder / "test_metrics.csv", list(metrics), [list(metrics.values())])
    counts = [[name, *row] for name, row in zip(task.classes, scores.confusion.tolist(), strict=True)]
    write_csv(folder / "confusion_matrix.csv", ["true class", *task.classes], counts)
    per_subject = [[entry.name, *pair] for entry in (result, *others) for pair in entry.per_subject.items()]
    write_csv(folder / "per_subject.csv", ["decoder", "subject", "accuracy"], per_subject)
    header = ["decoder", "accuracy", "low", "high", "balanced_accuracy", "macro_f1", "chance", "p", "ece"]
    write_csv(folder / "scores.csv", header, [_row(entry) for entry in (result, *others)])
    steps = [
        [i + 1, loss, rate, seed, fold]
        for seed, fold, fit in result.histories
        for i, (loss, rate) in enumerate(zip(fit.losses, fit.rates, strict=True))
    ]
    if result.histories:
        write_csv(folder / "train_history.csv", ["step", "loss", "lr", "seed", "fold"], steps)
    checks = [[*check, seed, fold] for seed, fold, fit in result.histories for check in fit.checks]
    if checks:
        write_csv(folder / "eval_history.csv", ["step", "loss", "accuracy", "seed", "fold"], checks)
    named = np.atleast_2d(result.predictions)
    windows = [
        [
            task.runs[row],
            task.subjects[row],
            task.folds[task.fold_of[row]].name,
            seed,
            task.classes[task.labels[row]],
            task.classes[one[row]],
        ]
        for seed, one in enumerate(named)
        for row in rows
    ]
    write_csv(folder / "predictions.csv", ["run", "subject", "fold", "seed", "label", "prediction"], windows)


def within_subject(task: DecodingTask) -> bool:
    """Whether some fold tests a subject of whom it trains on other runs."""
    return any(len(np.intersect1d(task.subjects[f.train], task.subjects[f.test])) for f in task.folds)


def _split_file(task: DecodingTask) -> dict[str, Any]:
    """Return which split file a task was judged by, ready for JSON."""
    if task.people is None:
        return {}
    fold = task.folds[0]
    sides = {"train": fold.train, "test": fold.test}
    people = {name: sorted({str(one) for one in task.subjects[rows]}) for name, rows in sides.items()}
    return {"split_file": {"path": task.config.split, "checksum": task.people.checksum, **people}}


def _data(task: DecodingTask) -> dict[str, Any]:
    """Return what was read, ready for JSON."""
    store, counts = task.store, np.bincount(task.labels, minlength=len(task.classes)).tolist()
    used = np.unique(np.asarray(store.segments.run)[task.segments])
    return {
        "store": str(store.path),
        "datasets": sorted({str(name) for name in np.asarray(store.runs.dataset)[used]}),
        "subjects": len(np.unique(task.subjects)),
        "runs": len(used),
        "networks": store.networks,
        "t_r": np.unique(np.asarray(store.runs.t_r)[used]).tolist(),
        **{name: store.attributes.get(name) for name in ("parcellation", "normalisation", "preprocessing")},
        "windows": dict(zip(task.classes, counts, strict=True)),
    }


def _row(entry: Result) -> list[Any]:
    s = entry.scores
    error = "" if entry.calibration is None else entry.calibration.error
    interval = [s.accuracy.value, s.accuracy.low, s.accuracy.high]
    return [
        entry.name,
        *interval,
        s.balanced_accuracy.value,
        s.macro_f1.value,
        s.chance,
        s.permutation_p,
        error,
    ]


def write_csv(path: Path, header: list[str], rows: list[list[Any]]) -> None:
    """Write a table, whose texts no spreadsheet takes for formulas, in place of a file in one step."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    for row in (header, *rows):
        writer.writerow([csv_cell(cell) if isinstance(cell, str) else cell for cell in row])
    write_text(path, text.getvalue())


def _write_array(path: Path, array: NDArray) -> None:
    with replacing(path) as handle:
        np.save(handle, array)
