"""The two operators that PyTorch sees: attention's forward and backward, whichever backend runs them.

They are opaque to torch.compile, so the windows' lengths may be read inside. Legend: T tokens, H heads,
D head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .backends import BACKENDS
from .checks import refusal

LSE_PAD = 8


@torch.library.custom_op("brainflow::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    dropout_p: float,
    softmax_scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return out [T, H, D], lse [T, H] and the backend's random state (empty without dropout)."""
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        return BACKENDS[impl].forward(q, k, v, cu_seqlens, max_seqlen, causal, dropout_p, softmax_scale)


@torch.library.custom_op("brainflow::attention_backward", mutates_args=())
def attention_backward(
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
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, each [T, H, D]."""
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        return BACKENDS[impl].backward(
            dout, q, k, v, out, lse, state, cu_seqlens, max_seqlen, causal, dropout_p, softmax_scale
        )


def lse_dtype(q: Tensor) -> torch.dtype:
    """Return the element type of the log-sum-exp: float32, or float64 beside float64."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


@attention.register_fake
def _(q, k, v, cu_seqlens, max_seqlen, causal, dropout_p, softmax_scale, impl):
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=lse_dtype(q)).t()
    state = q.new_empty(2 if dropout_p > 0.0 else 0, dtype=torch.int64)
    return q.new_empty(q.shape), lse, state


@attention_backward.register_fake
def _(dout, q, k, v, out, lse, state, cu_seqlens, max_seqlen, causal, dropout_p, softmax_scale, impl):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, cu_seqlens, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _state: None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, state, cu_seqlens = ctx.saved_tensors
    if dout is None and dlse is None:
        return (None,) * 9
    if dout is None:
        dout = torch.zeros_like(out)
    head_dim = q.shape[-1]
    if dlse is not None:
        dout, q, k, v, out = _carry_lse_gradient(dout, dlse, q, k, v, out)
        problem = refusal(BACKENDS[ctx.rest[-1]].LIMITS, q, cu_seqlens.shape[0] - 1, ctx.rest[0], 0.0)
        if problem is not None:
            raise problem
    grads = torch.ops.brainflow.attention_backward(dout, q, k, v, out, lse, state, cu_seqlens, *ctx.rest)
    if dlse is not None:
        grads = tuple(g[..., :head_dim] for g in grads)
    return (*grads, *(None,) * 6)


def _carry_lse_gradient(
    dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor
) -> tuple[Tensor, ...]:
    """Add head columns so that a backward pass that knows nothing of dlse adds its share.

    dS = P · (dout vᵀ − δ + dlse) with δ = Σ dout · out. One more column with v = 1, dout = dlse and out = 0
    adds dlse to the first term and nothing to δ; q and k get zeros, so the scores stay what they are.
    """
    one = torch.zeros(LSE_PAD, dtype=v.dtype, device=v.device)
    one[0] = 1
    grown = pad(dlse.to(dout.dtype).unsqueeze(-1), (0, LSE_PAD - 1))
    dout = torch.cat([dout, grown], -1)
    v = torch.cat([v, one.expand(*v.shape[:2], LSE_PAD)], -1)
    return dout, pad(q, (0, LSE_PAD)), pad(k, (0, LSE_PAD)), v, pad(out, (0, LSE_PAD))


attention.register_autograd(_backward, setup_context=_setup_context)
