"""What pretraining is worth: windows decoded from pretrained weights, from random ones, without a model.

Everything here goes by the package's defaults: how a model is pretrained and adapted is not chosen here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from brainflow.config import ModelConfig, PretrainConfig, TrainConfig
from brainflow.data.splits import Split
from brainflow.decoding.adapt import adapt
from brainflow.decoding.baselines import BaselineName
from brainflow.decoding.curve import Point, learning_curve
from brainflow.decoding.fit import AdaptConfig
from brainflow.decoding.result import Result, baseline, baselines, difference, judge
from brainflow.decoding.scores import Interval
from brainflow.decoding.splits import Fold, check_folds
from brainflow.decoding.task import DecodingTask, TaskConfig, load_task
from brainflow.storage import BoldStore
from brainflow.training.loop import pretrain
from brainflow.training.sizing import CADENCE, VALIDATIONS, choose


def split_people(store: BoldStore, parts: Mapping[str, Collection[str]]) -> Split:
    """Return a split by the names of people; those who are in no part are in no training.

    Raises
    ------
    ValueError
        If a person stands in two parts.
    """
    keys, names = [str(key) for key in store.runs.key], [str(name) for name in store.runs.subject]
    return Split(
        by="subject",
        seed=0,
        snapshot=store.snapshot,
        parts={
            part: tuple(key for key, name in zip(keys, names, strict=True) if name in people)
            for part, people in parts.items()
        },
        subjects={
            key: f"{dataset}/{name}"
            for key, dataset, name in zip(keys, store.runs.dataset, names, strict=True)
        },
    )


def people_task(store: BoldStore, target: str, tested: Collection[str]) -> DecodingTask:
    """Return a task with one fold: these people's windows test, those of all others train.

    Parameters
    ----------
    store
        Store with labelled segments.
    target
        Label column.
    tested
        Names of the people who test, without their dataset.
    """
    task = load_task(store, TaskConfig(target=target, split="leave-one-subject-out"))
    names = np.array([str(subject).rpartition("/")[2] for subject in task.subjects])
    test = np.isin(names, list(tested))
    fold = Fold(name=f"{len(tested)} people", train=np.flatnonzero(~test), test=np.flatnonzero(test))
    # `once=False`: those who train never test.
    check_folds([fold], task.subjects, unit="subject", once=False)
    return replace(task, folds=[fold])


def pretrained_on(
    store: BoldStore,
    split: Split,
    out: Path,
    *,
    framework: str = "csm",
    seed: int = 0,
    steps: int | None = None,
    model: Mapping[str, Any] = MappingProxyType({}),
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Pretrain as `brainflow pretrain` does on a part of a store's people, and return the run.

    Parameters
    ----------
    store, split
        Whose parts `train` and `validation` are read; nobody else is.
    out
        Folder of the run.
    framework, seed, steps
        As in :func:`default_run`.
    model
        Settings of the model that differ from those.
    progress
        Called with (steps done, steps).
    """
    path = out.with_suffix(".split.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    split.save(path)
    config = default_run(store, out, framework=framework, seed=seed, steps=steps)
    config = replace(config, data=replace(config.data, split=str(path)), model=replace(config.model, **model))
    return pretrain(config, resume="never", quiet=True, progress=progress)


def default_run(
    store: BoldStore, out: Path, *, framework: str = "csm", seed: int = 0, steps: int | None = None
) -> PretrainConfig:
    """Return what `brainflow pretrain` takes for a store on a CPU.

    Parameters
    ----------
    store, out
        The store, and the folder of the run.
    framework
        Which learning framework.
    seed
        Seeds weights, data order and masks.
    steps
        Optimizer steps, with ten validations; by default as many as are chosen for the store.
    """
    train = TrainConfig(seed=seed, plot=False)
    if steps is not None:
        every = max(1, steps // VALIDATIONS)
        train = replace(train, steps=steps, validate_every=every, checkpoint_every=every)
    config = PretrainConfig(
        store=str(store.path), out=str(out), model=ModelConfig(framework=framework), train=train, device="cpu"
    )
    # What is set here `choose` is to leave as it is.
    given = ["model.framework", "train.seed", "train.plot"]
    if steps is not None:
        given += ["train.steps", *CADENCE]
    return choose(config, store, given, cuda=False, resume="never")[0]


def curve(
    task: DecodingTask,
    checkpoints: Sequence[Path],
    counts: Iterable[int],
    *,
    draws: int,
    without: Sequence[BaselineName] | None,
    config: AdaptConfig | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Point]:
    """Return the learning curve of a pretrained model, of random weights, and of decoders without a model.

    Parameters
    ----------
    task
        From :func:`people_task`.
    checkpoints
        Runs that differ in the seed alone: what they say is pooled.
    counts
        Numbers of labelled people.
    draws
        How often these are drawn.
    without
        Decoders without a model; None: all that the windows allow.
    config
        How to adapt; by default as `adapt` does.
    progress
        Called with (draws done, draws) of all counts together.
    """
    numbers, drawn = sorted(set(counts)), 0

    def decoders(part: DecodingTask) -> list[Result]:
        nonlocal drawn
        ours = [adapted(part, checkpoints, config, scratch=scratch) for scratch in (False, True)]
        others = baselines(part) if without is None else [baseline(part, name) for name in without]
        drawn += 1
        progress(drawn, draws * len(numbers))
        return [*ours, *others]

    return learning_curve(task, numbers, decoders, draws=draws)


def adapted(
    task: DecodingTask,
    checkpoints: Sequence[Path],
    config: AdaptConfig | None = None,
    *,
    scratch: bool = False,
) -> Result:
    """Adapt checkpoints, each with a seed of its own, and return what they say as one result.

    Parameters
    ----------
    task
        From :func:`people_task`.
    checkpoints
        Runs that differ in the seed alone.
    config
        How to adapt; by default as `adapt` does.
    scratch
        Take their architecture with fresh weights.
    """
    config = replace(config or AdaptConfig(), scratch=scratch)
    seeds = [
        adapt(task, run, replace(config, seed=config.seed + number), device="cpu")
        for number, run in enumerate(checkpoints)
    ]
    chances: list[Any] = [result.probabilities for result in seeds]
    named = np.concatenate([np.atleast_2d(result.predictions) for result in seeds])
    return judge(task, seeds[0].name, named, probabilities=np.mean(chances, axis=0))


def opponents(point: Point) -> dict[str, Result]:
    """Return what the pretrained model of a point has to beat: `scratch`, `ridge`, and `best`.

    The best decoder without a model is the best in the test, which favours it.
    """
    _, scratch, *without = point.results
    best = max(without, key=lambda result: result.scores.accuracy.value)
    ridge = next(result for result in without if result.name == "ridge")
    return {"scratch": scratch, "ridge": ridge, "best": best}


def gains(point: Point) -> dict[str, Interval]:
    """Return the pretrained model's accuracy minus each opponent's on the same windows, people and draws."""
    return {name: difference(point.task, point.results[0], other) for name, other in opponents(point).items()}
