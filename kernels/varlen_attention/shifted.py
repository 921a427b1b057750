"""Attention of a second stream: strictly earlier keys of the first stream, plus its own key and value.

The earlier keys are a plain causal attention after moving the queries up by one: if row t holds query t + 1,
"keys up to my row" means "keys before me". The queries keep their number, so cu_seqlens and max_seqlen stay
as they are and no window gets empty. The last row of each window then holds the first query of the next
window, a query without earlier keys; its result is dropped.

Forward: the two parts are merged by their log-sum-exps. Backward: a flash backward pass computes
P = exp(s − lse) and δ = Σ dout · out from what it is given, so with the MERGED lse and out it returns the
exact gradients of its part (the identity behind ring attention, Liu et al. 2023, arXiv 2310.01889).

Legend: T tokens, H heads, D head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends import BACKENDS
from .ops import lse_dtype


@torch.library.custom_op("brainflow::shifted_attention", mutates_args=())
def shifted_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_self: Tensor,
    v_self: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float,
    softmax_scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return out [T, H, D] and what the backward pass needs.

    That is the lse of the moved rows [T, H], the softmax weight of the self term [T, H], its dropout factor
    [T, H] (empty without dropout) and the backend's random state.
    """
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        first, last = cu_seqlens[:-1].long(), cu_seqlens[1:].long() - 1
        before, row_lse, state = BACKENDS[impl].forward(
            q.roll(-1, 0), k, v, cu_seqlens, max_seqlen, True, dropout_p, softmax_scale
        )
        row_lse = row_lse.contiguous()
        lse_before = row_lse.roll(1, 0).index_fill_(0, first, -torch.inf)
        lse_self = (q.to(row_lse.dtype) * k_self).sum(-1).mul_(softmax_scale)
        lse = torch.logaddexp(lse_before, lse_self)
        weight = (lse_self - lse).exp_()
        keep = lse.new_empty(0)
        if dropout_p > 0.0:
            keep = torch.empty_like(lse).bernoulli_(1.0 - dropout_p).div_(1.0 - dropout_p)
        share = weight * keep if dropout_p > 0.0 else weight
        out = before.roll(1, 0).to(lse.dtype).mul_((lse_before - lse).exp_().unsqueeze(-1))
        out.addcmul_(share.unsqueeze(-1), v_self.to(lse.dtype))
        row_lse = lse.roll(-1, 0).index_copy_(0, last, row_lse.index_select(0, last))
        return out.to(q.dtype), row_lse, weight, keep, state


@torch.library.custom_op("brainflow::shifted_attention_backward", mutates_args=())
def shifted_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_self: Tensor,
    v_self: Tensor,
    out: Tensor,
    row_lse: Tensor,
    weight: Tensor,
    keep: Tensor,
    state: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float,
    softmax_scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, k_self and v_self, each [T, H, D]."""
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        last = cu_seqlens[1:].long() - 1
        row_dout = dout.roll(-1, 0).index_fill_(0, last, 0.0)
        row_dq, dk, dv = BACKENDS[impl].backward(
            row_dout,
            q.roll(-1, 0),
            k,
            v,
            out.roll(-1, 0),
            row_lse,
            state,
            cu_seqlens,
            max_seqlen,
            True,
            dropout_p,
            softmax_scale,
        )
        dout_ = dout.to(weight.dtype)
        delta = (dout_ * out).sum(-1)
        d_weight = (dout_ * v_self).sum(-1)
        share = weight
        if dropout_p > 0.0:
            d_weight, share = d_weight.mul_(keep), weight * keep
        d_score = d_weight.sub_(delta).mul_(weight).mul_(softmax_scale).unsqueeze(-1)
        dq = row_dq.roll(1, 0).to(weight.dtype).addcmul_(d_score, k_self.to(weight.dtype))
        dk_self = d_score * q
        dv_self = share.unsqueeze(-1) * dout_
        return dq.to(q.dtype), dk, dv, dk_self.to(q.dtype), dv_self.to(q.dtype)


@shifted_attention.register_fake
def _(q, k, v, k_self, v_self, cu_seqlens, max_seqlen, dropout_p, softmax_scale, impl):
    row_lse = q.new_empty(q.shape[:2], dtype=lse_dtype(q))
    keep = torch.empty_like(row_lse) if dropout_p > 0.0 else row_lse.new_empty(0)
    state = q.new_empty(2 if dropout_p > 0.0 else 0, dtype=torch.int64)
    return q.new_empty(q.shape), row_lse, torch.empty_like(row_lse), keep, state


@shifted_attention_backward.register_fake
def _(dout, q, k, v, k_self, v_self, *rest):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, k_self, v_self))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, cu_seqlens = inputs[:6]
    ctx.rest = inputs[6:]
    ctx.save_for_backward(*tensors, *output, cu_seqlens)


def _backward(ctx: Any, dout: Tensor, *_: object) -> tuple[Tensor | None, ...]:
    grads = torch.ops.brainflow.shifted_attention_backward(dout, *ctx.saved_tensors, *ctx.rest)
    return (*grads, *(None,) * 5)


shifted_attention.register_autograd(_backward, setup_context=_setup_context)
