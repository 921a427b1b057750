"""Training steps of the four frameworks against the recipe of 2022, same sizes, same windows, one run.

A step is forward, backward and AdamW. CSM is compared by predicted time points a second, since dense CSM
predicts every time point of a window and the recipe one; the others by steps a second. The autoencoder's step
time is the mean of a step with and one without teacher forcing, which is what a training run consists of.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from brainflow.config import ModelConfig
from brainflow.data.batch import PackedBatch
from brainflow.frameworks import StepOutput, build

from .timing import Row, Timing, interleave

PADDED = 50
T_R = 0.72
BASELINE = "recipe of 2022 (Hugging Face, padded)"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of model and batch."""

    networks: int = 1024
    width: int = 256
    layers: int = 4
    heads: int = 4
    batch: int = 64
    dropout: float = 0.1


def run(quick: bool, device: str) -> list[Row]:
    """Measure all four frameworks; without the package `transformers` say so and measure nothing.

    Parameters
    ----------
    quick
        Fewer repeats.
    device
        "cpu" or "cuda".
    """
    if importlib.util.find_spec("transformers") is None:
        print(
            "frameworks: skipped, the baseline needs transformers (pip install transformers)", file=sys.stderr
        )
        return []
    repeats, sizes = (3, Sizes()) if quick else (9, Sizes())
    rows = []
    for name in ("csm", "seq-bert", "net-bert", "autoencoder"):
        rows += measure(name, sizes, repeats, device)
    return rows


def measure(name: str, sizes: Sizes, repeats: int, device: str) -> list[Row]:
    """Return speed and memory rows of one framework."""
    windows = Windows(sizes, device)
    ours, theirs, targets = _steps(name, sizes, windows, device)
    steps = {"ours": ours, "theirs": theirs}
    both = {f"{who} {i}": step for who, parts in steps.items() for i, step in enumerate(parts)}
    times = interleave(both, repeats=repeats, device=device)
    mean = {who: _mean([times[f"{who} {i}"] for i in range(len(parts))]) for who, parts in steps.items()}
    peak = {who: max(peak_bytes(step, device) for step in parts) for who, parts in steps.items()}
    rate = {who: (targets[who] if name == "csm" else 1) / mean[who].p50 for who in steps}
    speed = Row(
        suite="frameworks",
        case=name,
        metric="targets" if name == "csm" else "steps",
        value=rate["ours"],
        unit="targets/s" if name == "csm" else "steps/s",
        baseline=BASELINE,
        ratio=rate["ours"] / rate["theirs"],
        p20=mean["ours"].p20,
        p50=mean["ours"].p50,
        p80=mean["ours"].p80,
    )
    memory = Row(
        suite="frameworks",
        case=name,
        metric="peak_memory",
        value=peak["ours"] / 2**20,
        unit="MiB",
        baseline=BASELINE,
        ratio=peak["theirs"] / peak["ours"],
    )
    return [speed, memory]


class Windows:
    """The same random windows in both forms: packed for us, padded with masks for the recipe.

    Lengths are uniform in [10, 50) time points; for the BERTs a window is cut into two halves.
    """

    def __init__(self, sizes: Sizes, device: str) -> None:
        random = np.random.default_rng(0)
        self.lengths = random.integers(10, PADDED, sizes.batch)
        first = np.array([random.integers(3, length - 3) for length in self.lengths])
        self.halves = np.stack([first, self.lengths - first], 1)
        self.label = torch.from_numpy(random.integers(0, 2, sizes.batch).astype(np.float32)).to(device)
        bold = torch.randn(
            int(self.lengths.sum()), sizes.networks, generator=torch.Generator().manual_seed(0)
        )
        self.bold = bold.to(device)
        self.device = device

    def packed(self, pairs: bool) -> PackedBatch:
        """Return the windows (or half windows) end to end."""
        lengths = (self.halves.reshape(-1) if pairs else self.lengths).astype(np.int32)
        bounds = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
        seconds = np.concatenate([np.arange(n) * T_R for n in lengths]).astype(np.float32)
        return PackedBatch(
            bold=self.bold,
            times=torch.from_numpy(seconds).to(self.device),
            cu_seqlens=torch.from_numpy(bounds).to(self.device),
            max_seqlen=int(lengths.max()),
            lengths=lengths,
            runs=np.zeros(len(lengths), np.int32),
            step=0,
            is_next=self.label if pairs else None,
        )

    def padded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return bold [batch, 50, networks], seconds and an int64 attention mask [batch, 50]."""
        bold = self.bold.new_zeros(len(self.lengths), PADDED, self.bold.shape[1])
        attention = torch.zeros(len(self.lengths), PADDED, dtype=torch.int64, device=self.device)
        for i, part in enumerate(self.bold.split(self.lengths.tolist())):
            bold[i, : len(part)] = part
            attention[i, : len(part)] = 1
        seconds = (torch.arange(PADDED, device=self.device) * T_R).expand(len(self.lengths), PADDED)
        return bold, seconds, attention


def _steps(
    name: str, sizes: Sizes, windows: Windows, device: str
) -> tuple[list[Callable[[], None]], list[Callable[[], None]], dict[str, int]]:
    """Return our training steps, theirs, and the predicted time points of one step of each."""
    from .baselines import published  # optional dependency: transformers

    torch.manual_seed(0)
    s = sizes
    common: dict[str, Any] = {
        "networks": s.networks,
        "width": s.width,
        "layers": s.layers,
        "dropout": s.dropout,
    }
    lengths = windows.lengths.tolist()
    bold, seconds, attention = windows.padded()
    batch = windows.packed(pairs="bert" in name)
    targets = {"ours": batch.tokens - batch.windows, "theirs": s.batch}

    def module(**changes: Any) -> nn.Module:
        return build(ModelConfig(framework=name, heads=s.heads, **common, **changes)).to(device)  # type: ignore[arg-type]

    theirs: nn.Module
    if name == "autoencoder":
        theirs = published.Autoencoder(**common).to(device)
        inputs = (bold, seconds, attention, lengths)
        baseline = [_step(theirs, partial(theirs, *inputs, forced)) for forced in (True, False)]
        both = [module(teacher_forcing=p) for p in (1.0, 0.0)]
        return [_step(m, partial(_loss, m, batch)) for m in both], baseline, targets
    ours = module()
    if name == "csm":
        theirs = published.CSM(**common, heads=s.heads).to(device)
        loss = partial(theirs, bold, seconds, attention, lengths)
    else:
        kind = "time" if name == "seq-bert" else "network"
        theirs = published.BERT(**common, heads=s.heads, by=kind).to(device)
        halves = [(int(a), int(b)) for a, b in windows.halves]
        loss = partial(theirs, bold, seconds, attention, halves, windows.label)
    return [_step(ours, partial(_loss, ours, batch))], [_step(theirs, loss)], targets


def _loss(module: nn.Module, batch: PackedBatch) -> Tensor:
    out: StepOutput = module(batch, seed=0)
    return out.loss


def _step(module: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, weight_decay=0.1, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()

    return step


def _mean(parts: list[Timing]) -> Timing:
    count = len(parts)
    return Timing(
        p20=sum(t.p20 for t in parts) / count,
        p50=sum(t.p50 for t in parts) / count,
        p80=sum(t.p80 for t in parts) / count,
        repeats=parts[0].repeats,
    )


def peak_bytes(step: Callable[[], None], device: str) -> int:
    """Return how far tensor memory rises above its level before a step, in bytes.

    On the CPU from the profiler's record of every allocation, on CUDA from the allocator's own peak.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        step()
    level = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return peak
