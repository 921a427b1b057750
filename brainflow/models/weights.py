"""Weights of a block in autocast's element type, cast together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class Linear(nn.Linear):
    """As `torch.nn.Linear`, with the weight and bias that :func:`cast_together` has left in `low`, if any."""

    low: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` [..., inputs] times the weight plus the bias, [..., outputs]."""
        weight, bias = (self.weight, self.bias) if self.low is None else self.low
        return F.linear(x, weight, bias)


@contextmanager
def cast_together(linears: Sequence[Linear], device: torch.device) -> Iterator[None]:
    """Have the layers compute with weights in autocast's type, cast by one launch for all of them.

    Autocast itself takes a launch for every weight and another one for every gradient, half as many as the
    blocks' products; the numbers are the same.
    """
    kind = device.type
    # what FSDP has cast already, and float64, stay
    wide = [layer for layer in linears if layer.weight.dtype == torch.float32]
    if wide and torch.is_autocast_enabled(kind):
        weights = [weight for layer in wide for weight in (layer.weight, layer.bias)]
        low = cast_all(weights, torch.get_autocast_dtype(kind))
        for layer, weight, bias in zip(wide, low[::2], low[1::2], strict=True):
            layer.low = weight, bias
    try:
        yield
    finally:
        for layer in wide:
            layer.low = None


def cast_all(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return the tensors in another element type, cast by one launch forward and one backward."""
    return cast(tuple[Tensor, ...], _Cast.apply(dtype, *tensors))


class _Cast(Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtype = weights[0].dtype
        return tuple(_all_to(weights, dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        there = iter(_all_to([g for g in upstream if g is not None], ctx.dtype))
        return None, *(None if g is None else next(there) for g in upstream)


def _all_to(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    result = [torch.empty_like(x, dtype=dtype) for x in tensors]
    if result:
        torch._foreach_copy_(result, list(tensors))
    return result
