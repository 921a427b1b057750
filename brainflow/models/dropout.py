"""Dropout as one operator forward and one backward on every device; PyTorch's takes two each on the CPU.

On the CPU it draws 16 bits a value (:mod:`brainflow.kernels.keep`): forward and backward 1.9 ms
for 533,000 values where `torch.native_dropout` takes 5.9, one thread (0.27 and 0.23 for 16,000). The bits are
kept for the backward pass.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from brainflow.kernels.keep import keep_words, kept, random_words

_LIBRARY = torch.library.Library("brainflow", "FRAGMENT")
_LIBRARY.define("dropout_cpu(Tensor x, float p) -> (Tensor, Tensor)")
_LIBRARY.define("dropout_cpu_backward(Tensor upstream, Tensor words, float p) -> Tensor")


def _forward(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Return x with values dropped and the others scaled up, and the bits that decided, int16 [x.numel()]."""
    words = random_words(x.numel(), x.device)
    return _scaled(x, words, p), words


def _scaled(x: Tensor, words: Tensor, p: float) -> Tensor:
    return keep_words(words, p, x).mul_(x).mul_(1.0 / kept(p))


_LIBRARY.impl("dropout_cpu", _forward, "CPU")
_LIBRARY.impl("dropout_cpu_backward", _scaled, "CPU")


@torch.library.register_fake("brainflow::dropout_cpu")
def _(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.numel(), dtype=torch.int16)


@torch.library.register_fake("brainflow::dropout_cpu_backward")
def _(upstream: Tensor, words: Tensor, p: float) -> Tensor:
    return upstream.new_empty(upstream.shape)


class _Dropped(Function):
    """Both operators; as a `custom_op` with its autograd a call for 16,000 values took twice as long."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        out, words = torch.ops.brainflow.dropout_cpu(x, p)
        ctx.save_for_backward(words)
        ctx.p = p
        return cast(Tensor, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return torch.ops.brainflow.dropout_cpu_backward(upstream, *ctx.saved_tensors, ctx.p), None


class Dropout(nn.Dropout):
    """As `torch.nn.Dropout`, with the probability rounded to a multiple of 1 / 65,536 on the CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with values dropped and the others scaled up in training, `x` itself otherwise."""
        if not self.training or self.p == 0.0:
            return x
        # Compiled, PyTorch's own is fused, and known to be random: it is not drawn again going backward.
        if x.device.type != "cpu" or self.p == 1.0 or torch.compiler.is_compiling():
            return torch.native_dropout(x, self.p, True)[0]
        return cast(Tensor, _Dropped.apply(x, self.p))
