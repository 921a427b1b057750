"""Which windows stand in which batch: a pure function of (seed, step, rank, world).

The windows of a training form ONE endless sequence, numbered 0, 1, 2, … Global batch `step` is the numbers
`step * batch … (step + 1) * batch - 1`, and rank `r` of `world` takes the r-th contiguous share of them. So
the shares of all ranks, laid end to end, are the batch of a single process for any world size, and resuming
at a step, or with another number of processes, continues the same sequence.

An epoch is a pseudo-random permutation of all slots (run, s): a run of T time points has about T / (mean
window length) slots, so an epoch reads about as many time points as the runs hold, each run in proportion to
its length, and no slot twice. A window of length L in slot s of n has its onset in the s-th n-th part of the
T - L + 1 possible onsets; over the slots the onset is exactly uniform.

For decoding, `SegmentSampler` takes whole labelled segments (trials, blocks) instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from brainflow.batch import Windows
from brainflow.data.counter_rng import key, permute, uniform
from brainflow.storage import StoreError
from brainflow.storage.tables import Intervals

# Streams of random numbers: what is drawn for a window, one counter space each.
_ORDER, _INNER, _LENGTH, _ONSET, _GAP, _NEXT, _OTHER, _OTHER_ONSET = range(8)
_BLOCK = 1024
_GAP_MIN, _GAP_MAX = 1, 4  # TRs, as published


class RunColumns(Protocol):
    """The columns of a store's run table that the data layer reads (`BoldStore.runs` has them)."""

    @property
    def start(self) -> NDArray[np.int64]: ...  # noqa: D102
    @property
    def length(self) -> NDArray[np.int32]: ...  # noqa: D102
    @property
    def t_r(self) -> NDArray[np.float64]: ...  # noqa: D102
    @property
    def dataset(self) -> NDArray[Any]: ...  # noqa: D102
    @property
    def subject(self) -> NDArray[Any]: ...  # noqa: D102
    @property
    def key(self) -> NDArray[Any]: ...  # noqa: D102
    def __len__(self) -> int: ...


class Sampler(Protocol):
    """What a loader asks of a sampler."""

    steps: int | None

    @property
    def windows_per_batch(self) -> int:
        """Most windows in a batch."""
        ...

    @property
    def max_tokens(self) -> int:
        """Time points that no batch exceeds."""
        ...

    def batch(self, step: int) -> Windows:
        """Return the windows of batch `step`."""
        ...


def rank_share(batch: int, rank: int, world: int) -> NDArray[np.int64]:
    """Return the places of a global batch that belong to `rank`: the rank-th of `world` contiguous shares."""
    if world < 1 or not 0 <= rank < world:
        raise ValueError(f"rank, world: got {rank}, {world}, expected 0 <= rank < world")
    return np.arange(rank * batch // world, (rank + 1) * batch // world, dtype=np.int64)


@dataclass(frozen=True)
class _Columns:
    """The runs that are sampled, in the sampler's order, and their slots laid end to end.

    `rows` is int64 [runs, 5]: run, start, length, first slot and the bits of t_r (float64). What is asked of
    a run stands in one cache line: a window of a million runs costs hardly more than one of a thousand.
    """

    rows: NDArray[np.int64]
    slot_runs: Intervals
    total: int  # slots
    mean: int  # mean length of a window

    def slots(self, length: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the slots of runs of some lengths."""
        return np.maximum(length // self.mean, 1)


class WindowSampler:
    """Windows of uniform length at any onset of any run, without replacement within an epoch.

    Parameters
    ----------
    store_runs
        Run table of the store (`store.runs`).
    runs
        Run ids to draw from, e.g. `split.part("train", store.runs)`; None for all.
    batch
        Windows a step over all ranks (pairs a step, if `pairs`); divisible by `world`.
    seq_min, seq_max
        Window length in TRs is uniform in [seq_min, seq_max). A window longer than its run is clipped to the
        run.
    seed
        Seed of the order; any integer.
    rank, world
        This process and how many there are.
    pairs
        Cut every window in two halves with a gap of 1 to 4 TRs between them (BERT-style training); half of
        the pairs get their second half from another run. Such a pair has `is_next` 0 and a true one 1 (the
        code of 2022 had it the other way round).
    onset
        "any", or "grid" for the 2022 system's choice: multiples of the window's length, 0, L, 2L, … < T - L.
    weights
        Dataset → how often an epoch draws each of its slots: 2 is twice an epoch, 0.5 every second epoch, 0
        never; 1 for datasets not named. Between two draws of a slot all others of the dataset are drawn.

    Raises
    ------
    ValueError
        If an argument is out of range, no run is left, or a run is shorter than 2 TRs (pairs: 6 TRs).

    Examples
    --------
    >>> sampler = WindowSampler(store.runs, batch=64, seed=1)  # doctest: +SKIP
    >>> sampler.batch(1000).lengths.shape  # doctest: +SKIP
    (64,)
    """

    steps: int | None = None
    """Batches until the end; None: endless."""

    def __init__(
        self,
        store_runs: RunColumns,
        *,
        runs: ArrayLike | None = None,
        batch: int = 64,
        seq_min: int = 10,
        seq_max: int = 50,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        pairs: bool = False,
        onset: Literal["any", "grid"] = "any",
        weights: Mapping[str, float] | None = None,
    ) -> None:
        shortest = 2 + _GAP_MAX if pairs else 2
        if not shortest <= seq_min < seq_max:
            raise ValueError(
                f"seq_min, seq_max: got {seq_min}, {seq_max}, expected {shortest} <= seq_min < seq_max"
                + (" (a pair needs two time points and the gap)" if pairs else "")
            )
        if onset not in ("any", "grid"):
            raise ValueError(f"onset: got {onset!r}, expected 'any' or 'grid'")
        if batch < 1 or batch % world:
            raise ValueError(
                f"batch: got {batch} windows for world={world} ranks, expected a positive multiple of world"
            )
        self.global_batch = batch
        self.seq_min, self.seq_max, self.seed = seq_min, seq_max, seed
        self.rank, self.world, self.pairs, self.onset = rank, world, pairs, onset
        self._share = rank_share(batch, rank, world)
        self._columns, groups = _select(store_runs, runs, shortest, (seq_min + seq_max - 1) // 2, weights)
        self._group_slot, self._group_draws = groups
        self._weighted = weights is not None
        if pairs and len(self._columns.rows) < 2:
            raise ValueError(
                "pairs: got 1 run to draw from, expected at least 2, as a second half may come from another; "
                "give training and validation two each (brainflow split STORE --validation 2 …)"
            )
        self._steps_per_block = max(1, _BLOCK // len(self._share))
        # Kept for speed, no state: a block follows from its number, wherever a run resumes.
        self._block: tuple[int, dict[str, NDArray[np.int64]]] = (-1, {})

    @property
    def windows_per_batch(self) -> int:
        """Windows in this rank's share of a batch."""
        return len(self._share) * (2 if self.pairs else 1)

    @property
    def max_tokens(self) -> int:
        """Time points that no batch of this rank exceeds."""
        return len(self._share) * (self.seq_max - 1)

    @property
    def epoch_windows(self) -> int:
        """Windows (or pairs) in an epoch over all ranks."""
        return int(self._group_draws[-1])

    def epoch(self, step: int) -> float:
        """Return the epochs that are complete before `step`, with its fraction."""
        return step * self.global_batch / self.epoch_windows

    def batch(self, step: int) -> Windows:
        """Return this rank's windows of batch `step` (0, 1, 2, … without end)."""
        if step < 0:
            raise ValueError(f"step: got {step}, expected 0 or more")
        number, column = divmod(step, self._steps_per_block)
        known, block = self._block
        if known != number:
            block = self._draw(number)
            self._block = (number, block)
        n = len(self._share) * (2 if self.pairs else 1)
        part = slice(column * n, (column + 1) * n)
        is_next = block.get("is_next")
        return Windows(
            starts=block["start"][part],
            lengths=block["length"][part].astype(np.int32),
            runs=block["run"][part].astype(np.int32),
            t_r=block["t_r"][part].view(np.float64),
            step=step,
            is_next=None if is_next is None else is_next[part.start // 2 : part.stop // 2].astype(np.float32),
        )

    def _draw(self, number: int) -> dict[str, NDArray[np.int64]]:
        """Draw the windows of `_steps_per_block` steps at once: NumPy costs the same for 64 as for 1,024."""
        steps = number * self._steps_per_block + np.arange(self._steps_per_block, dtype=np.int64)
        index = (steps[:, None] * self.global_batch + self._share).ravel()
        slot = self._slots(index)
        run = self._runs_of(slot)
        drawn = uniform(key(self.seed, _LENGTH), index)
        length = self.seq_min + (drawn * (self.seq_max - self.seq_min)).astype(np.int64)
        length = np.minimum(length, run["length"])
        onset = self._onsets(slot, run, length, uniform(key(self.seed, _ONSET), index))
        if not self.pairs:
            return _window(run, onset, length)
        gap = _GAP_MIN + (uniform(key(self.seed, _GAP), index) * (_GAP_MAX - _GAP_MIN + 1)).astype(np.int64)
        first = (length - gap + 1) // 2
        second = length - gap - first
        is_next = (uniform(key(self.seed, _NEXT), index) < 0.5).astype(np.int64)
        # Uniform over the slots of all other runs: skip the own run's.
        c, own, slots = self._columns, run["first_slot"], self._columns.slots(run["length"])
        other = (uniform(key(self.seed, _OTHER), index) * (c.total - slots)).astype(np.int64)
        other += np.where(other >= own, slots, 0)
        other_run = self._runs_of(other)
        other_length = np.minimum(second, other_run["length"])
        other_onset = self._onsets(
            other, other_run, other_length, uniform(key(self.seed, _OTHER_ONSET), index)
        )
        true = _window(run, onset + first + gap, second)
        other_window = _window(other_run, other_onset, other_length)
        seconds = {name: np.where(is_next == 1, true[name], other_window[name]) for name in true}
        firsts = _window(run, onset, first)
        return {
            **{name: np.stack([firsts[name], seconds[name]], axis=1).ravel() for name in firsts},
            "is_next": is_next,
        }

    def _runs_of(self, slot: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        """Return the columns of the runs that slots belong to."""
        c = self._columns
        rows = c.rows[c.slot_runs.begun(slot) - 1]
        return dict(zip(("run", "start", "length", "first_slot", "t_r"), rows.T, strict=True))

    def _slots(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the slot that each number of the endless sequence draws."""
        epoch, place = np.divmod(index, self.epoch_windows)
        place = permute(place, self.epoch_windows, key(self.seed, _ORDER, epoch))
        if not self._weighted:
            return place
        # Each dataset is a sequence of its own, permuted anew whenever all of its slots have been drawn.
        group = np.searchsorted(self._group_draws, place, side="right") - 1
        draws = self._group_draws[group + 1] - self._group_draws[group]
        size = self._group_slot[group + 1] - self._group_slot[group]
        # Counted over all epochs: one of them need not draw every slot of a dataset.
        inner_epoch, inner = np.divmod(epoch * draws + place - self._group_draws[group], size)
        return self._group_slot[group] + permute(inner, size, key(self.seed, _INNER, group, inner_epoch))

    def _onsets(
        self,
        slot: NDArray[np.int64],
        run: dict[str, NDArray[np.int64]],
        length: NDArray[np.int64],
        drawn: NDArray[np.float64],
    ) -> NDArray[np.int64]:
        share = (slot - run["first_slot"] + drawn) / self._columns.slots(run["length"])
        if self.onset == "any":
            choices = run["length"] - length + 1
            # `share * choices` may be rounded up to `choices`.
            return np.minimum((share * choices).astype(np.int64), choices - 1)
        choices = np.maximum((run["length"] - 1) // length, 1)
        return np.minimum((share * choices).astype(np.int64), choices - 1) * length


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
        As in :class:`WindowSampler`.

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


class SkipCorruptSampler:
    """The batches of another sampler, each without its windows (pairs) that lie on damaged chunks.

    Which windows those are depends on the store alone, so that the order stays reproducible.

    Parameters
    ----------
    sampler
        Which windows stand in which batch.
    store
        Store that tells by `intact(starts, lengths)` which windows can be read.

    Attributes
    ----------
    damaged_runs
        Run ids whose windows are left out as well, whatever the store says.
    """

    def __init__(self, sampler: Sampler, store: Any) -> None:
        self._sampler, self._store = sampler, store
        self.steps = sampler.steps
        self.damaged_runs: set[int] = set()

    @property
    def windows_per_batch(self) -> int:
        """Most windows in a batch."""
        return self._sampler.windows_per_batch

    @property
    def max_tokens(self) -> int:
        """Time points that no batch exceeds."""
        return self._sampler.max_tokens

    def batch(self, step: int) -> Windows:
        """Return the windows of batch `step` that can be read; the number of the others is `skipped`.

        Raises
        ------
        StoreError
            If none is left.
        """
        windows = self._sampler.batch(step)
        good = self._store.intact(windows.starts, windows.lengths)
        if self.damaged_runs:
            good &= ~np.isin(windows.runs, list(self.damaged_runs))
        if good.all():
            return windows
        is_next = windows.is_next
        if is_next is not None:  # half a pair is of no use
            pairs = good.reshape(-1, 2).all(axis=1)
            good, is_next = pairs.repeat(2), is_next[pairs]
        if not good.any():
            raise StoreError(
                f"batch {windows.step}: all of its {len(good)} windows are damaged, so none can be skipped; "
                "`brainflow verify` lists all damage; restore the store from a copy"
            )
        return replace(
            windows,
            starts=windows.starts[good],
            lengths=windows.lengths[good],
            runs=windows.runs[good],
            t_r=windows.t_r[good],
            labels=None if windows.labels is None else windows.labels[good],
            is_next=is_next,
            skipped=int(len(good) - good.sum()),
        )


class MicrobatchSampler:
    """The microbatches of this rank, one after the other: of n samplers, batch `n * step + i` is the i-th's.

    Parameters
    ----------
    samplers
        One a microbatch, each with its share of the windows of a step.
    """

    def __init__(self, samplers: Sequence[Sampler]) -> None:
        self.samplers = samplers
        self.steps: int | None = None

    @property
    def windows_per_batch(self) -> int:
        """Most windows in a microbatch."""
        return max(sampler.windows_per_batch for sampler in self.samplers)

    @property
    def max_tokens(self) -> int:
        """Time points that no microbatch exceeds."""
        return max(sampler.max_tokens for sampler in self.samplers)

    def batch(self, step: int) -> Windows:
        """Return the windows of one microbatch; their `step` is the optimizer's."""
        number, i = divmod(step, len(self.samplers))
        return self.samplers[i].batch(number)


def _window(
    run: dict[str, NDArray[np.int64]], onset: NDArray[np.int64], length: NDArray[np.int64]
) -> dict[str, NDArray[np.int64]]:
    """Return what is drawn of a window."""
    return {"start": run["start"] + onset, "length": length, "run": run["run"], "t_r": run["t_r"]}


def _select(
    table: RunColumns, runs: ArrayLike | None, shortest: int, mean: int, weights: Mapping[str, float] | None
) -> tuple[_Columns, tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Return the sampled runs' columns, and each group's first slot and first draw of an epoch."""
    ids = (
        np.arange(len(table), dtype=np.int64) if runs is None else np.unique(np.asarray(runs, dtype=np.int64))
    )
    if not ids.size:
        raise ValueError("runs: got none, expected at least one run to draw from")
    if ids[0] < 0 or ids[-1] >= len(table):
        raise ValueError(f"runs: got ids from {ids[0]} to {ids[-1]}, expected ids in [0, {len(table)})")
    factors = np.ones(1)
    bounds = np.array([0, ids.size])
    if weights is not None:
        names, group = np.unique(np.asarray(table.dataset)[ids].astype(str), return_inverse=True)
        unknown = sorted(set(weights) - set(names.tolist()))
        if unknown:
            raise ValueError(
                f"weights: no run of dataset {unknown[0]!r} here, expected {', '.join(map(repr, names))}"
            )
        factors = np.array([float(weights.get(str(name), 1.0)) for name in names])
        if not (np.isfinite(factors).all() and (factors >= 0).all() and factors.any()):
            raise ValueError(
                f"weights: got {dict(weights)}, expected numbers of at least 0, one of them above 0"
            )
        keep = factors[group] > 0
        # The runs of a dataset side by side, so that its slots are one stretch.
        order = np.argsort(group[keep], kind="stable")
        ids, group = ids[keep][order], group[keep][order]
        factors = factors[factors > 0]
        bounds = np.append(np.flatnonzero(np.diff(group, prepend=-1)), ids.size)
    length = np.asarray(table.length)[ids].astype(np.int64)
    if (length < shortest).any():
        bad = ids[np.argmin(length)]
        raise ValueError(
            f"runs: run {table.key[bad]!s} has {length.min()} time points, expected at least {shortest}; "
            "leave it out of `runs`"
        )
    first_slot = np.concatenate([[0], np.cumsum(np.maximum(length // mean, 1))])
    group_slot = first_slot[bounds]
    # Only a weight of 0 leaves a dataset out, so a small one must not be rounded to no draw.
    draws = np.maximum(np.rint(factors * np.diff(group_slot)).astype(np.int64), 1)
    rows = np.empty((ids.size, 5), np.int64)
    rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3] = (
        ids,
        np.asarray(table.start)[ids],
        length,
        first_slot[:-1],
    )
    rows[:, 4] = np.asarray(table.t_r)[ids].astype(np.float64).view(np.int64)
    columns = _Columns(rows=rows, slot_runs=Intervals(first_slot[:-1]), total=int(first_slot[-1]), mean=mean)
    return columns, (group_slot, np.concatenate([[0], np.cumsum(draws)]))
