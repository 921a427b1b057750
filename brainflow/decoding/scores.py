"""Scores of a decoder with what is needed to trust them: intervals over groups, chance, a permutation test.

Everything is computed from one confusion matrix per group (a run, or a subject where there are several):
windows of one group are not independent, so groups are what is resampled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainflow.optional import requires

with requires("decoding", "report"):
    from scipy import stats

Metric = Callable[[NDArray[np.float64]], NDArray[np.float64]]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value with its confidence interval; `low` and `high` are NaN where there is only one group."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if np.isnan(self.low):
            return f"{self.value:.3f} [one group: no interval]"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of predictions against labels.

    Attributes
    ----------
    accuracy, balanced_accuracy, macro_f1
        Value and 95 % interval over groups.
    chance
        Accuracy of a decoder that always names the most frequent class.
    permutation_p
        Share of label permutations within groups that score at least this accuracy.
    confusion
        int64 `[classes, classes]`: row = true class, column = predicted class.
    per_group
        Group → accuracy.
    """

    accuracy: Interval
    balanced_accuracy: Interval
    macro_f1: Interval
    chance: float
    permutation_p: float
    confusion: NDArray[np.int64]
    per_group: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, lists and dicts, ready for JSON (an interval without ends has None)."""
        named = {
            name: {key: _finite(getattr(interval, key)) for key in ("value", "low", "high")}
            for name, interval in (
                ("accuracy", self.accuracy),
                ("balanced_accuracy", self.balanced_accuracy),
                ("macro_f1", self.macro_f1),
            )
        }
        return {
            **named,
            "chance": self.chance,
            "permutation_p": self.permutation_p,
            "confusion": self.confusion.tolist(),
            "per_group": self.per_group,
        }


def accuracy(confusion: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of windows named rightly: confusion `[..., classes, classes]` → `[...]`."""
    total = confusion.sum(axis=(-2, -1))
    return _ratio(np.trace(confusion, axis1=-2, axis2=-1), total)


def balanced_accuracy(confusion: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean recall over the classes that occur: confusion `[..., classes, classes]` → `[...]`."""
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    support = confusion.sum(axis=-1)
    return _ratio(_ratio(hits, support).sum(axis=-1), (support > 0).sum(axis=-1))


def macro_f1(confusion: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean F1 over the classes that occur or are named: confusion `[..., classes, classes]` → `[...]`."""
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    either = confusion.sum(axis=-1) + confusion.sum(axis=-2)
    return _ratio(_ratio(2.0 * hits, either).sum(axis=-1), (either > 0).sum(axis=-1))


def score(
    labels: NDArray[np.int64],
    predictions: NDArray[np.int64],
    *,
    groups: NDArray,
    classes: int,
    seed: int = 0,
    resamples: int = 2_000,
    permutations: int = 1_000,
) -> Scores:
    """Score predictions.

    Parameters
    ----------
    labels, predictions
        True and predicted class, int64 `[windows]` in `[0, classes)`. Predictions of a decoder that was
        fitted with several seeds are `[seeds, windows]`; their windows are pooled.
    groups
        Group of each window `[windows]`: subjects, or runs where there is one subject.
    classes
        Number of classes.
    seed
        Seeds resampling and permutations.
    resamples, permutations
        Number of bootstrap resamples of groups; of permutations of the labels within groups.

    Raises
    ------
    ValueError
        If the arrays differ in length, are empty, or hold a class outside `[0, classes)`.
    """
    per_group, names = group_confusions(labels, predictions, groups=groups, classes=classes)
    total = per_group.sum(axis=0)
    draws = _resample(len(per_group), resamples, seed)
    return Scores(
        accuracy=_interval(accuracy, per_group, draws),
        balanced_accuracy=_interval(balanced_accuracy, per_group, draws),
        macro_f1=_interval(macro_f1, per_group, draws),
        chance=float(np.bincount(labels, minlength=classes).max() / len(labels)),
        permutation_p=permutation_p(labels, predictions, groups=groups, permutations=permutations, seed=seed),
        confusion=total.astype(np.int64),
        per_group=dict(zip(names, accuracy(per_group).tolist(), strict=True)),
    )


def paired_difference(
    labels: NDArray[np.int64],
    first: NDArray[np.int64],
    second: NDArray[np.int64],
    *,
    groups: NDArray,
    classes: int,
    seed: int = 0,
    resamples: int = 2_000,
) -> Interval:
    """Return accuracy of `first` minus accuracy of `second` on the same windows, with its interval.

    Both are resampled by the same groups, which removes what makes groups easy or hard for either.
    """
    ours, _ = group_confusions(labels, first, groups=groups, classes=classes)
    theirs, _ = group_confusions(labels, second, groups=groups, classes=classes)
    draws = _resample(len(ours), resamples, seed)
    both = np.stack([ours, theirs], axis=1)
    return _interval(lambda c: accuracy(c[..., 0, :, :]) - accuracy(c[..., 1, :, :]), both, draws)


def permutation_p(
    labels: NDArray[np.int64],
    predictions: NDArray[np.int64],
    *,
    groups: NDArray,
    permutations: int = 1_000,
    seed: int = 0,
) -> float:
    """Return the share of permutations of the labels within groups that reach the accuracy seen.

    (1 + reached) / (1 + permutations), never 0 (Phipson & Smyth 2010). The decoder is not fitted again:
    the hypothesis is that its predictions for a group say nothing about the order of that group's labels.
    """
    rng = np.random.default_rng(seed)
    order = np.argsort(groups, kind="stable")
    predictions = np.atleast_2d(predictions)[:, order]
    labels, groups = labels[order], groups[order]
    seen = int((labels == predictions).sum())
    hits = np.zeros(permutations, dtype=np.int64)
    edges = np.flatnonzero(groups[1:] != groups[:-1]) + 1
    for mine, named in zip(np.split(labels, edges), np.split(predictions, edges, axis=1), strict=True):
        shuffled = rng.permuted(np.broadcast_to(mine, (permutations, len(mine))), axis=1)
        for one_seed in named:
            hits += (shuffled == one_seed).sum(axis=1)
    return float((1 + (hits >= seen).sum()) / (1 + permutations))


def group_confusions(
    labels: NDArray[np.int64], predictions: NDArray[np.int64], *, groups: NDArray, classes: int
) -> tuple[NDArray[np.float64], list[str]]:
    """Return the confusion matrix of each group `[groups, classes, classes]` and the groups' names."""
    seeds = 1 if predictions.ndim == 1 else len(predictions)
    if not len(labels) == predictions.shape[-1] == len(groups) or predictions.size == 0:
        raise ValueError(
            f"labels, predictions, groups: got lengths {len(labels)}, {predictions.shape[-1]}, {len(groups)}"
            ", expected three equal lengths of at least 1"
        )
    for name, values in (("labels", labels), ("predictions", predictions)):
        if values.min() < 0 or values.max() >= classes:
            raise ValueError(
                f"{name}: got classes from {values.min()} to {values.max()}, expected 0 to {classes - 1}"
            )
    names, member = np.unique(groups, return_inverse=True)
    result = np.zeros((len(names), classes, classes))
    np.add.at(result, (np.tile(member, seeds), np.tile(labels, seeds), predictions.ravel()), 1.0)
    return result, [str(name) for name in names]


def _resample(groups: int, resamples: int, seed: int) -> NDArray[np.float64]:
    """Return how often each bootstrap resample draws each group: `[resamples, groups]`."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(groups, np.full(groups, 1.0 / groups), size=resamples).astype(np.float64)


def _interval(metric: Metric, per_group: NDArray[np.float64], draws: NDArray[np.float64]) -> Interval:
    """Return the metric of the pooled windows with its expanded percentile interval at 95 %.

    Percentile intervals are too narrow for few groups; their level is widened as in Hesterberg 2015
    (The American Statistician 69:371, "expanded percentile"), so that 10 runs cover about what 95 % promises.
    """
    value = float(metric(per_group.sum(axis=0)))
    groups = len(per_group)
    if groups < 2:
        return Interval(value=value, low=float("nan"), high=float("nan"))
    tail = stats.norm.cdf(np.sqrt(groups / (groups - 1)) * stats.t.ppf(0.025, groups - 1))
    resampled = metric(np.tensordot(draws, per_group, axes=1))
    low, high = np.quantile(resampled, [tail, 1.0 - tail])
    return Interval(value=value, low=float(low), high=float(high))


def _ratio(above: NDArray[np.float64], below: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return above / below, 0 where `below` is 0."""
    return np.divide(above, below, out=np.zeros_like(above, dtype=np.float64), where=below > 0)


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
