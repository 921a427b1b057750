"""The specification of linear_masked_loss in float64: project everything, then take the masked mean."""

from __future__ import annotations

import torch

from ..loss.naive import dense_mask, values
from ..masks import MaskSpec


def linear_masked_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    mask: MaskSpec | None,
    rows: torch.Tensor | None,
    row_weights: torch.Tensor | None,
    loss: str,
    bounds: torch.Tensor,
    period: int,
) -> torch.Tensor:
    """Return Σ w·m·loss / Σ w·m as a float64 scalar (m mask, w row weights); 0 if nothing is masked."""
    pred = torch.nn.functional.linear(
        hidden.double(), weight.double(), None if bias is None else bias.double()
    ).reshape(-1, weight.shape[0])
    if rows is None and mask is not None:
        selected = dense_mask(target, mask, bounds, period).reshape(pred.shape)
        rows = selected.any(1).nonzero().squeeze(1)
        selected = selected[rows]
    else:
        assert rows is not None
        selected = torch.ones(rows.shape[0], pred.shape[1], dtype=torch.bool, device=pred.device)
    weights = selected.double()
    if row_weights is not None:
        weights = weights * row_weights.double()[:, None]
    loss_values = values(pred[rows] - target.reshape(pred.shape)[rows].double(), loss)
    total = weights.sum()
    kept = torch.where(weights > 0, loss_values * weights, 0.0).sum()
    return kept / total if bool(total > 0) else kept * 0.0
