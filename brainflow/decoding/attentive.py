"""The attentive probe: learned queries attend over the frozen states of a window's time points."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from brainflow.batch import upload, window_of


class AttentiveHead(nn.Module):
    """One learned query a head attends over a window's hidden states; what it reads is classified.

    Cross-attention pooling as in Bardes et al. 2024 (V-JEPA, arXiv 2404.08471), with one layer and without
    the feed-forward block that follows it there. Windows lie end to end: the softmax is taken within each.

    Parameters
    ----------
    width
        Width of the hidden states.
    classes
        Number of classes.
    dropout
        Dropout before the last layer.

    Examples
    --------
    >>> AttentiveHead(16, 3)(torch.zeros(5, 16), np.array([2, 3])).shape
    torch.Size([2, 3])
    """

    def __init__(self, width: int, classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = next(count for count in (8, 4, 2, 1) if width % count == 0)
        self.norm = nn.LayerNorm(width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.query = nn.Parameter(torch.randn(self.heads, width // self.heads) * 0.02)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(width, classes)

    def forward(self, hidden: Tensor, lengths: np.ndarray) -> Tensor:
        """Return logits `[windows, classes]` of `hidden` `[tokens, width]`; `lengths` in host memory."""
        hidden = self.norm(hidden)
        window = upload(hidden.device, window=window_of(lengths))["window"]
        shape = (len(hidden), self.heads, -1)
        score = (self.key(hidden).view(shape) * self.query).sum(dim=-1) * self.query.shape[1] ** -0.5
        index = window[:, None].expand_as(score)
        blank = score.new_zeros(len(lengths), self.heads)
        top = blank.scatter_reduce(0, index, score.detach(), "amax", include_self=False)
        weight = (score - top[window]).exp()
        share = weight / blank.index_add(0, window, weight)[window]
        read = share[..., None] * self.value(hidden).view(shape)
        pooled = blank.new_zeros(len(lengths), hidden.shape[1]).index_add(0, window, read.flatten(1))
        logits: Tensor = self.output(self.dropout(pooled))
        return logits
