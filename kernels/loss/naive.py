"""The specification of masked_loss in float64: the mean of the loss over the masked values."""

from __future__ import annotations

import torch

from ..masks import MaskSpec


def dense_mask(x: torch.Tensor, mask: MaskSpec, bounds: torch.Tensor, period: int) -> torch.Tensor:
    """Return the mask of a packed or padded batch as bool, in the shape of x."""
    if period == 0:
        return mask.dense(bounds, x.shape[-1])
    packed = mask.dense(torch.nn.functional.pad(bounds.cumsum(0), (1, 0)).int(), x.shape[-1])
    valid = torch.arange(period, device=x.device) < bounds[:, None]
    result = torch.zeros(x.shape, dtype=torch.bool, device=x.device)
    result[valid] = packed
    return result


def values(difference: torch.Tensor, loss: str) -> torch.Tensor:
    """Return the loss of each difference: l1 |d|, mse d², huber d²/2 where |d| ≤ 1, else |d| − 1/2."""
    if loss == "l1":
        return difference.abs()
    if loss == "mse":
        return difference.square()
    size = difference.abs()
    return torch.where(size <= 1, size.square() / 2, size - 0.5)


def masked_loss(
    pred: torch.Tensor,
    target: torch.Tensor,
    mask: MaskSpec,
    loss: str,
    bounds: torch.Tensor,
    period: int,
) -> torch.Tensor:
    """Return the mean over masked values as a float64 scalar; 0 if nothing is masked."""
    selected = dense_mask(pred, mask, bounds, period)
    if not bool(selected.any()):
        # A sum over nothing: 0, but with a gradient.
        return pred.double()[selected].sum()
    return values(pred[selected].double() - target[selected].double(), loss).mean()
