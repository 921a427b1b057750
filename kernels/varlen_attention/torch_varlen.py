"""PyTorch's own variable-length attention (torch.nn.attention.varlen), CUDA only, without dropout.

Causal is a window of (-1, 0). The documentation gives lse as [tokens, heads]; the operator returns
[heads, tokens], which is checked: torch 2.14 sends some shapes to cuDNN. The backward pass is the operator
behind the public function's gradient, because the second stream must hand in a merged output and log-sum-exp.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

from .adapter import LOW_PRECISION, Call, Limits

LIMITS = Limits(
    name="torch",
    devices=("cuda",),
    dtypes=LOW_PRECISION,
    head_dim_max=256,
    head_dim_multiple=8,
    capability=(8, 0),
    index_limit=2**31,
)


@cache
def installed() -> bool:
    """Whether this PyTorch has it."""
    return importlib.util.find_spec("torch.nn.attention.varlen") is not None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return out [tokens, heads, head_dim], lse [tokens, heads] and an empty random state."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    out, lse = varlen_attn(
        query=q,
        key=k,
        value=v,
        cu_seq_q=call.cu_seqlens,
        cu_seq_k=call.cu_seqlens,
        max_q=call.max_seqlen,
        max_k=call.max_seqlen,
        return_aux=AuxRequest(lse=True),
        scale=call.softmax_scale,
        window_size=(-1, 0) if call.causal else (-1, -1),
    )
    if lse.shape != (q.shape[1], q.shape[0]):  # it is handed back in the backward pass
        raise ValueError(
            f'impl="torch": got a log-sum-exp of shape {tuple(lse.shape)} from torch {torch.__version__}, '
            f"expected [heads, tokens], {(q.shape[1], q.shape[0])}: another kernel ran than the tested one; "
            'choose impl="fa2" or impl="fallback" (--model.attention)'
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
    import torch.nn.attention.varlen

    dq, dk, dv = torch.ops.torch_attn._varlen_attn_backward(
        grad_out=dout,
        query=q,
        key=k,
        value=v,
        out=out,
        lse=lse.t().contiguous(),
        cu_seq_q=call.cu_seqlens,
        cu_seq_k=call.cu_seqlens,
        max_q=call.max_seqlen,
        max_k=call.max_seqlen,
        is_causal=call.causal,
        # The operator insists on one; there is no dropout to draw.
        rng_state=torch.zeros(2, dtype=torch.uint64, device=q.device),
        scale=call.softmax_scale,
        window_size=[-1, 0] if call.causal else [-1, -1],
    )
    return dq, dk, dv
