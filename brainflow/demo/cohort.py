"""Simulated people, to see what more of them would buy: many pretrain, 20 are labelled, 20 test."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from brainflow.data.splits import Split
from brainflow.decoding.task import DecodingTask
from brainflow.demo.worth import people_task, split_people
from brainflow.simulate import Cohort, write_cohort
from brainflow.storage import BoldStore

TARGET = "state"
LABELLED, TESTED = 20, 20
FIRST_LABELLED = 1_000_000
"""Number of the first labelled person: nobody who pretrains has it."""
LABELLED_TIME_POINTS = 600
MOST_VALIDATION = 20


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """A cohort in two stores: `unlabelled` people for pretraining, and `labelled` ones, half of whom test."""

    unlabelled: BoldStore
    labelled: BoldStore

    def split(self, people: int) -> Split:
        """Return the first `people` of those who pretrain; a tenth of them, at least 2, say when to stop."""
        names = [str(name) for name in self.unlabelled.runs.subject][:people]
        judges = max(2, min(MOST_VALIDATION, people // 10))
        return split_people(self.unlabelled, {"train": names[:-judges], "validation": names[-judges:]})

    def task(self) -> DecodingTask:
        """Return the task: 20 people train, 20 test."""
        names = [str(name) for name in self.labelled.runs.subject]
        return people_task(self.labelled, TARGET, names[-TESTED:])


def write(folder: Path, cohort: Cohort, people: int) -> Simulated:
    """Simulate a cohort with `people` for pretraining, and write both of its stores under `folder`."""
    write_cohort(folder / "unlabelled", cohort, people=people, labelled=0, overwrite=True)
    write_cohort(
        folder / "labelled",
        replace(cohort, time_points=LABELLED_TIME_POINTS),
        people=0,
        labelled=LABELLED + TESTED,
        first=FIRST_LABELLED,
        overwrite=True,
    )
    return Simulated(
        unlabelled=BoldStore.open(str(folder / "unlabelled")),
        labelled=BoldStore.open(str(folder / "labelled")),
    )
