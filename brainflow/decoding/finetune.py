"""Fitting a pretrained module and a new head to labelled windows, and frozen features for a probe."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from brainflow.data import make_loader
from brainflow.data.batch import PackedBatch
from brainflow.decoding.task import DecodingTask
from brainflow.models.heads import DecodingHead

Pooling = Literal["cls", "last", "mean", "first"]
EVALUATION_BATCH = 256


class Decoder(nn.Module):
    """A pretrained module with a decoding head.

    Parameters
    ----------
    module
        Framework module with `features(batch, pooling) -> [windows, width]`.
    classes
        Number of classes.
    pooling
        How one vector is made of a window.
    dropout
        Dropout of the head.
    """

    def __init__(self, module: Any, *, classes: int, pooling: Pooling, dropout: float) -> None:
        super().__init__()
        self.module = module
        self.head = DecodingHead(module.config.width, classes, dropout)
        self.pooling: Pooling = pooling

    def forward(self, batch: PackedBatch) -> Tensor:
        """Return logits `[windows, classes]`."""
        return self.head(self.module.features(batch, self.pooling))


def finetune(
    decoder: Decoder,
    task: DecodingTask,
    windows: NDArray[np.int64],
    *,
    steps: int,
    batch: int,
    lr: float,
    weight_decay: float,
    seed: int,
    device: torch.device,
) -> float:
    """Fit all weights of a decoder to some windows of a task by cross-entropy.

    AdamW, gradients clipped to norm 1, learning rate rising over the first 10 % of the steps and falling
    linearly to 0 after it.

    Parameters
    ----------
    decoder
        Changed in place.
    task, windows
        The task and the positions of its windows that train.
    steps, batch
        Optimizer steps, windows a step.
    lr, weight_decay
        Peak learning rate and decoupled weight decay.
    seed
        Seeds the order of the windows.
    device
        Where the decoder lives.

    Returns
    -------
    float
        Mean cross-entropy over the last tenth of the steps.
    """
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    warmup = max(1, steps // 10)
    sampler = task.sampler(windows, batch=min(batch, len(windows)), shuffle=True, seed=seed)
    tail = torch.zeros((), device=device)
    counted = max(1, steps // 10)
    decoder.train()
    with batches(task, sampler, device) as loader:
        for step, packed in enumerate(itertools.islice(loader, steps)):
            rate = min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
            for group in optimizer.param_groups:
                group["lr"] = lr * rate
            optimizer.zero_grad(set_to_none=True)
            assert packed.labels is not None  # the sampler was given labels
            loss = F.cross_entropy(decoder(packed), packed.labels)
            loss.backward()
            nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
            optimizer.step()
            if step >= steps - counted:
                tail += loss.detach()
    return float(tail / counted)


@torch.no_grad()
def probabilities(
    decoder: Decoder, task: DecodingTask, windows: NDArray[np.int64], *, device: torch.device
) -> NDArray[np.float32]:
    """Return class probabilities `[len(windows), classes]` of a decoder in evaluation mode."""
    decoder.eval()
    sampler = task.sampler(windows, batch=EVALUATION_BATCH, shuffle=False)
    with batches(task, sampler, device) as loader:
        parts = [decoder(packed).float().softmax(dim=-1).cpu() for packed in loader]
    return torch.cat(parts).numpy()


@torch.no_grad()
def frozen_features(
    module: Any, task: DecodingTask, *, pooling: Pooling, device: torch.device
) -> NDArray[np.float32]:
    """Return the features `[windows, width]` of all windows of a task from a module in evaluation mode."""
    module.eval()
    sampler = task.sampler(np.arange(len(task.labels)), batch=EVALUATION_BATCH, shuffle=False)
    with batches(task, sampler, device) as loader:
        parts = [module.features(packed, pooling).float().cpu() for packed in loader]
    return torch.cat(parts).numpy()


@contextmanager
def batches(task: DecodingTask, sampler: Any, device: torch.device) -> Iterator[Iterator[PackedBatch]]:
    """Open a loader of packed batches over a task's store and close it at the end."""
    loader = make_loader(task.store, sampler, kind="host", device=str(device))
    try:
        yield iter(loader)
    finally:
        loader.close()
