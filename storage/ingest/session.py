"""One store being filled from many sources, of which a bad one must not harm the others.

An ingestion also says how runs are scaled as they are given, whether it scales them or not.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from ..columns import LabelKinds
from ..errors import StoreError
from ..normalise import APPLIED, KINDS, Kind, kind_of, normalise
from ..quantise import rounding
from ..text import counted, printable
from ..writer import PreparedRun, StoreWriter
from .foreign import MAX_NETWORKS

TOLERANCE = 0.05
"""By which mean and standard deviation of a network of a z-scored run may differ from 0 and 1."""
APART = 100.0
"""Largest over smallest standard deviation of the networks of a run that is worth a word."""
SPIKE = 10.0
"""Standard deviations from the mean of its network that are worth a word."""
_LONGEST_REASON = 500


@dataclass(kw_only=True)
class Scale:
    """What was done to the scale of runs, and what it was before.

    Attributes
    ----------
    normalised
        What was done: one of `KINDS`.
    runs
        Number of runs that were looked at.
    zscored
        Number of those whose networks had mean 0 and standard deviation 1 as they were given.
    smallest_sd, largest_sd
        Over runs, of the median standard deviation of a network as it was given; 0 where none varies.
    notes
        {key: what} of runs with constant networks, with spikes, and, if nothing was done, with networks that
        are not centred or differ in scale by orders of magnitude.
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
        """Return one line for a person: what was done to the scale, or why that may be needed.

        Parameters
        ----------
        stated
            Attribute `normalisation` of the store.
        """
        given = f"networks had a standard deviation of {self.smallest_sd:.3g} to {self.largest_sd:.3g}"
        if not self.largest_sd:
            given = "no network varies"
        if self.normalised != "none":
            return f"scale: {self.normalised} ({APPLIED[self.normalised]}); as given, {given}"
        if self.zscored == self.runs:
            hint = "" if stated else f'; to record that, state normalisation "{APPLIED["zscore"]}"'
            all_are = counted(self.runs, "run is", "runs are")
            return f"scale: left as given; all {all_are} z-scored by network already{hint}"
        of_all = f"{self.zscored} of {counted(self.runs, 'run')} are z-scored by network"
        line = f"scale: left as given; {given}, {of_all}"
        if kind_of(stated):
            return f"{line}, though the store says {stated!r}: check the files"
        return line + ("" if stated else "; normalise = zscore, spatial or gsr scales them")


def _unscaled(mean: np.ndarray, spread: np.ndarray) -> list[str]:
    """Return what makes networks left as they are hard to learn from; NaN in `spread` is a constant."""
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
    """Return the value furthest from its network's mean, if that is far; infinity in `spread`: a constant."""
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


@dataclass(kw_only=True)
class IngestReport:
    """Outcome of an ingestion.

    Attributes
    ----------
    runs
        Keys of the runs that were written.
    sources
        Files that were read completely.
    failures
        {file: reason} of those of which nothing was written.
    rounded
        {key: what} of the runs that the element type of the store changed by more than 0.1 % of the standard
        deviation of a network.
    notes
        {key: what} of runs that were changed in reading, other than by rounding.
    scale
        How the runs were scaled as they were given, and what was done to that.
    """

    runs: list[str] = field(default_factory=list)
    sources: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    rounded: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    scale: Scale = field(default_factory=Scale)

    @property
    def ok(self) -> bool:
        """Whether every source was written."""
        return not self.failures


class IngestSession:
    """Writes the runs of one source after another; use it in a `with` block, which commits at its end.

    The store is made when the first good source comes, because its runs say how many networks there are. If
    every source is bad, no store is made.

    Parameters
    ----------
    path
        The store; runs are added if it exists, unless `overwrite`.
    create
        Keyword arguments of `StoreWriter.create`, without `networks`; a store that exists must have been made
        with those that are not defaults.
    overwrite
        Replace the store at `path`.
    normalise
        What is done to each run, see `normalise`; a store that exists must have been normalised so, and one
        that was takes no runs of which nothing is said.

    Raises
    ------
    StoreError
        If `create` states a normalisation beside one that is to be done.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        create: Mapping[str, Any],
        *,
        overwrite: bool,
        normalise: Kind = "none",
    ) -> None:
        if normalise not in KINDS:
            raise StoreError(f"normalise: got {normalise!r}, expected one of {', '.join(KINDS)}")
        if normalise != "none" and create.get("normalisation"):
            raise StoreError(
                f"normalisation: got {create['normalisation']!r} beside normalise {normalise!r}, expected "
                "one of them: normalisation says what was done to the files, normalise what is to be done"
            )
        self._path = Path(path)
        self._create = dict(create)
        if normalise != "none":
            self._create["normalisation"] = APPLIED[normalise]
        self._normalise: Kind = normalise
        self._overwrite = overwrite
        named = [create[n] for n in ("network_names", "network_coordinates") if create.get(n) is not None]
        self._networks = len(named[0]) if named else None  # or the first good source says it
        self._writer: StoreWriter | None = None
        self.report = IngestReport(scale=Scale(normalised=normalise))

    def __enter__(self) -> Self:
        if self._path.exists() and not self._overwrite:
            self._writer = StoreWriter.append_to(self._path)
            try:
                self._writer.attributes.check_same(self._create, str(self._path))
                self._check_said(self._writer.attributes.normalisation)
            except StoreError as error:
                self._writer.__exit__(type(error), error, None)
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.__exit__(kind, error, traceback)

    def add(self, source: str, runs: Iterable[Mapping[str, Any]]) -> None:
        """Write all runs of one source, or none and note the reason.

        Parameters
        ----------
        source
            File name.
        runs
            Keyword arguments of `StoreWriter.append` for each run; whatever iterating raises is the source's
            failure, except what stops the program.

        Raises
        ------
        StoreError, OSError
            If the store itself cannot be made or written.
        """
        try:
            # All of them before anything is written: a file that fails at its last run leaves nothing.
            collected = list(runs)
            networks = _networks(collected)
        except Exception as error:  # a damaged file fails in any way
            self._fail(source, error)
            return
        made: StoreWriter | None = None
        if self._writer is None:
            self._writer = made = StoreWriter.create(
                self._path,
                networks=networks if self._networks is None else self._networks,
                overwrite=self._overwrite,
                **self._create,
            )
        try:
            prepared = self._prepare(self._writer, collected)
        except Exception as error:
            self._fail(source, error)
            if made is not None:  # a bad source neither makes (or replaces) a store nor says how wide it is
                made.__exit__(type(error), error, None)
                self._writer = None
            return
        for run, given in zip(prepared, collected, strict=True):
            self._writer.write(run)
            self.report.runs.append(run.row["key"])
            self.report.scale.look(run.row["key"], np.asarray(given["bold"]))
        self.report.sources += 1

    def _check_said(self, held: str) -> None:
        """Refuse to add runs of which nothing is said to those that were normalised."""
        if (kind := kind_of(held)) and not self._create.get("normalisation"):
            raise StoreError(
                f"normalise: got none, but the runs of the store {self._path} are {held}; give normalise "
                f"{kind!r}, or state normalisation {held!r} if the new ones are so already"
            )

    def _prepare(self, writer: StoreWriter, runs: Iterable[Mapping[str, Any]]) -> list[PreparedRun]:
        """Normalise, check and round the runs of a source, each alone and all together."""
        prepared: list[PreparedRun] = []
        # Beside the writer's, which knows the runs that are written, not those of this source.
        labels, rounded = LabelKinds(), {}
        for run in runs:
            bold = normalise(run["bold"], self._normalise, censor=run.get("censor"))
            one = writer.prepare(**{**run, "bold": bold})
            key, segments = one.row["key"], one.row["segments"]
            if any(key == other.row["key"] for other in prepared):
                raise ValueError(f"run {key}: is there twice")
            labels.check(segments, key)
            labels.add(segments)
            if change := rounding(bold, one.values, one.statistics[0, 1]):
                rounded[key] = str(change)
            prepared.append(one)
        self.report.rounded |= rounded
        return prepared

    def _fail(self, source: str, error: Exception) -> None:
        """Note why a source was left out, in one line that names it."""
        text = str(error)
        if isinstance(error, MemoryError):
            text = "needs more memory than there is"
        elif not isinstance(error, ValueError | OSError | TypeError):
            text = f"cannot be read ({type(error).__name__}: {text})"
        reason = " ".join(text.split())
        if source not in reason:
            reason = f"{source}: {reason}"
        self.report.failures[source] = printable(reason[: len(source) + _LONGEST_REASON])


def _networks(runs: Sequence[Mapping[str, Any]]) -> int:
    """Return the networks of the runs of a source."""
    if not runs:
        raise ValueError("holds no run")
    for run in runs:
        shape = np.shape(run["bold"])
        if len(shape) != 2 or not 1 <= shape[1] <= MAX_NETWORKS:
            raise ValueError(
                f"bold must have shape [time, networks] with 1 to {MAX_NETWORKS} networks, got {list(shape)}"
            )
    return np.shape(runs[0]["bold"])[1]
