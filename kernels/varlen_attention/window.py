"""Our own kernels (triton.py) for short windows, CUDA only: with dropout, in float32, too.

That they come before flash-attn where they can compute something is an estimate from bytes, not a figure of
a GPU: flash-attn 2's backward pass clears and walks (tokens + 128 · windows) · width float32 of its own,
about as much as all that attention of windows of 30 tokens has to move, and the second stream costs it some
60 launches and 20 passes over its tokens more (backends.py). `bench gpu` races them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import HAS_TRITON, constant_to_compiler
from .adapter import LOW_PRECISION, Limits

if HAS_TRITON:
    from . import triton


@constant_to_compiler
def longest(dtype: torch.dtype) -> int:
    """Return how many queries, of both streams if there are two, a program holds in its registers."""
    if dtype != torch.float32:
        return 128
    return 32 if torch.get_float32_matmul_precision() == "highest" else 64


LIMITS = Limits(
    name="window",
    devices=("cuda",),
    dtypes=(*LOW_PRECISION, torch.float32),
    head_dim_max=64,
    capability=(8, 0),
    dropout=True,
    interpreted=True,
    longest=longest,
)


def installed() -> bool:
    """Whether Triton is there."""
    return HAS_TRITON


def attention(q: Tensor, k: Tensor | None, v: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    """Return out and lse of :func:`triton.window_attention`, which says what the arguments are."""
    out, lse, _ = triton.window_attention(q, k, v, *rest)
    return out, lse
