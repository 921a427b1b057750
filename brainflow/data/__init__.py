"""Samplers and loaders: from a store to packed batches on a device."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

    from brainflow.data.loader import Loader, WindowStore
    from brainflow.data.sampler import Sampler

_RESIDENT_SHARE = 0.5
"""A store is kept in device memory if it takes at most this share of what is free there.

The training asks after it has run its largest batch: activations have their room, the rest is for AdamW's
state and validation."""


def make_loader(
    store: WindowStore,
    sampler: Sampler,
    *,
    kind: Literal["auto", "dali", "host", "resident"] = "auto",
    device: str | torch.device = "cpu",
    start_step: int = 0,
    dtype: torch.dtype | None = None,
    on_corrupt: Literal["error", "skip"] = "error",
) -> Loader:
    """Return an iterator of packed batches; all kinds give identical ones.

    Parameters
    ----------
    store
        Store to read, e.g. a `BoldStore`.
    sampler
        Which windows stand in which batch: a `WindowSampler` or a `SegmentSampler`.
    kind
        "resident" keeps the store in device memory, "dali" runs a DALI pipeline, "host" needs torch alone.
        "auto" takes the first of them that fits: resident if the device is a GPU with room for the
        store, DALI if it is installed.
    device
        Where the batches' tensors shall be.
    start_step
        First batch; a loader that starts at step k continues one that stopped there.
    dtype
        torch.float32, or None for the store's own (float32 for a store of integers).
    on_corrupt
        "error": a damaged chunk raises, naming the run. "skip": the windows on it are left out of their
        batches and counted in `loader.report()["skipped_windows"]`.

    Raises
    ------
    ValueError
        If an argument is out of range.
    StoreError
        While batches are taken: if a chunk that one needs is damaged.
    ImportError
        If `kind` is "dali" and DALI is not installed.
    """
    # Imported here so that `import brainflow.data` costs nothing.
    from brainflow.data.loader import HostLoader, ResidentLoader
    from brainflow.data.pipeline import DaliLoader

    if kind == "auto":
        kind = "resident" if _fits(store, device) else "dali" if dali_installed() else "host"
    kinds: dict[str, type[Loader]] = {"dali": DaliLoader, "host": HostLoader, "resident": ResidentLoader}
    if kind not in kinds:
        raise ValueError(f"kind: got {kind!r}, expected 'auto', 'dali', 'host' or 'resident'")
    return kinds[kind](
        store, sampler, device=device, start_step=start_step, dtype=dtype, on_corrupt=on_corrupt
    )


def _fits(store: WindowStore, device: str | torch.device) -> bool:
    import torch

    from brainflow.data.loader import batch_dtype, resident_bytes

    device = torch.device(device)
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return resident_bytes(store, batch_dtype(store).itemsize) <= _RESIDENT_SHARE * free


def dali_installed() -> bool:
    """Whether DALI is there, without importing it."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False
