"""How a step's batch is cut into parts, and what each part weighs.

The global batch is cut into `parts` contiguous shares, some for each rank. Masks and dropout of a part are
drawn from (seed, step, part), whichever rank computes it: one process that accumulates four parts, two ranks
with two parts and four ranks with one have the same loss, dropout included.

A framework's loss is a mean over the values that it predicts, and parts predict different numbers of them. So
the gradient of a part counts by its number of predicted values; the is-next loss of the BERTs, a mean over
pairs, by its pairs. Where damaged windows are left out, parts have different numbers of these, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from brainflow.batch import Windows, offsets
from brainflow.data.sampler import Sampler, WindowSampler
from brainflow.frameworks.base import drawn_rows
from brainflow.kernels import MaskSpec


class Share(NamedTuple):
    """What share of a step a part has, on the device."""

    values: Tensor
    """Of the predicted values."""
    pairs: Tensor
    """Of the pairs."""


def predicted_values(module: Any, windows: Windows, *, seed: int, step: int) -> int:
    """Return over how much the reconstruction loss of a part is a mean, up to a factor that parts share.

    Parameters
    ----------
    module
        The framework.
    windows
        The part.
    seed, step
        What the masks are drawn from.
    """
    config, lengths = module.config, windows.lengths
    if config.framework == "csm":  # every window counts the same
        return len(lengths)
    if config.framework == "autoencoder":
        return int(lengths.sum())
    if config.framework == "seq-bert":
        if config.mask_span > 1:
            mask = MaskSpec.spans(config.mask_rate, config.mask_span, seed=seed, offset=step)
        else:
            mask = MaskSpec.time_points(config.mask_rate, seed=seed, offset=step)
        return len(drawn_rows(mask, lengths))
    bounds = offsets(lengths)[:: 1 if windows.is_next is None else 2].astype(np.int32)
    if config.mask_span > 0:
        mask = MaskSpec.tubes(config.mask_rate, config.mask_span, seed=seed, offset=step)
        return int(mask.dense(torch.from_numpy(bounds), config.networks).sum())
    # The same networks over the whole sequence: one time point of each sequence tells how many.
    mask = MaskSpec.networks(config.mask_rate, seed=seed, offset=step)
    ones = torch.arange(len(bounds), dtype=torch.int32)
    count = mask.dense(ones, config.networks).sum(dim=1).numpy()
    return int(count @ np.diff(bounds))


def part_shares(
    module: Any,
    samplers: Sequence[Sampler],
    seeds: list[int],
    step: int,
    *,
    parts: int,
    total: Callable[[Tensor], Tensor],
) -> list[Share | None]:
    """Return what share of a step each part of this rank has; None: all of it.

    Parameters
    ----------
    module
        The framework.
    samplers, seeds
        Windows and mask seed of each part of this rank.
    step
        Optimizer step, which windows and masks are drawn for.
    parts
        Parts of all ranks.
    total
        Sums counts, float64 [2], over all ranks, on the device.
    """
    if parts == 1:
        return [None]
    whole_parts = all(isinstance(sampler, WindowSampler) for sampler in samplers)  # no window is left out
    if module.config.framework == "csm" and whole_parts:  # every window counts the same
        return [Share(*torch.full((2,), 1 / parts))] * len(samplers)
    counts = []
    for sampler, seed in zip(samplers, seeds, strict=True):
        windows = sampler.batch(step)
        values = max(1, predicted_values(module, windows, seed=seed, step=step))
        counts.append((values, len(windows.lengths)))
    whole = total(torch.tensor(counts, dtype=torch.float64).sum(dim=0))
    return [Share((values / whole[0]).float(), (windows / whole[1]).float()) for values, windows in counts]


class PairGradient:
    """Scales the gradient of the is-next loss against that of the reconstruction; 1 leaves it as it is."""

    def __init__(self, module: nn.Module) -> None:
        self.scale: Tensor | None = None
        head = getattr(module, "is_next", None)
        if isinstance(head, nn.Module):
            head.register_forward_hook(self._hook)

    def _hook(self, head: nn.Module, given: Any, logits: Tensor) -> None:
        scale = self.scale
        if scale is not None and logits.requires_grad:
            logits.register_hook(lambda gradient: gradient * scale.to(gradient.dtype))
