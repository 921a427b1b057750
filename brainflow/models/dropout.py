"""Dropout as one operator forward and one backward on every device; PyTorch's takes two each on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """As `torch.nn.Dropout`."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with values dropped and the others scaled up in training, `x` itself otherwise."""
        if not self.training or self.p == 0.0:
            return x
        return torch.native_dropout(x, self.p, True)[0]
