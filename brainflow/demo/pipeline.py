"""Three acts: people who listen to a story, simulated people, one slice of a person who looks at pictures.

Each goes from recordings to a decoder: a store is written, a model is pretrained without labels, and what it
decodes stands beside random weights and decoders without a model.
"""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from brainflow.config import PretrainConfig
from brainflow.data.splits import Split
from brainflow.decoding.adapt import adapt
from brainflow.decoding.baselines import BaselineName
from brainflow.decoding.curve import Point, learning_curve
from brainflow.decoding.fit import AdaptConfig
from brainflow.decoding.result import Result, baseline, difference, write_results
from brainflow.decoding.scores import Interval
from brainflow.decoding.task import DecodingTask, TaskConfig, load_task
from brainflow.demo import cohort, haxby, story, worth
from brainflow.devices import begin_worker
from brainflow.pretrained.compatibility import LeakWarning
from brainflow.pretrained.format import load_pretrained
from brainflow.report.reconstruction import Reconstruction, reconstruct
from brainflow.simulate import Cohort
from brainflow.storage import BoldStore, verify
from brainflow.training.loop import pretrain
from brainflow.training.metrics import read_metrics
from brainflow.training.run_dir import SPLIT

HRF_SHIFT = 5.0
"""Seconds from a picture to the BOLD response it is decoded from: where the canonical response peaks."""
WITHOUT: tuple[BaselineName, ...] = ("ridge", "ridge-spatial")
"""Decoders without a model that are shown."""
SLICE_FOLDS = 6
"""Parts into which the slice's twelve runs are dealt."""
PICTURE_WINDOW = 49
"""Time points of the windows whose reconstruction is measured: the longest that pretraining draws."""
SECONDS = {
    "story": 1,
    "story: pretraining": 57,
    "story: decoding": 56,
    "slice": 1,
    "slice: pretraining": 29,
    "slice: decoding": 48,
    "simulated people": 1,
    "drawing": 2,
}
"""What each stage takes on two cores; only their ratios are used, to tell how far the demo is."""
Say = Callable[[str], None]
Report = Callable[[int, int], None]


class Stages:
    """Where the demo is: it says a line before each stage and reports how far the whole is.

    Parameters
    ----------
    say
        Called with a line before each stage.
    progress
        Called with (units done, units of the whole).
    """

    def __init__(self, say: Say, progress: Report) -> None:
        self._say, self._progress = say, progress
        self._ahead, self._behind, self._units = list(SECONDS), 0, 0

    def begin(self, stage: str, line: str) -> None:
        """Say that a stage begins; all before it are done."""
        while self._ahead and self._ahead[0] != stage:
            self._behind += SECONDS[self._ahead.pop(0)]
        self._units = SECONDS[stage]
        self._tell(0.0)
        self._say(f"{stage}: {line}" if line else stage)

    def within(self, done: int, total: int) -> None:
        """Say that so much of the stage is done."""
        self._tell(done / total)

    def _tell(self, share: float) -> None:
        thousandths = round(1000 * (self._behind + share * self._units))
        self._progress(thousandths, 1000 * sum(SECONDS.values()))


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What the demo does. Sizes are small so that two CPU cores suffice; nothing is tuned to the data."""

    out: Path
    """Folder for everything that the demo writes."""
    seed: int = 0
    """Seeds weights, data order, dropout and resampling."""
    threads: int = 1
    """CPU threads of torch: with one, the figures do not depend on the number of cores. Another number may
    change the last digits."""
    draws: int = 2
    """Draws of the labelled people."""
    people: Sequence[int] = story.PEOPLE
    """People of the story, counted from 0."""
    test_people: Sequence[int] = story.TEST
    """Those of them who test."""
    counts: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Numbers of labelled people of the story."""
    story_steps: int | None = None
    """Optimizer steps of pretraining on the story; by default as `pretrain` chooses."""
    order_people: tuple[int, ...] = (10, 50, 300)
    """Numbers of simulated people who pretrain, ascending."""
    order_count: int = 4
    """Labelled simulated people."""
    order_steps: int = 250
    """Optimizer steps of pretraining on each number of simulated people."""
    slice_steps: int = 100
    """Optimizer steps of pretraining on the slice."""
    adapt_steps: int | None = None
    """Optimizer steps of adaptation; by default as `adapt` takes."""

    @property
    def adapt(self) -> AdaptConfig:
        """How to adapt."""
        return AdaptConfig(steps=self.adapt_steps, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class StoryResult:
    """The first act: a learning curve over labelled people, and the last validation of pretraining."""

    points: list[Point]
    validation: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class OrderResult:
    """The second act.

    Attributes
    ----------
    pretrained
        Number of people who pretrained → result.
    others
        Random weights and decoders without a model.
    gains
        Number of people who pretrained → opponent → paired difference.
    """

    pretrained: dict[int, Result]
    others: list[Result]
    gains: dict[int, dict[str, Interval]]


@dataclass(frozen=True, kw_only=True)
class SliceResult:
    """The third act.

    Attributes
    ----------
    data
        The example data.
    metrics
        Lines of the pretraining's `metrics.jsonl`.
    held_out
        Keys of the runs that pretraining only validated on.
    reconstruction
        What the model predicts of these runs.
    task
        The decoding task.
    decoders
        Results: without a model, from fresh weights, and last the fine-tuned pretrained model.
    gain
        Accuracy of fine-tuning from pretrained minus from fresh weights.
    """

    data: haxby.Haxby
    metrics: list[dict[str, Any]]
    held_out: tuple[str, ...]
    reconstruction: Reconstruction
    task: DecodingTask
    decoders: list[Result]
    gain: Interval

    @property
    def validation(self) -> dict[str, Any]:
        """The last validation line of pretraining."""
        return last_validation(self.metrics)


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """Everything that the demo's tables and page show."""

    config: DemoConfig
    story: StoryResult
    order: OrderResult
    slice: SliceResult


def run_demo(config: DemoConfig, stages: Stages) -> DemoResult:
    """Run the whole demo but for its pictures; everything it writes is under `config.out`.

    Parameters
    ----------
    config
        What to do.
    stages
        Hears how far it is.

    Raises
    ------
    RuntimeError
        If a store that was just written does not verify.
    """
    torch.set_num_threads(config.threads)
    config.out.mkdir(parents=True, exist_ok=True)
    # spawned: what runs here has threads, which a fork would leave behind in the middle of their work
    context, threads = multiprocessing.get_context("spawn"), (config.threads,)
    with ProcessPoolExecutor(1, context, initializer=begin_worker, initargs=threads) as beside:
        others = multiprocessing.active_children()
        order = beside.submit(run_order, config)
        try:
            heard, seen = run_story(config, stages), run_slice(config, stages)
        # Ctrl-C, too, which is no Exception.
        except BaseException:
            # Its work is of no use any more, and leaving the executor would wait minutes for it.
            for process in set(multiprocessing.active_children()).difference(others):
                process.terminate()
            raise
        shown = ", ".join(map(str, config.order_people))
        stages.begin(
            "simulated people", f"{shown} of whom pretrain, and 40 others, in the process beside this one"
        )
        return DemoResult(config=config, story=heard, order=order.result(), slice=seen)


def run_story(config: DemoConfig, stages: Stages) -> StoryResult:
    """Pretrain on people who listen to a story, and decode where in it others are."""
    folder = config.out / "story"
    shown = f"{len(config.people)} people, real fMRI; {len(config.test_people)} of them only test"
    stages.begin("story", shown)
    store = story.write_store(story.read(), config.people, folder / "store")
    _check(store)
    stages.begin("story: pretraining", "labels not used")
    split = story.split(store, config.test_people)
    run = worth.pretrained_on(
        store, split, folder / "run", seed=config.seed, steps=config.story_steps, progress=stages.within
    )
    counts = ", ".join(map(str, config.counts))
    stages.begin("story: decoding", f"by {counts} labelled people, {config.draws} draws")
    task = story.task(store, config.test_people)
    points = worth.curve(
        task,
        [run],
        config.counts,
        draws=config.draws,
        without=WITHOUT,
        config=config.adapt,
        progress=stages.within,
    )
    return StoryResult(points=points, validation=last_validation(read_metrics(run)))


def run_order(config: DemoConfig) -> OrderResult:
    """Pretrain on more and more simulated people, and decode others."""
    folder, most = config.out / "order", config.order_people[-1]
    store = cohort.write(folder / "store", Cohort(kind="order", seed=config.seed), most)
    runs = {}
    for people in config.order_people:
        runs[people] = worth.pretrained_on(
            store,
            cohort.split(store, people),
            folder / f"run-{people}",
            seed=config.seed,
            steps=config.order_steps,
        )

    def decoders(part: DecodingTask) -> list[Result]:
        ours = [  # a curve tells its decoders apart by their names
            replace(worth.adapted(part, [run], config.adapt), name=f"pretrained on {people}")
            for people, run in runs.items()
        ]
        # Random weights take only the architecture of a run: any of them would do.
        fresh = worth.adapted(part, [runs[most]], config.adapt, scratch=True)
        return [*ours, fresh, *(baseline(part, name) for name in WITHOUT)]

    (point,) = learning_curve(cohort.task(store), [config.order_count], decoders, draws=config.draws)
    others = point.results[len(runs) :]
    points = {
        people: replace(point, results=[found, *others])
        # Behind the results of the runs come those of the others.
        for people, found in zip(runs, point.results, strict=False)
    }
    return OrderResult(
        pretrained={people: one.results[0] for people, one in points.items()},
        others=others,
        gains={people: worth.gains(one) for people, one in points.items()},
    )


def run_slice(config: DemoConfig, stages: Stages) -> SliceResult:
    """Pretrain on one slice of one person, map what it predicts, and decode the pictures that were seen."""
    folder = config.out / "slice"
    stages.begin("slice", "real fMRI, Haxby et al. 2001, one participant, 12 runs")
    data = haxby.read()
    haxby.write_store(data, str(folder / "store"))
    store = BoldStore.open(str(folder / "store"))
    _check(store)
    stages.begin("slice: pretraining", f"{config.slice_steps} steps, labels not used")
    chosen = _slice_config(config, store)
    run = pretrain(chosen, resume="never", quiet=True, progress=stages.within)
    held_out = Split.load(run / SPLIT).parts["validation"]
    reconstruction = reconstruct(store, load_pretrained(run), held_out, length=PICTURE_WINDOW)
    # Two runs test at a time: each fold fits two models, and twelve folds would be a third of the demo.
    task = load_task(
        store, TaskConfig(target=haxby.TARGET, split="k-fold", folds=SLICE_FOLDS, hrf_shift=HRF_SHIFT)
    )
    stages.begin("slice: decoding", f"{len(task.classes)} kinds of pictures, each run left out once")
    with warnings.catch_warnings():
        # all runs are of one person, and the notes say which of them pretraining read
        warnings.simplefilter("ignore", LeakWarning)
        fresh = adapt(
            task,
            run,
            replace(config.adapt, scratch=True),
            device="cpu",
            progress=lambda done, total: stages.within(done, 2 * total),
        )
        ours = adapt(
            task,
            run,
            config.adapt,
            device="cpu",
            progress=lambda done, total: stages.within(total + done, 2 * total),
        )
    decoders = [*(baseline(task, name) for name in WITHOUT), fresh, ours]
    write_results(task, ours, decoders[:-1], folder / "decoding")
    return SliceResult(
        data=data,
        metrics=read_metrics(run),
        held_out=held_out,
        reconstruction=reconstruction,
        task=task,
        decoders=decoders,
        gain=difference(task, ours, fresh),
    )


def last_validation(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the last validation among the lines of `metrics.jsonl`."""
    return next(line for line in reversed(metrics) if "val_loss" in line)


def _slice_config(config: DemoConfig, store: BoldStore) -> PretrainConfig:
    """Return the package's defaults with few windows a step: the slice has ten runs to learn from."""
    out = config.out / "slice" / "run"
    found = worth.default_run(store, out, seed=config.seed, steps=config.slice_steps)
    return replace(found, data=replace(found.data, batch_size=16, validation_batches=4))


def _check(store: BoldStore) -> None:
    report = verify(str(store.path))
    if not report.ok:
        raise RuntimeError(f"the store just written is damaged: {'; '.join(report.errors)}")
