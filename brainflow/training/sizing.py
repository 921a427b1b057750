"""A size of model and a number of steps for those who name none: by the data and the machine, and why."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from brainflow.config import PretrainConfig
from brainflow.frameworks import build, framework_spec, own_config
from brainflow.recipes import (
    FEWEST_STEPS,
    FITTING,
    MOST_STEPS,
    SIZED_BY,
    WINDOWS,
    preset,
    pretraining,
)
from brainflow.storage import BoldStore

from .compute import settle_precision
from .meters import matrix_weights, peak_flops
from .run_dir import Resume, begun, flatten, saved_config

SIZE = ("model.layers", "model.width", "model.heads")
CADENCE = ("train.validate_every", "train.checkpoint_every")
VALIDATIONS = 10
"""And checkpoints, of a run whose steps are chosen or fewer than from one to the next."""
REACHED = 0.5
"""Share of the speed of a device's matrix products that an estimate of time expects; on a CPU 0.24 to 0.75
were measured (dev/benchmarks.md)."""


def choose(
    config: PretrainConfig, store: BoldStore, stated: Collection[str], *, cuda: bool, resume: Resume
) -> tuple[PretrainConfig, list[str]]:
    """Fill in size, steps and checkpoints where they are not stated: the same for one store and machine.

    Parameters
    ----------
    config
        The run as it is without a choice.
    store
        What it trains on.
    stated
        Names of the settings that were given, such as "model.width"; these stay.
    cuda
        Whether it trains on a GPU.
    resume
        With "auto" a run that has begun keeps what it began with.

    Returns
    -------
    config, chosen
        The run, and the names of the settings that were chosen.
    """
    wanted: dict[str, Any] = {}
    if not any(name in stated for name in SIZED_BY):
        found = flatten(preset(fitting(store, cuda=cuda), config.model.framework))
        wanted |= {name: value for name, value in found.items() if name not in stated}
    if "train.steps" not in stated:
        wanted["train.steps"] = fitting_steps(config, store)
    steps = wanted.get("train.steps", config.train.steps)
    # A permanent checkpoint is one at a multiple: with another cadence none might fall on it.
    kept = {*stated, *(["train.checkpoint_every"] if "train.permanent_every" in stated else [])}
    given = flatten(dataclasses.asdict(config))
    # of stated steps, too, all would be lost with a run that is killed before its first checkpoint
    rare = [name for name in CADENCE if "train.steps" in wanted or given[name] > steps]
    wanted |= {name: math.ceil(steps / VALIDATIONS) for name in rare if name not in kept}
    if resume == "auto" and begun(Path(config.out)):
        before = flatten(saved_config(Path(config.out)))
        return with_settings(config, {name: before[name] for name in wanted if name in before}), []
    return with_settings(config, wanted), list(wanted)


def fitting(store: BoldStore, *, cuda: bool) -> str:
    """Return the preset for the number of time points of a store and a kind of machine."""
    points = int(store.runs.length.sum())
    return [name for least, name in FITTING["cuda" if cuda else "cpu"] if points >= least][-1]


def fitting_steps(config: PretrainConfig, store: BoldStore) -> int:
    """Return a number of steps for the number of time points of a store and a run's batches."""
    windows, per = WINDOWS
    wanted = windows * math.sqrt(int(store.runs.length.sum()) / per)
    return int(min(max(math.ceil(wanted / config.data.batch_size), FEWEST_STEPS), MOST_STEPS))


def operations(config: PretrainConfig) -> float:
    """Return the floating-point operations of a whole run: an estimate by its weights, without attention."""
    # Counted only, so no memory is taken for the weights.
    with torch.device("meta"):
        weights = matrix_weights(build(config.model))
    data = config.data
    points = data.batch_size * (data.seq_min + data.seq_max - 1) / 2
    tokens = points + data.batch_size * framework_spec(config.model.framework).special_tokens
    return weights.flops(round(tokens), round(points)) * config.train.steps


def explain(config: PretrainConfig, store: BoldStore, chosen: Collection[str], *, cuda: bool) -> str:
    """Say what was chosen and why.

    Parameters
    ----------
    config
        With what was chosen.
    store
        What is trained on.
    chosen
        Names of the settings that were chosen.
    cuda
        Whether on a GPU.
    """
    model, train = config.model, config.train
    parts = []
    if any(name in chosen for name in SIZE):
        size = f"{model.layers} layers of width {model.width}, peak learning rate {train.lr:g}"
        parts.append(f"preset {fitting(store, cuda=cuda)} ({size})")
    if "train.steps" in chosen:
        parts.append(f"{train.steps:,} steps of {config.data.batch_size} windows")
    if not parts:
        every = ", ".join(f"{name} {getattr(train, name.removeprefix('train.'))}" for name in chosen)
        return f"chose {every}, for a run of {train.steps:,} steps"
    return (
        f"chose {' and '.join(parts)}, for {int(store.runs.length.sum()):,} time points on a "
        f"{'GPU' if cuda else 'CPU'}; --preset, --model.layers, --model.width, --train.steps say otherwise"
    )


def published_cost(
    config: PretrainConfig, store: BoldStore, device: torch.device | None, devices: int = 1
) -> str:
    """Say what the published run of a framework would cost, in operations and, on a device, in time.

    Parameters
    ----------
    config
        A run of the framework.
    store
        Whose number of networks counts.
    device
        Where it would train; None for another machine than this one.
    devices
        Number of such devices.
    """
    framework = config.model.framework
    if not framework_spec(framework).published:
        return f"there is no published run of {framework}"
    run = pretraining(config.store, config.out, framework=framework)
    run = with_settings(run, {"model.networks": store.networks})
    count = operations(run)
    size = f"{run.model.layers} layers of width {run.model.width}"
    text = (
        f"--preset published ({size}, {run.train.steps:,} steps of {run.data.batch_size} windows) would take "
        f"about {count:.1e} operations"
    )
    if device is None:
        return text
    precision = settle_precision(config, Path(config.out), device, resume="never").train.precision
    seconds = count / (devices * REACHED * peak_flops(device, precision))
    return (
        f"{text}, {_duration(seconds)} here (an estimate, at {REACHED:.0%} of the speed of this device's "
        "matrix products)"
    )


def _duration(seconds: float) -> str:
    for unit, length in (("years", 365.25 * 86400), ("days", 86400), ("hours", 3600)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.2g} {unit}"
    return f"{max(seconds / 60, 0.1):.2g} minutes"


def with_settings(config: PretrainConfig, settings: dict[str, Any]) -> PretrainConfig:
    """Return a configuration with other settings, named as "model.width", its framework's own included."""
    config = dataclasses.replace(config, model=own_config(config.model))
    sections: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        section, _, field = name.partition(".")
        sections.setdefault(section, {})[field] = value
    changed = {name: dataclasses.replace(getattr(config, name), **some) for name, some in sections.items()}
    return dataclasses.replace(config, **changed)
