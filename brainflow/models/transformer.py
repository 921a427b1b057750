"""One transformer for all frameworks: GPT-2's block (pre-LN, causal) and BERT's (post-LN, both directions).

Letters: T tokens (all windows laid end to end, no padding), W windows, H heads, D head width, width = H·D.
Sources: Radford et al. 2019 (GPT-2), Devlin et al. 2018 (BERT). Options: rotary positions (Su et al. 2021,
arXiv 2104.09864), RMSNorm (Zhang & Sennrich 2019, 1910.07467), SwiGLU (Shazeer 2020, 2002.05202).

A causal transformer may run two streams at once (see :mod:`brainflow.frameworks.csm`): `x` then holds T
time points and, below them, T queries that stand for the same time points. Query i of a window sees the
time points before i and itself, never a time point i or later and never another query.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from brainflow.config import ModelConfig
from brainflow.kernels import qkv_attention
from brainflow.kernels.varlen_attention import settle
from brainflow.models.dropout import Dropout
from brainflow.models.rotary import rotate, rotation
from brainflow.models.weights import Linear, cast_together

Style = Literal["gpt", "bert"]
Streams = Literal["one", "two", "second"]
EPS = {"gpt": 1e-5, "bert": 1e-12}


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


class Attention(nn.Module):
    """Multi-head self-attention within each window."""

    def __init__(self, style: Style, c: ModelConfig) -> None:
        super().__init__()
        self.heads, self.dropout, self.causal = c.heads, c.dropout, style == "gpt"
        self.backend = None if c.attention == "auto" else c.attention
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
        asking = longest if streams == "one" else 2 * longest
        impl, p = settle(qkv[:, 0], cu.shape[0] - 1, asking, p, self.backend)
        mixed = qkv_attention(qkv, cu, longest, self.causal, p, streams=streams, impl=impl)
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
