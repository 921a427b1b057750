"""Ridge classification in closed form, its penalty and its probabilities from people that it did not see.

Scores are a ridge regression of one-hot labels on standardised features. One decomposition gives the scores
of every penalty, and of every group of windows as if that group had been left out: the residuals of a group
are (I - H_gg)^-1 times its training residuals, with H the hat matrix. What the left-out groups say chooses
the penalty and the scale by which scores become logits, both by cross-entropy; nothing is fitted twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from brainflow.optional import requires

with requires("decoding", "report"):
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax, softmax

PENALTIES = 10.0 ** np.arange(-3.0, 2.5, 0.5)
"""Penalties that are tried, in units of the mean squared norm of a window's standardised features."""
PENALTY, SCALE = 1.0, 4.0
"""Penalty and scale of the logits where nobody can be left out: one group, or classes of one group each."""
PARTS = 20
"""Most parts that groups are dealt into to be left out."""
NEVER = -1e4
"""Logit of a class that the training windows do not hold."""


@dataclass(frozen=True, kw_only=True)
class Ridge:
    """A fitted ridge classifier: logits = features · weight^T + bias.

    Attributes
    ----------
    weight, bias
        float64 `[classes, features]` and `[classes]`; standardisation and scale are folded in.
    penalty
        Chosen penalty, in the units of `PENALTIES`.
    loss
        Cross-entropy of the left-out windows; NaN where none could be left out.
    """

    weight: NDArray[np.float64]
    bias: NDArray[np.float64]
    penalty: float
    loss: float

    def logits(self, features: NDArray) -> NDArray[np.float64]:
        """Return logits `[windows, classes]` of `features` `[windows, features]`."""
        return features @ self.weight.T + self.bias


def fit_ridge(
    features: NDArray,
    labels: NDArray[np.int64],
    *,
    classes: int,
    groups: NDArray | None = None,
    balance: bool = False,
) -> Ridge:
    """Fit a ridge classifier in float64.

    Parameters
    ----------
    features, labels
        `[windows, features]` and int64 `[windows]` in [0, classes).
    classes
        Number of classes; one without windows is never named.
    groups
        Person (or run) of each window: these are left out to choose penalty and scale. None: windows are.
    balance
        Weigh windows by the inverse of their class's frequency.

    Raises
    ------
    ValueError
        If features are not finite, or lengths differ.
    """
    x = np.asarray(features, dtype=np.float64)
    labels = np.asarray(labels)
    if x.ndim != 2 or len(x) != len(labels) or not len(x):
        raise ValueError(f"features: got shape {list(x.shape)} for {len(labels)} labels, expected a row each")
    if not np.isfinite(x).all():
        raise ValueError("features: got NaN or infinity, expected finite values; look at the windows' BOLD")
    seen, named = np.unique(labels, return_inverse=True)
    weights = (len(x) / (len(seen) * np.bincount(named)))[named] if balance else np.ones(len(x))
    mean = np.average(x, axis=0, weights=weights)
    spread = np.sqrt(np.average(np.square(x - mean), axis=0, weights=weights))
    spread[spread < 1e-9 * np.maximum(np.abs(mean), 1e-30)] = np.inf  # a constant says nothing
    share = np.average(np.eye(len(seen))[named], axis=0, weights=weights)
    root = np.sqrt(weights)[:, None]
    with threadpool_limits(1, user_api="blas"):  # sums in one order, whatever the machine
        fit = _Decomposition(root * ((x - mean) / spread), root * (np.eye(len(seen))[named] - share))
        parts = _parts(groups, len(x))
        penalty, scale, loss = _choose(fit, parts, named, root, share)
        weight = scale * fit.weight(penalty).T / spread
    full, bias = np.zeros((classes, x.shape[1])), np.full(classes, NEVER)
    full[seen], bias[seen] = weight, scale * share - weight @ mean
    return Ridge(weight=full, bias=bias, penalty=penalty, loss=loss)


class _Decomposition:
    """A weighted, centred least-squares problem x w ≈ y by its singular values.

    Parameters
    ----------
    x, y
        float64 `[windows, features]` and `[windows, classes]`, rows multiplied by the root of their weight.
    """

    def __init__(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> None:
        self.x, self.y = x, y
        wide = x.shape[1] > x.shape[0]
        square, vectors = np.linalg.eigh(x @ x.T if wide else x.T @ x)
        kept = square > 1e-12 * max(float(square[-1]), 1e-300)
        self.square: NDArray[np.float64] = square[kept]
        self.left: NDArray[np.float64] = (
            vectors[:, kept] if wide else x @ (vectors[:, kept] / np.sqrt(self.square))
        )
        self.unit = max(float(np.square(x).sum()) / len(x), 1e-300)
        self.seen = self.left.T @ y

    def weight(self, penalty: float) -> NDArray[np.float64]:
        """Return the weights of a penalty, `[features, classes]`."""
        inner = self.seen / (self.square + penalty * self.unit)[:, None]
        return self.x.T @ (self.left @ inner)

    def left_out(
        self, penalty: float, parts: Sequence[NDArray[np.int64]], root: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Return what each window would be given without its part, `[windows, classes]`, times its root."""
        shrink = self.square / (self.square + penalty * self.unit)
        offset = root / np.linalg.norm(root)  # the class offsets, which are not penalised
        said = self.y.copy()
        fitted = self.left @ (shrink[:, None] * self.seen)
        for part in parts:
            rows = self.left[part]
            hat = (rows * shrink) @ rows.T + offset[part] @ offset[part].T
            said[part] -= np.linalg.solve(np.eye(len(part)) - hat, self.y[part] - fitted[part])
        return said


def _parts(groups: NDArray | None, windows: int) -> list[NDArray[np.int64]]:
    """Return the windows that are left out together."""
    member = np.arange(windows) if groups is None else np.unique(groups, return_inverse=True)[1]
    count = int(member.max()) + 1
    if count > PARTS:
        member = (np.random.default_rng(0).permutation(count) % PARTS)[member]
    return [np.flatnonzero(member == part) for part in range(min(count, PARTS))]


def _choose(
    fit: _Decomposition,
    parts: Sequence[NDArray[np.int64]],
    named: NDArray[np.int64],
    root: NDArray[np.float64],
    share: NDArray[np.float64],
) -> tuple[float, float, float]:
    """Return the penalty with the least cross-entropy of left-out windows, its scale, and that entropy."""
    judged = np.zeros(len(named), dtype=bool)
    for part in parts:  # only classes that are trained on without the part
        judged[part] = np.isin(named[part], np.delete(named, part))
    if len(parts) < 2 or not judged.any():
        return PENALTY, SCALE, float("nan")
    best = (PENALTY, SCALE, np.inf)
    for penalty in PENALTIES:
        scores = (fit.left_out(penalty, parts, root) / root + share)[judged]
        scale, loss = _scale(scores, named[judged], np.square(root[judged, 0]))
        if loss < best[2]:
            best = (float(penalty), scale, loss)
    return best


def _scale(
    scores: NDArray[np.float64], named: NDArray[np.int64], weights: NDArray[np.float64]
) -> tuple[float, float]:
    """Return the factor that makes logits of scores with the least cross-entropy, and that."""
    rows = np.arange(len(scores))

    def loss(log_scale: float) -> float:
        return float(
            -np.average(log_softmax(np.exp(log_scale) * scores, axis=1)[rows, named], weights=weights)
        )

    found = minimize_scalar(loss, bounds=(-3.0, 6.0), method="bounded", options={"xatol": 1e-2})
    return float(np.exp(found.x)), float(found.fun)


class RidgeDecoder:
    """:func:`fit_ridge` with the interface of a scikit-learn classifier, for the baselines."""

    def fit(self, X: NDArray, y: NDArray[np.int64], groups: NDArray | None = None) -> Self:
        """Fit to `[windows, features]`, classes, and the person or run of each window."""
        self.classes_, named = np.unique(y, return_inverse=True)
        self.ridge_ = fit_ridge(X, named, classes=len(self.classes_), groups=groups)
        return self

    def predict(self, X: NDArray) -> NDArray[np.int64]:
        """Return the class of each window."""
        return self.classes_[self.ridge_.logits(X).argmax(axis=1)]

    def predict_proba(self, X: NDArray) -> NDArray[np.float64]:
        """Return the probability of each of `classes_` for each window."""
        return np.asarray(softmax(self.ridge_.logits(X), axis=1))
