"""Simulated people, to see what more of them would buy: many pretrain, 20 are labelled, 20 test."""

from __future__ import annotations

from pathlib import Path

from brainflow.data.splits import Split
from brainflow.decoding.task import DecodingTask
from brainflow.demo.worth import people_task, split_people
from brainflow.simulate import Cohort, write_cohort
from brainflow.storage import BoldStore

TARGET = "state"
LABELLED, TESTED = 20, 20
MOST_VALIDATION = 20


def write(path: Path, cohort: Cohort, people: int) -> BoldStore:
    """Simulate a cohort of `people` without labels and 40 with labels, and open its store."""
    write_cohort(path, cohort, people=people, labelled=LABELLED + TESTED, overwrite=True)
    return BoldStore.open(str(path))


def split(store: BoldStore, people: int) -> Split:
    """Return the first `people` without labels: a tenth of them, at least 2, say when to stop; others train.

    Whoever has labels is in no training.
    """
    # `write_cohort` puts people without labels first.
    everybody = [str(name) for name in store.runs.subject]
    names, judges = everybody[:people], max(2, min(MOST_VALIDATION, people // 10))
    parts = {
        "train": names[:-judges],
        "validation": names[-judges:],
        "not used": everybody[people:-TESTED],
        "test": everybody[-TESTED:],
    }
    return split_people(store, parts)


def task(store: BoldStore) -> DecodingTask:
    """Return the task: 20 people train, 20 test."""
    return people_task(store, TARGET, [str(name) for name in store.runs.subject][-TESTED:])
