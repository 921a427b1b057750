"""The specification of mask_tokens: masked values are replaced by the mask token."""

from __future__ import annotations

import torch

from ..loss.naive import dense_mask
from ..masks import MaskSpec, locate, windows


def mask_tokens(
    x: torch.Tensor, mask: MaskSpec, mask_token: torch.Tensor, bounds: torch.Tensor, period: int
) -> torch.Tensor:
    """Return x with its masked values replaced, in the dtype of x.

    mask_token [networks] gives network n its value n; [positions, 1] gives position t its value t.
    """
    token = mask_token
    if mask_token.ndim == 2:
        position = torch.arange(period) if period else locate(windows(bounds, 0)[1])[1]
        token = torch.nn.functional.pad(mask_token, (0, 0, 0, max(0, period - len(mask_token))))[position]
    return torch.where(dense_mask(x, mask, bounds, period), token.to(x.dtype), x)
