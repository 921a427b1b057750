"""The DALI loader: an NVIDIA DALI pipeline around the store's reader, with or without a GPU.

The pipeline's source is called in batch mode with the number of the iteration, three batches ahead.

On a CPU it hands DALI views of the mapped store, a sample a window, without copying; laying the outputs end
to end is then the batch's one copy, and DALI makes it in its own thread into buffers that it reuses. Outputs
leave by DLPack as one tensor [tokens, networks].

On a GPU, and from a store that cannot be viewed in place (compressed, integers), the source reads the whole
packed batch into one of a ring of (on a GPU: pinned) buffers, which DALI takes as a single sample.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import numpy as np
import torch

from brainflow.data.batch import PackedBatch
from brainflow.data.host import Gatherer
from brainflow.data.loader import Loader, WindowStore
from brainflow.data.packing import packed_fields
from brainflow.data.windows import Sampler, Windows

_PREFETCH = 3
_IN_FLIGHT = _PREFETCH + 2
"""Buffers of the ring: DALI may read a buffer until `_PREFETCH` further batches have been taken."""


class DaliLoader(Loader):
    """Batches by way of a DALI pipeline; `device="cpu"` needs neither GPU nor driver.

    Batches are equal, bit for bit, to those of :class:`~brainflow.data.host.HostLoader`. Three batches are
    read ahead, so an error of the store (a corrupt chunk) surfaces up to three batches early. On the CPU a
    batch's `bold` lies in a buffer of DALI's and stays valid until the next batch is taken: clone what must
    live longer. On a GPU it stays valid for ever.

    Parameters
    ----------
    others
        See :class:`~brainflow.data.loader.Loader`.

    Raises
    ------
    ImportError
        If DALI is not installed.
    """

    kind = "dali"

    def __init__(
        self,
        store: WindowStore,
        sampler: Sampler,
        *,
        device: str | torch.device = "cpu",
        start_step: int = 0,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(store, sampler, device=device, start_step=start_step, dtype=dtype)
        _dali()
        self._gpu = self.device.type == "cuda"
        self._views = not self._gpu and _viewable(store)
        buffers = 0 if self._views else _IN_FLIGHT
        self._gatherer = Gatherer(store, sampler, buffers=buffers, pinned=self._gpu)
        self._pending: deque[tuple[int, Windows, dict[str, np.ndarray]]] = deque()
        self._first = start_step
        self._pipeline: Any = None
        # Which small arrays the sampler gives does not change from batch to batch.
        self._fields = list(packed_fields(sampler.batch(start_step if sampler.steps is None else 0)))

    def _source(self, iteration: int) -> Any:
        step = self._first + iteration
        if self.sampler.steps is not None and step >= self.sampler.steps:
            raise StopIteration
        began = time.perf_counter()
        if self._views:
            windows, samples = self._gatherer.view(step)
        else:
            windows, bold = self._gatherer.gather(step)
            samples = [bold.numpy()]
        fields = packed_fields(windows)
        self._pending.append((step, windows, fields))
        self._gather_s += time.perf_counter() - began
        return (samples, *([array] for array in fields.values())) if self._gpu else (samples,)

    def _build(self, first: int) -> Any:
        """Return a pipeline whose first output is batch `first`."""
        fn, types, pipeline_def = _dali()
        gpu, index = self._gpu, None
        if gpu:
            index = torch.cuda.current_device() if self.device.index is None else self.device.index

        # On the CPU the dynamic executor takes fresh memory for every output, whose page faults cost more
        # than the copy; on a GPU memory comes from a pool.
        @pipeline_def(
            batch_size=self.sampler.windows_per_batch if self._views else 1,
            num_threads=2,
            device_id=index,
            prefetch_queue_depth=_PREFETCH,
            exec_dynamic=gpu,
        )
        def packed() -> tuple[Any, ...]:
            # Only `bold` is large: what it lies in outlives the iteration; DALI keeps the small arrays.
            outputs = list(
                fn.external_source(
                    source=self._source,
                    num_outputs=1 + (len(self._fields) if gpu else 0),
                    batch=True,
                    batch_info=False,
                    no_copy=True,
                )
            )
            if gpu:
                outputs = [output.gpu() for output in outputs]
            if self.dtype != self.stored_dtype:
                outputs[0] = fn.cast(outputs[0], dtype=types.FLOAT)
            return tuple(outputs)

        self._first = first
        self._pending.clear()
        self._gatherer.seek()
        return packed()

    def _take(self, step: int) -> PackedBatch:
        if self._pipeline is None:
            self._pipeline = self._build(step)
        outputs = self._pipeline.run()
        began = time.perf_counter()
        number, windows, arrays = self._pending.popleft()
        assert number == step, (number, step)
        if self._gpu:
            bold, *small = [torch.from_dlpack(output.as_tensor())[0] for output in outputs]
            fields = dict(zip(self._fields, small, strict=True))
        else:
            tokens = int(windows.lengths.sum(dtype=np.int64))
            bold = torch.from_dlpack(outputs[0].as_reshaped_tensor([tokens, self.store.networks]))
            fields = {name: torch.from_numpy(array) for name, array in arrays.items()}
        self._transfer_s += time.perf_counter() - began
        return PackedBatch(
            bold=bold,
            max_seqlen=int(windows.lengths.max()),
            lengths=windows.lengths,
            runs=windows.runs,
            step=step,
            **fields,
        )

    def _seek(self, step: int) -> None:
        self._pipeline = None

    def _placement(self) -> str:
        return "page cache of this machine"

    def _memory(self) -> int:
        return (
            self._gatherer.nbytes
            + (_PREFETCH + 1) * self.sampler.max_tokens * self.store.networks * self.dtype.itemsize
        )

    def close(self) -> None:
        """Drop the pipeline (its threads end) and the buffers."""
        self._pipeline = None
        self._pending.clear()
        self._gatherer.buffers.clear()


def _viewable(store: Any) -> bool:
    """Whether the store's windows can be viewed in place."""
    nothing = np.zeros(0, np.int64)
    try:
        store.views(nothing, nothing)
    except (AttributeError, ValueError):  # a store of another kind; a compressed one or one of integers
        return False
    return True


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
