"""Resident mode: the store lies in device memory; windows are gathered there, the host sends only indices."""

from __future__ import annotations

import time
from typing import Literal

import numpy as np
import torch

from brainflow.batch import PackedBatch
from brainflow.data.loader import Loader, WindowStore
from brainflow.data.sampler import Sampler, SkipCorruptSampler
from brainflow.kernels.gathering import gather_windows
from brainflow.storage import StoreError

_LOAD_ROWS = 65_536


def resident_bytes(store: WindowStore, itemsize: int) -> int:
    """Bytes that the whole store takes in device memory."""
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
        super().__init__(
            store, sampler, device=device, start_step=start_step, dtype=dtype, on_corrupt=on_corrupt
        )
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
                self.sampler.damaged_runs.add(run)
        self.load_s = time.perf_counter() - began

    def _load(self, start: int, length: int) -> None:
        """Copy a run to the device."""
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
        self._bold = self._bold[:0].clone()
