"""Variable-length attention in plain PyTorch: a few products a window, or a group of small windows.

Runs wherever PyTorch runs, in float32 and float64 (lower types are computed in float32), with dropout.
On the CPU windows that are too large for a group and have no dropout go to PyTorch's own kernel
(flash_cpu.py): 1.3 times as fast for 64 windows of 10 to 50, 1.6 to 1.9 for some of 300 to 1,200.
Probabilities are not kept for the backward pass; they are computed again from the log-sum-exp. Scores are
held in units of log 2: on the CPU exp takes a slow path at −inf (84 µs a window of 30, 12 heads), exp2 does
not (11 µs).

Legend: T tokens, H heads, D head_dim, L length of a block's longest window, B its matrices [L, L].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from ..keep import keep_mask, kept
from . import flash_cpu
from .checks import Limits, host_lengths
from .groups import Groups, grouped

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
    groups = grouped(lengths, q)
    if _by_flash_cpu(q, groups, dropout_p):
        a, b, c = (x.to(compute) for x in (q, k, v))
        out, lse = flash_cpu.forward(a, b, c, lengths, causal, softmax_scale)
        return out.to(q.dtype), lse, _start_dropout(0.0, q.device)[0]
    packed = [_placed(x.to(compute), groups) for x in (q, k, v)]
    out = packed[0].new_empty(packed[0].shape)
    lse = out.new_empty(out.shape[-2::-1]).t()
    later = _later(max(lengths), compute, q.device) if causal else None
    state, generator = _start_dropout(dropout_p, q.device)
    for hidden, (a, b, c, o, e) in _blocks(lengths, groups, *packed, out, lse):
        p = _scores(a * (softmax_scale / LN2), b, later, hidden)
        top = p.amax(-1, keepdim=True)
        total = p.sub_(top).exp2_().sum(-1, keepdim=True)
        torch.mul(top.add_(total.log2()).squeeze(-1), LN2, out=e)
        if generator is not None:
            p *= keep_mask(p, dropout_p, generator)
            total *= kept(dropout_p)
        torch.div(torch.bmm(p, c), total, out=o)
    if groups is not None:
        out, lse = (groups.restore(x, q.shape[1]) for x in (out, lse))
        lse = lse.t().contiguous().t()
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
    groups = grouped(lengths, q)
    if _by_flash_cpu(q, groups, dropout_p):
        g, a, b, c, o = (x.to(compute) for x in (dout, q, k, v, out))
        dq, dk, dv = flash_cpu.backward(g, a, b, c, o, lse, lengths, causal, softmax_scale)
        return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)
    delta = (dout.to(compute) * out).sum(-1)
    packed = [_placed(x.to(compute), groups) for x in (dout, q, k, v, lse / LN2, delta)]
    if groups is not None:
        # A query that stands for no token has probabilities of 0: keys and values get nothing from it.
        packed[4].index_fill_(0, groups.padding, torch.inf)
    grads = [packed[0].new_empty(packed[0].shape) for _ in range(3)]
    later = _later(max(lengths), compute, q.device) if causal else None
    _, generator = _start_dropout(dropout_p, q.device, state)
    if generator is not None:  # what is kept was scaled up
        packed[0] = packed[0] / kept(dropout_p)
    for hidden, (g, a, b, c, e, d, dq, dk, dv) in _blocks(lengths, groups, *packed, *grads):
        a = a * (softmax_scale / LN2)
        p = _scores(a, b, later, hidden).sub_(e.unsqueeze(-1)).exp2_()
        ds = torch.bmm(g, c.transpose(1, 2))
        used = p
        if generator is not None:
            keep = keep_mask(p, dropout_p, generator)
            ds *= keep
            used = keep.mul_(p)
        dv.copy_(torch.bmm(used.transpose(1, 2), g))
        ds.sub_(d.unsqueeze(-1)).mul_(p)
        torch.mul(torch.bmm(ds, b), softmax_scale, out=dq)
        torch.mul(torch.bmm(ds.transpose(1, 2), a), LN2, out=dk)
    if groups is not None:
        grads = [groups.restore(x, q.shape[1]) for x in grads]
    dq, dk, dv = (x.to(q.dtype) for x in grads)
    return dq, dk, dv


def _by_flash_cpu(q: Tensor, groups: Groups | None, dropout_p: float) -> bool:
    return q.device.type == "cpu" and groups is None and dropout_p == 0.0


def _placed(x: Tensor, groups: Groups | None) -> Tensor:
    return x if groups is None else groups.place(x)


def _blocks(
    lengths: list[int], groups: Groups | None, *packed: Tensor
) -> Iterator[tuple[Tensor | None, list[Tensor]]]:
    """Yield the mask of padding and the views [B, L, …] of each group, or of each window.

    A window comes in fewer heads at a time where it is long: a block's scores stay near 1 MiB, so they stay
    in the cache and memory stays small.
    """
    if groups is not None:
        for group in groups.groups:
            rows = slice(group.begin, group.end)
            yield group.hidden, [x[rows].unflatten(0, (-1, group.length)) for x in packed]
        return
    heads = packed[0].shape[1]
    for window in zip(*(x.split(lengths) for x in packed), strict=True):
        views = [x.transpose(0, 1) for x in window]
        step = max(1, BLOCK_SCORES // views[0].shape[1] ** 2)
        if step >= heads:
            yield None, views
        else:
            for head in range(0, heads, step):
                yield None, [x[head : head + step] for x in views]


def _scores(a: Tensor, b: Tensor, later: Tensor | None, hidden: Tensor | None) -> Tensor:
    """Return a bᵀ [B, L, L], −inf where the key lies later than the query or is padding."""
    scores = torch.bmm(a, b.transpose(1, 2))
    if hidden is not None:
        scores += hidden.to(scores.dtype)
    if later is not None:
        length = a.shape[1]
        scores += later[:length, :length]
    return scores


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
