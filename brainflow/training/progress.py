"""Where metrics lines go beside `metrics.jsonl`: a bar or plain lines on stderr, and experiment trackers."""

from __future__ import annotations

import hashlib
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from brainflow.config import PretrainConfig, to_dict
from brainflow.optional import requires
from brainflow.progress import Pause, ProgressLine, Remaining

from .metrics import explained
from .run_dir import flatten

PLAIN_EVERY = 5.0  # seconds between plain lines
STEPS_A_BATCH = 0.5  # what a batch of the first validation may take, in steps: 0.49 of a tiny CSM on a CPU
Tracker = Callable[[dict[str, Any]], None]


class TrainingProgress:
    """Show metrics lines as they come.

    Parameters
    ----------
    steps
        Optimizer steps of the whole run.
    done
        Steps that a resumed run has behind it.
    quiet
        Show nothing.
    pauses
        What interrupts the steps, for the time that is left.
    clock
        Gives seconds.
    """

    def __init__(
        self,
        steps: int,
        *,
        done: int = 0,
        quiet: bool = False,
        pauses: Mapping[str, Pause] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.steps = steps
        self.quiet = quiet
        self.left = Remaining(steps, done=done, pauses=pauses, clock=clock)
        self._last = -math.inf
        self._text = ""
        self._line = ProgressLine("pretrain", self.left, quiet=quiet, counts=True, keep=True)

    def __enter__(self) -> TrainingProgress:
        self._line.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._line.__exit__(kind, error, trace)

    def advance(self, step: int) -> None:
        """Say that a step is done."""
        self.left.advance(step)
        self._line.update(self._text)

    def show(self, line: dict[str, Any]) -> None:
        """Show one line of `metrics.jsonl`."""
        validation = "val_loss" in line
        text = _validation(line) if validation else _training(line)
        if self._line.live:
            if validation:
                self._line.print(f"step {line['step']}  {text}")
            else:
                self._text = text
                self._line.update(text)
        elif not self.quiet and (validation or time.monotonic() - self._last >= PLAIN_EVERY):
            self._last = time.monotonic()
            eta = "" if validation else f"  ETA {self.left}"
            sys.stderr.write(f"step {line['step']}/{self.steps}  {text}{eta}\n")
            sys.stderr.flush()


def pauses(config: PretrainConfig) -> dict[str, Pause]:
    """Return what interrupts the steps of a run."""
    train = config.train
    return {
        "validation": Pause(train.validate_every, guess=STEPS_A_BATCH * config.data.validation_batches),
        "checkpoint": Pause(train.checkpoint_every),
    }


def _training(line: dict[str, Any]) -> str:
    text = (
        f"loss {line['loss']:.4f}  lr {line['lr']:.2e}  {line['trs_per_s']:,.0f} TRs/s  "
        f"{line['tokens_per_s']:,.0f} tokens/s  data-wait {100 * line['data_wait']:.1f} %  "
        f"MFU {100 * line['mfu']:.0f} %"
    )
    if "gpu_memory_gib" in line:
        text += f"  GPU {line['gpu_memory_gib']:.1f} GiB"
    return text + (f"  skipped {line['skipped']}" if line["skipped"] else "")


def _validation(line: dict[str, Any]) -> str:
    found = explained(line)
    others = ", ".join(f"{name} {value:.3f}" for name, value in found.items() if name != "model")
    return (
        f"validation loss {line['val_loss']:.4f}; explained variance {line['val_explained_variance']:.3f} "
        f"({others}, the mean 0), correlation {line['val_correlation']:.3f}"
    )


def make_tracker(config: PretrainConfig) -> Tracker:
    """Return a function that takes one line of `metrics.jsonl`; it does nothing if no tracker was asked for.

    Raises
    ------
    ImportError
        If the tracker's package is not installed, naming the extra.
    """
    if config.train.tracker == "none":
        return lambda line: None
    with requires(f"train.tracker: {config.train.tracker}", "tracking"):
        make = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}[config.train.tracker]
        return make(Path(config.out), config)


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
