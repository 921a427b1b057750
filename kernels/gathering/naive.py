"""The specification of gather_windows: one window at a time, values in float64."""

from __future__ import annotations

from itertools import pairwise

import torch

from ..masks import MaskSpec


def gather_windows(
    store: torch.Tensor,
    starts: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: torch.Tensor | None,
    out_dtype: torch.dtype,
    mask: MaskSpec | None,
    mask_token: torch.Tensor | None,
) -> torch.Tensor:
    """Return the windows end to end, [tokens, networks]: store · scale, rounded once to `out_dtype`."""
    windows = []
    bounds = cu_seqlens.tolist()
    for w, start in enumerate(starts.tolist()):
        length = bounds[w + 1] - bounds[w]
        window = store[start : start + length].double()
        if scale is not None:
            window = window * (scale if scale.ndim == 1 else scale[w]).double()
        windows.append(window.to(out_dtype))
    packed = torch.cat(windows)
    if mask is None or mask_token is None:
        return packed
    token = mask_token.to(out_dtype)
    if token.ndim == 2:
        position = torch.cat([torch.arange(b - a) for a, b in pairwise(bounds)])
        token = token[position.to(token.device)]
    return torch.where(mask.dense(cu_seqlens, store.shape[1]), token, packed)
