"""The specification of variable-length attention, in float64, one window and one head at a time.

Legend: T tokens, H heads, D head_dim, L length of a window.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, causal: bool, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Attend within each window: out = softmax(scale · q kᵀ) v.

    Returns
    -------
    tuple of Tensor
        out [T, H, D] and log-sum-exp of the scores [T, H], float64, differentiable by autograd.
    """
    outs, lses = [], []
    edges = cu_seqlens.tolist()
    for start, end in pairwise(edges):
        a, b, c = (x[start:end].double() for x in (q, k, v))
        scores = torch.einsum("ihd,jhd->hij", a, b) * softmax_scale
        if causal:
            length = end - start
            later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        outs.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), c))
        lses.append(scores.logsumexp(-1).t())
    return torch.cat(outs), torch.cat(lses)


def shifted_attention(
    q: Tensor, k: Tensor, v: Tensor, k_self: Tensor, v_self: Tensor, cu_seqlens: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Attend from query i of a window to keys j < i of (k, v) and to entry i of (k_self, v_self).

    Returns
    -------
    tuple of Tensor
        out [T, H, D] and log-sum-exp of the scores [T, H], float64, differentiable by autograd.
    """
    outs, lses = [], []
    edges = cu_seqlens.tolist()
    for start, end in pairwise(edges):
        for i in range(start, end):
            keys = torch.cat([k[start:i], k_self[i : i + 1]]).double()
            values = torch.cat([v[start:i], v_self[i : i + 1]]).double()
            scores = torch.einsum("hd,jhd->hj", q[i].double(), keys) * softmax_scale
            outs.append(torch.einsum("hj,jhd->hd", scores.softmax(-1), values))
            lses.append(scores.logsumexp(-1))
    return torch.stack(outs), torch.stack(lses)
