"""How soon the loss falls: dense CSM against single-position CSM, `csm_time_to_loss`.

Two models with the same initial weights, settings and batches (windows of the example recordings, Haxby et
al. 2001, or of a store, the last two runs held out) train in turns: single a number of steps, dense as many
as it takes until it has had the same time. Time is the number of steps × the median step. The loss is the
single-position one for both, on the same held-out windows and positions; measuring it does not count. The
ratio is the time of single ÷ the time in which dense first got below single's LOWEST loss.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from brainflow.batch import PackedBatch
from brainflow.data import make_loader
from brainflow.data.sampler import WindowSampler
from brainflow.demo import haxby
from brainflow.frameworks import CSMConfig, build
from brainflow.storage import BoldStore

from .timing import Row

HELD_OUT = 2
BATCH, SEQ_MIN, SEQ_MAX = 8, 10, 50
LR, WARMUP = 1e-3, 20
MODEL: dict[str, Any] = {"width": 128, "layers": 2, "heads": 2}
CHECKS, DENSE_STEPS = 30, 10
"""How often single's loss is looked at, and the steps of dense between two looks at its own."""
Curve = list[tuple[float, float]]
"""Seconds of training, held-out single-position loss."""


def measurements(quick: bool, device: str) -> dict[str, Callable[[], list[Row]]]:
    """Return the one measurement, on the example recordings; `quick` makes it shorter."""
    return {"csm_time_to_loss": lambda: time_to_loss(240 if quick else 1200, device)}


def time_to_loss(steps: int, device: str, path: str | None = None) -> list[Row]:
    """Race dense against single for `steps` steps of single, on a store or the example recordings."""
    curves = race(steps, device, path)
    lowest = min(loss for _, loss in curves["single"])
    # Infinite if it never did: such a row is left out.
    reached = next((seconds for seconds, loss in curves["dense"] if loss <= lowest), float("inf"))
    for name, curve in curves.items():
        print(f"{name}: {curve[-1][1]:.4f} after {curve[-1][0]:.1f} s", file=sys.stderr)
    return [
        Row(
            suite="frameworks", case="csm_time_to_loss", metric="time", value=reached, unit="s",
            baseline="single", ratio=curves["single"][-1][0] / reached,
        )
    ]  # fmt: skip


def race(steps: int, device: str, path: str | None = None) -> dict[str, Curve]:
    """Return the curves of "single", CHECKS points, and "dense", one point in DENSE_STEPS steps."""
    with tempfile.TemporaryDirectory(prefix="brainflow-bench-") as folder:
        if path is None:
            path = f"{folder}/store"
            haxby.write_store(haxby.read(), path)
        store = BoldStore.open(path)
        count = len(store.runs.start)
        if count <= HELD_OUT:
            raise ValueError(f"--store: got {count} runs, expected at least {HELD_OUT + 1}")
        single, dense = (_Runner(masking, store, device) for masking in ("single", "dense"))
        for turn in range(1, CHECKS + 1):
            single.train(turn * steps // CHECKS)
            while dense.had < single.had:
                dense.train(dense.steps + DENSE_STEPS)
        single.loader.close()
        dense.loader.close()
    return {"single": single.curve(), "dense": dense.curve()}


class _Runner:
    """One model in training, with the time that it has had."""

    def __init__(self, masking: Any, store: BoldStore, device: str) -> None:
        torch.manual_seed(0)
        config = {"networks": store.networks, "max_positions": SEQ_MAX, **MODEL}
        self.module = build(CSMConfig(masking=masking, **config)).to(device)
        self.judge: nn.Module = build(CSMConfig(masking="single", **config)).to(device).eval()
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=LR, weight_decay=0.1, fused=True)
        runs = np.arange(len(store.runs.start))
        self.loader = make_loader(store, _sampler(store, runs[:-HELD_OUT], 0), kind="host", device=device)
        self.batches: Iterator[Any] = iter(self.loader)
        held_out = make_loader(store, _sampler(store, runs[-HELD_OUT:], 1), kind="host", device=device)
        self.held_out = [_kept(batch) for _, batch in zip(range(16), held_out, strict=False)]
        held_out.close()
        self.device, self.steps = device, 0
        self.seconds: list[float] = []
        self.losses = [(0, self.loss())]

    @property
    def had(self) -> float:
        """Seconds of training so far: steps × the median step, so that what else ran does not count."""
        return self.steps * float(np.median(self.seconds)) if self.seconds else 0.0

    def curve(self) -> Curve:
        """Return the losses so far, by seconds of training."""
        median = float(np.median(self.seconds)) if self.seconds else 0.0
        return [(steps * median, loss) for steps, loss in self.losses]

    def train(self, until: int) -> None:
        """Train up to step `until`, then take the loss."""
        while self.steps < until:
            torch.manual_seed(self.steps)  # dropout draws from it, and the other model in between
            began = time.perf_counter()
            for group in self.optimizer.param_groups:
                group["lr"] = LR * min(1.0, (self.steps + 1) / WARMUP)
            self.module(next(self.batches), seed=0).loss.backward()
            nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            # Launched is not done.
            if self.device == "cuda":
                torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - began)
            self.steps += 1
        self.losses.append((self.steps, self.loss()))

    @torch.no_grad()
    def loss(self) -> float:
        """Return the single-position loss on the held-out windows and positions."""
        # The judge has another way of masking and the same parameters.
        self.judge.load_state_dict(self.module.state_dict())
        # One seed: the same positions every time.
        return float(np.mean([float(self.judge(batch, seed=7).loss) for batch in self.held_out]))


def _sampler(store: BoldStore, runs: np.ndarray, seed: int) -> WindowSampler:
    return WindowSampler(store.runs, runs=runs, batch=BATCH, seq_min=SEQ_MIN, seq_max=SEQ_MAX, seed=seed)


def _kept(batch: PackedBatch) -> PackedBatch:
    """Return a batch that stays when the loader reuses its buffer."""
    return replace(
        batch, bold=batch.bold.clone(), times=batch.times.clone(), cu_seqlens=batch.cu_seqlens.clone()
    )
