"""The plain loader: sampler, store, reused buffers, torch. The others' reference, and the fallback."""

from __future__ import annotations

import time
from typing import Any, Literal

import numpy as np
import torch

from brainflow.batch import PackedBatch, Windows
from brainflow.data.loader import Loader, WindowStore, batch_dtype
from brainflow.data.sampler import Sampler
from brainflow.storage.mapping import aligned_empty


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
        super().__init__(
            store, sampler, device=device, start_step=start_step, dtype=dtype, on_corrupt=on_corrupt
        )
        if buffers < 1:
            raise ValueError(f"buffers: got {buffers}, expected at least 1")
        self._gatherer = Gatherer(store, self.sampler, buffers=buffers, pinned=self.device.type == "cuda")
        # On a GPU a buffer may only be written again when the copy out of it is over.
        self._copied: list[torch.cuda.Event | None] = [None] * buffers

    def _take(self, step: int) -> PackedBatch:
        place = step % len(self._copied)
        if (event := self._copied[place]) is not None:
            event.synchronize()
        began = time.perf_counter()
        windows, bold = self._gatherer.gather(step)
        gathered = time.perf_counter()
        self._skipped += windows.skipped
        batch = PackedBatch.pack(bold, windows, device=self.device)  # on a GPU from pinned memory
        if self.device.type == "cuda":
            self._copied[place] = torch.cuda.Event()
            self._copied[place].record()  # type: ignore[union-attr]
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
            ahead = step + 1
            if self._advised < ahead and (self.sampler.steps is None or ahead < self.sampler.steps):
                self._next = ahead, self.sampler.batch(ahead)
                self._advise(self._next[1].starts, self._next[1].lengths)
                self._advised = ahead
        return windows


def _buffer(rows: int, columns: int, dtype: torch.dtype, pinned: bool) -> torch.Tensor:
    if pinned:
        return torch.empty(rows, columns, dtype=dtype, pin_memory=True)
    return torch.from_numpy(aligned_empty(rows, columns, torch.empty(0, dtype=dtype).numpy().dtype))
