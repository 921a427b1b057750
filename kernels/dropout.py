"""Dropout as one operator forward and one backward on every device, drawn 16 bits a value on the CPU.

There `bernoulli_` draws each value from numbers of its own and takes 8 ns a value (measured: 533,000 of them
in 4.5 ms); four values from each 64-bit number take 1.5 ns. A probability is rounded to a multiple of
1 / 65,536, and :func:`kept` is what it was rounded to, so that expectations are exact. PyTorch's dropout
takes two operators each way on the CPU: forward and backward 5.9 ms for 533,000 values by
`torch.native_dropout`, 1.9 ms here, one thread (0.27 and 0.23 for 16,000). The bits are kept for the
backward pass.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

_LEVELS = 1 << 16


def dropped(p: float) -> int:
    """Return how many of the 65,536 numbers drop a value."""
    # A p just below 1 may be rounded to 1: nothing would be kept, and 1 / kept be infinite.
    return min(_LEVELS - 1, round(p * _LEVELS))


def kept(p: float) -> float:
    """Return the probability with which a value is kept at a dropout probability p in [0, 1)."""
    return 1.0 - dropped(p) / _LEVELS


def random_words(count: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """Return `count` uniform int16, from the default generator if none is given."""
    words = torch.empty(-(-count // 4), dtype=torch.int64, device=device)
    # No upper bound (None): all 64 bits are random, so each 16 of them are uniform.
    return words.random_(-(2**63), None, generator=generator).view(torch.int16)[:count]


def keep_words(words: Tensor, p: float, like: Tensor) -> Tensor:
    """Return 1 where a value of `like`'s shape is kept and 0 where it is dropped, in its dtype."""
    # Compared straight into the dtype of what it is multiplied with: no bool tensor in between.
    out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    # Words are signed, so the drop threshold counts from -32,768.
    return torch.ge(words.view(like.shape), dropped(p) - _LEVELS // 2, out=out)


def keep_mask(like: Tensor, p: float, generator: torch.Generator) -> Tensor:
    """Draw :func:`keep_words`."""
    return keep_words(random_words(like.numel(), like.device, generator), p, like)


# A fragment: the other operators of this package share the namespace.
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
