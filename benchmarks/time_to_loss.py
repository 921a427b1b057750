"""How much sooner dense CSM reaches the loss that single-position CSM ends with, on real BOLD.

Two models with the same initial weights, settings and batches (windows of the example recordings, Haxby et
al. 2001, or of a store, the last two runs held out) train in turns: single a number of steps, dense as many
as it takes until it has had the same time. Time is the number of steps × the median step by the wall clock:
what else the machine does for a while counts for neither. The loss is the single-position one for both, on
the same held-out windows and positions; measuring it does not count. The ratio of the row is the time of
single ÷ the time in which dense first got below single's LOWEST loss; which steps these are does not depend
on the clock, nor dropout on whose turn it is. It depends on the batch: the fewer windows, the more the noise
of one position a window costs. The curves go to csm_time_to_loss.csv and .png beside the history.
"""

from __future__ import annotations

import csv
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from brainflow.config import ModelConfig
from brainflow.data import make_loader
from brainflow.data.batch import PackedBatch
from brainflow.data.sampler import WindowSampler
from brainflow.demo import haxby
from brainflow.frameworks import build
from brainflow.storage import BoldStore

from . import history
from .timing import Row

HELD_OUT = 2
BATCH, SEQ_MIN, SEQ_MAX = 8, 10, 50
LR, WARMUP = 1e-3, 20
MODEL: dict[str, Any] = {"width": 128, "layers": 2, "heads": 2}
CHECKS = 30
STEPS, QUICK_STEPS, STORE_STEPS = 1200, 240, 6000
"""Steps of single-position training; the last with a store of one's own. On the example recordings, ten runs
of one participant, dense would begin to overfit before single has come far."""
DENSE_STEPS = 10
"""Steps of dense between two looks at its loss."""
Curve = list[tuple[float, float, int]]
"""Seconds of training, held-out single-position loss, steps."""


def measurements(quick: bool, device: str) -> dict[str, Callable[[], list[Row]]]:
    """Return the one measurement, on the example recordings."""
    return {"csm_time_to_loss": lambda: measure(QUICK_STEPS if quick else STEPS, device)}


def measure(steps: int, device: str, path: str | None = None) -> list[Row]:
    """Train single for `steps` and dense for the same time, write the curves and return the row of record.

    `path` is the store to train on; None: the example recordings.
    """
    curves = race(steps, device, path)
    lowest = min(loss for _, loss, _ in curves["single"])
    reached = next((seconds for seconds, loss, _ in curves["dense"] if loss <= lowest), None)
    _write(curves, lowest, history.default_path().parent)
    if reached is None:
        print(f"time_to_loss: dense did not reach {lowest:.4f}", file=sys.stderr)
        reached = float("inf")
    for name, curve in curves.items():
        seconds, loss, steps = curve[-1]
        print(f"{name}: {loss:.4f} after {seconds:.1f} s, {steps} steps", file=sys.stderr)
    return [
        Row(
            suite="frameworks", case="csm_time_to_loss", metric="time", value=reached, unit="s",
            baseline="single", ratio=curves["single"][-1][0] / reached,
        )
    ]  # fmt: skip


def race(steps: int, device: str, path: str | None = None) -> dict[str, Curve]:
    """Return the curves of "single", CHECKS points, and "dense", one point in DENSE_STEPS steps."""
    with tempfile.TemporaryDirectory() as folder:
        if path is None:
            path = f"{folder}/store"
            haxby.write_store(haxby.read(), path)
        store = BoldStore.open(path)
        count = len(store.runs.start)
        if count <= HELD_OUT:
            raise ValueError(f"--store: got {count} runs, expected at least {HELD_OUT + 1}")
        held_out = np.arange(count - HELD_OUT, count)
        loader = make_loader(store, _sampler(store, held_out, seed=1), kind="host", device=device)
        fixed = [_kept(batch) for _, batch in zip(range(16), loader, strict=False)]
        loader.close()
        runners = {
            name: Runner(name, store, _sampler(store, np.arange(count - HELD_OUT), seed=0), device)
            for name in ("single", "dense")
        }
        losses = {name: [(0, runner.loss(fixed))] for name, runner in runners.items()}
        single, dense = runners["single"], runners["dense"]
        for turn in range(1, CHECKS + 1):
            single.train(turn * steps // CHECKS)
            losses["single"].append((single.steps, single.loss(fixed)))
            while dense.steps * dense.seconds_a_step() < single.steps * single.seconds_a_step():
                dense.train(dense.steps + DENSE_STEPS)
                losses["dense"].append((dense.steps, dense.loss(fixed)))
        for runner in runners.values():
            runner.loader.close()
    return {
        name: [(step * runner.seconds_a_step(), loss, step) for step, loss in losses[name]]
        for name, runner in runners.items()
    }


class Runner:
    """One model in training, with the time that it has had."""

    def __init__(self, masking: Any, store: BoldStore, sampler: WindowSampler, device: str) -> None:
        torch.manual_seed(0)
        config = {"networks": store.networks, "max_positions": SEQ_MAX, **MODEL}
        self.module = build(ModelConfig(masking=masking, **config)).to(device)
        self.judge: nn.Module = build(ModelConfig(masking="single", **config)).to(device).eval()
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=LR, weight_decay=0.1, fused=True)
        self.loader = make_loader(store, sampler, kind="host", device=device)
        self.batches: Iterator[Any] = iter(self.loader)
        self.device, self.steps = device, 0
        self.seconds: list[float] = []

    def train(self, until: int) -> None:
        """Train up to step `until`."""
        while self.steps < until:
            torch.manual_seed(self.steps)  # dropout draws from it, and the other model in between
            began = time.perf_counter()
            for group in self.optimizer.param_groups:
                group["lr"] = LR * min(1.0, (self.steps + 1) / WARMUP)
            self.module(next(self.batches), seed=0).loss.backward()
            nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if self.device == "cuda":
                torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - began)
            self.steps += 1

    def seconds_a_step(self) -> float:
        """Return the median of the steps so far, 0 before the first."""
        return float(np.median(self.seconds)) if self.seconds else 0.0

    @torch.no_grad()
    def loss(self, batches: list[PackedBatch]) -> float:
        """Return the single-position loss on fixed windows and positions."""
        self.judge.load_state_dict(self.module.state_dict())
        return float(np.mean([float(self.judge(batch, seed=7).loss) for batch in batches]))


def _sampler(store: BoldStore, runs: np.ndarray, *, seed: int) -> WindowSampler:
    return WindowSampler(store.runs, runs=runs, batch=BATCH, seq_min=SEQ_MIN, seq_max=SEQ_MAX, seed=seed)


def _kept(batch: PackedBatch) -> PackedBatch:
    """Return a batch that stays when the loader reuses its buffer."""
    return PackedBatch(**{**vars(batch), "bold": batch.bold.clone(), "times": batch.times.clone(),
                          "cu_seqlens": batch.cu_seqlens.clone()})  # fmt: skip


def _write(curves: dict[str, Curve], lowest: float, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "csm_time_to_loss.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["masking", "seconds", "held_out_single_position_l1", "steps"])
        writer.writerows([name, *point] for name, curve in curves.items() for point in curve)
    print(path, file=sys.stderr)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("time_to_loss: no picture, it needs matplotlib (extra `report`)", file=sys.stderr)
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, curve in curves.items():
        axes.plot([p[0] for p in curve], [p[1] for p in curve], label=f"{name}: {curve[-1][2]} steps")
    axes.axhline(lowest, linestyle="--", color="gray", label="single's lowest loss")
    axes.set(xlabel="seconds of training", ylabel="held-out single-position L1")
    axes.legend()
    figure.savefig(path.with_suffix(".png"), dpi=120)
    print(path.with_suffix(".png"), file=sys.stderr)
