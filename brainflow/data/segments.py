"""Whole labelled segments (trials, blocks) as windows, for decoding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from brainflow.batch import Windows
from brainflow.data.counter_rng import key, permute
from brainflow.data.sampler import RunColumns, rank_share
from brainflow.files import is_number


class SegmentColumns(Protocol):
    """The columns of a store's segment table that the data layer reads."""

    @property
    def run(self) -> NDArray[np.int32]: ...  # noqa: D102
    @property
    def onset(self) -> NDArray[np.int32]: ...  # noqa: D102
    @property
    def length(self) -> NDArray[np.int32]: ...  # noqa: D102
    def __len__(self) -> int: ...


class SegmentStore(Protocol):
    """A store with runs and segments."""

    @property
    def runs(self) -> RunColumns: ...  # noqa: D102
    @property
    def segments(self) -> SegmentColumns: ...  # noqa: D102


def stored_shift(attributes: Mapping[str, Any]) -> float | None:
    """Return the seconds by which a store's segments were moved for the haemodynamic lag; None: not known.

    Parameters
    ----------
    attributes
        Of the store; `brainflow prepare` writes `preprocessing.hrf_shift`.
    """
    shift: Any = (attributes.get("preprocessing") or {}).get("hrf_shift")
    return float(shift) if is_number(shift) else None


class SegmentSampler:
    """Whole segments, shuffled anew every epoch without end, or once in fixed order.

    Parameters
    ----------
    store
        Store with `runs` and `segments`.
    segments
        Segment ids (rows of `store.segments`).
    labels
        int64 [segments], class of each of them.
    batch
        Segments a step over all ranks; divisible by `world`.
    shuffle
        True: endless, a new order each epoch, no segment twice in an epoch. False: one pass in the order
        given, for evaluation; the last batch may be smaller.
    hrf_shift
        Seconds by which every segment is moved back to where the haemodynamic response is; rounded to whole
        TRs of the run. The shifted segment is clipped to its run.
    seed, rank, world
        As in :class:`~brainflow.data.sampler.WindowSampler`.

    Raises
    ------
    ValueError
        If an argument is out of range, or fewer than 2 time points of a segment are left in its run.
    """

    def __init__(
        self,
        store: SegmentStore,
        *,
        segments: ArrayLike,
        labels: ArrayLike,
        batch: int = 64,
        shuffle: bool = True,
        hrf_shift: float = 0.0,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        ids = np.asarray(segments, dtype=np.int64)
        classes = np.asarray(labels, dtype=np.int64)
        if not ids.size:
            raise ValueError("segments: got none, expected at least one segment id")
        if ids.min() < 0 or ids.max() >= len(store.segments):
            raise ValueError(
                f"segments: got ids from {ids.min()} to {ids.max()}, "
                f"expected ids in [0, {len(store.segments)})"
            )
        if classes.shape != ids.shape:
            raise ValueError(
                f"labels: got shape {classes.shape}, expected one label per segment, {ids.shape}"
            )
        if batch < 1 or batch % world:
            raise ValueError(
                f"batch: got {batch} segments for world={world} ranks, expected a positive multiple of world"
            )
        if not abs(hrf_shift) < 1e9:  # neither NaN nor what no integer of time points holds
            raise ValueError(f"hrf_shift: got {hrf_shift}, expected seconds, about 3 to 6")
        table, runs = store.segments, store.runs
        run = np.asarray(table.run)[ids].astype(np.int64)
        t_r = np.asarray(runs.t_r)[run].astype(np.float64)
        begin = np.asarray(table.onset)[ids] + np.rint(hrf_shift / t_r).astype(np.int64)
        end = np.minimum(begin + np.asarray(table.length)[ids], np.asarray(runs.length)[run])
        begin = np.maximum(begin, 0)
        if (end - begin < 2).any():
            bad = int(np.argmin(end - begin))
            raise ValueError(
                f"segments: segment {ids[bad]} of run {runs.key[run[bad]]!s} has "
                f"{max(end[bad] - begin[bad], 0)} time points inside its run after a shift of {hrf_shift} s, "
                "expected at least 2; leave it out or lower hrf_shift"
            )
        self._windows = Windows(
            starts=np.asarray(runs.start)[run].astype(np.int64) + begin,
            lengths=(end - begin).astype(np.int32),
            runs=run.astype(np.int32),
            t_r=t_r,
            step=0,
            labels=classes,
        )
        self.global_batch, self.shuffle, self.seed = batch, shuffle, seed
        self.rank, self.world = rank, world
        self._share = rank_share(batch, rank, world)
        self.steps: int | None = None if shuffle else -(-ids.size // batch)
        """Batches until the end; None: endless."""
        # A rank without a segment would have no batch to give.
        if self.steps is not None and 0 < ids.size % batch < world:
            raise ValueError(
                f"batch: got {batch}, which leaves {ids.size % batch} segments for {world} ranks in the last "
                "batch; choose another batch size"
            )

    @property
    def windows_per_batch(self) -> int:
        """Most windows in this rank's share of a batch."""
        return len(self._share)

    @property
    def max_tokens(self) -> int:
        """Time points that no batch of this rank exceeds."""
        return len(self._share) * int(self._windows.lengths.max())

    @property
    def epoch_windows(self) -> int:
        """Segments in an epoch over all ranks."""
        return len(self._windows)

    def epoch(self, step: int) -> float:
        """Return the epochs that are complete before `step`, with its fraction."""
        return step * self.global_batch / self.epoch_windows

    def batch(self, step: int) -> Windows:
        """Return this rank's segments of batch `step`.

        Raises
        ------
        ValueError
            If `step` is negative or beyond the only pass of a fixed order.
        """
        if step < 0 or (self.steps is not None and step >= self.steps):
            raise ValueError(f"step: got {step}, expected a step in [0, {self.steps if self.steps else '…'})")
        if self.shuffle:
            epoch, place = np.divmod(step * self.global_batch + self._share, self.epoch_windows)
            pick = permute(place, self.epoch_windows, key(self.seed, epoch))
        else:
            begin = step * self.global_batch
            left = min(self.global_batch, self.epoch_windows - begin)
            pick = begin + rank_share(left, self.rank, self.world)
        w = self._windows
        assert w.labels is not None
        return Windows(
            starts=w.starts[pick],
            lengths=w.lengths[pick],
            runs=w.runs[pick],
            t_r=w.t_r[pick],
            step=step,
            labels=w.labels[pick],
        )
