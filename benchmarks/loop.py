"""What the training loop costs beside the bare model step (bar: 3 %), and its waiting for data (bar: 2 %).

`brainflow pretrain` runs as it is (loader, schedule, seeds, meters, logs, no checkpoint) at the tiny preset.
Before each of its steps the bare step runs on the same batch with a copy of the model: forward, backward,
clipping, fused AdamW. A round is one step of the loop, from one call of the step to the next without what was
put between, and one bare step; the bare step comes once first and once second in turn. The loop reads its
batches by the plain loader, in the training process itself: nothing is prefetched while the bare step runs.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn

from brainflow.config import DataConfig, ModelConfig, PretrainConfig, TrainConfig
from brainflow.frameworks import build
from brainflow.storage import StoreWriter
from brainflow.training.loop import pretrain
from brainflow.training.metrics import read_metrics
from brainflow.training.step import TrainingStep

from .timing import Row, Timing, speed_rows

NETWORKS, RUNS, LENGTH = 1024, 8, 300
TINY = ModelConfig(width=128, layers=2, heads=2, networks=NETWORKS)
WARMUP = 5


def measurements(quick: bool, device: str) -> dict[str, Callable[[], list[Row]]]:
    """Return what measures the loop's overhead and its waiting for data."""
    return {
        "loop_overhead": lambda: _overhead(25 if quick else 300, device),
        "loop_data_wait": lambda: _data_wait(25 if quick else 300, device),
    }


class _Rounds:
    """Runs a bare step beside every step of the loop and takes the times of both."""

    def __init__(self) -> None:
        self.real = TrainingStep.__call__
        self.loop: list[float] = []
        self.bare: list[float] = []
        self.came = 0.0
        self.module: nn.Module | None = None

    def step(self, loop: TrainingStep, batches: Iterator[Any], step: int, lr: float, *, stop: bool) -> Any:
        called = time.perf_counter()
        if self.module is None:
            self.module = build(loop.config.model).to(loop.device)
            self.module.load_state_dict(loop.module.state_dict())
            parameters = list(self.module.parameters())
            self.optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.1, fused=True)
        else:
            self.loop[-1] += called - self.came
        first = bool(step % 2)
        taken: list[Any] = []
        fetch = time.perf_counter()
        taken.append(next(batches))  # the loop's own fetch: it belongs to the loop
        fetched = time.perf_counter() - fetch
        seconds = self._bare(taken[0], step) if first else 0.0
        began = time.perf_counter()
        numbers = self.real(loop, iter(taken), step, lr, stop=stop)
        self._wait(loop.device)
        self.loop.append(fetched + time.perf_counter() - began)
        if not first:
            seconds = self._bare(taken[0], step)
        self.bare.append(seconds)
        self.came = time.perf_counter()
        return numbers

    def _bare(self, batch: Any, step: int) -> float:
        assert self.module is not None
        began = time.perf_counter()
        self.module(batch, seed=step).loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._wait(batch.bold.device)
        return time.perf_counter() - began

    def _wait(self, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def _overhead(steps: int, device: str) -> list[Row]:
    rounds = _Rounds()

    def call(loop: TrainingStep, batches: Any, step: int, lr: float, *, stop: bool) -> Any:
        return rounds.step(loop, batches, step, lr, stop=stop)

    with (
        tempfile.TemporaryDirectory(prefix="brainflow-bench-") as folder,
        mock.patch.object(TrainingStep, "__call__", call),
    ):
        pretrain(_config(Path(folder), steps, device, loader="host"), quiet=True)
    # The last round is not complete: validation and the release follow.
    part = slice(WARMUP, -1)
    times = {
        "loop": Timing(seconds=tuple(rounds.loop[part])),
        "bare_step": Timing(seconds=tuple(rounds.bare[part])),
    }
    return speed_rows("frameworks", "loop_overhead", times, ours="loop", unit="ms")


def _data_wait(steps: int, device: str) -> list[Row]:
    """Return the share of the loop's time that it waits for the loader that `auto` takes."""
    with tempfile.TemporaryDirectory(prefix="brainflow-bench-") as folder:
        config = _config(Path(folder), steps, device, loader="auto")
        lines = [line for line in read_metrics(pretrain(config, quiet=True)) if "loss" in line]
    wait = float(np.median([100 * line["data_wait"] for line in lines[1:]]))
    return [Row(suite="frameworks", case="loop_data_wait", metric="data_wait", value=wait, unit="%")]


def _config(folder: Path, steps: int, device: str, *, loader: Any) -> PretrainConfig:
    rng = np.random.default_rng(0)
    with StoreWriter.create(
        folder / "store", networks=NETWORKS, dtype="float16", parcellation="none"
    ) as writer:
        for run in range(RUNS):
            bold = rng.standard_normal((LENGTH, NETWORKS)).astype(np.float32)
            writer.append(bold, t_r=2.0, dataset="noise", subject=str(run), session="", task="rest", run="1")
    return PretrainConfig(
        store=str(folder / "store"),
        out=str(folder / "run"),
        device="cuda" if device == "cuda" else "cpu",
        model=TINY,
        data=DataConfig(validation_batches=1, loader=loader),
        train=TrainConfig(
            steps=steps, validate_every=10 * steps, checkpoint_every=10 * steps, plot=False, log_every=10
        ),
    )
