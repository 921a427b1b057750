"""Scores of what is said about people: of numbers R², r and MAE, of classes AUC and balanced accuracy.

A score is a function of weights, one a person: those of a bootstrap resample are how often each person stands
in it. What is resampled are people, or what a split keeps whole (sites, families), whose people are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainflow.decoding.scores import Interval, expanded_interval
from brainflow.optional import requires

with requires("decoding", "report"):
    from scipy.stats import rankdata

Metric = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Weights `[resamples, people]` → scores `[resamples]`."""
AT_ONCE = 2**22
"""Weights that are held at once."""


@dataclass(frozen=True, kw_only=True)
class PeopleScores:
    """Scores of a decoder of people.

    Attributes
    ----------
    metrics
        Name → score as a function of weights; the first is what decoders are compared by.
    intervals
        Name → value and 95 % interval.
    permutation_p
        Share of permutations of the truth over people that are told at least as well.
    """

    metrics: Mapping[str, Metric]
    intervals: Mapping[str, Interval]
    permutation_p: float

    @property
    def main(self) -> Interval:
        """R², or AUC."""
        return next(iter(self.intervals.values()))

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and dicts, ready for JSON."""
        named = {name: interval.to_dict() for name, interval in self.intervals.items()}
        return {**named, "permutation_p": self.permutation_p}


def score_numbers(truth: NDArray, said: NDArray, *, units: NDArray, seed: int = 0) -> PeopleScores:
    """Score numbers that were said of people.

    Parameters
    ----------
    truth, said
        Number of each person and what was said, `[people]`, both as deviations from what is expected of a
        person without looking at the brain (the training mean, or what confounds predict). R² is the share
        of squared deviation that is explained: 0 for saying what is expected, in every fold. r is 0 where
        everybody is said to be the same.
    units
        What is resampled, `[people]`: each person, or their sites or families.
    seed
        Seeds resampling and permutations.
    """
    if said.std() <= 1e-9 * truth.std():  # rounding is no opinion
        said = np.zeros_like(truth)
    # Every score is made of these sums, so that a resample is one product.
    sums = np.stack(
        [
            np.ones_like(truth),
            truth,
            said,
            truth**2,
            said**2,
            truth * said,
            np.square(truth - said),
            np.abs(truth - said),
        ],
        axis=1,
    )

    def r_squared(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        total = weights @ sums
        return 1 - _ratio(total[:, 6], total[:, 3], 1.0)

    def correlation(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        n, y, p, yy, pp, yp = (weights @ sums).T[:6]
        # Rounding may leave a little less than 0 under the root.
        return _ratio(n * yp - y * p, np.sqrt(np.maximum((n * yy - y**2) * (n * pp - p**2), 0)), 0.0)

    def error(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        total = weights @ sums
        return total[:, 7] / total[:, 0]

    metrics = {"r2": r_squared, "r": correlation, "mae": error}
    order = _permutations(units, seed)
    # Products order permutations as the correlation does: all else in it is the same for each.
    p = _permutation_p((truth[order] * said).sum(axis=1), float((truth * said).sum()))
    return _scored(metrics, p, units, seed)


def score_classes(
    labels: NDArray[np.int64], logits: NDArray, *, units: NDArray, seed: int = 0
) -> PeopleScores:
    """Score classes that were said of people.

    Parameters
    ----------
    labels
        Class of each person, int64 `[people]`.
    logits
        Evidence for each class, `[people, classes]`. AUC is the mean over classes of that of one against the
        others; balanced accuracy the mean recall of the classes that occur.
    units, seed
        As in :func:`score_numbers`.
    """
    classes = logits.shape[1]
    said = logits.argmax(axis=1)
    belongs = labels[:, None] == np.arange(classes)

    def balanced(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        there = weights @ belongs
        hits = weights @ (belongs & (said == labels)[:, None])
        return _ratio(hits, there, 0.0).sum(axis=1) / np.maximum((there > 0).sum(axis=1), 1)

    curves = [_area(belongs[:, c], logits[:, c]) for c in range(classes)]
    metrics: dict[str, Metric] = {
        "auc": lambda weights: np.mean([curve(weights) for curve in curves], axis=0),
        "balanced_accuracy": balanced,
    }
    count = belongs.sum(axis=0)
    rank = rankdata(logits, axis=0) / np.maximum(count * (len(labels) - count), 1)  # their sums make the AUC
    order = _permutations(units, seed)
    people = np.arange(len(labels))
    p = _permutation_p(rank[people, labels[order]].sum(axis=1), float(rank[people, labels].sum()))
    return _scored(metrics, p, units, seed)


def difference(first: PeopleScores, second: PeopleScores, *, units: NDArray, seed: int = 0) -> Interval:
    """Return the main score of `first` minus that of `second`, both resampled alike.

    Parameters
    ----------
    first, second
        Scores of the same people, in one order.
    units, seed
        As in :func:`score_numbers`.
    """
    name = next(iter(first.metrics))
    ours, theirs = first.metrics[name], second.metrics[name]
    return _interval(lambda weights: ours(weights) - theirs(weights), units, seed)


def _area(member: NDArray[np.bool_], score: NDArray) -> Metric:
    """Return the area under the ROC curve as a function of weights; 0.5 where a side is empty."""
    order = np.argsort(score, kind="stable")
    inside = member[order]
    # Where scores that are equal begin.
    ties = np.flatnonzero(np.append(True, np.diff(score[order]) > 0))

    def area(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        sorted_weights = weights[:, order]
        above = np.add.reduceat(sorted_weights * inside, ties, axis=1)
        below = np.add.reduceat(sorted_weights * ~inside, ties, axis=1)
        # Who has the same score counts half.
        beaten = np.cumsum(below, axis=1) - below / 2
        return _ratio((above * beaten).sum(axis=1), above.sum(axis=1) * below.sum(axis=1), 0.5)

    return area


def _scored(metrics: Mapping[str, Metric], p: float, units: NDArray, seed: int) -> PeopleScores:
    intervals = {name: _interval(metric, units, seed) for name, metric in metrics.items()}
    return PeopleScores(metrics=metrics, intervals=intervals, permutation_p=p)


def _interval(metric: Metric, units: NDArray, seed: int, resamples: int = 2_000) -> Interval:
    names, member = np.unique(units, return_inverse=True)
    value = float(metric(np.ones((1, len(units))))[0])
    share = np.full(len(names), 1.0 / len(names))
    times = np.random.default_rng(seed).multinomial(len(names), share, size=resamples)
    parts = np.array_split(times, -(-resamples * len(units) // AT_ONCE))
    resampled = np.concatenate([metric(part[:, member].astype(np.float64)) for part in parts])
    return expanded_interval(value, resampled, len(names))


def _permutations(units: NDArray, seed: int, permutations: int = 1_000) -> NDArray[np.int64]:
    """Return orders of people, `[permutations, people]`.

    They change places within units of several people; those who are alone in theirs, among each other.
    """
    _, member, count = np.unique(units, return_inverse=True, return_counts=True)
    # Within a site or family, because people of different ones differ in more than the target.
    block = np.where(count[member] > 1, member, -1)
    rng = np.random.default_rng(seed)
    order = np.tile(np.arange(len(units)), (permutations, 1))
    for one in np.unique(block):
        mine = np.flatnonzero(block == one)
        order[:, mine] = rng.permuted(np.tile(mine, (permutations, 1)), axis=1)
    return order


def _permutation_p(permuted: NDArray[np.float64], seen: float) -> float:
    """Return (1 + reached) / (1 + permutations) (Phipson & Smyth 2010), with slack for rounding."""
    slack = 1e-9 * max(abs(seen), float(np.abs(permuted).max()))
    return float((1 + (permuted >= seen - slack).sum()) / (1 + len(permuted)))


def _ratio(above: NDArray[np.float64], below: NDArray[np.float64], otherwise: float) -> NDArray[np.float64]:
    """Return above / below, `otherwise` where `below` is 0."""
    return np.divide(above, below, out=np.full(above.shape, otherwise), where=below > 0)
