"""An LSTM decoder that reads its own output."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import HAS_TRITON, pick
from . import naive

if HAS_TRITON:
    from . import triton

__all__ = ["HAS_TRITON", "decode_freely"]


def decode_freely(
    sizes: tuple[int, ...],
    previous: Tensor,
    eps: float,
    start: Tensor,
    first_bias: Tensor,
    output: Tensor,
    output_bias: Tensor,
    keep: Tensor,
    layers: list[tuple[Tensor, Tensor, Tensor]],
    norms: list[tuple[Tensor, Tensor]],
    *,
    impl: str | None = None,
) -> Tensor:
    """Return the top layer's hidden states, [T, H] in the type of `start`; differentiable.

    Parameters
    ----------
    sizes
        Windows still running at each step.
    previous
        int64 [T], row of the step before in [hidden states; start].
    eps
        Of the layer norms.
    start
        [W, H], hidden states of all layers before the first step; cells are 0 then.
    first_bias
        [4H], biases of the lowest layer at the first step, which reads nothing.
    output, output_bias
        [H, H] and [H], projection of what is read at the next step.
    keep
        [L, T, H], factors of dropout above each layer, without gradient.
    layers
        Weights [4H, H] of what a layer reads and of its hidden state, and biases [4H]. Those of the lowest
        layer read the top layer's hidden state: `weight @ output` and `weight @ output_bias + bias`.
    norms
        Weight and bias of the L - 1 layer norms, float32 [H] each.
    impl
        "naive" or "triton"; None picks by device.
    """
    face = triton if pick(impl, start.device) == "triton" else naive
    return face.decode_freely(
        sizes, previous, eps, start, first_bias, output, output_bias, keep, layers, norms
    )
