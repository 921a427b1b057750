"""The story: 24 people listen to the same recording, and its time is the label.

Simony et al. 2016 (Nature Communications 7:12141), 300 volumes at 1.5 s, 100 spatial factors. The task:
which of 13 segments of 20 volumes is this window? People 1–16 pretrain and are labelled; 17–24 test and are
never in pretraining. Licence and credit: `demo_data/pieman`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.resources import as_file, files

import numpy as np
from numpy.typing import NDArray

from brainflow.data.splits import Split
from brainflow.decoding.task import DecodingTask
from brainflow.demo.worth import people_task, split_people
from brainflow.storage import BoldStore, Segment, StoreWriter

T_R = 1.5
"""Seconds between volumes."""
PEOPLE, TEST = range(24), range(16, 24)
"""All people, and those who test, counted from 0."""
TARGET = "segment"
FIRST, LENGTH, SEGMENTS = 20, 20, 13
"""Volume where the first segment begins, volumes of each, their number."""
VALIDATION = 2
"""How many of the people who pretrain say when to stop."""


def read() -> NDArray[np.float32]:
    """Return what ships with the package, z-scored by person and network: [people, volumes, networks].

    Raises
    ------
    ValueError
        If the installed file is damaged.
    """
    shipped = files("brainflow") / "demo_data" / "pieman" / "pieman24.npz"
    with as_file(shipped) as path, np.load(path, allow_pickle=False) as arrays:
        # Shipped as float16, in which sums over 300 volumes would be rounded.
        bold = arrays["bold"].astype(np.float64)
    if bold.shape != (len(PEOPLE), 300, 100) or not np.isfinite(bold).all():
        raise ValueError(
            f"pieman24.npz: got an array of shape {bold.shape}, expected finite values [24, 300, 100]; the "
            "installed file is damaged, install the package again"
        )
    bold -= bold.mean(axis=1, keepdims=True)
    bold /= bold.std(axis=1, keepdims=True)
    return bold.astype(np.float32)


def name(person: int) -> str:
    """Return what a store calls a person, counted from 0: `01` to `24`."""
    return f"{person + 1:02d}"


def write_store(bold: NDArray[np.float32], people: Sequence[int], path: str | os.PathLike[str]) -> BoldStore:
    """Write some of the people as a store, a run each, with the segments of the story, and open it."""
    segments = [
        Segment(onset=FIRST + LENGTH * i, length=LENGTH, labels={TARGET: f"part-{i + 1:02d}"})
        for i in range(SEGMENTS)
    ]
    with StoreWriter.create(
        path,
        networks=bold.shape[2],
        parcellation="100 spatial factors (Simony et al. 2016)",
        normalisation="z-scored per run and network",
        overwrite=True,
    ) as writer:
        for person in people:
            writer.append(
                bold[person], t_r=T_R, dataset="pieman", subject=name(person), task="story", segments=segments
            )
    return BoldStore.open(str(path))


def split(store: BoldStore, test: Sequence[int]) -> Split:
    """Return the people of a store who pretrain, who say when to stop, and who test."""
    tested = {name(person) for person in test}
    rest = sorted({str(subject) for subject in store.runs.subject} - tested)
    parts = {"train": rest[:-VALIDATION], "validation": rest[-VALIDATION:], "test": tested}
    return split_people(store, parts)


def task(store: BoldStore, test: Sequence[int]) -> DecodingTask:
    """Return the task with one fold: the named people test, all others train."""
    return people_task(store, TARGET, [name(person) for person in test])
