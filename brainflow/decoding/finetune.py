"""Fitting a pretrained module and a new head to labelled windows, and frozen features for a probe."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from brainflow.batch import PackedBatch
from brainflow.decoding.heads import class_weights
from brainflow.decoding.readout import Readout, read
from brainflow.decoding.windows import WindowSource

EVALUATION_BATCH = 256
POINTS = 4
"""Time points, in widths of the states, that a covariance needs."""
CHECKS = 10
"""How often a fit looks at its validation windows."""


@dataclass(frozen=True, kw_only=True)
class History:
    """What a fit went through.

    Attributes
    ----------
    losses, rates
        Training loss and learning rate of each step.
    checks
        (steps done, loss, accuracy) on the validation windows at each look at them.
    """

    losses: list[float]
    rates: list[float]
    checks: list[tuple[int, float, float]] = field(default_factory=list)


class Decoder(nn.Module):
    """A pretrained module with a head.

    Parameters
    ----------
    module
        Framework module.
    head
        Module from what the readout gives to logits `[windows, classes]`; with the pooling "tokens" from
        states `[tokens, width]` and lengths `[windows]`.
    readout
        How one vector is made of a window; "tokens" leaves that to the head.
    frozen
        Train the head alone: the module stays in evaluation mode and gets no gradients.
    """

    def __init__(self, module: Any, head: nn.Module, readout: Readout, *, frozen: bool = False) -> None:
        super().__init__()
        self.module = module
        self.head = head
        self.readout = readout
        self.frozen = frozen
        if frozen:
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Set training mode, of the head alone if the module is frozen."""
        super().train(mode)
        if self.frozen:
            self.module.eval()
        return self

    def forward(self, batch: PackedBatch) -> Tensor:
        """Return logits `[windows, classes]`."""
        features = self.readout(self.module, batch)
        tokens = self.readout.pooling == "tokens"
        return self.head(features, batch.lengths) if tokens else self.head(features)


def finetune(
    decoder: nn.Module,
    source: WindowSource,
    windows: NDArray[np.int64],
    *,
    classes: int,
    steps: int,
    batch: int,
    lr: float,
    weight_decay: float,
    seed: int,
    device: torch.device,
    balance: bool = False,
    smoothing: float = 0.0,
    validation: NDArray[np.int64] | None = None,
    jitter: int = 0,
    stop: int | None = None,
) -> History:
    """Fit the trainable weights of a decoder to some windows by cross-entropy.

    AdamW, gradients clipped to norm 1, learning rate rising over the first 10 % of the steps and falling
    linearly to 0 after it. With validation windows the weights of the best of ten looks at them are kept; a
    head that was fitted before is the first of them.

    Parameters
    ----------
    decoder
        Module from a batch to logits `[windows, classes]`; changed in place.
    source, windows
        Labelled windows and the positions of those that train.
    classes
        Number of classes.
    steps, batch
        Optimizer steps, windows a step.
    lr, weight_decay
        Peak learning rate and decoupled weight decay.
    seed
        Seeds the order of the windows.
    device
        Where the decoder lives.
    balance
        Weigh windows by the inverse of their class's frequency.
    smoothing
        Share of each label spread over all classes.
    validation
        Positions of windows that choose the weights, in neither training nor test.
    jitter
        Time points by which onsets move, where the source can.
    stop
        Step after which to stop, with the learning rates of a fit of `steps`; by default `steps`.
    """
    trained = [p for p in decoder.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay, fused=True)
    labels = source.labels[windows]
    weights = torch.from_numpy(class_weights(labels, classes)).to(device) if balance else None
    warmup = max(1, steps // 10)
    # Zero would be reached one step after the last, so no step does nothing.
    rates = [lr * min((i + 1) / warmup, (steps - i) / max(1, steps - warmup)) for i in range(steps)]
    stop = steps if stop is None else stop
    losses = torch.zeros(stop, device=device)
    # Counted from the last step, which has to be among them.
    looks = {steps - 1 - look * max(1, steps // CHECKS) for look in range(CHECKS)}
    checks: list[tuple[int, float, float]] = []
    best: dict[str, Tensor] | None = None
    if validation is not None:
        checks.append((0, *_check(decoder, source, validation, device)))
        best = copy.deepcopy(decoder.state_dict())
    decoder.train()
    # Batches are filled up over the end of an epoch: a larger one would hold a window twice.
    size = min(batch, len(windows))
    with source.loader(windows, batch=size, shuffle=True, seed=seed, device=device, jitter=jitter) as loader:
        for step, packed in enumerate(itertools.islice(loader, stop)):
            for group in optimizer.param_groups:
                group["lr"] = rates[step]
            optimizer.zero_grad(set_to_none=True)
            assert packed.labels is not None  # the loader was given labels
            loss = F.cross_entropy(decoder(packed), packed.labels, weight=weights, label_smoothing=smoothing)
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            # Kept on the device: to read it would stop a GPU once a step.
            losses[step] = loss.detach()
            if validation is not None and step in looks:
                now, right = _check(decoder, source, validation, device)
                if now < min(check[1] for check in checks):
                    best = copy.deepcopy(decoder.state_dict())
                checks.append((step + 1, now, right))
                # `_check` left it in evaluation mode.
                decoder.train()
    if best is not None:
        decoder.load_state_dict(best)
    return History(losses=losses.tolist(), rates=rates[:stop], checks=checks)


@torch.no_grad()
def probabilities(
    decoder: nn.Module, source: WindowSource, windows: NDArray[np.int64], *, device: torch.device
) -> NDArray[np.float32]:
    """Return class probabilities `[len(windows), classes]` of a decoder in evaluation mode.

    Parameters
    ----------
    decoder
        Module from a batch to logits `[windows, classes]`; put into evaluation mode.
    source, windows
        Windows, and the positions of those that are read.
    device
        Where the decoder lives.
    """
    decoder.eval()
    with source.loader(windows, batch=EVALUATION_BATCH, shuffle=False, seed=0, device=device) as loader:
        parts = [decoder(packed).float().softmax(dim=-1).cpu() for packed in loader]
    return torch.cat(parts).numpy()


def _check(
    decoder: nn.Module, source: WindowSource, windows: NDArray[np.int64], device: torch.device
) -> tuple[float, float]:
    """Return cross-entropy and accuracy over some windows."""
    chances, labels = probabilities(decoder, source, windows, device=device), source.labels[windows]
    chosen = chances[np.arange(len(windows)), labels]
    # A softmax in float32 may be 0, whose log is infinite.
    loss = float(-np.log(np.maximum(chosen, 1e-12)).mean())
    return loss, float((chances.argmax(axis=1) == labels).mean())


@torch.no_grad()
def frozen_features(
    module: Any,
    source: WindowSource,
    readouts: Sequence[Readout],
    *,
    device: torch.device,
    windows: NDArray[np.int64] | None = None,
) -> list[NDArray[np.float32]]:
    """Return what each readout gives of some windows (all of them if None), `[windows, …]`.

    The module is put into evaluation mode.

    Parameters
    ----------
    module
        Framework module; put into evaluation mode.
    source, windows
        Windows, and the positions of those that are read.
    readouts
        How one vector is made of a window; all from one pass.
    device
        Where the module lives.
    """
    module.eval()
    if windows is None:
        windows = np.arange(len(source.labels))
    with source.loader(windows, batch=EVALUATION_BATCH, shuffle=False, seed=0, device=device) as loader:
        parts = [[x.float().cpu() for x in read(module, packed, readouts)] for packed in loader]
    return [torch.cat(column).numpy() for column in zip(*parts, strict=True)]


@torch.no_grad()
def state_covariance(
    module: Any, source: WindowSource, *, device: torch.device, windows: NDArray[np.int64] | None = None
) -> NDArray[np.float64] | None:
    """Return the covariance of a module's last states over the time points of some windows.

    Parameters
    ----------
    module
        Put into evaluation mode.
    source, windows
        Windows (all if None); their labels are not read.
    device
        Where the module lives.

    Returns
    -------
    ndarray
        float64 `[width, width]`; None of fewer than `POINTS` · width time points, whose quietest directions
        are quiet by chance.
    """
    module.eval()
    if windows is None:
        windows = np.arange(len(source.labels))
    total = np.zeros((module.config.width, module.config.width))
    mean, count = np.zeros(len(total)), 0
    with source.loader(windows, batch=EVALUATION_BATCH, shuffle=False, seed=0, device=device) as loader:
        for packed in loader:
            # In float64: the small difference of large sums is wanted.
            states = module.features(packed, "tokens").double().cpu().numpy()
            total += states.T @ states
            mean, count = mean + states.sum(axis=0), count + len(states)
    if count < POINTS * len(total):
        return None
    mean /= count
    return total / count - np.outer(mean, mean)
