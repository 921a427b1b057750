"""One transformer for all frameworks: GPT-2's block (pre-LN, causal) and BERT's (post-LN, both directions).

Letters: T tokens (all windows laid end to end, no padding), W windows, H heads, D head width, width = H·D.
Sources: Radford et al. 2019 (GPT-2), Devlin et al. 2018 (BERT).

A causal transformer may run two streams at once (see :mod:`brainflow.frameworks.csm`): `x` then holds T
time points and, below them, T queries that stand for the same time points. Query i of a window sees the
time points before i and itself, never a time point i or later and never another query.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from brainflow.kernels import attention, shifted_attention

Style = Literal["gpt", "bert"]
Streams = Literal["one", "two", "second"]


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
        int64 [T], place of a token in its window.
    token_types
        int64 [T] or None; only BERT reads it.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    positions: Tensor
    token_types: Tensor | None = None


class Attention(nn.Module):
    """Multi-head self-attention within each window."""

    def __init__(self, width: int, heads: int, dropout: float, causal: bool) -> None:
        super().__init__()
        self.heads, self.dropout, self.causal = heads, dropout, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, layout: Layout, streams: Streams = "one") -> Tensor:
        """Return attention of `x` [T, width] over itself, same shape; with two streams see :class:`Block`."""
        p = self.dropout if self.training else 0.0
        cu, longest = layout.cu_seqlens, layout.max_seqlen
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        if streams == "one":
            q, k, v = qkv.unbind(1)
            return self.out(_attend(q, k, v, cu, longest, self.causal, p).flatten(1))
        points, queries = qkv.unflatten(0, (2, -1)).unbind(0)
        q, k, v = points.unbind(1)
        q2, k2, v2 = queries.unbind(1)
        mixed = shifted_attention(q2, k, v, k2, v2, cu, longest, dropout_p=p)
        if streams == "two":
            mixed = torch.cat((_attend(q, k, v, cu, longest, True, p), mixed))
        return self.out(mixed.flatten(1))


def _attend(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, causal: bool, p: float) -> Tensor:
    return cast(Tensor, attention(q, k, v, cu, longest, causal=causal, dropout_p=p))


class FeedForward(nn.Module):
    """Linear, GELU, Linear. GPT-2 takes GELU's tanh form, BERT the exact one."""

    def __init__(self, width: int, hidden: int, approximate: Literal["tanh", "none"]) -> None:
        super().__init__()
        self.approximate: Literal["tanh", "none"] = approximate
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the transformed tokens, [T, width]."""
        return self.down(F.gelu(self.up(x), approximate=self.approximate))


class Block(nn.Module):
    """Attention and feed-forward with residuals; LayerNorm before each (`pre`) or after each sum (`post`)."""

    def __init__(self, style: Style, width: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        gpt = style == "gpt"
        self.pre = gpt
        eps = 1e-5 if gpt else 1e-12
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attention = Attention(width, heads, dropout, causal=gpt)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.feedforward = FeedForward(width, feedforward * width, "tanh" if gpt else "none")
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, layout: Layout, streams: Streams = "one") -> Tensor:
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
        """
        if self.pre:
            mixed = self.attention(self.norm1(x), layout, streams)
            x = x[-len(mixed) :] + self.dropout(mixed)
            return x + self.dropout(self.feedforward(self.norm2(x)))
        x = self.norm1(x + self.dropout(self.attention(x, layout)))
        return self.norm2(x + self.dropout(self.feedforward(x)))


class Transformer(nn.Module):
    """Blocks with learned positions; LayerNorm after the last block (GPT-2) or after the input sum (BERT).

    Parameters
    ----------
    style
        "gpt": pre-LN, causal, tanh-GELU. "bert": post-LN, both directions, token types, exact GELU.
    width, layers, heads
        Hidden width, blocks, attention heads.
    feedforward
        Feed-forward width as a multiple of `width`.
    dropout
        Probability after input sum, attention weights, attention, feed-forward.
    max_positions
        Rows of the position table.
    recompute
        Activation checkpointing: keep only the blocks' inputs, compute the rest again in the backward pass.
    """

    def __init__(
        self,
        style: Style,
        *,
        width: int,
        layers: int,
        heads: int,
        feedforward: int = 4,
        dropout: float = 0.1,
        max_positions: int = 512,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.style, self.recompute = style, recompute
        self.positions = nn.Embedding(max_positions, width)
        self.token_types = nn.Embedding(2, width) if style == "bert" else None
        self.norm = nn.LayerNorm(width, eps=1e-12 if style == "bert" else 1e-5)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(style, width, heads, feedforward, dropout) for _ in range(layers))
        self._initialise()

    def _initialise(self) -> None:
        # N(0, 0.02); in GPT-2 the projections back onto the residual stream shrink with depth.
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                back = self.style == "gpt" and name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * len(self.blocks)) ** 0.5 if back else 0.02)

    def forward(self, x: Tensor, layout: Layout, *, two_streams: bool = False) -> Tensor:
        """Return the hidden states of the last block.

        Parameters
        ----------
        x
            [T, width] embedded tokens; with `two_streams` [2, T, width].
        layout
            Windows and positions of the T tokens. Windows must not be longer than the position table.
        two_streams
            x[1] holds queries that stand for the time points x[0]; only for style "gpt".

        Returns
        -------
        Tensor
            [T, width]; with `two_streams` of the queries alone.
        """
        self._check(layout, two_streams)
        place = F.embedding(layout.positions, self.positions.weight)
        if self.token_types is not None and layout.token_types is not None:
            place = place + F.embedding(layout.token_types, self.token_types.weight)
        elif self.token_types is not None:
            place = place + self.token_types.weight[0]
        x = x + place
        if self.style == "bert":
            x = self.norm(x)
        x = self.dropout(x).flatten(0, -2)
        streams: list[Streams] = ["two" if two_streams else "one"] * len(self.blocks)
        if two_streams:
            streams[-1] = "second"
        for block, which in zip(self.blocks, streams, strict=True):
            if self.recompute and self.training:
                x = checkpoint(block, x, layout, which, use_reentrant=False)
            else:
                x = block(x, layout, which)
        return self.norm(x) if self.style == "gpt" else x

    def _check(self, layout: Layout, two_streams: bool) -> None:
        if layout.max_seqlen > self.positions.num_embeddings:
            raise ValueError(
                f"max_seqlen: got a window of {layout.max_seqlen} tokens (special tokens included), but the "
                f"model has {self.positions.num_embeddings} positions; raise model.max_positions or shorten "
                "the windows"
            )
        if two_streams and self.style != "gpt":
            raise ValueError(f"two_streams: got True with style={self.style!r}, expected style 'gpt'")
