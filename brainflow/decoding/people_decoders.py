"""Decoders of people: one frozen vector a person, and ridge in closed form.

A person is described by mean and log-SD, over all time points of all their runs, of a model's states. Ridge
reads the target from it; penalty and layer are chosen by leaving people (or sites) out within the training
people of a fold. Confounds are regressed out with weights of the training people, of numbers from both sides.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from brainflow.batch import PackedBatch, Windows, offsets
from brainflow.decoding.adapt import Device, load_module
from brainflow.decoding.baselines import connectomes, covariances, log_variances, tangents
from brainflow.decoding.finetune import EVALUATION_BATCH
from brainflow.decoding.fit import AdaptConfig
from brainflow.decoding.people import PeopleTask
from brainflow.decoding.people_scores import PeopleScores, difference, score_classes, score_numbers
from brainflow.decoding.readout import SMALLEST_VARIANCE, Layer, Readout, read
from brainflow.decoding.result import write_csv
from brainflow.decoding.ridge import Ridge, fit_numbers, fit_ridge
from brainflow.decoding.splits import Fold
from brainflow.devices import resolve_device
from brainflow.pretrained.compatibility import check_fits, check_unseen, longest_window
from brainflow.pretrained.format import read_config
from brainflow.storage.files import write_text

BASELINES = {
    "connectome": "connectome + ridge, no model",
    "tangent": "tangent connectome + ridge, no model",
    "log-variance": "log-variance + ridge, no model",
}
SAME = "the same for everybody"
"""Of numbers what training people have on average (or confounds predict), of classes one of them."""


@dataclass(frozen=True, kw_only=True)
class PeopleResult:
    """What one decoder says of every tested person, each by the fold that did not train on them.

    Attributes
    ----------
    name
        What it is called in tables.
    said
        `[tested]`, deviations from what is expected without the brain, in units of the target; of classes
        logits `[tested, classes]`.
    scores
        See :class:`~brainflow.decoding.people_scores.PeopleScores`.
    details
        Whatever else is worth keeping, ready for JSON.
    """

    name: str
    said: NDArray[np.float64]
    scores: PeopleScores
    details: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return name, scores and details, ready for JSON."""
        return {"name": self.name, **self.scores.to_dict(), **self.details}


@torch.no_grad()
def states_of_people(
    module: Any,
    batches: Iterable[PackedBatch],
    owner: NDArray[np.int64],
    readouts: Sequence[Readout],
) -> list[NDArray[np.float64]]:
    """Return mean and log-SD of a module's states over all time points of each person.

    Parameters
    ----------
    module
        Framework module; put into evaluation mode.
    batches
        Windows that hold each time point of the people once.
    owner
        Position of the person of each window, int64 `[windows]`, in the order of the batches.
    readouts
        Which states; their pooling is "moments".

    Returns
    -------
    list of ndarray
        float64 `[people, 2 · width]` of each readout: means, then log-SDs. The windows' moments are put
        together by the law of total variance, so that it does not matter how the runs were cut.
    """
    module.eval()
    count, begin = int(owner.max()) + 1, 0
    sums = [torch.zeros(count, one.width(module.config), dtype=torch.float64) for one in readouts]
    tokens = torch.zeros(count, 1, dtype=torch.float64)
    # In float64: variances are small differences of these sums.
    for packed in batches:
        rows = torch.from_numpy(owner[begin : begin + len(packed.lengths)])
        length = torch.from_numpy(packed.lengths.astype(np.float64))[:, None]
        tokens.index_add_(0, rows, length)
        for total, vectors in zip(sums, read(module, packed, readouts), strict=True):
            mean, log_spread = vectors.double().cpu().chunk(2, dim=1)
            # `moments` has added the constant to the variance.
            square = (2 * log_spread).exp() - SMALLEST_VARIANCE + mean.square()
            total.index_add_(0, rows, length * torch.cat((mean, square), dim=1))
        begin += len(rows)
    found = []
    for total in sums:
        mean, square = (total / tokens).chunk(2, dim=1)
        # Rounding may leave a little less than 0.
        variance = (square - mean.square()).clamp_min(0) + SMALLEST_VARIANCE
        found.append(torch.cat((mean, variance.log() / 2), dim=1).numpy())
    return found


def cut_runs(lengths: NDArray[Any], longest: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return run and length of windows of nearly equal length, at most `longest`, that tile runs end to end.

    Examples
    --------
    >>> [part.tolist() for part in cut_runs(np.array([7, 3]), 4)]
    [[0, 0, 1], [4, 3, 3]]
    """
    parts = [
        len(part) for length in lengths for part in np.array_split(np.arange(length), -(-length // longest))
    ]
    run = np.repeat(np.arange(len(lengths)), -(-np.asarray(lengths) // longest))
    return run, np.array(parts, dtype=np.int64)


def _batches(
    task: PeopleTask, longest: int, device: torch.device
) -> tuple[Iterator[PackedBatch], NDArray[np.int64]]:
    """Return batches of windows that tile the runs of a task, and the person of each window."""
    runs = task.store.runs
    run, lengths = cut_runs(np.asarray(runs.length)[task.runs], longest)
    first = np.asarray(runs.start, dtype=np.int64)[task.runs[run]]
    within = offsets(lengths)[:-1] - offsets(lengths)[np.searchsorted(run, run)]
    windows = Windows(
        starts=first + within,
        lengths=lengths.astype(np.int32),
        runs=task.runs[run].astype(np.int32),
        t_r=np.asarray(runs.t_r, dtype=np.float64)[task.runs[run]],
        step=0,
    )

    def made() -> Iterator[PackedBatch]:
        for begin in range(0, len(run), EVALUATION_BATCH):
            part = slice(begin, begin + EVALUATION_BATCH)
            chosen = replace(
                windows,
                starts=windows.starts[part],
                lengths=windows.lengths[part],
                runs=windows.runs[part],
                t_r=windows.t_r[part],
            )
            bold = task.store.windows(chosen.starts, chosen.lengths)
            yield PackedBatch.pack(torch.from_numpy(bold.astype(np.float32)), chosen, device=device)

    return made(), task.owner[run]


def adapt_people(
    task: PeopleTask,
    checkpoint: str | os.PathLike[str],
    *,
    scratch: bool = False,
    layer: Layer = None,
    seed: int = 0,
    device: Device = "auto",
    allow_mismatch: bool = False,
    allow_seen: bool = False,
) -> PeopleResult:
    """Judge ridge on a frozen model's states.

    Parameters
    ----------
    task
        People and folds.
    checkpoint
        Directory of a pretrained model.
    scratch
        Take its architecture with fresh weights, drawn from `seed`.
    layer
        Which states, see :class:`~brainflow.decoding.readout.Readout`; None: those that read best whom the
        training people of a fold leave out.
    seed
        Seeds fresh weights.
    device, allow_mismatch, allow_seen
        As in :func:`~brainflow.decoding.adapt.adapt`.

    Raises
    ------
    ValueError
        If the checkpoint does not fit the store, or has seen people whom a split file keeps for the test.
    """
    check_fits(checkpoint, task.store, allow=allow_mismatch)
    saw = [] if scratch else check_unseen(checkpoint, task, allow=allow_seen)
    config = AdaptConfig(mode="linear", pooling="moments", layer=layer, scratch=scratch, seed=seed)
    where = resolve_device(device)
    module = load_module(checkpoint, config, where)
    readouts = config.readouts(module)
    # The longest, for models that know only so many seconds.
    t_r = float(np.asarray(task.store.runs.t_r)[task.runs].max())
    longest = longest_window(read_config(checkpoint), module.config, t_r)
    features = states_of_people(module, *_batches(task, longest, where), readouts)
    result, chosen = _decode(task, config.name, lambda fold: features)
    layers = [readouts[place].layer for place in chosen]
    details = {**result.details, "layers": ["last" if one is None else one for one in layers]}
    return replace(result, details=details if scratch else {**details, "pretraining_saw": saw})


def people_baselines(task: PeopleTask) -> list[PeopleResult]:
    """Judge ridge on connectome, tangent connectome and log-variance, and saying the same of everybody.

    Of a person with several runs these are their averages, weighted by length.
    """
    makers: dict[str, Any] = {
        "connectome": connectomes,
        "tangent": covariances,
        "log-variance": log_variances,
    }
    people = len(task.subjects)
    tokens = np.zeros(people)
    sums: dict[str, Any] = {}
    # Run by run: one of them is in memory at a time.
    for run, person in zip(task.runs, task.owner, strict=True):
        bold = np.asarray(task.store.run(int(run)), dtype=np.float32)
        tokens[person] += len(bold)
        for name, maker in makers.items():
            one = maker(bold, np.array([len(bold)]))[0]
            sums.setdefault(name, np.zeros((people, *one.shape)))[person] += len(bold) * one
    mean = {name: (total.T / tokens).T for name, total in sums.items()}

    def tangent(fold: Fold) -> list[NDArray]:
        # Seen from the training people's mean: that of all would know whom the fold tests.
        return [tangents(mean["tangent"], mean["tangent"][fold.train].mean(axis=0))]

    return [
        _decode(task, "connectome", lambda fold: [mean["connectome"]])[0],
        _decode(task, "tangent", tangent)[0],
        _decode(task, "log-variance", lambda fold: [mean["log-variance"]])[0],
        _decode(task, SAME, lambda fold: [])[0],
    ]


def _decode(
    task: PeopleTask, name: str, features: Callable[[Fold], Sequence[NDArray]]
) -> tuple[PeopleResult, list[int]]:
    """Fit ridge in each fold to those of several features that read left-out training people best.

    Returns the result, and which features each fold took.
    """
    people, classes = len(task.subjects), len(task.classes)
    said = np.zeros((people, max(classes, 1)))
    chosen = []
    for fold in task.folds:
        # A class cannot be freed of confounds; of classes the features alone are.
        target = task.target if classes else task.without_confounds(task.target, fold)
        found = list(features(fold))
        if task.confounds.shape[1]:
            found = [task.without_confounds(x, fold) for x in found]
        # Nothing is read of the brain: what is expected is said.
        if not found:
            continue
        fits = [_fit(task, x, target, fold.train) for x in found]
        losses = [fit.loss for fit in fits]
        place = len(fits) - 1 if np.isnan(losses).any() else int(np.argmin(losses))
        said[fold.test] = fits[place].logits(found[place][fold.test])
        chosen.append(place)
    rows = task.tested
    units = task.units[rows]
    if classes:
        scores = score_classes(task.target[rows], said[rows], units=units)
    else:
        scores = score_numbers((task.target - task.expected)[rows], said[rows, 0], units=units)
    if not classes:
        return PeopleResult(name=name, said=said[rows, 0], scores=scores), chosen
    confusion = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(confusion, (task.target[rows], said[rows].argmax(axis=1)), 1)
    details = {"confusion": confusion.tolist()}
    return PeopleResult(name=name, said=said[rows], scores=scores, details=details), chosen


def _fit(task: PeopleTask, x: NDArray, target: NDArray, train: NDArray[np.int64]) -> Ridge:
    confounds = task.confounds[train] if task.confounds.shape[1] else None
    settings: Any = {"groups": task.units[train], "confounds": confounds}
    if not task.classes:
        return fit_numbers(x[train], target[train], **settings)
    # every class counts alike: where one is rare, naming the other would be right most of the time
    return fit_ridge(x[train], target[train], classes=len(task.classes), balance=True, **settings)


def people_gains(
    task: PeopleTask, pretrained: PeopleResult, scratch: PeopleResult, without: Sequence[PeopleResult]
) -> dict[str, Any]:
    """Return paired differences of R² (of classes, AUC) with intervals over people or units, ready for JSON.

    The opponent among the decoders without a model is the best of them in the test, which favours it.

    Parameters
    ----------
    task
        What all of them were judged on.
    pretrained, scratch
        Ridge on the states of a pretrained model, and of one with fresh weights.
    without
        Decoders without a model.
    """
    best = max(without, key=lambda result: result.scores.main.value)
    units = task.units[task.tested]
    found = {}
    for name, other in (("scratch", scratch), ("best baseline", best)):
        interval = difference(pretrained.scores, other.scores, units=units).to_dict()
        found[f"pretrained - {name}"] = {"of": pretrained.name, "and": other.name, **interval}
    return found


def write_people(
    task: PeopleTask,
    result: PeopleResult,
    others: Sequence[PeopleResult],
    folder: Path,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write `scores.json`, `scores.csv` (a row a decoder) and `predictions.csv` (a row a tested person)."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, store = task.tested, task.store
    split_file: dict[str, Any] = {}
    if task.people is not None:
        split_file = {"split_file": {"path": task.config.split, "checksum": task.people.checksum}}
    summary = {
        "level": "subject",
        "target": task.config.target,
        "kind": "classes" if task.classes else "numbers",
        "classes": list(task.classes),
        "split": task.split_name,
        "people": len(task.subjects),
        "tested": len(rows),
        "left_out": task.left_out,
        "confounds": task.confound_kinds,
        "groups": {"kind": task.unit, "count": len(np.unique(task.units[rows]))},
        "folds": [fold.name for fold in task.folds],
        "store_snapshot": store.snapshot,
        "data": {
            "store": str(store.path),
            "participants": str(task.table),
            "runs": len(task.runs),
            "networks": store.networks,
            "t_r": np.unique(np.asarray(store.runs.t_r)[task.runs]).tolist(),
            **{
                name: store.attributes.get(name)
                for name in ("parcellation", "normalisation", "preprocessing")
            },
        },
        **split_file,
        "decoder": result.to_dict(),
        "baselines": [other.to_dict() for other in others],
        **(extra or {}),
    }
    if "command" in summary:
        write_text(folder / "train_config.json", json.dumps(summary["command"], indent=1) + "\n")
    write_text(folder / "scores.json", json.dumps(summary, indent=1) + "\n")
    names = list(result.scores.intervals)
    header = ["decoder", *(f"{name}{end}" for name in names for end in ("", "_low", "_high")), "p"]
    table = []
    for one in (result, *others):
        ends = [(value.value, value.low, value.high) for value in one.scores.intervals.values()]
        table.append([one.name, *(x for triple in ends for x in triple), one.scores.permutation_p])
    write_csv(folder / "scores.csv", header, table)
    fold_of = {int(row): fold.name for fold in task.folds for row in fold.test}
    people = [[str(task.subjects[row]), fold_of[int(row)], str(task.units[row])] for row in rows]
    if task.classes:
        header = ["label", "prediction", *(f"logit {name}" for name in task.classes)]
        said = [
            [task.classes[task.target[row]], task.classes[int(logits.argmax())], *logits.tolist()]
            for row, logits in zip(rows, result.said, strict=True)
        ]
    else:
        header = ["target", "expected", "prediction"]
        expected = task.expected[rows]
        said = np.stack([task.target[rows], expected, expected + result.said], axis=1).tolist()
    lines = [[*person, *values] for person, values in zip(people, said, strict=True)]
    write_csv(folder / "predictions.csv", ["subject", "fold", "group", *header], lines)
