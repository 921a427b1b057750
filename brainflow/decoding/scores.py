"""Scores of a decoder with what is needed to trust them: intervals over groups, chance, a permutation test.

Everything is computed from one confusion matrix per group (a run, or a subject where there are several):
windows of one group are not independent, so groups are what is resampled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
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

    def to_dict(self) -> dict[str, float | None]:
        """Return value, low and high, ready for JSON (None where there is no interval)."""
        return {key: _finite(getattr(self, key)) for key in ("value", "low", "high")}

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
            name: interval.to_dict()
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
    """Return the share of windows named rightly: confusion `[..., classes, classes]` → `[...]`."""
    total = confusion.sum(axis=(-2, -1))
    return _ratio(np.trace(confusion, axis1=-2, axis2=-1), total)


def balanced_accuracy(confusion: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean recall over the classes that occur: confusion `[..., classes, classes]` → `[...]`."""
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    support = confusion.sum(axis=-1)
    return _ratio(_ratio(hits, support).sum(axis=-1), (support > 0).sum(axis=-1))


def macro_f1(confusion: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return mean F1 over classes that occur or are named: confusion `[..., classes, classes]` → `[...]`."""
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    either = confusion.sum(axis=-1) + confusion.sum(axis=-2)
    return _ratio(_ratio(2.0 * hits, either).sum(axis=-1), (either > 0).sum(axis=-1))


def score(
    labels: NDArray[np.int64],
    predictions: NDArray[np.int64],
    *,
    groups: NDArray,
    classes: int,
    draws: int = 1,
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
    draws
        Number of draws of training people that the rows of the predictions come from, those of a draw
        together. Intervals then resample draws, too: other people might have been labelled.
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
    counts, names = draw_confusions(labels, predictions, groups=groups, classes=classes, draws=draws)
    per_group = counts.sum(axis=0)
    total = per_group.sum(axis=0)
    resampled = _resample(counts, resamples, seed)
    return Scores(
        accuracy=_interval(accuracy, total, resampled, len(names)),
        balanced_accuracy=_interval(balanced_accuracy, total, resampled, len(names)),
        macro_f1=_interval(macro_f1, total, resampled, len(names)),
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
    draws: int = 1,
    seed: int = 0,
    resamples: int = 2_000,
) -> Interval:
    """Return accuracy of `first` minus accuracy of `second` on the same windows, with its interval.

    Both are resampled by the same groups and draws of training people, which removes what makes these easy
    or hard for either.

    Parameters
    ----------
    labels
        True class, int64 `[windows]`.
    first, second
        Predicted classes, `[windows]` or `[seeds, windows]`.
    groups, classes, draws, seed, resamples
        As in :func:`score`.
    """
    settings: dict[str, Any] = {"groups": groups, "classes": classes, "draws": draws}
    ours, names = draw_confusions(labels, first, **settings)
    theirs, _ = draw_confusions(labels, second, **settings)
    both = np.stack([ours, theirs], axis=2)
    return _interval(
        lambda c: accuracy(c[..., 0, :, :]) - accuracy(c[..., 1, :, :]),
        both.sum(axis=(0, 1)),
        _resample(both, resamples, seed),
        len(names),
    )


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

    Parameters
    ----------
    labels, predictions, groups
        As in :func:`score`.
    permutations, seed
        How many, and what seeds them.
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
        # One permutation for all rows, which share their labels: with one for each p would be too small.
        for one_seed in named:
            hits += (shuffled == one_seed).sum(axis=1)
    return float((1 + (hits >= seen).sum()) / (1 + permutations))


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Confidence against accuracy in bins of equal width over [0, 1] (Guo et al. 2017).

    Attributes
    ----------
    error
        Expected calibration error: mean over windows of |accuracy - confidence| of their bin.
    confidence, accuracy
        Means of each bin that holds windows.
    windows
        Number of windows in each of these bins.
    """

    error: float
    confidence: list[float]
    accuracy: list[float]
    windows: list[int]

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists, ready for JSON."""
        return asdict(self)


def calibration(labels: NDArray[np.int64], probabilities: NDArray, *, bins: int = 10) -> Calibration:
    """Return how well the probability of the class named predicts that it is right.

    Parameters
    ----------
    labels
        int64 `[windows]`.
    probabilities
        `[windows, classes]`, rows sum to 1.
    bins
        Number of bins over [0, 1].

    Raises
    ------
    ValueError
        If lengths differ or there are no windows.

    Examples
    --------
    >>> sure = np.array([[1.0, 0.0], [1.0, 0.0]])
    >>> calibration(np.array([0, 1]), sure).error
    0.5
    """
    if len(labels) != len(probabilities) or not len(labels):
        raise ValueError(
            f"labels, probabilities: got lengths {len(labels)} and {len(probabilities)}, expected one length"
        )
    named = probabilities.argmax(axis=1)
    sure = probabilities[np.arange(len(labels)), named].astype(np.float64)
    # A confidence of 1 lies in the last bin.
    place = np.minimum((sure * bins).astype(np.int64), bins - 1)
    count = np.bincount(place, minlength=bins)
    filled = count > 0
    confidence = np.bincount(place, sure, minlength=bins)[filled] / count[filled]
    accuracy = (
        np.bincount(place, (named == labels).astype(np.float64), minlength=bins)[filled] / count[filled]
    )
    error = float((np.abs(accuracy - confidence) * count[filled]).sum() / len(labels))
    return Calibration(
        error=error,
        confidence=confidence.tolist(),
        accuracy=accuracy.tolist(),
        windows=count[filled].tolist(),
    )


def draw_confusions(
    labels: NDArray[np.int64],
    predictions: NDArray[np.int64],
    *,
    groups: NDArray,
    classes: int,
    draws: int = 1,
) -> tuple[NDArray[np.float64], list[str]]:
    """Return a confusion matrix a draw and group, `[draws, groups, classes, classes]`, and groups' names.

    Parameters
    ----------
    labels, predictions, groups, classes, draws
        As in :func:`score`.

    Raises
    ------
    ValueError
        If the arrays differ in length, are empty, hold a class outside `[0, classes)`, or the rows are no
        multiple of `draws`.
    """
    seeds = 1 if predictions.ndim == 1 else len(predictions)
    if seeds % draws:
        raise ValueError(f"draws: got {draws} for {seeds} rows of predictions, expected as many rows a draw")
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
    result = np.zeros((draws, len(names), classes, classes))
    draw = np.repeat(np.arange(draws), predictions.size // draws)
    np.add.at(result, (draw, np.tile(member, seeds), np.tile(labels, seeds), predictions.ravel()), 1.0)
    return result, [str(name) for name in names]


def _resample(counts: NDArray[np.float64], resamples: int, seed: int) -> NDArray[np.float64]:
    """Return counts `[draws, groups, …]` summed over bootstrap resamples of both, `[resamples, …]`."""
    draws, groups = counts.shape[:2]
    rng = np.random.default_rng(seed)
    # How often each group is drawn, not which: a resample is then one product.
    of_groups = rng.multinomial(groups, np.full(groups, 1.0 / groups), size=resamples).astype(np.float64)
    if draws == 1:
        return np.tensordot(of_groups, counts[0], axes=1)
    of_draws = rng.multinomial(draws, np.full(draws, 1.0 / draws), size=resamples).astype(np.float64)
    return np.stack(
        [
            np.tensordot(g, np.tensordot(d, counts, axes=1), axes=1)
            for g, d in zip(of_groups, of_draws, strict=True)
        ]
    )


def _interval(
    metric: Metric, total: NDArray[np.float64], resampled: NDArray[np.float64], groups: int
) -> Interval:
    """Return the metric of the pooled windows with its expanded percentile interval at 95 %."""
    return expanded_interval(float(metric(total)), metric(resampled), groups)


def expanded_interval(value: float, resampled: NDArray[np.float64], groups: int) -> Interval:
    """Return a value with the 95 % interval of bootstrap resamples `[resamples]` of so many groups.

    Percentile intervals are too narrow for few groups; their level is widened as in Hesterberg 2015
    (The American Statistician 69:371, "expanded percentile"), so that 10 runs cover about what 95 % promises.

    Parameters
    ----------
    value
        The metric itself.
    resampled
        The metric of each resample, `[resamples]`.
    groups
        How many groups were resampled.
    """
    if groups < 2:
        return Interval(value=value, low=float("nan"), high=float("nan"))
    tail = stats.norm.cdf(np.sqrt(groups / (groups - 1)) * stats.t.ppf(0.025, groups - 1))
    low, high = np.quantile(resampled, [tail, 1.0 - tail])
    return Interval(value=value, low=float(low), high=float(high))


def _ratio(above: NDArray[np.float64], below: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return above / below, 0 where `below` is 0."""
    return np.divide(above, below, out=np.zeros_like(above, dtype=np.float64), where=below > 0)


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
