"""One transformer for all frameworks: GPT-2's block (pre-LN, causal) and BERT's (post-LN, both directions).

Letters: T tokens (all windows laid end to end, no padding), W windows, H heads, D head width, width = H·D.
Sources: Radford et al. 2019 (GPT-2), Devlin et al. 2018 (BERT). Options: rotary positions (Su et al. 2021,
arXiv 2104.09864), RMSNorm (Zhang & Sennrich 2019, 1910.07467), SwiGLU (Shazeer 2020, 2002.05202).

A causal transformer may run two streams at once (see :mod:`brainflow.frameworks.csm`): `x` then holds T
time points and, below them, T queries that stand for the same time points. Query i of a window sees the
time points before i and itself, never a time point i or later and never another query.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from brainflow.batch import Ints, PackedBatch
from brainflow.config import ModelConfig
from brainflow.kernels import qkv_attention
from brainflow.kernels.dropout import Dropout
from brainflow.kernels.varlen_attention import settle

Style = Literal["gpt", "bert"]
Streams = Literal["one", "two", "second"]
EPS = {"gpt": 1e-5, "bert": 1e-12}  # as GPT-2 and BERT were published
ROTARY_BASE = 10_000.0


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where windows begin and which position a token has.

    Attributes
    ----------
    cu_seqlens
        int32 [W + 1], offsets of the windows, 0 first, T last.
    max_seqlen
        Tokens of the longest window.
    positions
        int64 [T], place of a token in its window; float32, seconds, where `model.positions` is `seconds`.
    token_types
        int64 [T] or None; only BERT reads it.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    positions: Tensor
    token_types: Tensor | None = None


def places(config: ModelConfig, place: Ints, window: Ints, batch: PackedBatch) -> np.ndarray:
    """Return positions for the transformer: int64 places, or float32 seconds if `model.positions` says so.

    Parameters
    ----------
    config
        Reads positions.
    place
        [n], place of each token in its sequence, special tokens included.
    window
        [n], window of the batch that gives a token's repetition time.
    batch
        The batch.
    """
    if config.positions != "seconds":
        return place
    return (place * batch.t_r[window]).astype(np.float32)


class Attention(nn.Module):
    """Multi-head self-attention within each window."""

    def __init__(self, style: Style, c: ModelConfig) -> None:
        super().__init__()
        self.heads, self.dropout, self.causal = c.heads, c.dropout, style == "gpt"
        self.backend = None if c.attention == "auto" else c.attention  # `settle` chooses where it is None
        self.qkv = Linear(c.width, 3 * c.width)
        self.out = Linear(c.width, c.width)

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        streams: Streams = "one",
        turn: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Return attention of `x` [T, width] over itself; streams and rows as in :class:`Block`."""
        p = self.dropout if self.training else 0.0
        cu, longest = layout.cu_seqlens, layout.max_seqlen
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        if turn is not None:
            qkv = rotate(qkv, turn)
        # The kernels for short windows hold the queries of both streams at once.
        asking = longest if streams == "one" else 2 * longest
        impl, p = settle(qkv[:, 0], cu.shape[0] - 1, asking, p, self.backend)
        mixed = qkv_attention(qkv, cu, longest, self.causal, p, streams=streams, impl=impl)
        # Not sooner: the other tokens still are keys and values.
        mixed = mixed if rows is None else mixed.index_select(0, rows)
        return self.out(mixed.flatten(1))


class FeedForward(nn.Module):
    """Linear, GELU, Linear; or SwiGLU with as many weights."""

    def __init__(self, style: Style, c: ModelConfig) -> None:
        super().__init__()
        self.gated = c.activation == "swiglu"
        tanh = c.activation == "gelu-tanh" or (c.activation == "published" and style == "gpt")
        self.approximate: Literal["tanh", "none"] = "tanh" if tanh else "none"
        hidden = c.feedforward * c.width
        if self.gated:
            # SwiGLU has three matrices where the others have two: two thirds of the width are as many
            # weights.
            # Rounded up to 8, of which tensor cores take multiples without padding.
            hidden = -(-2 * hidden // 3 // 8) * 8
        self.up = Linear(c.width, 2 * hidden if self.gated else hidden)
        self.down = Linear(hidden, c.width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the transformed tokens, [T, width]."""
        if self.gated:
            gate, value = self.up(x).chunk(2, -1)
            return self.down(F.silu(gate) * value)
        return self.down(F.gelu(self.up(x), approximate=self.approximate))


def _norm(style: Style, c: ModelConfig) -> nn.Module:
    return nn.RMSNorm(c.width, eps=1e-6) if c.norm == "rms" else nn.LayerNorm(c.width, eps=EPS[style])


def norm_first(style: Style, c: ModelConfig) -> bool:
    """Whether a norm stands before each part of a block and after the last, not after each sum."""
    return style == "gpt" or c.norm_first


class Block(nn.Module):
    """Attention and feed-forward with residuals; a norm before each (GPT-2) or after each sum (BERT)."""

    def __init__(self, style: Style, c: ModelConfig) -> None:
        super().__init__()
        self.pre = norm_first(style, c)
        self.norm1, self.norm2 = _norm(style, c), _norm(style, c)
        self.attention = Attention(style, c)
        self.feedforward = FeedForward(style, c)
        self.dropout = Dropout(c.dropout)

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        streams: Streams = "one",
        turn: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Return the block's output.

        Parameters
        ----------
        x
            [T, width]; with two streams [2T, width], time points above queries.
        layout
            Windows of the T tokens.
        streams
            "one", "two", or "second": two come in, only the queries go on, [T, width] (nothing reads the time
            points after the last block).
        turn
            [T (or 2T), 2, D], cosines and sines of rotary positions.
        rows
            int64 [n], the tokens that go on (nothing reads the others after the last block); None: all.
        """
        if torch.compiler.is_compiling():  # the compiler puts the casts into its kernels
            return self._forward(x, layout, streams, turn, rows)
        linears = self.attention.qkv, self.attention.out, self.feedforward.up, self.feedforward.down
        with cast_together(linears, x.device):
            return self._forward(x, layout, streams, turn, rows)

    def _forward(
        self, x: Tensor, layout: Layout, streams: Streams, turn: Tensor | None, rows: Tensor | None
    ) -> Tensor:
        if self.pre:
            mixed = self.attention(self.norm1(x), layout, streams, turn, rows)
            # The queries stand below the time points.
            x = x[-layout.positions.shape[0] :] if streams == "second" else x
            x = (x if rows is None else x.index_select(0, rows)) + self.dropout(mixed)
            return x + self.dropout(self.feedforward(self.norm2(x)))
        mixed = self.attention(x, layout, streams, turn, rows)
        x = self.norm1((x if rows is None else x.index_select(0, rows)) + self.dropout(mixed))
        return self.norm2(x + self.dropout(self.feedforward(x)))


class Transformer(nn.Module):
    """Blocks with positions; a norm after the last block (GPT-2) or after the input sum (BERT).

    Parameters
    ----------
    style
        "gpt": pre-LN, causal, tanh-GELU. "bert": post-LN, both directions, token types, exact GELU.
    config
        Reads width, layers, heads, feedforward, dropout, max_positions, positions, norm, activation and
        recompute.
    """

    def __init__(self, style: Style, config: ModelConfig) -> None:
        super().__init__()
        c = config
        self.style, self.config, self.recompute = style, c, c.recompute
        learned = c.positions == "learned"
        self.positions = nn.Embedding(c.max_positions, c.width) if learned else None
        self.token_types = nn.Embedding(2, c.width) if style == "bert" else None
        self.norm = _norm(style, c)
        self.dropout = Dropout(c.dropout)
        self.blocks = nn.ModuleList(Block(style, c) for _ in range(c.layers))
        self._initialise()

    def _initialise(self) -> None:
        # N(0, 0.02); in GPT-2 the projections back onto the residual stream shrink with depth.
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                back = self.style == "gpt" and name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * len(self.blocks)) ** 0.5 if back else 0.02)

    def forward(
        self, x: Tensor, layout: Layout, *, two_streams: bool = False, rows: Tensor | None = None
    ) -> Tensor:
        """Return the hidden states of the last block.

        Parameters
        ----------
        x
            [T, width] embedded tokens; with `two_streams` [2, T, width].
        layout
            Windows and positions of the T tokens. Windows must not be longer than the position table.
        two_streams
            x[1] holds queries that stand for the time points x[0]; only for style "gpt".
        rows
            int64 [n], the tokens whose hidden states are wanted: the last block's output projection and
            feed-forward compute no others. None: all.

        Returns
        -------
        Tensor
            [T, width], or [n, width] with `rows`; with `two_streams` of the queries alone.
        """
        self._check(layout, two_streams)
        x = self.dropout(self._placed(x, layout)).flatten(0, -2)
        turn = self._turn(layout, 2 if two_streams else 1) if self.positions is None else None
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            streams: Streams = "one" if not two_streams else "second" if i == last else "two"
            inputs = (x, layout, streams, turn, rows if i == last else None)
            if self.recompute and self.training:
                # The reentrant kind gives no gradients where no input has one, as behind a frozen embedder.
                x = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x = block(*inputs)
        return self.norm(x) if norm_first(self.style, self.config) else x

    def _placed(self, x: Tensor, layout: Layout) -> Tensor:
        """Add learned positions and token types."""
        if self.positions is not None:
            x = x + F.embedding(layout.positions, self.positions.weight)
        if self.token_types is not None and layout.token_types is not None:
            x = x + F.embedding(layout.token_types, self.token_types.weight)
        elif self.token_types is not None:
            # BERT where nothing says which sequence a token belongs to: all are of the first.
            x = x + self.token_types.weight[0]
        return x if norm_first(self.style, self.config) else self.norm(x)

    def _turn(self, layout: Layout, streams: int) -> Tensor:
        """Return the rotation of the tokens by their positions, [streams · T, 2, D]."""
        c = self.config
        turn = rotation(layout.positions, c.width // c.heads, next(self.parameters()).dtype)
        return turn if streams == 1 else turn.repeat(streams, 1, 1)

    def _check(self, layout: Layout, two_streams: bool) -> None:
        if self.positions is not None and layout.max_seqlen > self.positions.num_embeddings:
            raise ValueError(
                f"max_seqlen: got a window of {layout.max_seqlen} tokens (special tokens included), but the "
                f"model has {self.positions.num_embeddings} positions; raise model.max_positions or shorten "
                "the windows"
            )
        if two_streams and self.style != "gpt":
            raise ValueError(f"two_streams: got True with style={self.style!r}, expected style 'gpt'")


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
        # None for a weight without a gradient, not zeros that would have to be cast.
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


# Rotary positions in few operators: value i of a head turns together with value i + D/2.
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
    speeds = torch.logspace(
        0.0, (1 - half) / half, half, base=ROTARY_BASE, dtype=exact, device=positions.device
    )
    angle = positions[:, None] * speeds
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos, -sin, sin), 1).unflatten(1, (2, width)).to(dtype)


def rotate(qkv: Tensor, turn: Tensor) -> Tensor:
    """Return `qkv` [T, 3, H, D] with queries and keys turned by :func:`rotation`, in its own type."""
    # Compiled, the plain form is fused into one kernel.
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
