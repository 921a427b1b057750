"""The parts of `bench learning` that pretrain: on the story, and on simulated people."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from brainflow.decoding.adapt import adapt
from brainflow.decoding.curve import Point, learning_curve
from brainflow.decoding.fit import AdaptConfig
from brainflow.decoding.result import Result
from brainflow.decoding.scores import Interval
from brainflow.decoding.task import DecodingTask
from brainflow.demo import cohort, story, worth
from brainflow.pretrained.format import load_pretrained
from brainflow.simulate import Cohort
from brainflow.storage import BoldStore
from brainflow.training.run_dir import saved_config

from . import forecast
from .plan import COUNTS, FIXED, Plan, Row, curve_rows, row

WINDOW, LONG_WINDOW = 30, 196
"""Time points of the windows that are forecast: as in training on average, and four times the longest."""
FITTED = 300
"""People whom the linear predictor of simulated ones is fitted on at most: more do not change it."""


def story_part(plan: Plan, folder: Path, framework: str) -> list[Row]:
    """Pretrain a framework on the story, forecast and decode the people who were not in it.

    The first framework of the plan decodes beside random weights and decoders without a model, in the cases
    `story/N`; what the others decode stands there as a metric of their name.
    """
    store = story.write_store(story.read(), plan.people, folder / "store")
    split = story.split(store, plan.test_people)
    runs = [
        worth.pretrained_on(
            store, split, folder / f"run-{seed}", framework=framework, seed=seed, steps=plan.story_steps
        )
        for seed in range(plan.seeds)
    ]
    tested = [int(run) for run in split.part("test", store.runs)]
    known = [store.run(run) for run in range(len(store.runs)) if run not in tested]
    module, rows = load_pretrained(runs[0]), []
    for before, length in (("", WINDOW), ("long_", LONG_WINDOW)):
        found = forecast.explained(module, known, store, tested, length)
        note = f"{_steps(runs[0])} steps, seed 0, windows of {length} time points"
        rows += [row(f"story/{framework}", before + metric, one, note) for metric, one in found.items()]
    task = story.task(store, plan.test_people)
    return rows + _decoded(plan, "story", task, runs, framework)


def permuted_part(plan: Plan, folder: Path) -> list[Row]:
    """Decode labels of the story that were permuted within each person: everybody has to be at chance."""
    store = story.write_store(story.read(), plan.people, folder / "store")
    run = worth.pretrained_on(
        store,
        story.split(store, plan.test_people),
        folder / "run",
        framework=plan.frameworks[0],
        steps=plan.story_steps,
    )
    task, rng = story.task(store, plan.test_people), np.random.default_rng(0)
    labels = task.labels.copy()
    for person in np.unique(task.subjects):
        windows = np.flatnonzero(task.subjects == person)
        labels[windows] = rng.permutation(labels[windows])
    points = worth.curve(
        replace(task, labels=labels), [run], (FIXED, COUNTS[-1]), draws=plan.draws, without=plan.without
    )
    chance = f"chance is {1 / len(task.classes):.3f}"
    return [replace(one, note=one.note or chance) for one in curve_rows("permuted", points)]


def order_part(plan: Plan, folder: Path, people: int, framework: str) -> list[Row]:
    """Pretrain on so many simulated people whose states are orders, and forecast and decode others.

    With the largest number of people the cases are `order/N`; each number has its rows in `order/people`.
    """
    store = cohort.write(folder / "store", Cohort(kind="order"), plan.order_people[-1])
    runs = _pretrained(plan, folder, store, people, framework)
    forecasts = _forecast(store, people, runs[0])
    note = f"{people} people, {_steps(runs[0])} steps; {FIXED} labelled people"
    of_people = [row("order/people", f"{name}_{people}", one, note) for name, one in forecasts.items()]
    if people != plan.order_people[-1]:
        (point,) = _points(plan, cohort.task(store), runs, [FIXED])
        return [_accuracy("order/people", f"people_{people}", point, note), *of_people]
    rows = _decoded(plan, "order", cohort.task(store), runs, framework)
    rows += [row(f"order/{framework}", name, one, note) for name, one in forecasts.items()]
    if framework == plan.frameworks[0]:
        found = next(r for r in rows if (r.case, r.metric) == (f"order/{FIXED}", "pretrained"))
        rows += [replace(found, case="order/people", metric=f"people_{people}", note=note), *of_people]
    return rows


def steps_part(plan: Plan, folder: Path, share: float) -> list[Row]:
    """Decode orders after a share of the optimizer steps, on the largest number of people."""
    people = plan.order_people[-1]
    store = cohort.write(folder / "store", Cohort(kind="order"), people)
    steps = int((plan.steps or worth.default_run(store, folder / "run").train.steps) * share)
    fewer = replace(plan, steps=steps)
    runs = _pretrained(fewer, folder, store, people, plan.frameworks[0])
    points = _points(plan, cohort.task(store), runs, [FIXED])
    note = f"{people} people; {FIXED} labelled people"
    return [_accuracy("order/steps", f"steps_{steps}", points[0], note)]


def oscillator_part(plan: Plan, folder: Path, kind: str) -> list[Row]:
    """Pretrain on simulated oscillators whose states are `drive` or `regime`, and decode others."""
    people = plan.regime_people
    store = cohort.write(folder / "store", Cohort(kind=kind), people)
    runs = _pretrained(plan, folder, store, people, plan.frameworks[0])
    points = worth.curve(
        cohort.task(store), runs, (FIXED, COUNTS[-1]), draws=plan.draws, without=plan.without
    )
    return [replace(one, note=one.note or f"{people} people") for one in curve_rows(kind, points)]


def transfer_part(plan: Plan, folder: Path) -> list[Row]:
    """Decode at another repetition time than that of pretraining: `transfer/tr`, states as drive."""
    people, steps = plan.regime_people, plan.steps
    slow = cohort.write(folder / "slow", Cohort(kind="drive", t_r=2.0), people)
    fast = cohort.write(folder / "fast", Cohort(kind="drive", t_r=1.0), people)
    task, framework = cohort.task(fast), plan.frameworks[0]
    rows = []
    for metric, store in (("same_tr", fast), ("other_tr", slow)):
        run = worth.pretrained_on(
            store,
            cohort.split(store, people),
            folder / metric,
            framework=framework,
            steps=steps,
        )

        def decoders(part: DecodingTask, run: Path = run, first: bool = metric == "same_tr") -> list[Result]:
            # Random weights know no repetition time: once is enough.
            kinds = (False, True) if first else (False,)
            return [
                # A mismatch is what is measured.
                adapt(part, run, AdaptConfig(scratch=kind), device="cpu", allow_mismatch=True)
                for kind in kinds
            ]

        (point,) = learning_curve(task, [FIXED], decoders, draws=plan.draws)
        for name, result in zip((metric, "scratch"), point.results, strict=False):
            note = f"{people} people at a TR of {2 if metric == 'other_tr' else 1} s, decoded at 1 s"
            rows.append(row("transfer/tr", name, result.scores.accuracy, note))
    return rows


def _pretrained(plan: Plan, folder: Path, store: BoldStore, people: int, framework: str) -> list[Path]:
    return [
        worth.pretrained_on(
            store,
            cohort.split(store, people),
            folder / f"run-{seed}",
            framework=framework,
            seed=seed,
            steps=plan.steps,
        )
        for seed in range(plan.seeds)
    ]


def _decoded(plan: Plan, case: str, task: DecodingTask, runs: list[Path], framework: str) -> list[Row]:
    """Return the rows of a learning curve; of another framework than the first its accuracies alone."""
    most = len(np.unique(task.groups[task.folds[0].train]))
    counts = [count for count in COUNTS if count <= most]
    if framework == plan.frameworks[0]:
        return curve_rows(case, worth.curve(task, runs, counts, draws=plan.draws, without=plan.without))
    points = _points(plan, task, runs, counts)
    return [_accuracy(f"{case}/{point.groups}", framework, point, "pretrained") for point in points]


def _points(plan: Plan, task: DecodingTask, runs: list[Path], counts: list[int]) -> list[Point]:
    """Return the learning curve of the pretrained model alone."""
    return learning_curve(task, counts, lambda part: [worth.adapted(part, runs)], draws=plan.draws)


def _steps(run: Path) -> int:
    return int(saved_config(run)["train"]["steps"])


def _accuracy(case: str, metric: str, point: Point, note: str) -> Row:
    return row(case, metric, point.results[0].scores.accuracy, note)


def _forecast(store: BoldStore, people: int, run: Path) -> dict[str, Interval]:
    """Return how the people who test are forecast, beside a linear predictor fitted on at most `FITTED`."""
    known = [store.run(i) for i in range(min(FITTED, people))]
    tested = range(len(store.runs))[-cohort.TESTED :]
    return forecast.explained(load_pretrained(run), known, store, tested, WINDOW)
