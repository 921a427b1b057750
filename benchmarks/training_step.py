"""A training step on random windows: what the suites `scaling` and `throughput` time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import nn

from brainflow.config import ModelConfig
from brainflow.data.batch import PackedBatch
from brainflow.frameworks import build

T_R = 0.72


def random_batch(
    windows: int,
    networks: int,
    *,
    shortest: int = 10,
    longest: int = 50,
    pairs: bool = False,
    device: str = "cpu",
) -> PackedBatch:
    """Return normally distributed windows of `shortest` to `longest` − 1 time points.

    Parameters
    ----------
    windows, networks
        Sizes of the batch; with `pairs` each window is cut into two halves.
    shortest, longest
        Range of the windows' lengths in time points, `longest` exclusive.
    device
        Where the tensors are.
    """
    random = np.random.default_rng(0)
    whole = random.integers(shortest, longest, windows)
    first = random.integers(3, whole - 2)
    lengths = np.stack([first, whole - first], 1).reshape(-1) if pairs else whole
    generator = torch.Generator().manual_seed(0)
    seconds = np.concatenate([np.arange(n, dtype=np.float32) * T_R for n in lengths])
    same_run = torch.from_numpy(random.integers(0, 2, windows).astype(np.float32))
    return PackedBatch(
        bold=torch.randn(int(lengths.sum()), networks, generator=generator).to(device),
        times=torch.from_numpy(seconds).to(device),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)).to(device),
        max_seqlen=int(lengths.max()),
        lengths=lengths.astype(np.int32),
        runs=np.zeros(len(lengths), np.int32),
        step=0,
        is_next=same_run.to(device) if pairs else None,
    )


def csm(networks: int, device: str) -> nn.Module:
    """Return a dense CSM of 4 layers, width 256, for windows of up to 1,024 time points."""
    torch.manual_seed(0)
    config = ModelConfig(
        networks=networks, width=256, layers=4, heads=4, max_positions=1024, max_seconds=1024 * T_R
    )
    return build(config).to(device)


def train_step(
    module: nn.Module, autocast: Callable[[], AbstractContextManager[object]] = nullcontext
) -> Callable[[PackedBatch], None]:
    """Return forward, backward and AdamW as one function of a batch."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, weight_decay=0.1, fused=True)

    def step(batch: PackedBatch) -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            loss = module(batch, seed=0).loss
        loss.backward()
        optimizer.step()

    return step
