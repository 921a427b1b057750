"""Heads on top of a sequence model's features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brainflow.models.dropout import Dropout


class DecodingHead(nn.Module):
    """The published decoding head: Linear + tanh + dropout, then Linear to the classes.

    Parameters
    ----------
    width
        Width of the features.
    classes
        Number of classes.
    dropout
        Dropout after the tanh.

    Examples
    --------
    >>> DecodingHead(16, 3, 0.1)(torch.zeros(5, 16)).shape
    torch.Size([5, 3])
    """

    def __init__(self, width: int, classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        if classes < 2:
            raise ValueError(f"classes: got {classes}, expected at least 2")
        self.pooler = nn.Linear(width, width)
        self.dropout = Dropout(dropout)
        self.output = nn.Linear(width, classes)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits [windows, classes] of `features` [windows, width]."""
        return self.output(self.dropout(torch.tanh(self.pooler(features))))


class IsNextHead(nn.Module):
    """BERT's pooler (Linear + tanh) and a Linear to one logit: does the second half follow the first?"""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.pooler = nn.Linear(width, width)
        self.dropout = Dropout(dropout)
        self.output = nn.Linear(width, 1)

    def forward(self, first: Tensor) -> Tensor:
        """Return logits [sequences] of the hidden states of the first tokens, [sequences, width]."""
        return self.output(self.dropout(torch.tanh(self.pooler(first)))).squeeze(-1)

    def loss(self, first: Tensor, is_next: Tensor) -> tuple[Tensor, Tensor]:
        """Return binary cross-entropy and accuracy against `is_next` [sequences], 1 where it follows."""
        logits = self(first).float()
        accuracy = ((logits.detach() > 0) == is_next).mean(dtype=torch.float32)
        return F.binary_cross_entropy_with_logits(logits, is_next), accuracy
