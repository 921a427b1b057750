"""Are probabilities as good as they say? Expected calibration error and the table behind it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


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
