"""Light adaptation: a trained low-rank change of the blocks' projections, merged into the weights afterwards.

Hu et al. 2021, LoRA (arXiv 2106.09685): W + (alpha / rank) · B A with B [out, rank] = 0 at the start. Written
as a parametrization of the weight, so that it holds wherever the weight is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class LowRank(nn.Module):
    """`W` → `W + scale · B A`."""

    def __init__(self, rows: int, columns: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.a = nn.Parameter(torch.empty(rank, columns))
        self.b = nn.Parameter(torch.zeros(rows, rank))
        # As `nn.Linear` begins; with B = 0 the first step starts from the model itself.
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the changed weight `[rows, columns]`."""
        return weight + self.scale * (self.b @ self.a)


def add_lora(module: nn.Module, *, rank: int = 8, alpha: float = 16.0) -> None:
    """Freeze a module and give the attention and feed-forward projections of its blocks low-rank changes.

    Parameters
    ----------
    module
        Changed in place; its own weights are frozen.
    rank
        Rank of a change.
    alpha
        A change is scaled by alpha / rank.

    Raises
    ------
    ValueError
        If the module has no transformer blocks, as the autoencoder.
    """
    targets = list(_projections(module))
    if not targets:
        raise ValueError("mode: got lora, but this model has no transformer blocks; use another mode")
    # Before the changes are added, which are to be trained.
    module.requires_grad_(False)
    for linear in targets:
        rows, columns = linear.weight.shape
        change = LowRank(rows, columns, rank, alpha).to(linear.weight.device)
        parametrize.register_parametrization(linear, "weight", change)


def merge_lora(module: nn.Module) -> None:
    """Write the changes into the weights: afterwards the module is of the same kind as before."""
    for linear in _projections(module):
        if parametrize.is_parametrized(linear, "weight"):
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)


def has_blocks(module: nn.Module) -> bool:
    """Whether a module has the projections that :func:`add_lora` changes."""
    return any(True for _ in _projections(module))


def _projections(module: nn.Module) -> Iterator[nn.Linear]:
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear) and ".blocks." in f".{name}.":
            yield child
