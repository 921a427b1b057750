"""From BOLD to hidden states: Linear + LayerNorm on each time point, plus a learned embedding of its time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BoldEmbedding(nn.Module):
    """Linear + LayerNorm + dropout on each time point, plus a TR embedding (arXiv 2206.11417).

    The TR embedding is a table with one row per `time_resolution` seconds up to `max_seconds`, and one
    dummy row, the last, for special tokens. Special tokens live in input space: they are rows of
    `networks` values and pass through the same Linear + LayerNorm.

    Parameters
    ----------
    networks
        Networks of a time point.
    width
        Hidden width.
    dropout
        Probability of dropping a hidden value after the LayerNorm.
    max_seconds
        Longest time since window onset with a row of its own, in seconds; later times share the last one.
    time_resolution
        Seconds per row.
    """

    def __init__(
        self, networks: int, width: int, dropout: float, max_seconds: float, time_resolution: float
    ) -> None:
        super().__init__()
        self.time_resolution = time_resolution
        self.project = nn.Linear(networks, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.time = nn.Embedding(round(max_seconds / time_resolution) + 1, width)
        nn.init.normal_(self.time.weight, std=0.02)

    @property
    def dummy(self) -> int:
        """Row of the TR embedding for special tokens."""
        return self.time.num_embeddings - 1

    def time_index(self, times: Tensor) -> Tensor:
        """Return rows of the TR embedding, int64 [tokens], of `times` [tokens] in seconds."""
        return (times / self.time_resolution).round_().clamp_(0, self.dummy - 1).long()

    def forward(self, bold: Tensor, special: Tensor | None = None) -> Tensor:
        """Return Linear + LayerNorm of `bold` [tokens, networks] and, below it, of `special` [k, networks].

        `bold` may be of any floating type: it is cast here, once. It gets no gradient. Dropout and TR
        embedding follow in :meth:`finish`, when every token stands where it belongs.
        """
        x = cast_input(bold, self.project.weight)
        hidden = self.project(x)
        if special is not None:
            hidden = torch.cat((hidden, self.project(special)))
        return self.norm(hidden)

    def finish(self, hidden: Tensor, time_index: Tensor) -> Tensor:
        """Return dropout(`hidden`) [..., tokens, width] plus the TR embedding of `time_index` [tokens]."""
        return self.dropout(hidden) + F.embedding(time_index, self.time.weight)


def cast_input(bold: Tensor, weight: Tensor) -> Tensor:
    """Return `bold` in the element type that a product with `weight` runs in; under autocast unchanged."""
    if torch.is_autocast_enabled(bold.device.type):
        return bold
    return bold.to(weight.dtype)
