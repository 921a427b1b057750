"""The specification of variable-length attention, in float64, one window and one head at a time.

Legend: T tokens, H heads, D head_dim, L length of a window.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .. import dropout
from ..random import philox


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    causal: bool,
    softmax_scale: float,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attend within each window: out = softmax(scale · q kᵀ) v, with the weights that :func:`kept` keeps.

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
        weights = scores.softmax(-1) * kept(start, scores, 0, dropout_p, seed)
        outs.append(torch.einsum("hij,jhd->ihd", weights, c))
        lses.append(scores.logsumexp(-1).t())
    return torch.cat(outs), torch.cat(lses)


def shifted_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_self: Tensor,
    v_self: Tensor,
    cu_seqlens: Tensor,
    softmax_scale: float,
    dropout_p: float = 0.0,
    seed: int = 0,
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
            weights = scores.softmax(-1) * kept(i, scores[:, None], 1, dropout_p, seed)[:, 0]
            outs.append(torch.einsum("hj,jhd->hd", weights, values))
            lses.append(scores.logsumexp(-1))
    return torch.stack(outs), torch.stack(lses)


def kept(first: int, scores: Tensor, stream: int, dropout_p: float, seed: int) -> Tensor:
    """Return what `impl="window"` multiplies weights by: 0, or 1 / the probability with which one is kept.

    Parameters
    ----------
    first
        Token of the first query, counted over the batch.
    scores
        [H, queries, keys], from the window's first key.
    stream
        0 or 1: whose queries they are.
    dropout_p, seed
        A weight is dropped where 16 bits of Philox lie below dropout_p · 65,536; key j of a query has those
        at 16 · (j % 2) of word j % 8 // 2 of counter (token, head, j // 8, stream).
    """
    heads, queries, keys = (torch.arange(n, device=scores.device) for n in scores.shape)
    groups = keys[: -(-len(keys) // 8)]
    words = philox(seed, (first + queries)[:, None], heads[:, None, None], groups, stream)
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    drawn = torch.stack(halves, -1).flatten(-2)[..., : len(keys)]
    return (drawn >= dropout.dropped(dropout_p)).to(scores.dtype) / dropout.kept(dropout_p)
