"""Published architectures on the story: those of ml4fmri (PyPI, extra `bench`), trained as it trains them.

Each has its own learning rate, batches and scaling; the two people who say when our pretraining stops say
when theirs does. They see the windows and people of `story/16`.
"""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from brainflow.decoding.result import judge
from brainflow.demo import story

from .baselines import missing
from .plan import Plan, Row, row

PACKAGE = "ml4fmri"
FAST = ("LR", "meanMLP", "MILC", "LSTM", "meanLSTM", "Transformer")
SLOW = ("meanTransformer", "BNT", "BrainNetCNN", "FBNetGen", "DICE", "Glacier", "BolT")
EPOCHS = 100


def peers_part(plan: Plan, folder: Path, name: str) -> list[Row]:
    """Train one architecture on all labelled people of the story: case `peers/NAME`."""
    reason = missing(PACKAGE)
    if reason:
        print(f"peers/{name}: left out, {PACKAGE} {reason}: extra `bench`", file=sys.stderr, flush=True)
        return []
    store = story.write_store(story.read(), plan.people, folder / "store")
    task = story.task(store, plan.test_people)
    bold, lengths = task.read()
    windows = bold.reshape(len(lengths), story.LENGTH, store.networks)
    (fold,) = task.folds
    people = np.unique(task.subjects[fold.train])
    judges = np.isin(task.subjects[fold.train], people[-story.VALIDATION :])
    parts = fold.train[~judges], fold.train[judges], fold.test
    seeds = [_predictions(name, windows, task.labels, parts, seed) for seed in range(plan.seeds)]
    named = np.full((plan.seeds, len(task.labels)), -1)
    named[:, fold.test] = seeds
    result = judge(task, name, named)
    note = f"{PACKAGE} {version(PACKAGE)}, at most {EPOCHS} epochs, {len(people)} labelled people"
    return [row(f"peers/{name}", "accuracy", result.scores.accuracy, note)]


def architecture(name: str) -> Any:
    """Return the class of an architecture."""
    return getattr(importlib.import_module(f"{PACKAGE}.models"), name)


def _predictions(
    name: str, windows: np.ndarray, labels: np.ndarray, parts: tuple[np.ndarray, ...], seed: int
) -> np.ndarray:
    """Return the classes that an architecture names for the windows of the last part."""
    kind = architecture(name)
    torch.manual_seed(seed)
    loaders = [
        # Those who train alone.
        kind.prepare_dataloader(windows[part], labels[part], shuffle=place == 0)
        for place, part in enumerate(parts)
    ]
    model = kind(input_size=windows.shape[2], output_size=int(labels.max()) + 1)
    # None: its own learning rate.
    _, _, predicted = model.train_model(*loaders, epochs=EPOCHS, lr=None, device="cpu", patience=30)
    return np.asarray(predicted["y_pred"], dtype=np.int64)
