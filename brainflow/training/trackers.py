"""Copies of the metrics for TensorBoard, Weights & Biases or MLflow; `metrics.jsonl` stays the record."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from brainflow.config import PretrainConfig, to_dict

from .run_dir import flatten

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
        make = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}[config.train.tracker]
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


def _mlflow(folder: Path, config: PretrainConfig) -> Tracker:
    from mlflow.tracking import MlflowClient

    # MLFLOW_TRACKING_URI wins, as everywhere in MLflow; else a database beside the run.
    where = folder.resolve()
    uri = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{where / 'mlflow.db'}")
    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name("brainflow")
    experiment = found.experiment_id if found else client.create_experiment("brainflow")
    key = hashlib.sha256(str(where).encode()).hexdigest()[:16]  # a resumed run goes on in the same curve
    same = client.search_runs([experiment], f"tags.folder = '{key}'", max_results=1)
    run = same[0] if same else client.create_run(experiment, tags={"folder": key}, run_name=where.name)

    def write(line: dict[str, Any]) -> None:
        for name, value in _numbers(line).items():
            client.log_metric(run.info.run_id, name, value, step=line["step"])

    return write


def _numbers(line: dict[str, Any]) -> dict[str, float]:
    flat = flatten({k: v for k, v in line.items() if k != "step"})
    return {k: v for k, v in flat.items() if isinstance(v, int | float) and math.isfinite(v)}
