"""What all loaders share: the position, the clock, what is said before and after a run."""

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

from brainflow.batch import PackedBatch
from brainflow.data.sampler import RunColumns, Sampler, SkipCorruptSampler


class WindowStore(Protocol):
    """What a loader asks of a store (`BoldStore` has it)."""

    @property
    def networks(self) -> int: ...  # noqa: D102
    @property
    def dtype(self) -> Any: ...  # noqa: D102
    @property
    def runs(self) -> RunColumns: ...  # noqa: D102
    def windows(self, starts: Any, lengths: Any, out: Any = None) -> NDArray[Any]: ...  # noqa: D102


_SETTLE = 8  # batches: asking what was read costs 10 µs


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
