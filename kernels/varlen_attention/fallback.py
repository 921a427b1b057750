"""Variable-length attention in plain PyTorch: tokens are split into windows, each window is a few products.

Runs wherever PyTorch runs, in float32 and float64 (lower types are computed in float32), with dropout.
Probabilities are not kept for the backward pass; they are computed again from the log-sum-exp. Scores are
held in units of log 2: on the CPU exp takes a slow path at −inf (84 µs a window of 30, 12 heads), exp2 does
not (11 µs).

Legend: T tokens, H heads, D head_dim, L length of a window.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from .checks import Limits, host_lengths

LN2 = math.log(2.0)
BLOCK_SCORES = 2**18
"""Scores that one block of heads may hold."""

LIMITS = Limits(
    name="fallback",
    devices=("cpu", "cuda"),
    dtypes=(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    head_dim_max=2**31,
    dropout=True,
)


def installed() -> bool:
    """Whether it can be used: always."""
    return True


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    dropout_p: float,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return out [T, H, D], lse [T, H] and the random state that the backward pass needs."""
    lengths = host_lengths(cu_seqlens, q.shape[0], max_seqlen)
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.empty(q.shape, dtype=compute, device=q.device)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=compute, device=q.device).t()
    later = _later(max(lengths), compute, q.device) if causal else None
    state, generator = _start_dropout(dropout_p, q.device)
    for a, b, c, o, e in _blocks(lengths, q.to(compute), k.to(compute), v.to(compute), out, lse):
        p = _scores(a * (softmax_scale / LN2), b, later)
        top = p.amax(-1, keepdim=True)
        total = p.sub_(top).exp2_().sum(-1, keepdim=True)
        torch.mul(top.add_(total.log2()).squeeze(-1), LN2, out=e)
        if generator is not None:
            p *= _keep(p, dropout_p, generator)
        torch.div(torch.bmm(p, c), total, out=o)
    return out.to(q.dtype), lse, state


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    state: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    dropout_p: float,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, each [T, H, D].

    With P = exp(s − lse) and δ = Σ_d dout · out: dV = Pᵀ dout, dS = P · (dout Vᵀ − δ), dQ = scale · dS K,
    dK = scale · dSᵀ Q (Dao 2023, arXiv 2307.08691, section 3.1.2).
    """
    edges = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(edges)]
    compute = lse.dtype
    grads = [torch.empty(q.shape, dtype=compute, device=q.device) for _ in range(3)]
    later = _later(max(lengths), compute, q.device) if causal else None
    _, generator = _start_dropout(dropout_p, q.device, state)
    packed = (*(x.to(compute) for x in (dout, out, q, k, v)), lse, *grads)
    for g, o, a, b, c, e, dq, dk, dv in _blocks(lengths, *packed):
        a = a * (softmax_scale / LN2)
        p = _scores(a, b, later).sub_((e / LN2).unsqueeze(-1)).exp2_()
        ds = torch.bmm(g, c.transpose(1, 2))
        if generator is None:
            dv.copy_(torch.bmm(p.transpose(1, 2), g))
        else:
            keep = _keep(p, dropout_p, generator)
            ds *= keep
            dv.copy_(torch.bmm(keep.mul_(p).transpose(1, 2), g))
        ds.sub_((g * o).sum(-1, keepdim=True)).mul_(p)
        torch.mul(torch.bmm(ds, b), softmax_scale, out=dq)
        torch.mul(torch.bmm(ds.transpose(1, 2), a), LN2, out=dk)
    dq, dk, dv = (x.to(q.dtype) for x in grads)
    return dq, dk, dv


def _blocks(lengths: list[int], *packed: Tensor) -> Iterator[list[Tensor]]:
    """Yield the views [heads, L, …] of each window, fewer heads at a time where windows are long.

    The limit keeps a block's scores near 1 MiB, so they stay in the cache and memory stays small.
    """
    heads = packed[0].shape[1]
    for window in zip(*(x.split(lengths) for x in packed), strict=True):
        views = [x.transpose(0, 1) for x in window]
        step = max(1, BLOCK_SCORES // views[0].shape[1] ** 2)
        if step >= heads:
            yield views
        else:
            for head in range(0, heads, step):
                yield [x[head : head + step] for x in views]


def _scores(a: Tensor, b: Tensor, later: Tensor | None) -> Tensor:
    """Return a bᵀ [H, L, L], −inf where the key lies later than the query."""
    scores = torch.bmm(a, b.transpose(1, 2))
    if later is None:
        return scores
    length = a.shape[1]
    return scores.add_(later[:length, :length])


def _later(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((length, length), -torch.inf, dtype=dtype, device=device).triu_(1)


def _start_dropout(
    dropout_p: float, device: torch.device, state: Tensor | None = None
) -> tuple[Tensor, torch.Generator | None]:
    """Return (state, generator): a new state from the default generator, or the given one replayed."""
    if dropout_p == 0.0:
        return torch.empty(0, dtype=torch.int64, device=device), None
    if state is None:
        state = torch.randint(2**62, (2,), dtype=torch.int64, device=device)
    generator = torch.Generator(device)
    generator.manual_seed(int(state[0]))
    return state, generator


def _keep(p: Tensor, dropout_p: float, generator: torch.Generator) -> Tensor:
    """Return 1 / (1 − dropout_p) where a weight is kept and 0 where it is dropped."""
    return torch.empty_like(p).bernoulli_(1.0 - dropout_p, generator=generator).div_(1.0 - dropout_p)
