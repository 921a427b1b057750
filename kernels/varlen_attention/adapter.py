"""What an attention backend is asked for and what it can compute: adapters take a Call and have Limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

LOW_PRECISION = (torch.float16, torch.bfloat16)


class Call(NamedTuple):
    """What attention forward and backward are given beside tensors of values."""

    cu_seqlens: Tensor
    """int32 [windows + 1], on the device of the values."""
    max_seqlen: int
    causal: bool
    dropout_p: float
    softmax_scale: float


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one backend can do; everything else is refused, see :func:`backends.refusal`."""

    name: str
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    head_dim_max: int
    head_dim_multiple: int = 1
    capability: tuple[int, int] | None = None
    """Least CUDA compute capability."""
    dropout: bool = False
    index_limit: int | None = None
    """Bound of (tokens + 128 · windows) · heads · head_dim, where the backend counts in int32."""
    interpreted: bool = False
    """Whether it also takes CPU tensors under Triton's interpreter."""
    longest: Callable[[torch.dtype], int] | None = None
    """Tokens of the longest window that it takes, both streams counted where there are two."""
