"""Variable-length attention by PyTorch's flash kernel for the CPU, window by window, without dropout.

PyTorch chooses that kernel inside `scaled_dot_product_attention`, which keeps the log-sum-exp to itself; it
is called here directly because attention of two streams is merged by log-sum-exps. Legend: T tokens, H heads,
D head_dim, n length of a window.
"""

from __future__ import annotations

import torch
from torch import Tensor

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], causal: bool, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Return out [T, H, D] and lse [T, H] (in memory [H, T]) of q, k, v [T, H, D], float32 or float64."""
    done = [
        _forward(*window, 0.0, causal, scale=softmax_scale) for window in _windows(lengths, q, k, v)
    ]  # each [1, H, n, D] and [1, H, n]
    return torch.cat([_packed(out) for out, _ in done]), torch.cat([lse[0] for _, lse in done], 1).t()


def backward(
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
    done = [_backward(*window, e, 0.0, causal, scale=softmax_scale) for window, e in parts]
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
