"""What each microbatch of a step weighs.

The batch of a step is cut into `train.micro_batches` contiguous microbatches, some for each rank. Masks and
dropout of a microbatch are drawn from (seed, step, microbatch), whichever rank computes it: one process that
accumulates four, two ranks with two and four ranks with one have the same loss, dropout included.

A framework's loss is a mean over its targets, of which microbatches have different numbers. So the gradient
of a microbatch counts by its targets; the is-next loss of the BERTs, a mean over pairs, by its windows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from brainflow.batch import PackedBatch
from brainflow.frameworks.base import Framework


class LossWeight(NamedTuple):
    """What share of a step a microbatch has; float32, 0-d, on the device."""

    targets: Tensor
    windows: Tensor

    def weigh(self, loss: Tensor, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what a microbatch adds to the step's loss (`loss`) and metrics."""
        reconstruction = metrics.get("reconstruction", loss)
        weighed = {
            name: metric * (self.targets if name == "reconstruction" else self.windows)
            for name, metric in metrics.items()
        }
        return weighed | {"loss": self.targets * reconstruction + self.windows * (loss - reconstruction)}


def loss_weights(
    module: Framework, batches: Sequence[PackedBatch], total: Callable[[Tensor], Tensor]
) -> list[LossWeight]:
    """Return the weights of this rank's microbatches.

    Parameters
    ----------
    module
        Counts the targets.
    batches
        The microbatches of this rank, with their masks.
    total
        Sums counts, float64 [2], over all ranks; the one collective.
    """
    counts = [(max(1, module.num_targets(batch)), batch.windows) for batch in batches]
    summed = total(torch.tensor(counts, dtype=torch.float64).sum(dim=0))
    return [
        LossWeight((targets / summed[0]).float(), (windows / summed[1]).float())
        for targets, windows in counts
    ]


class PairGradient:
    """Scales the gradient of the is-next loss against that of the reconstruction.

    A backward pass weighs the whole loss by targets; at the logits of the head `is_next` its gradient is put
    right. (Two backward passes, or a second weighted sum, would round differently.) None leaves it as it is.
    """

    def __init__(self, module: nn.Module) -> None:
        self.scale: Tensor | None = None
        head = getattr(module, "is_next", None)
        if isinstance(head, nn.Module):
            head.register_forward_hook(self._hook)

    def _hook(self, head: nn.Module, given: Any, logits: Tensor) -> None:
        scale = self.scale
        if scale is not None and logits.requires_grad:
            logits.register_hook(lambda gradient: gradient * scale.to(gradient.dtype))
