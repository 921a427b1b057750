"""Variable-length attention in plain PyTorch: a few products a window, or a group of small windows.

Runs wherever PyTorch runs, in float32 and float64 (lower types are computed in float32), with dropout. Small
windows of about equal length are padded to the longest of their group, one matrix a window and head. On the
CPU windows that are too large for a group and have no dropout go to PyTorch's own kernel: 1.3 times as fast
for 64 windows of 10 to 50, 1.6 to 1.9 for some of 300 to 1,200. Probabilities are not kept for the backward
pass; they are computed again from the log-sum-exp. Scores are held in units of log 2: on the CPU exp takes a
slow path at −inf (84 µs a window of 30, 12 heads), exp2 does not (11 µs).

Legend: T tokens, H heads, D head_dim, n length of a window, L length of a group's longest window, B its
matrices [L, L].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from ..dispatch import host_lengths
from ..dropout import keep_mask, kept
from .adapter import Call, Limits

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
SMALL = 2**14
"""Values (time points × heads × head_dim) of a mean window up to which windows are grouped: the products of
larger ones take longer than calling them, and copying them costs more than it saves."""
SCORES = 2**16
"""Scores that the windows of a group may have together, so that they stay in the cache."""
PADDING = 1.5
"""Scores of a group over those of its windows alone, at most."""

# PyTorch chooses this kernel inside `scaled_dot_product_attention`, which keeps the log-sum-exp to itself; it
# is called here directly because attention of two streams is merged by log-sum-exps.
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@dataclass(frozen=True)
class Group:
    """Rows `begin` to `end` of the padded order: matrices of `length` rows.

    `hidden` [B, 1, L], float32, is −inf at padding; None where there is none.
    """

    begin: int
    end: int
    length: int
    hidden: Tensor | None


@dataclass(frozen=True)
class Groups:
    """The padded order: group by group, window by window, head by head, token by token.

    Attributes
    ----------
    take
        int64, row of [T · H, …] for each padded row; padding repeats a window's last token.
    back
        int64 [T · H], the padded row of each row.
    padding
        int64, padded rows that stand for no token.
    groups
        Its parts.
    """

    take: Tensor
    back: Tensor
    padding: Tensor
    groups: tuple[Group, ...]

    def place(self, x: Tensor) -> Tensor:
        """Return x [T, H, …] in the padded order, [padded rows, …]."""
        return x.reshape(-1, *x.shape[2:]).index_select(0, self.take)

    def restore(self, x: Tensor, heads: int) -> Tensor:
        """Return the opposite of :meth:`place`."""
        return x.index_select(0, self.back).unflatten(0, (-1, heads))


def grouped(lengths: list[int], q: Tensor) -> Groups | None:
    """Return groups of these windows of q [T, H, D] where windows are small and several, else None."""
    heads, width = q.shape[1], q.shape[1] * q.shape[2]
    if len(lengths) < 2 or len(q) * width > SMALL * len(lengths) or max(lengths) ** 2 * heads > SCORES:
        return None
    return _groups(tuple(lengths), heads, q.device)


@lru_cache(maxsize=8)
def _groups(lengths: tuple[int, ...], heads: int, device: torch.device) -> Groups:
    """Return the groups: they are the same in every layer of a step, forward and backward."""
    # On the host whatever the default device is: the lengths are there already.
    size = torch.tensor(lengths, device="cpu")
    starts = size.cumsum(0) - size
    head = torch.arange(heads, device="cpu")[:, None]
    take, padding, groups = [], [], []
    back = torch.empty(sum(lengths) * heads, dtype=torch.int64, device="cpu")
    done = 0
    for windows in _alike(lengths, heads):
        chosen = torch.tensor(windows, device="cpu")
        own, length = size[chosen, None], lengths[windows[0]]
        place = torch.arange(length, device="cpu")
        real = place < own
        # Padding repeats the last token, whose scores are finite: what lies in unused memory plus −inf might
        # be NaN.
        token = starts[chosen, None] + torch.minimum(place, own - 1)
        rows = (token[:, None] * heads + head).flatten()
        mask = real[:, None].expand(-1, heads, -1).flatten()
        padded = torch.arange(done, done + len(rows), device="cpu")
        take.append(rows)
        back[rows[mask]] = padded[mask]
        padding.append(padded[~mask])
        hidden = None
        if not bool(real.all()):
            outside = torch.zeros(real.shape, device="cpu").masked_fill_(~real, -torch.inf)
            hidden = outside.repeat_interleave(heads, 0)[:, None].to(device)
        groups.append(Group(done, done + len(rows), length, hidden))
        done += len(rows)
    return Groups(torch.cat(take).to(device), back.to(device), torch.cat(padding).to(device), tuple(groups))


def _alike(lengths: tuple[int, ...], heads: int) -> list[list[int]]:
    """Return groups of windows, the longest first: as many as SCORES and PADDING allow."""
    groups: list[list[int]] = []
    own = 0
    # The first window of a group says how far the others are padded, so it has to be the longest.
    for window in sorted(range(len(lengths)), key=lambda w: -lengths[w]):
        scores = lengths[window] ** 2
        if groups:
            together = (len(groups[-1]) + 1) * lengths[groups[-1][0]] ** 2
            if together * heads <= SCORES and together <= PADDING * (own + scores):
                groups[-1].append(window)
                own += scores
                continue
        groups.append([window])
        own = scores
    return groups


def installed() -> bool:
    """Whether it can be used: always."""
    return True


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return out [T, H, D], lse [T, H] and the random state that the backward pass needs."""
    lengths = host_lengths(call.cu_seqlens, q.shape[0], call.max_seqlen)
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    groups = grouped(lengths, q)
    if _by_flash_cpu(q, groups, call.dropout_p):
        a, b, c = (x.to(compute) for x in (q, k, v))
        out, lse = _flash_forward(a, b, c, lengths, call.causal, call.softmax_scale)
        return out.to(q.dtype), lse, _start_dropout(0.0, q.device)[0]
    packed = [_placed(x.to(compute), groups) for x in (q, k, v)]
    out = packed[0].new_empty(packed[0].shape)
    # [H, T] in memory: the strides that the operator's fake tells the compiler.
    lse = out.new_empty(out.shape[-2::-1]).t()
    later = _later(max(lengths), compute, q.device) if call.causal else None
    state, generator = _start_dropout(call.dropout_p, q.device)
    for hidden, (a, b, c, o, e) in _blocks(lengths, groups, *packed, out, lse):
        # The scale goes into the queries, [L, D], rather than into the scores, [L, L].
        p = _scores(a * (call.softmax_scale / LN2), b, later, hidden)
        top = p.amax(-1, keepdim=True)
        total = p.sub_(top).exp2_().sum(-1, keepdim=True)
        torch.mul(top.add_(total.log2()).squeeze(-1), LN2, out=e)
        if generator is not None:
            # After the sum was taken: dropout comes behind the softmax.
            p *= keep_mask(p, call.dropout_p, generator)
            # In the divisor, a column, rather than in the probabilities, a matrix.
            total *= kept(call.dropout_p)
        torch.div(torch.bmm(p, c), total, out=o)
    if groups is not None:
        out, lse = (groups.restore(x, q.shape[1]) for x in (out, lse))
        # Back to [H, T] in memory, as the fake promises.
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
    call: Call,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, each [T, H, D].

    With P = exp(s − lse) and δ = Σ_d dout · out: dV = Pᵀ dout, dS = P · (dout Vᵀ − δ), dQ = scale · dS K,
    dK = scale · dSᵀ Q (Dao 2023, arXiv 2307.08691, section 3.1.2).
    """
    # They were checked going forward.
    edges = call.cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(edges)]
    compute = lse.dtype
    groups = grouped(lengths, q)
    if _by_flash_cpu(q, groups, call.dropout_p):
        g, a, b, c, o = (x.to(compute) for x in (dout, q, k, v, out))
        dq, dk, dv = _flash_backward(g, a, b, c, o, lse, lengths, call.causal, call.softmax_scale)
        return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)
    delta = (dout.to(compute) * out).sum(-1)
    packed = [_placed(x.to(compute), groups) for x in (dout, q, k, v, lse / LN2, delta)]
    if groups is not None:
        # A query that stands for no token has probabilities of 0: keys and values get nothing from it.
        packed[4].index_fill_(0, groups.padding, torch.inf)
    grads = [packed[0].new_empty(packed[0].shape) for _ in range(3)]
    later = _later(max(lengths), compute, q.device) if call.causal else None
    _, generator = _start_dropout(call.dropout_p, q.device, state)
    if generator is not None:  # what is kept was scaled up
        packed[0] = packed[0] / kept(call.dropout_p)
    for hidden, (g, a, b, c, e, d, dq, dk, dv) in _blocks(lengths, groups, *packed, *grads):
        a = a * (call.softmax_scale / LN2)
        p = _scores(a, b, later, hidden).sub_(e.unsqueeze(-1)).exp2_()
        ds = torch.bmm(g, c.transpose(1, 2))
        used = p
        if generator is not None:
            keep = keep_mask(p, call.dropout_p, generator)
            ds *= keep
            used = keep.mul_(p)
        dv.copy_(torch.bmm(used.transpose(1, 2), g))
        ds.sub_(d.unsqueeze(-1)).mul_(p)
        torch.mul(torch.bmm(ds, b), call.softmax_scale, out=dq)
        # `a` carries scale / ln 2 already.
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
        # Two numbers, as flash-attn 2's state has, because the operator's fake promises them; one is used.
        state = torch.randint(2**62, (2,), dtype=torch.int64, device=device)
    # One of its own, so that the backward pass draws the same again and leaves the default one alone.
    generator = torch.Generator(device)
    generator.manual_seed(int(state[0]))
    return state, generator


def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], causal: bool, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Return out [T, H, D] and lse [T, H] (in memory [H, T]) of q, k, v [T, H, D], float32 or float64."""
    done = [
        _FLASH(*window, 0.0, causal, scale=softmax_scale) for window in _windows(lengths, q, k, v)
    ]  # each [1, H, n, D] and [1, H, n]
    return torch.cat([_packed(out) for out, _ in done]), torch.cat([lse[0] for _, lse in done], 1).t()


def _flash_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: list[int],
    causal: bool,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, each [T, H, D]; all inputs have one element type."""
    parts = zip(_windows(lengths, dout, q, k, v, out), lse.t().unsqueeze(0).split(lengths, 2), strict=True)
    done = [_FLASH_BACKWARD(*window, e, 0.0, causal, scale=softmax_scale) for window, e in parts]
    dq, dk, dv = (torch.cat([_packed(x) for x in grads]) for grads in zip(*done, strict=True))
    return dq, dk, dv


def _windows(lengths: list[int], *tensors: Tensor) -> zip[tuple[Tensor, ...]]:
    """Return window by window the views [1, H, n, D] of tensors [T, H, D]."""
    heads = (_readable(x).transpose(0, 1).unsqueeze(0).split(lengths, 2) for x in tensors)
    return zip(*heads, strict=True)


def _readable(x: Tensor) -> Tensor:
    """Return x [T, H, D] such that its rows can go into a matrix product.

    The kernel takes for granted what its usual caller checks: values of a row next to each other. Rows that
    overlap (a gradient that `expand` made of one number) are no matrix for it either.
    """
    return x if x.stride(2) == 1 and x.stride(0) >= x.shape[2] else x.contiguous()


def _packed(x: Tensor) -> Tensor:
    """Return [n, H, D] of [1, H, n, D]; the kernel writes it in this order already."""
    return x[0].transpose(0, 1)
