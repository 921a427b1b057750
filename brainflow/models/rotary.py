"""Rotary positions (Su et al. 2021, arXiv 2104.09864) of packed queries and keys, in few operators.

Letters: T tokens, H heads, D head width. Value i of a head turns together with value i + D/2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

BASE = 10_000.0


def rotation(positions: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Return what :func:`rotate` multiplies with, [T, 2, D]: cosines, and sines with their signs.

    Parameters
    ----------
    positions
        [T], of any real type.
    width
        D, even.
    dtype
        Element type of the result; angles are computed in float32 at least, because half precision cannot
        tell late positions apart.
    """
    half, exact = width // 2, torch.promote_types(dtype, torch.float32)
    speeds = torch.logspace(0.0, (1 - half) / half, half, base=BASE, dtype=exact, device=positions.device)
    angle = positions[:, None] * speeds
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos, -sin, sin), 1).unflatten(1, (2, width)).to(dtype)


def rotate(qkv: Tensor, turn: Tensor) -> Tensor:
    """Return `qkv` [T, 3, H, D] with queries and keys turned by :func:`rotation`, in its own type."""
    if not torch.compiler.is_compiling():
        return _Rotated.apply(qkv, turn)
    qk = qkv[:, :2]
    cos, sin = turn[:, None, None].unbind(-2)
    turned = qk * cos + qk.roll(qk.shape[-1] // 2, -1) * sin
    return torch.cat((turned.to(qkv.dtype), qkv[:, 2:]), 1)


class _Rotated(Function):
    """Four operators either way, where autograd would take twelve."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, turn: Tensor) -> Tensor:
        ctx.save_for_backward(turn)
        return _turned(qkv, turn, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (turn,) = ctx.saved_tensors
        return _turned(upstream, turn, -1), None


def _turned(qkv: Tensor, turn: Tensor, sign: int) -> Tensor:
    out, qk = torch.empty_like(qkv), qkv[:, :2]
    cos, sin = turn[:, None, None].unbind(-2)
    torch.addcmul(qk * cos, qk.roll(qk.shape[-1] // 2, -1), sin, value=sign, out=out[:, :2])
    out[:, 2].copy_(qkv[:, 2])
    return out
