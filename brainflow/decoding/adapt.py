"""Adapt a pretrained model to decode labelled windows: all weights, or a linear probe on frozen features."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from brainflow.decoding.baselines import make_classifier, single_threaded
from brainflow.decoding.finetune import Decoder, Pooling, finetune, frozen_features, probabilities
from brainflow.decoding.result import Result, judge
from brainflow.decoding.task import DecodingTask
from brainflow.frameworks import build
from brainflow.models.pretrained import load_pretrained, read_config
from brainflow.storage import BoldStore


@dataclass(frozen=True, kw_only=True)
class AdaptConfig:
    """How a pretrained model is adapted."""

    freeze: bool = False
    """Keep the pretrained weights and fit logistic regression on their features (a linear probe)."""
    scratch: bool = False
    """Take the checkpoint's architecture with fresh weights: what pretraining has to beat."""
    pooling: Pooling | None = None
    """How one vector is made of a window: `cls` appends the CLS token as published, `last`, `mean`, `first`
    take hidden states of the time points. By default `cls` for fine-tuning, `mean` for frozen features."""
    steps: int = 500
    """Optimizer steps a fold."""
    batch_size: int = 32
    """Windows a step."""
    lr: float = 3e-4
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    dropout: float = 0.1
    """Dropout of the decoding head."""
    seed: int = 0
    """Seeds fresh weights, dropout and the order of the windows."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if not self.lr > 0:
            raise ValueError(f"lr: got {self.lr}, expected a positive number")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout: got {self.dropout}, expected a number in [0, 1)")


def adapt(
    task: DecodingTask,
    checkpoint: str | Path,
    config: AdaptConfig | None = None,
    *,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Fit a decoder in each fold of a task and score what it says about the windows it did not see.

    Parameters
    ----------
    task
        Labelled windows and folds, from :func:`~brainflow.decoding.task.load_task`.
    checkpoint
        Directory of a pretrained model.
    config
        How to adapt; defaults if None.
    device
        `auto` takes CUDA where there is one.
    progress
        Called with (folds done, folds) after each fold.

    Returns
    -------
    Result
        Predictions for every window and their scores; the same for the same seed, data and threads.

    Raises
    ------
    ValueError
        If the checkpoint does not fit the store: another number of networks, or another parcellation.
    """
    config = config or AdaptConfig()
    check_fits(Path(checkpoint), task.store)
    where = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    if device == "cuda" and where.type != "cuda":
        raise ValueError("device: got cuda, but torch sees no CUDA device; use --device cpu")
    torch.manual_seed(config.seed)
    module: Any = load_pretrained(checkpoint)
    if config.scratch:
        module = build(module.config)
    module = module.to(where)
    method = _probe if config.freeze else _finetune
    chances, details = method(task, module, config, where, progress or (lambda done, folds: None))
    origin = "from scratch" if config.scratch else "pretrained"
    name = f"{'linear probe' if config.freeze else 'fine-tuned'}, {origin}"
    details = {"adapt": asdict(config), "model": asdict(module.config), **details}
    return judge(task, name, chances.argmax(axis=1), probabilities=chances, details=details)


def check_fits(checkpoint: Path, store: BoldStore) -> None:
    """Refuse a checkpoint that was trained on other networks than the store has.

    Raises
    ------
    ValueError
        Naming both.
    """
    saved = read_config(checkpoint)
    networks = int(saved["model"]["networks"])
    if networks != store.networks:
        raise ValueError(
            f"checkpoint: {checkpoint} was trained on {networks} networks, but the store {store.path} has "
            f"{store.networks}; use a model and a store of one parcellation"
        )
    theirs, ours = saved.get("data", {}), store.attributes
    for name, what in (("parcellation", "parcellation"), ("network_names", "network names")):
        if theirs.get(name) and ours.get(name) and theirs[name] != ours[name]:
            raise ValueError(
                f"checkpoint: {checkpoint} was trained on the {what} {_shown(theirs[name])}, but the store "
                f"{store.path} has {_shown(ours[name])}; use a model and a store of one parcellation"
            )


def _shown(value: Any) -> str:
    """Return a name, or the first names of a list, for a message."""
    return repr(value) if isinstance(value, str) else f"{list(value[:3])}…"


def _finetune(
    task: DecodingTask,
    module: Any,
    config: AdaptConfig,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> tuple[np.ndarray, dict[str, Any]]:
    """Return class probabilities `[windows, classes]` of a decoder fitted in each fold, and its losses."""
    chances = np.zeros((len(task.labels), len(task.classes)), dtype=np.float32)
    losses = []
    for number, fold in enumerate(task.folds):
        torch.manual_seed(config.seed + 1 + number)
        decoder = Decoder(
            copy.deepcopy(module),
            classes=len(task.classes),
            pooling=config.pooling or "cls",
            dropout=config.dropout,
        ).to(device)
        loss = finetune(
            decoder,
            task,
            fold.train,
            steps=config.steps,
            batch=config.batch_size,
            lr=config.lr,
            weight_decay=config.weight_decay,
            seed=config.seed,
            device=device,
        )
        losses.append(loss)
        chances[fold.test] = probabilities(decoder, task, fold.test, device=device)
        progress(number + 1, len(task.folds))
    return chances, {"final_train_loss": losses}


def _probe(
    task: DecodingTask,
    module: Any,
    config: AdaptConfig,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> tuple[np.ndarray, dict[str, Any]]:
    """Return class probabilities `[windows, classes]` of logistic regression on frozen features."""
    features = frozen_features(module, task, pooling=config.pooling or "mean", device=device)
    chances = np.zeros((len(task.labels), len(task.classes)), dtype=np.float32)
    for number, fold in enumerate(task.folds):
        with single_threaded():
            probe = make_classifier("logistic").fit(features[fold.train], task.labels[fold.train])
            columns = np.asarray(probe.classes_, dtype=np.int64)
            chances[np.ix_(fold.test, columns)] = probe.predict_proba(features[fold.test])
        progress(number + 1, len(task.folds))
    return chances, {}
