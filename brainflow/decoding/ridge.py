"""Ridge in closed form, of classes or of numbers; penalty and probabilities come from people left out.

Scores are a ridge regression of one-hot labels on standardised features. One decomposition gives the scores
of every penalty, and of every group of windows as if that group had been left out: the residuals of a group
are (I - H_gg)^-1 times its training residuals, with H the hat matrix. What the left-out groups say chooses
the penalty and the scale by which scores become logits, both by cross-entropy (of numbers the penalty, by
squared error); nothing is fitted twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from brainflow.optional import requires

with requires("decoding", "report"):
    from scipy.optimize import minimize_scalar
    from scipy.special import softmax

PENALTIES = 10.0 ** np.arange(-3.0, 2.5, 0.5)
"""Penalties that are tried, in units of the mean squared norm of a window's standardised features."""
PENALTY, SCALE = 0.3, 6.0
"""Penalty and scale of the logits where too little can be left out, as of one window a class."""
PARTS, ENOUGH = 20, 2_000
"""Most parts that groups are dealt into; as many windows are enough to choose by, and to need no choice of
whether means over time are read."""
CLEARLY = 0.8
"""Share of the cross-entropy that whitened features must come below to be read alone; from there on the mean
of both is read. Few left-out windows tell no less apart, and where they chose by a hair, accuracy fell from
.66 to .53."""
BETTER = 0.9
"""Share of the cross-entropy that a simpler reading must come below to be taken: means over time alone, or
variances. Sustained states are read better by them (dev/log.md), and no state of the story or order was taken
for one."""
SMALLEST_VARIANCE = 1e-3
"""Of whitened features, in units of the mean variance."""
NUMBER_PENALTIES = np.append(PENALTIES, np.inf)
"""Of numbers the last is their mean alone: where nothing is to be read, nothing is said."""
LARGEST = 1e100
AT_ONCE = 10_000_000
"""Numbers of an array that is made for all penalties at once."""
NEVER = -1e4
"""Logit of a class that the training windows do not hold."""


@dataclass(frozen=True, kw_only=True)
class Ridge:
    """A fitted ridge: logits, or a number, = features · weight^T + bias.

    Attributes
    ----------
    weight, bias
        float64 `[classes, features]` and `[classes]` (one row of numbers); standardisation and scale are
        folded in.
    penalty
        Chosen penalty, in the units of `PENALTIES`.
    loss
        Cross-entropy of the left-out windows, NaN where fewer than half of all could be left out; of numbers
        their mean squared error.
    whitened
        Whether the penalty was that of whitened features, be it in one half of a mean.
    """

    weight: NDArray[np.float64]
    bias: NDArray[np.float64]
    penalty: float
    loss: float
    whitened: bool = False

    def logits(self, features: NDArray) -> NDArray[np.float64]:
        """Return logits `[windows, classes]` (or numbers, `[windows, 1]`) of `[windows, features]`."""
        return features @ self.weight.T + self.bias


def fit_ridge(
    features: NDArray,
    labels: NDArray[np.int64],
    *,
    classes: int,
    groups: NDArray | None = None,
    balance: bool = False,
    times: int = 1,
    covariance: NDArray | None = None,
    confounds: NDArray | None = None,
) -> Ridge:
    """Fit a ridge classifier in float64.

    Parameters
    ----------
    features
        `[windows, features]`, or `[copies, windows, features]`: first the windows, then copies of them, as
        those that begin a little earlier or later. Copies share the weight of one window, are left out with
        it, and judge nothing.
    labels
        int64 `[windows]` in [0, classes).
    classes
        Number of classes; one without windows is never named.
    groups
        Person (or run) of each window: these are left out to choose penalty and scale. Of one group, or None,
        single windows are.
    balance
        Weigh windows by the inverse of their class's frequency.
    times
        Time points (or bins) that features lie side by side of, in order. Persons and runs differ in a
        window's mean over them; where left-out windows are read better without it, it has no weight. Where
        they are read clearly better by nothing but that mean, as sustained states are, all times have the
        same weights.
    covariance
        `[width, width]` of what stands at each of `times`, from windows without labels. A penalty shrinks
        directions of little variance, which may be those that tell; where left-out windows are read clearly
        better by whitened features, the penalty was that of these, where a little better, the mean of both is
        returned.
    confounds
        `[windows, columns]`, regressed out of the features before (with the weights of `balance`). Features
        that sum to 0 within a site tell the one who is left out from the others, unless that is known here.

    Raises
    ------
    ValueError
        If features are not finite, or lengths differ.
    """
    settings: Any = {"classes": classes, "groups": groups, "balance": balance, "confounds": confounds}
    found = _fit(features, labels, **settings)
    if np.isnan(found.loss):
        return found
    x = np.asarray(features, dtype=np.float64)
    # both maps are symmetric: what is done to weights is as good as done to features
    if times > 1 and len(labels) <= ENOUGH:
        centred = _fit(_without_mean(x, times), labels, **settings)
        if centred.loss < found.loss:
            found = replace(centred, weight=_without_mean(centred.weight, times))
        averaged = _fit(_mean_over(x, times), labels, **settings)
        if averaged.loss < BETTER * found.loss:
            # The mean is a sum of times: a head on all of them says the same.
            found = replace(averaged, weight=np.tile(averaged.weight / times, times))
    if covariance is not None:
        whitener = power_of(covariance, -0.5)
        fit = _fit(_at_each_time(x, whitener, times), labels, **settings)
        weight = _at_each_time(fit.weight, whitener, times)
        whitened = replace(fit, weight=weight, whitened=True)
        if whitened.loss < CLEARLY * found.loss:
            return whitened
        if whitened.loss < found.loss:
            return replace(
                whitened,
                weight=(found.weight + whitened.weight) / 2,
                bias=(found.bias + whitened.bias) / 2,
                loss=(found.loss + whitened.loss) / 2,  # at most: cross-entropy is convex in the logits
            )
    return found


@cache
def _libraries() -> ThreadpoolController:
    # To look for them takes milliseconds, a fifth of a small fit.
    return ThreadpoolController()


def one_thread() -> AbstractContextManager[Any]:
    """Let BLAS sum in one thread, and so in one order, whatever the machine."""
    return _libraries().limit(limits=1, user_api="blas")


def class_balance(labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return weights `[windows]` by which classes count alike, 1 on average."""
    _, named, count = np.unique(labels, return_inverse=True, return_counts=True)
    weights: NDArray[np.float64] = len(named) / (len(count) * count[named])
    return weights


def fit_numbers(
    features: NDArray,
    targets: NDArray,
    *,
    groups: NDArray | None = None,
    confounds: NDArray | None = None,
) -> Ridge:
    """Fit a ridge regression of numbers in float64.

    Parameters
    ----------
    features
        `[people, features]`.
    targets
        Number of each person, `[people]`.
    groups
        What is left out together to choose the penalty, `[people]`; single people if None or of one group.
    confounds
        `[people, columns]`, regressed out of features and targets before, see :func:`fit_ridge`.

    Raises
    ------
    ValueError
        If features are not finite or targets NaN or huge, lengths differ, or there are fewer than 3 people.
    """
    x, y = np.asarray(features, dtype=np.float64), np.asarray(targets, dtype=np.float64)
    if x.ndim != 2 or x.shape[0] != len(y) or not x.size:
        raise ValueError(f"features: got shape {list(x.shape)} for {len(y)} targets, expected a row each")
    if len(y) < 3:
        some = "1 sample" if len(y) == 1 else f"{len(y)} samples"
        raise ValueError(f"targets: got {some}, expected at least 3 to choose a penalty")
    if not np.isfinite(x).all():
        raise ValueError("features: got NaN or infinity, expected finite values")
    if not (np.abs(y) < LARGEST).all():  # of which squares are summed
        raise ValueError(f"targets: got NaN or a number of {LARGEST:g} or more, expected smaller ones")
    ones = np.ones(len(y))
    mean, spread = _mean_and_spread(x, ones)
    parts = [np.flatnonzero(part) for part in _parts(groups, len(y))]
    with one_thread():
        fit = _Decomposition((x - mean) / spread, (y - y.mean())[:, None], ones[:, None], confounds)
        out = [(part, fit.left(part)) for part in parts]
        errors = [fit.left_out(NUMBER_PENALTIES, part, left) - fit.y[part] for part, left in out]
        losses = np.sum([np.square(error).sum(axis=(1, 2)) for error in errors], axis=0)
        best = int(np.argmin(losses))
        weight = fit.weight(NUMBER_PENALTIES[best]).T / spread
    return Ridge(
        weight=weight,
        bias=y.mean() - weight @ mean,
        penalty=float(NUMBER_PENALTIES[best]),
        loss=float(losses[best]) / len(y),
    )


def _mean_and_spread(
    x: NDArray[np.float64], weights: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    mean = np.average(x, axis=0, weights=weights)
    spread = np.sqrt(np.average(np.square(x - mean), axis=0, weights=weights))
    # Divided by infinity it is 0, and so is its weight: it can neither help nor overflow.
    spread[spread < 1e-6 * np.maximum(np.abs(mean), 1e-30)] = np.inf  # a constant, as float32 knows it
    return mean, spread


def _without_mean(x: NDArray[np.float64], times: int) -> NDArray[np.float64]:
    """Return rows less their mean over time."""
    over = x.reshape(*x.shape[:-1], times, -1)
    return (over - over.mean(axis=-2, keepdims=True)).reshape(x.shape)


def _mean_over(x: NDArray[np.float64], times: int) -> NDArray[np.float64]:
    """Return rows' means over time."""
    mean: NDArray[np.float64] = x.reshape(*x.shape[:-1], times, -1).mean(axis=-2)
    return mean


def _at_each_time(x: NDArray[np.float64], matrix: NDArray[np.float64], times: int) -> NDArray[np.float64]:
    """Return rows whose features at each time are multiplied by a matrix."""
    return (x.reshape(*x.shape[:-1], times, -1) @ matrix).reshape(x.shape)


def power_of(covariance: NDArray, power: float) -> NDArray[np.float64]:
    """Return a covariance to a negative power; variances below a thousandth of their mean count as that."""
    with one_thread():
        value, vector = np.linalg.eigh(np.asarray(covariance, dtype=np.float64))
        value = np.maximum(value, max(SMALLEST_VARIANCE * float(value.mean()), 1e-12))
        result: NDArray[np.float64] = (vector * value**power) @ vector.T
    return result


def _fit(
    features: NDArray,
    labels: NDArray[np.int64],
    *,
    classes: int,
    groups: NDArray | None,
    balance: bool,
    confounds: NDArray | None,
) -> Ridge:
    x, labels = np.asarray(features, dtype=np.float64), np.asarray(labels)
    copies, count = (len(x), len(labels)) if x.ndim == 3 else (1, len(labels))
    if x.ndim not in (2, 3) or x.shape[-2] != count or not x.size:
        raise ValueError(f"features: got shape {list(x.shape)} for {count} labels, expected a row each")
    if not np.isfinite(x).all():
        raise ValueError("features: got NaN or infinity, expected finite values; look at the windows' BOLD")
    seen, named = np.unique(labels, return_inverse=True)
    weights = class_balance(named) if balance else np.ones(count)
    parts = [np.flatnonzero(np.tile(part, copies)) for part in _parts(groups, count)]
    named, weights = np.tile(named, copies), np.tile(weights / copies, copies)
    x = x.reshape(len(named), -1)
    mean, spread = _mean_and_spread(x, weights)
    share = np.average(np.eye(len(seen))[named], axis=0, weights=weights)
    root = np.sqrt(weights)[:, None]
    with one_thread():
        fit = _Decomposition((x - mean) / spread, np.eye(len(seen))[named] - share, root, confounds)
        penalty, scale, loss = _choose(fit, parts, named, share, count)
        weight = scale * fit.weight(penalty).T / spread
    full, bias = np.zeros((classes, x.shape[1])), np.full(classes, NEVER)
    full[seen], bias[seen] = weight, scale * share - weight @ mean
    return Ridge(weight=full, bias=bias, penalty=penalty, loss=loss)


class _Decomposition:
    """A weighted, centred least-squares problem x w ≈ y by its singular values.

    Parameters
    ----------
    x, y, root
        float64 `[rows, features]`, `[rows, classes]`, and the root of the rows' weights `[rows, 1]`.
    confounds
        `[rows, columns]`, of which x has been freed: what is left out, is left out of that, too.
    """

    def __init__(
        self,
        x: NDArray[np.float64],
        y: NDArray[np.float64],
        root: NDArray[np.float64],
        confounds: NDArray[np.float64] | None = None,
    ) -> None:
        self.x, self.y, self.root = root * x, root * y, root
        self.free = root / np.linalg.norm(root)  # an offset is not penalised, nor are confounds
        self.rest = self.y
        if confounds is not None:
            # By singular values, because confounds may depend on each other.
            vectors, size, _ = np.linalg.svd(root * np.column_stack([np.ones(len(x)), confounds]), False)
            self.free = vectors[:, size > 1e-9 * size[0]]
            self.rest = self.y - self.free @ (self.free.T @ self.y)
        self.wide = x.shape[1] > x.shape[0]
        # Of the smaller square: its eigenvectors cost the cube of its size.
        square, vectors = np.linalg.eigh(self.x @ self.x.T if self.wide else self.x.T @ self.x)
        # Of squared singular values: what lies a million times below the largest is rounding.
        kept = square > 1e-12 * max(float(square[-1]), 1e-300)
        self.square: NDArray[np.float64] = square[kept]
        self.vectors: NDArray[np.float64] = vectors[:, kept]
        self.unit = max(float(np.square(self.x).sum() / np.square(root).sum()), 1e-300)
        # U^T y: of a wide x the vectors are U, else x V / s is.
        self.seen = self.vectors.T @ (self.y if self.wide else self.x.T @ self.y)
        if not self.wide:
            self.seen /= np.sqrt(self.square)[:, None]

    def left(self, part: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return rows of the left singular vectors, `[part, values]`."""
        return self.vectors[part] if self.wide else self.x[part] @ (self.vectors / np.sqrt(self.square))

    def weight(self, penalty: float) -> NDArray[np.float64]:
        """Return the weights of a penalty, `[features, classes]`."""
        inner = self.seen / (self.square + penalty * self.unit)[:, None]
        if self.wide:
            return self.x.T @ (self.vectors @ inner)
        return self.vectors @ (np.sqrt(self.square)[:, None] * inner)

    def left_out(
        self, penalties: NDArray[np.float64], part: NDArray[np.int64], left: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Return what the rows of a part would be given without it, `[penalties, part, classes]`.

        `left` are their left singular vectors.
        """
        # All penalties at once, because most parts are small; of large ones so many as fit into memory.
        each = max(1, AT_ONCE // max(1, len(part) * max(left.shape)))
        found = [self._left_out(penalties[i : i + each], part, left) for i in range(0, len(penalties), each)]
        return np.concatenate(found)

    def _left_out(
        self, penalties: NDArray[np.float64], part: NDArray[np.int64], left: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        shrink = self.square / (self.square + penalties[:, None, None] * self.unit)
        free = self.free[part]
        inside = np.eye(len(part)) - ((left * shrink) @ left.T + free @ free.T)
        residual = self.rest[part] - left @ (shrink.transpose(0, 2, 1) * self.seen)
        if free.shape[1] > 1:  # a category that stands in this part alone is known to nobody else
            return (self.y[part] - np.linalg.pinv(inside, 1e-8, hermitian=True) @ residual) / self.root[part]
        return (self.y[part] - np.linalg.solve(inside, residual)) / self.root[part]


def _parts(groups: NDArray | None, windows: int) -> list[NDArray[np.bool_]]:
    """Return which windows are left out together, in random order."""
    member = np.arange(windows) if groups is None else np.unique(groups, return_inverse=True)[1]
    if not member.any():
        member = np.arange(windows)
    count = int(member.max()) + 1
    dealt = (np.random.default_rng(0).permutation(count) % PARTS)[member]
    return [dealt == part for part in range(min(count, PARTS))]


def _choose(
    fit: _Decomposition,
    parts: Sequence[NDArray[np.int64]],
    named: NDArray[np.int64],
    share: NDArray[np.float64],
    windows: int,
) -> tuple[float, float, float]:
    """Return the penalty with the least cross-entropy of left-out windows, its scale, and that entropy.

    Judged are windows, not their copies, of classes that are trained on without the part.
    """
    known = [np.isin(named[part], np.delete(named, part)) & (part < windows) for part in parts]
    sizes = np.array([one.sum() for one in known])
    if sizes.sum() < windows / 2:
        return PENALTY, SCALE, float("nan")
    most = int(np.searchsorted(np.cumsum(sizes), ENOUGH)) + 1
    out = [(part, fit.left(part), one) for part, one in zip(parts[:most], known[:most], strict=True)]
    judged = np.concatenate([part[one] for part, _, one in out])
    best = (PENALTY, SCALE, np.inf)
    # Labels were centred by `share`; scores get it back before they are compared.
    judging = [fit.left_out(PENALTIES, part, left)[:, one] for part, left, one in out]
    said = share + np.concatenate(judging, axis=1)
    for penalty, scores in zip(PENALTIES, said, strict=True):
        scale, loss = _scale(scores, named[judged], np.square(fit.root[judged, 0]))
        if loss < best[2]:
            best = (float(penalty), scale, loss)
    return best


def _scale(
    scores: NDArray[np.float64], named: NDArray[np.int64], weights: NDArray[np.float64]
) -> tuple[float, float]:
    """Return the factor that makes logits of scores with the least cross-entropy, and that."""
    # By hand, without calls that check their arguments: a choice of readout asks for it a thousand times.
    behind = scores - scores.max(axis=1, keepdims=True)
    right, share = behind[np.arange(len(scores)), named], weights / weights.sum()

    def loss(log_scale: float) -> float:
        scale = np.exp(log_scale)
        return float(share @ (np.log(np.exp(scale * behind).sum(axis=1)) - scale * right))

    found = minimize_scalar(loss, bounds=(-3.0, 6.0), method="bounded", options={"xatol": 1e-2})
    return float(np.exp(found.x)), float(found.fun)


class RidgeDecoder:
    """:func:`fit_ridge` with the interface of a scikit-learn classifier, for the baselines."""

    def __init__(self, times: int = 1) -> None:
        self.times = times

    def fit(self, X: NDArray, y: NDArray[np.int64], groups: NDArray | None = None) -> Self:
        """Fit to `[windows, features]`, classes, and the person or run of each window."""
        self.classes_, named = np.unique(y, return_inverse=True)
        self.ridge_ = fit_ridge(X, named, classes=len(self.classes_), groups=groups, times=self.times)
        return self

    def predict(self, X: NDArray) -> NDArray[np.int64]:
        """Return the class of each window."""
        return self.classes_[self.ridge_.logits(X).argmax(axis=1)]

    def predict_proba(self, X: NDArray) -> NDArray[np.float64]:
        """Return the probability of each of `classes_` for each window."""
        return np.asarray(softmax(self.ridge_.logits(X), axis=1))
