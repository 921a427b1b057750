"""How often the 95 % interval of an accuracy holds the truth: only simulated people can tell.

A ridge that was trained once decodes many people; their mean accuracy is the truth. Small groups of them are
drawn as tests, and the share of their intervals that holds the truth is the coverage.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from brainflow.decoding.result import baseline
from brainflow.decoding.scores import score
from brainflow.demo.worth import people_task
from brainflow.simulate import Cohort, write_cohort
from brainflow.storage import BoldStore

from .plan import Plan, Row

TRAINED, GROUPS = 8, (3, 5, 10, 20)
SIZES = {True: (150, 500), False: (400, 2_000)}
"""Decoded people and tests drawn from them, quick and full."""


def coverage_part(plan: Plan, folder: Path) -> list[Row]:
    """Return the coverage of intervals over 3 to 20 tested people: cases `coverage/3` to `coverage/20`."""
    people, tests = SIZES[plan.quick]
    write_cohort(folder / "store", Cohort(kind="order"), people=0, labelled=TRAINED + people)
    store = BoldStore.open(str(folder / "store"))
    task = people_task(store, "state", [str(name) for name in store.runs.subject[TRAINED:]])
    result = baseline(task, "ridge")
    rows, truth = [], result.scores.accuracy.value
    subjects = task.subjects[task.tested]
    labels, named = task.labels[task.tested], result.predictions[task.tested]
    for groups in GROUPS:
        rng = np.random.default_rng(groups)
        held = 0
        for _ in range(tests):
            mine = np.isin(subjects, rng.choice(np.unique(subjects), groups, replace=False))
            # The interval alone is asked for: no p-value, and fewer resamples than in a result.
            found = score(
                labels[mine],
                named[mine],
                groups=subjects[mine],
                classes=len(task.classes),
                permutations=1,
                resamples=500,
            ).accuracy
            held += found.low <= truth <= found.high
        note = f"ridge, order, {tests} tests drawn from {people} people"
        rows.append(Row(case=f"coverage/{groups}", metric="coverage", value=held / tests, note=note))
    return rows
