"""Windows held in memory: what arrays and tables of events become, and what decoders are fitted to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from brainflow.batch import PackedBatch, Windows
from brainflow.storage.text import counted


class WindowSource(Protocol):
    """Labelled windows that can be read in batches: a `DecodingTask` or :class:`ArrayWindows`."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class of each window, `[windows]`."""
        ...

    @property
    def groups(self) -> NDArray | None:
        """Person (or run) of each window, `[windows]`; None where that is not known."""
        ...

    def loader(
        self,
        windows: NDArray[np.int64],
        *,
        batch: int,
        shuffle: bool,
        seed: int,
        device: torch.device,
        jitter: int = 0,
    ) -> AbstractContextManager[Iterator[PackedBatch]]:
        """Open batches of some windows: endless if shuffled, else one pass in order.

        Where the source knows what lies around a window, its onset moves by up to `jitter` time points.

        Parameters
        ----------
        windows
            Positions of the windows.
        batch
            Windows a batch.
        shuffle
            Endless in random order, else one pass.
        seed
            Seeds order and jitter.
        device
            Where batches are wanted.
        jitter
            Time points by which onsets move at most.
        """
        ...

    def moved(self, by: int) -> WindowSource | None:
        """Return the same windows, each `by` time points later inside its run; None if that is not known."""
        ...


class ArrayWindows:
    """Windows in memory.

    Parameters
    ----------
    windows
        Arrays `[time, networks]`.
    t_r
        Seconds between time points, one for all windows or `[windows]`.
    labels
        Class of each window; zeros if None.
    groups
        Person or run of each window, where that is known.
    """

    def __init__(
        self,
        windows: Sequence[NDArray],
        *,
        t_r: float | NDArray,
        labels: NDArray[np.int64] | None = None,
        groups: NDArray | None = None,
    ) -> None:
        self.groups = groups
        self.t_r = np.broadcast_to(np.asarray(t_r, dtype=np.float64), len(windows))
        self.lengths = np.array([len(window) for window in windows], dtype=np.int32)
        self.bold = np.concatenate([np.asarray(window, dtype=np.float32) for window in windows])
        self.starts = np.cumsum(self.lengths, dtype=np.int64) - self.lengths
        self.labels: NDArray[np.int64] = (
            np.zeros(len(windows), np.int64) if labels is None else np.asarray(labels, dtype=np.int64)
        )

    def loader(
        self,
        windows: NDArray[np.int64],
        *,
        batch: int,
        shuffle: bool,
        seed: int,
        device: torch.device,
        jitter: int = 0,
    ) -> AbstractContextManager[Iterator[PackedBatch]]:
        """Open batches of some windows: endless if shuffled, else one pass in order.

        `jitter` changes nothing: what lay around these windows is not known.
        """
        return nullcontext(self._batches(np.asarray(windows), batch, shuffle, seed, device))

    def moved(self, by: int) -> None:
        """Return None: what lay around these windows is not known."""

    def _batches(
        self, windows: NDArray[np.int64], batch: int, shuffle: bool, seed: int, device: torch.device
    ) -> Iterator[PackedBatch]:
        if not shuffle:
            for step, start in enumerate(range(0, len(windows), batch)):
                yield self._packed(windows[start : start + batch], step, device)
            return
        rng = np.random.default_rng(seed)
        waiting = windows[:0]
        for step in count():
            # On over the end of an epoch, so that all batches are of one size.
            while len(waiting) < batch:
                waiting = np.concatenate([waiting, rng.permutation(windows)])
            yield self._packed(waiting[:batch], step, device)
            waiting = waiting[batch:]

    def _packed(self, pick: NDArray[np.int64], step: int, device: torch.device) -> PackedBatch:
        chosen = Windows(
            starts=self.starts[pick],
            lengths=self.lengths[pick],
            runs=np.zeros(len(pick), np.int32),
            t_r=self.t_r[pick],
            step=step,
            labels=self.labels[pick],
        )
        return PackedBatch.pack(torch.from_numpy(self.bold[chosen.rows()]), chosen, device=device)


def cut_events(
    runs: Sequence[NDArray], events: Sequence[Any], *, t_r: float, hrf_shift: float = 0.0
) -> tuple[list[NDArray], NDArray, NDArray[np.int64]]:
    """Cut runs into one window an event.

    Parameters
    ----------
    runs
        Arrays `[time, networks]`.
    events
        A table a run with the columns onset and duration in seconds and trial_type: a DataFrame, or a dict of
        sequences.
    t_r
        Seconds between time points.
    hrf_shift
        Seconds by which windows begin after their event.

    Returns
    -------
    windows, labels, run
        Arrays `[time, networks]`, trial types, and the number of the run of each.

    Raises
    ------
    ValueError
        If tables and runs differ in number, a column is missing, or an event lies outside its run.
    """
    if len(runs) != len(events):
        raise ValueError(
            f"events: got {counted(len(events), 'table')} for {counted(len(runs), 'run')}, expected one a run"
        )
    windows, labels, owner = [], [], []
    for number, (run, table) in enumerate(zip(runs, events, strict=True)):
        try:
            onset, duration, kind = (list(table[name]) for name in ("onset", "duration", "trial_type"))
        except KeyError as error:
            raise ValueError(
                f"events: the table of run {number} has no column {error}; expected onset, duration, "
                "trial_type"
            ) from None
        for begin, seconds, label in zip(onset, duration, kind, strict=True):
            first = round((float(begin) + hrf_shift) / t_r)
            # An event that is shorter than a volume has one.
            length = max(1, round(float(seconds) / t_r))
            # An index below 0 would count from the end.
            window = np.asarray(run)[max(first, 0) : first + length]
            if first < 0 or not len(window):
                raise ValueError(
                    f"events: the event at {begin} s of run {number} lies outside its {len(run)} time points "
                    f"after a shift of {hrf_shift} s; correct onset, t_r ({t_r} s) or hrf_shift"
                )
            windows.append(window)
            labels.append(label)
            owner.append(number)
    return windows, np.asarray(labels), np.asarray(owner, dtype=np.int64)


def as_windows(X: ArrayLike | Sequence[NDArray]) -> list[NDArray]:
    """Return a list of windows `[time, networks]` of an array or of a list of arrays.

    An array is `[windows, networks]` (one time point each) or `[windows, time, networks]`, those of a list
    `[time, networks]`.

    Raises
    ------
    ValueError
        If an array has another number of dimensions.
    """
    if isinstance(X, (list, tuple)) and X and all(np.ndim(window) == 2 for window in X):
        return [np.asarray(window, dtype=np.float32) for window in X]
    array = np.asarray(X, dtype=np.float32)
    if array.ndim == 2:
        return list(array[:, None])
    if array.ndim == 3:
        return list(array)
    raise ValueError(
        f"X: got an array of {array.ndim} dimensions, expected [samples, networks], "
        "[windows, time, networks] or a list of [time, networks]"
    )
