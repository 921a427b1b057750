"""The published linear baseline: one weight a time point, then one linear layer over the networks."""

from __future__ import annotations

from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

ITERATIONS, PENALTY = 30, 1e-3


class LinearOverTime:
    """Linear over time points → 1, Linear over networks → classes (the linear model of arXiv 2206.11417).

    Fitted by L-BFGS with a quadratic penalty, from zero weights over networks and uniform ones over time:
    nothing is drawn.
    """

    def fit(self, X: NDArray, y: NDArray[np.int64]) -> Self:
        """Fit to windows `[windows, time, networks]` (short ones padded with zeros) and their classes."""
        self.classes_, target = np.unique(y, return_inverse=True)
        x, named = torch.from_numpy(np.asarray(X, dtype=np.float32)), torch.from_numpy(target)
        self._mean, self._scale = x.mean(dim=(0, 1)), x.std(dim=(0, 1)).clamp_min(1e-6)
        x = (x - self._mean) / self._scale
        self._time = torch.full((x.shape[1],), 1.0 / x.shape[1], requires_grad=True)
        self._weight = torch.zeros(x.shape[2], len(self.classes_), requires_grad=True)
        self._bias = torch.zeros(len(self.classes_), requires_grad=True)
        parameters = [self._time, self._weight, self._bias]
        optimizer = torch.optim.LBFGS(parameters, max_iter=ITERATIONS, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            penalty = PENALTY * (self._weight.square().sum() + self._time.square().sum())
            loss = F.cross_entropy(self._logits(x), named) + penalty
            loss.backward()
            return loss

        optimizer.step(closure)
        return self

    def predict(self, X: NDArray) -> NDArray[np.int64]:
        """Return the class of each window."""
        return self.classes_[self.predict_proba(X).argmax(axis=1)]

    def predict_proba(self, X: NDArray) -> NDArray[np.float32]:
        """Return the probability of each of `classes_` for each window."""
        with torch.no_grad():
            x = (torch.from_numpy(np.asarray(X, dtype=np.float32)) - self._mean) / self._scale
            return self._logits(x).softmax(dim=1).numpy()

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("wtn,t->wn", x, self._time) @ self._weight + self._bias
