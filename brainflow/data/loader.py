"""Loaders of packed batches: what all share (position, clock, what is said of a run), and two of them.

The host loader, sampler to store to reused buffers to torch, is the others' reference and their fallback. The
resident one keeps the store in device memory and gathers windows there; the host sends only indices.
"""

from __future__ import annotations

import resource
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from brainflow.batch import PackedBatch, Windows
from brainflow.data.sampler import RunColumns, Sampler, SkipCorruptSampler
from brainflow.kernels.gathering import gather_windows
from brainflow.storage import StoreError
from brainflow.storage.mapping import aligned_empty

_SETTLE = 8  # batches: asking what was read costs 10 µs
_LOAD_ROWS = 65_536


class WindowStore(Protocol):
    """What a loader asks of a store (`BoldStore` has it)."""

    @property
    def networks(self) -> int: ...  # noqa: D102
    @property
    def dtype(self) -> Any: ...  # noqa: D102
    @property
    def runs(self) -> RunColumns: ...  # noqa: D102
    def windows(self, starts: Any, lengths: Any, out: Any = None) -> NDArray[Any]: ...  # noqa: D102


def batch_dtype(store: WindowStore) -> torch.dtype:
    """Return the element type of a store's windows: its own float type, float32 for stores of integers."""
    dtype = np.dtype(store.dtype)
    return torch.from_numpy(np.empty(0, dtype if dtype.kind == "f" else np.float32)).dtype


class Loader(ABC):
    """An iterator of :class:`~brainflow.batch.PackedBatch` whose whole state is the next step.

    Parameters
    ----------
    store
        Store to read.
    sampler
        Which windows stand in which batch; None in `sampler.steps` means an endless iterator.
    device
        Where the batches' tensors shall be.
    start_step
        First batch.
    dtype
        Element type of `bold`: torch.float32, or None for the store's own. (Widening is exact, so all loaders
        agree.)
    on_corrupt
        What to do about a damaged chunk: "error" raises, naming the run; "skip" leaves the windows (pairs) on
        it out of their batches and counts them in `report()["skipped_windows"]`.

    Attributes
    ----------
    wait_s
        Seconds that the consumer has spent in `next(loader)`.
    """

    kind: str

    def __init__(
        self,
        store: WindowStore,
        sampler: Sampler,
        *,
        device: str | torch.device = "cpu",
        start_step: int = 0,
        dtype: torch.dtype | None = None,
        on_corrupt: Literal["error", "skip"] = "error",
    ) -> None:
        if on_corrupt not in ("error", "skip"):
            raise ValueError(f"on_corrupt: got {on_corrupt!r}, expected 'error' or 'skip'")
        if start_step < 0:
            raise ValueError(f"start_step: got {start_step}, expected 0 or more")
        if dtype not in (None, torch.float32):
            raise ValueError(f"dtype: got {dtype}, expected None (the store's own) or torch.float32")
        self.store = store
        self.sampler = SkipCorruptSampler(sampler, store) if on_corrupt == "skip" else sampler
        self.device = torch.device(device)
        self.stored_dtype = batch_dtype(store)
        self.dtype = dtype or self.stored_dtype
        self.step = start_step
        self.wait_s = 0.0
        self._disk_s = self._gather_s = self._transfer_s = self._consumer_s = 0.0
        self._batches = self._skipped = self._read = 0
        self._settled_s = 0.0
        self._settle()
        self._left: float | None = None
        self._open()

    @abstractmethod
    def _open(self) -> None:
        """Make what batches are read with; the last thing that the constructor does."""

    @abstractmethod
    def _take(self, step: int) -> PackedBatch:
        """Return batch `step`; steps are asked for in order, between two calls of `_seek`."""

    @abstractmethod
    def _seek(self, step: int) -> None:
        """Be ready to take `step` next."""

    @abstractmethod
    def _placement(self) -> str:
        """Say where the store's data will live."""

    @abstractmethod
    def _memory(self) -> int:
        """Return the bytes that the loader holds, the page cache apart."""

    @abstractmethod
    def close(self) -> None:
        """Free buffers and threads; the loader cannot be used after it."""

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> PackedBatch:
        began = time.perf_counter()
        if self._left is not None:
            self._consumer_s += began - self._left
        if self.sampler.steps is not None and self.step >= self.sampler.steps:
            # What comes after the end is not the consumer's time between two batches.
            self._left = None
            raise StopIteration
        batch = self._take(self.step)
        self.step += 1
        self._batches += 1
        if self._batches % _SETTLE == 0:
            self._settle()
        self._left = time.perf_counter()
        self.wait_s += self._left - began
        return batch

    def _settle(self) -> None:
        """Count the gathering since the last call as `disk` if anything was read from a disk or a server."""
        # Pages that were in the page cache add no block: what it grows by came from a disk.
        read = resource.getrusage(resource.RUSAGE_SELF).ru_inblock + getattr(self.store, "waits", 0)
        if read != self._read:
            self._read = read
            self._disk_s += self._gather_s - self._settled_s
            self._gather_s = self._settled_s
        self._settled_s = self._gather_s

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def state_dict(self) -> dict[str, int]:
        """Return the position: the step of the next batch."""
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue at a position that :meth:`state_dict` returned; batches are bit-identical from there."""
        if "step" not in state or int(state["step"]) < 0:
            raise ValueError(f"state: got {dict(state)}, expected what state_dict() returned, {{'step': …}}")
        self.step = int(state["step"])
        self._left = None
        self._seek(self.step)

    def describe(self) -> dict[str, Any]:
        """Return what the run will cost, before it runs: bytes and places."""
        windows = self.sampler.batch(self.step)
        tokens = int(windows.lengths.sum())
        row = self.store.networks * self.stored_dtype.itemsize
        runs = self.store.runs
        return {
            "loader": self.kind,
            "device": str(self.device),
            "store_lives_in": self._placement(),
            "store_bytes": int(np.asarray(runs.length, dtype=np.int64).sum()) * row,
            "windows_per_step": len(windows),
            "bytes_first_step": tokens * row,
            "bytes_per_step_at_most": self.sampler.max_tokens * row,
            "memory_bytes": self._memory(),
        }

    def report(self) -> dict[str, Any]:
        """Return where time went so far, in seconds, and which stage limits.

        `gather` (sampler and copy) is what the loader took for batches that were in memory, `disk` for those
        during which this process had to read from a disk or a server; `transfer` is handing them over. `wait`
        is what the consumer spent waiting for batches and `consumer` what it spent between them.
        """
        self._settle()
        stages = {
            "disk": self._disk_s,
            "gather": self._gather_s,
            "transfer": self._transfer_s,
            "consumer": self._consumer_s,
        }
        limit = max(stages, key=lambda name: stages[name]) if self._batches else "nothing yet"
        return {
            "batches": self._batches,
            "skipped_windows": self._skipped,
            "wait_s": self.wait_s,
            **{f"{name}_s": seconds for name, seconds in stages.items()},
            "limited_by": limit,
        }


class HostLoader(Loader):
    """Batches from a store by way of reused host buffers (pinned if the device is a GPU).

    A batch's `bold` on the CPU is a view of one of `buffers` buffers: it stays valid while the next `buffers`
    - 1 batches are taken, then it is overwritten. Clone what must live longer. On another device, or with a
    `dtype` that is not the store's, it is a copy and stays valid for ever.

    Parameters
    ----------
    buffers
        Batches that are valid at the same time.
    store, sampler, device, start_step, dtype, on_corrupt
        See :class:`~brainflow.data.loader.Loader`.
    """

    kind = "host"

    def __init__(
        self,
        store: WindowStore,
        sampler: Sampler,
        *,
        device: str | torch.device = "cpu",
        start_step: int = 0,
        dtype: torch.dtype | None = None,
        on_corrupt: Literal["error", "skip"] = "error",
        buffers: int = 3,
    ) -> None:
        if buffers < 1:
            raise ValueError(f"buffers: got {buffers}, expected at least 1")
        self._buffers = buffers
        super().__init__(
            store, sampler, device=device, start_step=start_step, dtype=dtype, on_corrupt=on_corrupt
        )

    def _open(self) -> None:
        pinned = self.device.type == "cuda"
        self._gatherer = Gatherer(self.store, self.sampler, buffers=self._buffers, pinned=pinned)
        # On a GPU a buffer may only be written again when the copy out of it is over.
        self._copied: list[torch.cuda.Event | None] = [None] * self._buffers

    def _take(self, step: int) -> PackedBatch:
        # A ring: batch n overwrites batch n - buffers, of which a copy to a GPU may still be under way.
        place = step % len(self._copied)
        if (event := self._copied[place]) is not None:
            event.synchronize()
        began = time.perf_counter()
        windows, bold = self._gatherer.gather(step)
        gathered = time.perf_counter()
        self._skipped += windows.skipped
        batch = PackedBatch.pack(bold, windows, device=self.device)  # on a GPU from pinned memory
        if self.device.type == "cuda":
            self._copied[place] = copied = torch.cuda.Event()
            copied.record()
        if batch.bold.dtype != self.dtype:
            batch = batch.cast(self.dtype)
        self._gather_s += gathered - began
        self._transfer_s += time.perf_counter() - gathered
        return batch

    def _seek(self, step: int) -> None:
        self._gatherer.seek()

    def _placement(self) -> str:
        return "page cache of this machine"

    def _memory(self) -> int:
        return self._gatherer.nbytes

    def close(self) -> None:
        """Free the buffers."""
        self._gatherer.buffers.clear()


class Gatherer:
    """Reads a batch's windows into one of a ring of host buffers."""

    def __init__(self, store: WindowStore, sampler: Sampler, *, buffers: int, pinned: bool) -> None:
        self.store, self.sampler = store, sampler
        self._advise: Any = getattr(store, "advise", None)
        self._check: Any = getattr(store, "check", None)
        self._advised = -1
        self._next: tuple[int, Windows] | None = None
        self.buffers = [
            _buffer(sampler.max_tokens, store.networks, batch_dtype(store), pinned) for _ in range(buffers)
        ]
        self._arrays = [buffer.numpy() for buffer in self.buffers]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers)

    def gather(self, step: int) -> tuple[Windows, torch.Tensor]:
        """Return the windows of `step` and their BOLD, a view of buffer `step % buffers`."""
        windows = self._windows(step)
        place = step % len(self.buffers)
        tokens = int(windows.lengths.sum(dtype=np.int64))
        self.store.windows(windows.starts, windows.lengths, out=self._arrays[place][:tokens])
        return windows, self.buffers[place][:tokens]

    def check(self, step: int) -> Windows:
        """Return the windows of `step` when the store has checked them; their BOLD is read by another."""
        windows = self._windows(step)
        self._check(windows.starts, windows.lengths)
        return windows

    def seek(self) -> None:
        """Forget which batches have been announced to the store."""
        self._advised, self._next = -1, None

    def _windows(self, step: int) -> Windows:
        """Return the windows of a step; announce the next one's, and its own if that was not done."""
        known, self._next = self._next, None
        windows = known[1] if known is not None and known[0] == step else self.sampler.batch(step)
        if self._advise is not None:
            if self._advised < step:
                self._advise(windows.starts, windows.lengths)
                self._advised = step
            # Announced a batch ahead, its pages are read from a cold disk while this batch is trained on;
            # the sampler is asked once, for the answer is kept for the next call.
            ahead = step + 1
            if self._advised < ahead and (self.sampler.steps is None or ahead < self.sampler.steps):
                self._next = ahead, self.sampler.batch(ahead)
                self._advise(self._next[1].starts, self._next[1].lengths)
                self._advised = ahead
        return windows


def _buffer(rows: int, columns: int, dtype: torch.dtype, pinned: bool) -> torch.Tensor:
    if pinned:
        return torch.empty(rows, columns, dtype=dtype, pin_memory=True)
    # torch's own memory begins anywhere; `aligned_empty` says what a copy to there costs.
    return torch.from_numpy(aligned_empty(rows, columns, torch.empty(0, dtype=dtype).numpy().dtype))


def resident_bytes(store: WindowStore, itemsize: int) -> int:
    """Return bytes that the whole store takes in device memory."""
    runs = store.runs
    rows = int((np.asarray(runs.start, dtype=np.int64) + runs.length).max()) if len(runs) else 0
    return rows * store.networks * itemsize


class ResidentLoader(Loader):
    """Batches gathered on the device from a copy of the whole store.

    Batches are equal, bit for bit, to those of :class:`~brainflow.data.loader.HostLoader` and stay valid for
    ever. Stores of integers are kept as float32. Loading reads every run once.

    Parameters
    ----------
    store, sampler, device, start_step, dtype, on_corrupt
        See :class:`~brainflow.data.loader.Loader`.
    """

    kind = "resident"

    def _open(self) -> None:
        store = self.store
        row = store.networks * self.stored_dtype.itemsize
        rows = resident_bytes(store, self.stored_dtype.itemsize) // row
        self._bold = torch.zeros(rows, store.networks, dtype=self.stored_dtype, device=self.device)
        began = time.perf_counter()
        starts = np.asarray(store.runs.start, dtype=np.int64)
        lengths = np.asarray(store.runs.length, dtype=np.int64)
        for run, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
            try:
                self._load(start, length)
            except StoreError:
                if not isinstance(self.sampler, SkipCorruptSampler):
                    raise
                # Its rows stay zero: no window of it is drawn.
                self.sampler.damaged_runs.add(run)
        self.load_s = time.perf_counter() - began

    def _load(self, start: int, length: int) -> None:
        """Copy a run to the device."""
        # In pieces: a whole run would need as much memory on the host as well.
        for first in range(start, start + length, _LOAD_ROWS):
            count = min(_LOAD_ROWS, start + length - first)
            piece = self.store.windows(np.array([first]), np.array([count], dtype=np.int32))
            self._bold[first : first + count].copy_(torch.from_numpy(piece))

    def _take(self, step: int) -> PackedBatch:
        began = time.perf_counter()
        windows = self.sampler.batch(step)
        # starts and lengths stay on the host: their sum and range are known there without a sync.
        bold = gather_windows(self._bold, windows.starts, windows.lengths, out_dtype=self.dtype)
        moved = time.perf_counter()
        batch = PackedBatch.pack(bold, windows)
        self._skipped += windows.skipped
        self._gather_s += moved - began
        self._transfer_s += time.perf_counter() - moved
        return batch

    def _seek(self, step: int) -> None:
        pass

    def _placement(self) -> str:
        return f"memory of {self.device}"

    def _memory(self) -> int:
        return self._bold.nbytes

    def close(self) -> None:
        """Free the device memory."""
        # A clone: a view of no rows would keep them all.
        self._bold = self._bold[:0].clone()
