"""The DALI loader: an NVIDIA DALI pipeline around the mapped store, with or without a GPU.

The pipeline's source is called in batch mode with the number of the iteration, an iteration ahead. A batch is
a sample; an iteration has a few of them.

The mapped store is one constant input, and what the source gives is which of its rows a batch has, in their
order. DALI's `sequence_rearrange` gathers them, in threads of its own and into memory that it reuses (for a
GPU: pinned memory, from which DALI transfers them): the one copy on the host. Outputs leave by DLPack.

From a store that cannot be mapped as a whole (remote, compressed, integers) the source reads the packed batch
into one of a ring of (on a GPU: pinned) buffers, which DALI takes as a single sample.
"""

from __future__ import annotations

import importlib
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from brainflow.batch import PackedBatch, Windows
from brainflow.data.loader import Gatherer, Loader

_BLOCK, _BLOCK_BYTES = 16, 2**27
"""Batches an iteration and their bytes, at most: they share what an iteration costs DALI and us."""
_READ_BYTES = 2**25
"""The same where the source reads the batches, into buffers of its own."""
_THREADS = 2
"""DALI's threads, which share an iteration's batches."""
# With three, whose outputs fit the cache less, its copies were 15 to 20 % slower.
_PREFETCH = 2
"""Iterations in DALI's queue: the one in use and the next."""


@dataclass(frozen=True)
class Prepared:
    """A batch that DALI is working on."""

    windows: Windows
    columns: dict[str, np.ndarray]


class DaliLoader(Loader):
    """Batches by way of a DALI pipeline; `device="cpu"` needs neither GPU nor driver.

    Batches are equal, bit for bit, to those of :class:`~brainflow.data.loader.HostLoader`. They are read
    ahead, so an error of the store (a corrupt chunk) surfaces up to 32 batches early. On the CPU a batch's
    `bold` lies in a buffer of DALI's and stays valid until the next batch is taken: clone what must live
    longer. On a GPU it stays valid for ever.

    Parameters
    ----------
    store, sampler, device, start_step, dtype, on_corrupt
        See :class:`~brainflow.data.loader.Loader`.

    Raises
    ------
    ImportError
        If DALI is not installed.
    """

    kind = "dali"

    def _open(self) -> None:
        store = self.store
        _dali()
        self._gpu = self.device.type == "cuda"
        size = self.sampler.max_tokens * store.networks * self.dtype.itemsize
        mapped = _mapped(store)
        self._block = max(1, min(_BLOCK, (_READ_BYTES if mapped is None else _BLOCK_BYTES) // size))
        # The mapped store as an input of n batches, each all of it.
        self._rows = None if mapped is None else _samples(mapped, self._block)
        # DALI may read a buffer of the ring until `_PREFETCH` further iterations have been taken.
        buffers = self._block * (_PREFETCH + 2) if self._rows is None else 0
        self._gatherer = Gatherer(store, self.sampler, buffers=buffers, pinned=self._gpu)
        # An iteration's batches and inputs; DALI reads these without a copy, so they have to live until then.
        self._scheduled: deque[tuple[list[Prepared], Any]] = deque()
        self._ready: deque[PackedBatch] = deque()
        self._first = self.step
        self._pipeline: Any = None
        # Which small arrays the sampler gives does not change from batch to batch.
        # The first of a sampler that has an end: `self.step` may lie behind that.
        first = self.sampler.batch(self.step if self.sampler.steps is None else 0)
        self._columns = list(first.columns())

    def _source(self, iteration: int) -> Any:
        """Return the inputs of an iteration's batches (fewer at the end)."""
        first = self._first + iteration * self._block
        last = first + self._block
        if self.sampler.steps is not None:
            last = min(last, self.sampler.steps)
        if first >= last:
            raise StopIteration
        began = time.perf_counter()
        prepared: list[Prepared] = []
        large: list[np.ndarray] = []
        for step in range(first, last):
            if self._rows is None:
                windows, bold = self._gatherer.gather(step)
                large.append(bold.numpy())
            else:
                windows = self._gatherer.check(step)
                large.append(windows.rows())
            prepared.append(Prepared(windows, windows.columns()))
        inputs: list[Any] = [large] if self._rows is None else [self._rows[len(prepared)], large]
        # On the CPU the small arrays need not go through DALI.
        if self._gpu:
            inputs += [[one.columns[name] for one in prepared] for name in self._columns]
        self._scheduled.append((prepared, inputs))
        self._gather_s += time.perf_counter() - began
        return tuple(inputs)

    def _build(self, first: int) -> Any:
        """Return a pipeline whose first output is batch `first`."""
        fn, types, pipeline_def = _dali()
        gpu, index = self._gpu, None
        if gpu:
            index = torch.cuda.current_device() if self.device.index is None else self.device.index

        # On the CPU the dynamic executor takes fresh memory for every output, whose page faults cost more
        # than the copy; on a GPU memory comes from a pool.
        @pipeline_def(
            batch_size=self._block,
            num_threads=_THREADS,
            device_id=index,
            prefetch_queue_depth=_PREFETCH,
            exec_dynamic=gpu,
        )
        def packed() -> tuple[Any, ...]:
            outputs = list(
                fn.external_source(
                    source=self._source,
                    num_outputs=(1 if self._rows is None else 2) + (len(self._columns) if gpu else 0),
                    batch=True,
                    batch_info=False,
                    no_copy=True,  # `_scheduled` keeps what DALI reads
                )
            )
            if self._rows is not None:
                whole, rows, *outputs = outputs
                # By row numbers of one constant input: a view a window as inputs cost the calling thread
                # 0.4 ms a batch, most of it DALI's preparation of each, and a gather of our own before it
                # is a second copy.
                outputs.insert(0, fn.sequence_rearrange(whole, new_order=rows))
            if gpu:
                outputs = [output.gpu() for output in outputs]
            if self.dtype != self.stored_dtype:
                outputs[0] = fn.cast(outputs[0], dtype=types.FLOAT)
            return tuple(outputs)

        self._first = first
        self._scheduled.clear()
        self._ready.clear()
        self._gatherer.seek()
        return packed()

    def _take(self, step: int) -> PackedBatch:
        if not self._ready:
            self._run(step)
        return self._ready.popleft()

    def _run(self, step: int) -> None:
        """Take an iteration's batches from DALI; those before are overwritten."""
        if self._pipeline is None:
            self._pipeline = self._build(step)
        began, sourced = time.perf_counter(), self._gather_s
        outputs = self._pipeline.run()
        waited = time.perf_counter()
        prepared, _ = self._scheduled.popleft()
        tokens = [one.columns["cu_seqlens"][-1] for one in prepared]
        bold = _joined(outputs[0], [sum(tokens), self.store.networks]).split(tokens)
        small = [
            _split(output, prepared, name) for output, name in zip(outputs[1:], self._columns, strict=False)
        ]
        for i, one in enumerate(prepared):
            columns = {name: torch.from_numpy(array) for name, array in one.columns.items()}
            if self._gpu:
                columns = {name: pieces[i] for name, pieces in zip(self._columns, small, strict=True)}
            self._ready.append(PackedBatch.pack(bold[i], one.windows, columns=columns))
            self._skipped += one.windows.skipped
        # What `run` took beyond the source is waiting for DALI: for its gather or, on a GPU, its transfer.
        behind = waited - began - (self._gather_s - sourced)
        self._gather_s += 0.0 if self._gpu else behind
        self._transfer_s += time.perf_counter() - waited + (behind if self._gpu else 0.0)

    def _seek(self, step: int) -> None:
        # DALI counts its iterations from 0 and has read ahead: only a new pipeline starts elsewhere.
        self._pipeline = None
        self._ready.clear()

    def _placement(self) -> str:
        return "page cache of this machine"

    def _memory(self) -> int:
        batch = self.sampler.max_tokens * self.store.networks * self.dtype.itemsize
        return self._gatherer.nbytes + self._block * (_PREFETCH + 1) * batch

    def close(self) -> None:
        """Drop the pipeline (its threads end) and the buffers."""
        self._pipeline = None
        self._scheduled.clear()
        self._ready.clear()
        self._gatherer.buffers.clear()


def _joined(output: Any, shape: list[int]) -> torch.Tensor:
    """Return an output of DALI, its samples laid end to end."""
    return torch.from_dlpack(output.as_reshaped_tensor(shape))


def _split(output: Any, prepared: list[Prepared], name: str) -> tuple[torch.Tensor, ...]:
    """Return a small field of each batch of an iteration, from an output of DALI."""
    sizes = [len(one.columns[name]) for one in prepared]
    return _joined(output, [sum(sizes)]).split(sizes)


def _mapped(store: Any) -> Any:
    """Return the rows of a store that DALI can gather from where they lie; None if there are none."""
    rows = getattr(store, "rows", None)
    # `sequence_rearrange` takes row numbers of 32 bits.
    return rows if rows is not None and len(rows) <= np.iinfo(np.int32).max else None


def _samples(rows: Any, most: int) -> dict[int, Any]:
    """Return the same array as an input of n ≤ `most` samples."""
    tensors: Any = importlib.import_module("nvidia.dali.tensors")
    sample = tensors.TensorCPU(rows)
    # Not contiguous: a contiguous list would be n copies of the store.
    return {n: tensors.TensorListCPU([sample] * n, contiguous=False) for n in range(1, most + 1)}


def _dali() -> tuple[Any, Any, Any]:
    """Import DALI, or say how to get it."""
    try:
        from nvidia.dali import fn, pipeline_def, types
    except ImportError as error:
        raise ImportError(
            "kind: 'dali' needs NVIDIA DALI, which is not installed; run `pip install "
            "'brainflow-fmri[dali]'` (CUDA 12: the extra dali-cuda12; the package called plainly nvidia-dali "
            "is a placeholder), or take kind='host', which gives the same batches"
        ) from error
    return fn, types, pipeline_def
