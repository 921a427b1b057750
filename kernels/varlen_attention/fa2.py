"""flash-attn 2 (tested signature: 2.8.3), varlen, by keywords only; of flash-attn the one with dropout.

Its lower-level pair is used because the public function hides the random state and because the second
stream's backward pass must hand in a merged output and log-sum-exp. lse is [heads, tokens] there.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

from .adapter import LOW_PRECISION, Call, Limits

LIMITS = Limits(
    name="fa2",
    devices=("cuda",),
    dtypes=LOW_PRECISION,
    head_dim_max=256,
    head_dim_multiple=8,
    capability=(8, 0),
    dropout=True,
    index_limit=2**31,
)


@cache
def installed() -> bool:
    """Whether flash-attn 2's compiled module can be found (flash-attn 4 shares its package name)."""
    return importlib.util.find_spec("flash_attn_2_cuda") is not None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return out [tokens, heads, head_dim], lse [tokens, heads] and the random state."""
    # Here, not above: optional, and importing it loads CUDA.
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

    out, lse, _, rng_state = _flash_attn_varlen_forward(
        q=q,
        k=k,
        v=v,
        cu_seqlens_q=call.cu_seqlens,
        cu_seqlens_k=call.cu_seqlens,
        max_seqlen_q=call.max_seqlen,
        max_seqlen_k=call.max_seqlen,
        dropout_p=call.dropout_p,
        softmax_scale=call.softmax_scale,
        causal=call.causal,
    )
    state = rng_state.view(torch.int64) if call.dropout_p > 0.0 else q.new_empty(0, dtype=torch.int64)
    return out, lse.t(), state


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
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

    # Contiguous, whatever the strides of q, k and v: they may be views of one projection.
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    _flash_attn_varlen_backward(
        dout=dout,
        q=q,
        k=k,
        v=v,
        out=out,
        softmax_lse=lse.t().contiguous(),
        dq=dq,
        dk=dk,
        dv=dv,
        cu_seqlens_q=call.cu_seqlens,
        cu_seqlens_k=call.cu_seqlens,
        max_seqlen_q=call.max_seqlen,
        max_seqlen_k=call.max_seqlen,
        dropout_p=call.dropout_p,
        softmax_scale=call.softmax_scale,
        causal=call.causal,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        # Otherwise dq is added up by atomics, and its last bits change from run to run.
        deterministic=torch.are_deterministic_algorithms_enabled(),
        rng_state=state if call.dropout_p > 0.0 else None,
    )
    return dq, dk, dv
