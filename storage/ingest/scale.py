"""How runs are scaled as they are given: what an ingestion says of it, whether it scales them or not."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..normalise import APPLIED, kind_of

TOLERANCE = 0.05
"""By which mean and standard deviation of a network of a z-scored run may differ from 0 and 1."""
APART = 100.0
"""Largest over smallest standard deviation of the networks of a run that is worth a word."""
SPIKE = 10.0
"""Standard deviations from the mean of its network that are worth a word."""


@dataclass(kw_only=True)
class Scale:
    """What was done to the scale of runs, and what it was before.

    Attributes
    ----------
    normalised : what was done: one of `KINDS`
    runs : number of runs that were looked at
    zscored : number of those whose networks had mean 0 and standard deviation 1 as they were given
    smallest_sd, largest_sd : over runs, of the median standard deviation of a network as it was given; 0
        where none varies
    notes : {key: what} of runs with constant networks, with spikes, and, if nothing was done, with networks
        that are not centred or differ in scale by orders of magnitude
    """

    normalised: str = "none"
    runs: int = 0
    zscored: int = 0
    smallest_sd: float = 0.0
    largest_sd: float = 0.0
    notes: dict[str, str] = field(default_factory=dict)

    def look(self, key: str, bold: np.ndarray) -> None:
        """Count one run, real and finite [time, networks], as it was given."""
        with np.errstate(over="ignore", invalid="ignore"):
            mean, spread = bold.mean(axis=0, dtype=np.float64), bold.std(axis=0, dtype=np.float64)
        precision = np.finfo(bold.dtype).eps if bold.dtype.kind == "f" else 0.0
        varies = spread > 4 * precision * np.abs(mean)
        self.runs += 1
        notes = []
        if not varies.all():
            notes.append(
                f"{(~varies).sum()} of {len(varies)} networks are constant (first: network {varies.argmin()})"
            )
        if varies.any():
            middle = float(np.median(spread[varies]))
            self.smallest_sd, self.largest_sd = (
                min(self.smallest_sd or middle, middle),
                max(self.largest_sd, middle),
            )
            off = np.maximum(np.abs(mean), np.abs(spread - 1))[varies]
            self.zscored += bool((off <= TOLERANCE).all())
            if self.normalised == "none":
                notes += _unscaled(mean, np.where(varies, spread, np.nan))
            notes += _spike(bold, mean, np.where(varies, spread, np.inf))
        if notes:
            self.notes[key] = "; ".join(notes)

    def said(self, stated: str) -> str:
        """One line for a person: what was done to the scale, or why that may be needed.

        Parameters
        ----------
        stated : attribute `normalisation` of the store
        """
        given = f"networks had a standard deviation of {self.smallest_sd:.3g} to {self.largest_sd:.3g}"
        if not self.largest_sd:
            given = "no network varies"
        if self.normalised != "none":
            return f"scale: {self.normalised} ({APPLIED[self.normalised]}); as given, {given}"
        if self.zscored == self.runs:
            hint = "" if stated else f'; to record that, state normalisation "{APPLIED["zscore"]}"'
            return f"scale: left as given; all {self.runs} runs are z-scored by network already{hint}"
        line = f"scale: left as given; {given}, {self.zscored} of {self.runs} runs are z-scored by network"
        if kind_of(stated):
            return f"{line}, though the store says {stated!r}: check the files"
        return line + ("" if stated else "; normalise = zscore, spatial or gsr scales them")


def _unscaled(mean: np.ndarray, spread: np.ndarray) -> list[str]:
    """What makes networks that were left as they are hard to learn from; NaN in `spread` is a constant."""
    notes = []
    low, high = int(np.nanargmin(spread)), int(np.nanargmax(spread))
    if spread[high] > APART * spread[low]:
        notes.append(
            f"its networks differ in scale: standard deviations from {spread[low]:.3g} (network {low}) to "
            f"{spread[high]:.3g} (network {high})"
        )
    distance = np.abs(mean) / spread
    furthest = int(np.nanargmax(distance))
    if distance[furthest] > 1.0:
        notes.append(
            f"its networks are not centred: network {furthest} has mean {mean[furthest]:.3g}, "
            f"{distance[furthest]:.3g} × its standard deviation"
        )
    return notes


def _spike(bold: np.ndarray, mean: np.ndarray, spread: np.ndarray) -> list[str]:
    """The value furthest from the mean of its network, if that is far; infinity in `spread`: a constant."""
    above, below = (bold.max(axis=0) - mean) / spread, (mean - bold.min(axis=0)) / spread
    furthest = np.maximum(above, below)
    network = int(np.argmax(furthest))
    if furthest[network] <= SPIKE:
        return []
    column = bold[:, network]
    time = int(column.argmax() if above[network] >= below[network] else column.argmin())
    return [
        f"network {network} is {furthest[network]:.3g} standard deviations from its mean at time point "
        f"{time}; nothing was clipped"
    ]
