"""Adapt a pretrained model to labelled windows of a store, judged in every fold of a task."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from brainflow.decoding.finetune import Decoder, History, frozen_features, probabilities, state_covariance
from brainflow.decoding.fit import AdaptConfig, fit_decoder
from brainflow.decoding.readout import Readout
from brainflow.decoding.result import Result, judge
from brainflow.decoding.splits import Fold
from brainflow.decoding.task import DecodingTask
from brainflow.devices import resolve_device
from brainflow.frameworks import build
from brainflow.pretrained.compatibility import check_fits, check_unseen
from brainflow.pretrained.format import load_pretrained
from brainflow.progress import or_notebook

Device = Literal["auto", "cpu", "cuda"]
Known = dict[tuple[Any, ...], list[NDArray[np.float32]]]


def adapt(
    task: DecodingTask,
    checkpoint: str | Path,
    config: AdaptConfig | None = None,
    *,
    seeds: int = 1,
    device: Device = "auto",
    allow_mismatch: bool = False,
    allow_seen: bool = False,
    known: Known | None = None,
    explain: Callable[[Decoder, np.ndarray], None] | None = None,
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
    allow_seen
        Go on where a split file names people to test whom the model has seen.
    known
        Frozen features of earlier calls: what is there is not computed again, what is computed is put there.
    explain
        Called with each fitted decoder and the windows that its fold tests.
    progress
        Called with (folds done, folds) after each fold. A notebook shows a bar without it.

    Returns
    -------
    Result
        Predictions for every tested window and their scores; the same for the same seed, data and threads.

    Raises
    ------
    ValueError
        If the checkpoint does not fit the store, or has seen people whom a split file keeps for the test; the
        message says which.

    Warns
    -----
    LeakWarning
        If the checkpoint has seen tested people, or does not say whom it saw.
    """
    config = config or AdaptConfig()
    if seeds < 1:
        raise ValueError(f"seeds: got {seeds}, expected at least 1")
    check_fits(checkpoint, task.store, allow=allow_mismatch)
    # Fresh weights have seen nobody, whoever trained the checkpoint.
    saw = [] if config.scratch else check_unseen(checkpoint, task, allow=allow_seen)
    where, told = resolve_device(device), or_notebook(progress, "fits")
    parts, histories, read = [], [], Counter[str]()
    for number in range(seeds):
        seeded = replace(config, seed=config.seed + number)

        def show(done: int, number: int = number) -> None:
            told(number * len(task.folds) + done, seeds * len(task.folds))

        # Anew for each seed: with `scratch` the weights are drawn from it.
        module = load_module(checkpoint, seeded, where)
        features = _features(checkpoint, task, module, seeded, where, {} if known is None else known)
        chances, fits, readouts = _fold_chances(task, module, seeded, where, features, explain, show)
        parts.append(chances)
        read.update(one.name for one in readouts)
        histories += [(number, fold.name, fit) for fold, fit in zip(task.folds, fits, strict=True) if fit]
    stacked = np.stack(parts)
    details: dict[str, Any] = {"adapt": asdict(config), "seeds": seeds, "model": asdict(module.config)}
    # What left-out people chose may be the BOLD alone: then no model is read, and a reader has to know.
    details["read"] = dict(read.most_common())
    if not config.scratch:
        details["pretraining_saw"] = saw
    return judge(
        task,
        config.name,
        # Of each seed, not of their mean: scores are those of one decoder, not of a committee.
        stacked.argmax(axis=-1),
        probabilities=stacked.mean(axis=0),
        details=details,
        histories=histories,
    )


def load_module(checkpoint: str | os.PathLike[str], config: AdaptConfig, device: torch.device) -> Any:
    """Return a checkpoint's module on a device, with fresh weights if `config.scratch`.

    Parameters
    ----------
    checkpoint
        Directory of a pretrained model.
    config
        Whose `scratch` and `seed` are looked at.
    device
        Where the module shall be.
    """
    # Also where weights are fresh: its configuration is the architecture.
    module: Any = load_pretrained(checkpoint)
    if config.scratch:
        torch.manual_seed(config.seed)
        module = build(module.config)
    return module.to(device)


def _features(
    checkpoint: str | os.PathLike[str],
    task: DecodingTask,
    module: Any,
    config: AdaptConfig,
    device: torch.device,
    known: Known,
) -> list[NDArray[np.float32]] | None:
    """Return what `config.readouts` give of all windows, None if nothing is fitted to them."""
    if not config.fitted_first:
        return None
    readouts = tuple(config.readouts(module))
    # Fresh weights are another model for each seed.
    fresh = config.seed if config.scratch else None
    # By content: two tasks of one store may read different windows.
    windows = (task.store.path, task.store.snapshot, task.config.hrf_shift, task.segments.tobytes())
    key = (os.fspath(checkpoint), fresh, readouts, *windows)
    if key not in known:
        known[key] = frozen_features(module, task, readouts, device=device)
    return known[key]


def _fold_chances(
    task: DecodingTask,
    module: Any,
    config: AdaptConfig,
    device: torch.device,
    features: list[NDArray[np.float32]] | None,
    explain: Callable[[Decoder, np.ndarray], None] | None,
    progress: Callable[[int], None],
) -> tuple[np.ndarray, list[History | None], list[Readout]]:
    """Return class probabilities `[windows, classes]` of a decoder fitted in each fold, fits and readouts."""
    classes = len(task.classes)
    chances = np.zeros((len(task.labels), classes), dtype=np.float32)
    histories, readouts = [], []
    for number, fold in enumerate(task.folds):
        decoder, history = fit_decoder(
            module,
            task,
            fold.train,
            # A seed of its own for each fold; the first is that of fresh weights.
            replace(config, seed=config.seed + 1 + number),
            classes=classes,
            device=device,
            validation=fold.validation,
            features=features,
            covariance=background_covariance(task, module, config, device, fold),
        )
        histories.append(history)
        readouts.append(decoder.readout)
        if features is None or not config.by_features:
            chances[fold.test] = probabilities(decoder, task, fold.test, device=device)
        else:
            # All features are known, so only the head has to run.
            known = features[config.readouts(module).index(decoder.readout)]
            with torch.no_grad():
                logits = decoder.head(torch.from_numpy(known[fold.test]).to(device))
                chances[fold.test] = logits.float().softmax(dim=-1).cpu().numpy()
        if explain is not None:
            explain(decoder, fold.test)
        progress(number + 1)
    return chances, histories, readouts


def background_covariance(
    task: DecodingTask, module: Any, config: AdaptConfig, device: torch.device, fold: Fold | None = None
) -> NDArray | None:
    """Return that of the last states in runs which a fold does not test; None where it is not needed.

    Parameters
    ----------
    task
        Whose store and people are read.
    module
        Framework module on `device`.
    config
        How it is adapted, which decides whether anything is whitened.
    device
        Where to compute.
    fold
        Whose tested people and runs are left out; None: nobody but those whom a split file keeps for the
        test.
    """
    # Not of the training windows: whitened by themselves these are orthogonal to each other, and whoever is
    # left out looks unknown (dev/log.md).
    background = task.background(fold) if config.whitens else None
    return None if background is None else state_covariance(module, background, device=device)
