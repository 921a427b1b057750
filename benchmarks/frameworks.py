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
from brainflow.frameworks import FRAMEWORKS, StepOutput, build

from .timing import Row, Timing, interleave, speed_rows

PADDED = 50
T_R = 0.72


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of model and batch."""

    networks: int = 1024
    width: int = 256
    layers: int = 4
    heads: int = 4
    batch: int = 64
    dropout: float = 0.1


def measurements(quick: bool, device: str) -> dict[str, Callable[[], list[Row]]]:
    """Return framework → what measures it; nothing, and a line that says so, without `transformers`.

    Parameters
    ----------
    quick
        Makes no difference here: a full run has more passes.
    device
        "cpu" or "cuda".
    """
    if importlib.util.find_spec("transformers") is None:
        print(
            "frameworks: skipped, the baseline needs transformers (pip install transformers)", file=sys.stderr
        )
        return {}
    return {name: partial(measure, name, Sizes(), 3, device) for name in FRAMEWORKS}


def measure(name: str, sizes: Sizes, repeats: int, device: str) -> list[Row]:
    """Return speed and memory rows of one framework; with dense CSM also those of `csm-single`."""
    windows = Windows(sizes, device)
    steps, targets = _steps(name, sizes, windows, device)
    parts = {f"{who} {i}": step for who, parts in steps.items() for i, step in enumerate(parts)}
    timed = interleave(parts, repeats=repeats, device=device)
    times = {who: _mean([timed[f"{who} {i}"] for i in range(len(parts))]) for who, parts in steps.items()}
    peak = {who: max(peak_bytes(step, device) for step in parts) for who, parts in steps.items()}
    work: dict[str, dict[str, int]] = {
        "steps": dict.fromkeys(steps, 1),
        "targets": targets,
        "tokens": dict.fromkeys(steps, int(windows.lengths.sum())),
    }
    cases = {name: "ours"} | ({"csm-single": "single"} if "single" in steps else {})
    found = []
    for case, ours in cases.items():
        baselines = [who for who in steps if who not in (ours, "ours")]
        for what, amount in work.items():
            found += speed_rows(
                "frameworks", case, times, ours=ours, baselines=baselines, metric=f"{what}_per_s",
                unit=f"{what}/s", work=amount,
            )  # fmt: skip
        for baseline in baselines:
            memory = Row(
                suite="frameworks", case=case, metric="peak_memory", value=peak[ours] / 2**20, unit="MiB",
                baseline=baseline, ratio=peak[baseline] / peak[ours],
            )  # fmt: skip
            found.append(memory)
    return found


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

    def padded(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return bold [batch, 50, networks], seconds, int64 attention mask and token types [batch, 50]."""
        bold = self.bold.new_zeros(len(self.lengths), PADDED, self.bold.shape[1])
        attention = torch.zeros(len(self.lengths), PADDED, dtype=torch.int64, device=self.device)
        for i, part in enumerate(self.bold.split(self.lengths.tolist())):
            bold[i, : len(part)] = part
            attention[i, : len(part)] = 1
        seconds = (torch.arange(PADDED, device=self.device) * T_R).expand(len(self.lengths), PADDED)
        types = (torch.arange(PADDED) >= torch.from_numpy(self.halves[:, :1])).long().to(self.device)
        return bold, seconds, attention, types


Step = Callable[[], None]


def _steps(
    name: str, sizes: Sizes, windows: Windows, device: str
) -> tuple[dict[str, list[Step]], dict[str, int]]:
    """Return name → training steps (ours, the published recipe's, …), and name → targets of one step.

    A target is a predicted time point; Net-BERT's are the share of the time points' values that it predicts.
    """
    from .baselines import published  # optional dependency: transformers

    torch.manual_seed(0)
    s = sizes
    common: dict[str, Any] = {
        "networks": s.networks,
        "width": s.width,
        "layers": s.layers,
        "dropout": s.dropout,
    }
    bold, seconds, attention, types = windows.padded()
    batch = windows.packed(pairs="bert" in name)

    def module(**changes: Any) -> nn.Module:
        return build(ModelConfig(framework=name, heads=s.heads, **common, **changes)).to(device)  # type: ignore[arg-type]

    def ours(**changes: Any) -> Step:
        made = module(**changes)
        return _step(made, partial(_loss, made, batch))

    theirs: nn.Module
    if name == "autoencoder":
        theirs = published.Autoencoder(**common).to(device)
        inputs = (bold, seconds, attention)
        steps = {
            "ours": [ours(teacher_forcing=p) for p in (1.0, 0.0)],
            "published": [_step(theirs, partial(theirs, *inputs, forced)) for forced in (True, False)],
        }
        return steps, dict.fromkeys(steps, batch.tokens)
    if name == "csm":
        theirs = published.CSM(**common, heads=s.heads).to(device)
        step = _step(theirs, partial(theirs, bold, seconds, attention))
        steps = {"ours": [ours()], "published": [step], "single": [ours(masking="single")]}
        return steps, {"ours": batch.tokens - batch.windows, "published": s.batch, "single": s.batch}
    theirs = published.BERT(**common, heads=s.heads, by="time" if name == "seq-bert" else "network").to(
        device
    )
    loss = partial(theirs, bold, seconds, attention, types, windows.label)
    steps = {"ours": [ours()], "published": [_step(theirs, loss)]}
    return steps, dict.fromkeys(steps, round(ModelConfig().mask_rate * batch.tokens))


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
    """Return the mean step, round by round."""
    return Timing(seconds=tuple(float(np.mean(s)) for s in zip(*(t.seconds for t in parts), strict=True)))


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
