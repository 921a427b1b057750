"""flash-attn 4 (tested version: 4.0.0b36), varlen, by keywords only: its fourth positional argument is `qv`.

The forward pass is its public function, which returns a tuple; the backward pass is called directly because
the second stream must hand in a merged output and log-sum-exp. lse is [heads, tokens] there.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

from .adapter import LOW_PRECISION, Call, Limits

LIMITS = Limits(
    name="fa4",
    devices=("cuda",),
    dtypes=LOW_PRECISION,
    head_dim_max=128,
    head_dim_multiple=8,
    capability=(9, 0),
)


@cache
def installed() -> bool:
    """Whether flash-attn 4 can be found."""
    # Looking for a submodule imports its parents, so these are looked for first.
    if importlib.util.find_spec("flash_attn") is None or importlib.util.find_spec("cutlass") is None:
        return False
    return importlib.util.find_spec("flash_attn.cute") is not None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return out [tokens, heads, head_dim], lse [tokens, heads] and an empty random state."""
    from flash_attn.cute.interface import flash_attn_varlen_func

    out, lse = flash_attn_varlen_func(
        q=q,
        k=k,
        v=v,
        cu_seqlens_q=call.cu_seqlens,
        cu_seqlens_k=call.cu_seqlens,
        max_seqlen_q=call.max_seqlen,
        max_seqlen_k=call.max_seqlen,
        softmax_scale=call.softmax_scale,
        causal=call.causal,
        return_lse=True,
    )
    return out, lse.t(), q.new_empty(0, dtype=torch.int64)


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
    """Return the gradients of q, k and v, each [tokens, heads, head_dim]."""
    from flash_attn.cute.interface import _flash_attn_bwd

    dq, dk, dv = _flash_attn_bwd(
        q=q,
        k=k,
        v=v,
        out=out,
        dout=dout.contiguous(),
        lse=lse.t().contiguous(),
        softmax_scale=call.softmax_scale,
        causal=call.causal,
        cu_seqlens_q=call.cu_seqlens,
        cu_seqlens_k=call.cu_seqlens,
        max_seqlen_q=call.max_seqlen,
        max_seqlen_k=call.max_seqlen,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return dq, dk, dv
