"""Adapt a pretrained model to labelled windows of a store, judged in every fold of a task."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from brainflow.compat import check_fits
from brainflow.decoding.finetune import frozen_features, probabilities
from brainflow.decoding.fit import AdaptConfig, fit_decoder
from brainflow.decoding.result import Result, judge
from brainflow.decoding.task import DecodingTask
from brainflow.frameworks import build
from brainflow.models.pretrained import load_pretrained

Device = Literal["auto", "cpu", "cuda"]


def adapt(
    task: DecodingTask,
    checkpoint: str | Path,
    config: AdaptConfig | None = None,
    *,
    seeds: int = 1,
    device: Device = "auto",
    allow_mismatch: bool = False,
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
    seeds
        Fit everything this often, with seeds `config.seed`, `config.seed + 1`, …; scores are means over them.
    device
        `auto` takes CUDA where there is one.
    allow_mismatch
        Go on where the store's parcellation, TR or normalisation is not what the model was trained on.
    progress
        Called with (folds done, folds) after each fold.

    Returns
    -------
    Result
        Predictions for every tested window and their scores; the same for the same seed, data and threads.

    Raises
    ------
    ValueError
        If the checkpoint does not fit the store; the message says in what.
    """
    config = config or AdaptConfig()
    if seeds < 1:
        raise ValueError(f"seeds: got {seeds}, expected at least 1")
    check_fits(checkpoint, task.store, allow=allow_mismatch)
    where = pick_device(device)
    parts, losses = [], []
    for number in range(seeds):
        seeded = replace(config, seed=config.seed + number)

        def show(done: int, number: int = number) -> None:
            if progress is not None:
                progress(number * len(task.folds) + done, seeds * len(task.folds))

        chances, loss = _fold_chances(task, load_module(checkpoint, seeded, where), seeded, where, show)
        parts.append(chances)
        losses.append(loss)
    stacked = np.stack(parts)
    module_config = asdict(load_module(checkpoint, config, torch.device("cpu")).config)
    details: dict[str, Any] = {"adapt": asdict(config), "seeds": seeds, "model": module_config}
    if losses[0][0] is not None:
        details["final_train_loss"] = losses
    return judge(
        task, config.name, stacked.argmax(axis=-1), probabilities=stacked.mean(axis=0), details=details
    )


def load_module(checkpoint: str | os.PathLike[str], config: AdaptConfig, device: torch.device) -> Any:
    """Return a checkpoint's module on a device, with fresh weights if `config.scratch`."""
    module: Any = load_pretrained(checkpoint)
    if config.scratch:
        torch.manual_seed(config.seed)
        module = build(module.config)
    return module.to(device)


def pick_device(device: Device) -> torch.device:
    """Return the device of a name.

    Raises
    ------
    ValueError
        If CUDA is asked for and not there.
    """
    where = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    if device == "cuda" and where.type != "cuda":
        raise ValueError("device: got cuda, but torch sees no CUDA device; use --device cpu")
    return where


def _fold_chances(
    task: DecodingTask,
    module: Any,
    config: AdaptConfig,
    device: torch.device,
    progress: Callable[[int], None],
) -> tuple[np.ndarray, Sequence[float | None]]:
    """Return class probabilities `[windows, classes]` of a decoder fitted in each fold, and its losses."""
    classes = len(task.classes)
    chances = np.zeros((len(task.labels), classes), dtype=np.float32)
    features = None
    if config.frozen:
        features = frozen_features(module, task, pooling=config.pooled_by, device=device)
    losses = []
    for number, fold in enumerate(task.folds):
        decoder, loss = fit_decoder(
            module,
            task,
            fold.train,
            replace(config, seed=config.seed + 1 + number),
            classes=classes,
            device=device,
            validation=fold.validation,
            features=features,
        )
        losses.append(loss)
        if features is None:
            chances[fold.test] = probabilities(decoder, task, fold.test, device=device)
        else:
            with torch.no_grad():
                logits = decoder.head(torch.from_numpy(features[fold.test]).to(device))
                chances[fold.test] = logits.float().softmax(dim=-1).cpu().numpy()
        progress(number + 1)
    return chances, losses
