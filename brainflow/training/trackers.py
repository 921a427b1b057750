"""Copies of the metrics for TensorBoard or Weights & Biases; `metrics.jsonl` stays the record."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from brainflow.config import PretrainConfig, to_dict

Tracker = Callable[[dict[str, Any]], None]


def make_tracker(config: PretrainConfig) -> Tracker:
    """Return a function that takes one line of `metrics.jsonl`; it does nothing if no tracker was asked for.

    Raises
    ------
    ImportError
        If the tracker's package is not installed, naming the extra.
    """
    if config.train.tracker == "none":
        return lambda line: None
    try:
        make = {"tensorboard": _tensorboard, "wandb": _wandb}[config.train.tracker]
        return make(Path(config.out), config)
    except ImportError as error:
        raise ImportError(
            f"train.tracker: {config.train.tracker} is not installed; pip install 'brainflow-fmri[tracking]'"
        ) from error


def _tensorboard(folder: Path, config: PretrainConfig) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def write(line: dict[str, Any]) -> None:
        for name, value in _numbers(line).items():
            writer.add_scalar(name, value, line["step"])
        writer.flush()

    return write


def _wandb(folder: Path, config: PretrainConfig) -> Tracker:
    import wandb

    # The id is made from the directory's path, so that a resumed run goes on in the same curve.
    where = folder.resolve()
    run = wandb.init(
        project="brainflow",
        dir=str(where),
        name=where.name,
        id=hashlib.sha256(str(where).encode()).hexdigest()[:16],
        resume="allow",
        config=to_dict(config),
    )
    return lambda line: run.log(_numbers(line), step=line["step"])


def _numbers(line: dict[str, Any]) -> dict[str, float]:
    return {k: v for k, v in line.items() if k != "step" and isinstance(v, int | float) and math.isfinite(v)}
