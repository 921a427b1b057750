"""Which part does it: the defaults of pretraining and of decoding, one changed at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from brainflow.decoding.curve import learning_curve
from brainflow.decoding.fit import AdaptConfig
from brainflow.decoding.result import Result, difference
from brainflow.decoding.task import DecodingTask
from brainflow.demo import cohort, story, worth
from brainflow.simulate import Cohort
from brainflow.training.run_dir import saved_config

from .plan import Plan, Row, row

COUNTS = (1, 4, 8)
"""Labelled people."""
PRETRAINING: dict[str, Mapping[str, Any]] = {
    "without linear path": {"linear": False},
    "dense, not next": {"masking": "dense"},
    "amplitude normalised away": {"embedding_norm": True},
    "learned positions": {"positions": "learned", "time_encoding": "table"},
}
"""What is changed → settings of the model."""
DECODING: dict[str, Mapping[str, Any]] = {
    "mean over time, not bins": {"pooling": "mean"},
    "input alone": {"layer": "input"},
    "embedding alone": {"layer": 0},
    "frozen body": {"mode": "linear"},
    "as published": {"published": True},
}
"""What is changed → how it is adapted."""


def ablation_part(plan: Plan, folder: Path, data: str) -> list[Row]:
    """Change one part at a time: on the `story` without the people who test there, or on `order`.

    In the case `ablation/DATA` the metric `PART_N` is the accuracy with N labelled people, `PART_N_costs` how
    much the defaults are above it, on the same windows, people and draws.
    """
    if data == "story":
        people = [person for person in plan.people if person not in plan.test_people]
        tested = people[-len(people) // 3 :]
        store = story.write_store(story.read(), people, folder / "store")
        split, task, steps = story.split(store, tested), story.task(store, tested), plan.story_steps
    else:
        store = cohort.write(folder / "store", Cohort(kind="order"), plan.regime_people)
        split, task, steps = cohort.split(store, plan.regime_people), cohort.task(store), plan.steps
    runs = {
        name: worth.pretrained_on(store, split, folder / name, steps=steps, model=model)
        for name, model in {"defaults": {}, **PRETRAINING}.items()
    }

    last = saved_config(runs["defaults"])["model"]["layers"]
    decoding = {name: AdaptConfig(**settings) for name, settings in DECODING.items()}
    decoding["last states alone"] = AdaptConfig(layer=last)

    def decoders(part: DecodingTask) -> list[Result]:
        ours = {name: worth.adapted(part, [run]) for name, run in runs.items()}
        ours |= {name: worth.adapted(part, [runs["defaults"]], config) for name, config in decoding.items()}
        ours["random weights"] = worth.adapted(part, [runs["defaults"]], scratch=True)
        return [replace(result, name=name) for name, result in ours.items()]

    most = len(np.unique(task.groups[task.folds[0].train]))
    rows = []
    for point in learning_curve(task, [n for n in COUNTS if n <= most], decoders, draws=plan.draws):
        default, *changed = point.results
        rows.append(row(f"ablation/{data}", f"defaults_{point.groups}", default.scores.accuracy))
        for other in changed:
            metric = f"{other.name}_{point.groups}"
            rows.append(row(f"ablation/{data}", metric, other.scores.accuracy))
            rows.append(row(f"ablation/{data}", f"{metric}_costs", difference(point.task, default, other)))
    return rows
