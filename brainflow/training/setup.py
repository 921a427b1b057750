"""What is settled before the first step: the configuration, who begins where, split, device, seeds."""

from __future__ import annotations

import dataclasses
import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from brainflow.batch import PackedBatch, Windows
from brainflow.config import PretrainConfig
from brainflow.data.sampler import WindowSampler
from brainflow.data.splits import Split, SplitWarning, listed, split_runs
from brainflow.devices import resolve_device
from brainflow.frameworks import own_config
from brainflow.storage import BoldStore
from brainflow.storage.text import counted

from .parallel import Ranks
from .run_dir import CHECKPOINTS, Resume, begin, begun, saved_config


def fit_to_store(config: PretrainConfig, store: BoldStore) -> PretrainConfig:
    """Return the configuration with the store's number of networks and all settings of its framework.

    Raises
    ------
    ValueError
        If another number was asked for, or a window may last longer than the TR embedding covers.
    """
    # From the first to the last of seq_max − 1 time points.
    longest = (config.data.seq_max - 2) * float(np.max(store.runs.t_r))
    if config.model.time_encoding == "table" and longest > config.model.max_seconds:
        raise ValueError(
            f"data.seq_max: windows of up to {config.data.seq_max - 1} time points last {longest:g} s at the "
            f"store's longest TR, but model.max_seconds is {config.model.max_seconds:g}; shorten the windows "
            "or raise model.max_seconds"
        )
    default = type(config.model)().networks
    if config.model.networks not in (default, store.networks):
        raise ValueError(
            f"model.networks: got {config.model.networks}, but the store has {store.networks}; leave it out"
        )
    model = dataclasses.replace(own_config(config.model), networks=store.networks)
    return dataclasses.replace(config, model=model)


def give_coordinates(module: Any, store: BoldStore) -> None:
    """Tell a framework where the store's networks are.

    Raises
    ------
    ValueError
        If the store does not know.
    """
    coordinates = store.attributes.get("network_coordinates")
    if coordinates is None:
        raise ValueError(
            "model.coordinates: got True, but the store has no network coordinates; ingest it with them, or "
            "leave the setting out"
        )
    module.embedding.set_coordinates(coordinates)


def cut_into_parts(config: PretrainConfig, folder: Path, world: int, *, resume: Resume) -> PretrainConfig:
    """Return the configuration with `train.micro_batches`: as asked for, as the run began, or one a rank.

    Parameters
    ----------
    config
        Whose `train.micro_batches` may be left to this function.
    folder
        Run directory, which a run that continues has filled.
    world
        Number of ranks.
    resume
        Whether such a run is continued.

    Raises
    ------
    ValueError
        If ranks cannot share the parts equally or parts the windows.
    """
    parts = config.train.micro_batches or as_begun(folder, "micro_batches", resume) or world
    if parts % world or config.data.batch_size % parts:
        raise ValueError(
            f"train.micro_batches: got {counted(parts, 'part')} for {world} ranks and data.batch_size="
            f"{config.data.batch_size}, expected a multiple of the ranks that divides the batch; choose "
            "another number of ranks or of parts"
        )
    return dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batches=parts))


def as_begun(folder: Path, name: str, resume: Resume) -> Any:
    """Return a training setting of the run that will be continued, or None."""
    if resume != "auto" or not begun(folder):
        return None
    return saved_config(folder).get("train", {}).get(name)


def begin_together(
    ranks: Ranks, device: torch.device, folder: Path, config: PretrainConfig, **options: Any
) -> Path | None:
    """Let rank 0 look at the run directory and tell the others the step to start from.

    Parameters
    ----------
    ranks, device
        This rank among the others, and its device.
    folder, config
        Run directory and configuration.
    **options
        As :func:`~brainflow.training.run_dir.begin` takes them.

    Raises
    ------
    ValueError, OSError
        What rank 0 found wrong; the other ranks say that it did.
    """
    step, error = 0, None
    if ranks.first:
        try:
            found = begin(folder, config, **options)
            step = int(found.name.removeprefix("step-")) if found else 0
        # Kept for later: rank 0 has to take part in the agreement, or the others wait for it.
        except (ValueError, OSError) as reason:
            step, error = -1, reason
    step = ranks.agree(step, device)
    if error is not None:
        raise error
    if step < 0:
        raise ValueError("out: rank 0 refused the run directory; its message says why")
    return folder / CHECKPOINTS / f"step-{step:08d}" if step else None


@contextmanager
def collecting_rarely() -> Iterator[None]:
    """Keep Python's garbage collector from stopping single ranks at random moments."""
    enabled = gc.isenabled()
    # Whoever has frozen objects before, as a process that forks others does, would find them thawed.
    ours = not gc.get_freeze_count()
    gc.collect()
    if ours:
        # What is here already stays to the end and need not be looked at again.
        gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        if ours:
            gc.unfreeze()
        if enabled:
            gc.enable()


def device_of(name: str, number: int = 0) -> torch.device:
    """Return the device of a setting; GPU `number` of this machine."""
    device = resolve_device(name)
    if device.type == "cpu":
        return device
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def largest_batch(sampler: WindowSampler, store: BoldStore, dtype: torch.dtype) -> PackedBatch:
    """Return a batch of zeros as large as any that the sampler can give, on the host.

    Parameters
    ----------
    sampler
        Whose longest windows are taken, as many as a batch has.
    store
        Whose networks and longest TR are taken.
    dtype
        Type of the values.
    """
    longest = sampler.seq_max - 1
    lengths = np.full(sampler.windows_per_batch, longest, dtype=np.int32)
    if sampler.pairs:  # two halves and a gap of at least one time point
        lengths[0::2], lengths[1::2] = longest // 2, longest - 1 - longest // 2
    windows = Windows.end_to_end(
        lengths,
        t_r=float(np.max(store.runs.t_r)),
        is_next=np.zeros(len(lengths) // 2, np.float32) if sampler.pairs else None,
    )
    return PackedBatch.pack(torch.zeros(int(lengths.sum()), store.networks, dtype=dtype), windows)


def split_of(config: PretrainConfig, store: BoldStore, path: Path) -> Split:
    """Read the run's split, or make and save it.

    Of a split file only the parts train and validation are ever drawn from. It may be older than the store,
    or made for another store of the same people: whom it does not know is left out, with a warning.

    Parameters
    ----------
    config
        Which split: a file, or a share that validates.
    store
        Whose runs are split.
    path
        The run's own split file; a run that continues keeps it.

    Raises
    ------
    ValueError
        If the file is damaged, or a part that training needs holds no run of this store.
    """
    # A run that goes on keeps the split that it began with.
    if path.exists():
        return Split.load(path, snapshot=store.snapshot)
    if config.data.split:
        split = _given(config.data.split, store)
    else:
        split = split_runs(
            store.runs,
            sizes={"validation": config.data.validation_fraction},
            seed=config.train.seed,
            snapshot=store.snapshot,
        )
    split.save(path)
    return split


def _given(path: str, store: BoldStore) -> Split:
    """Return the split of a file for a store."""
    split = Split.load(path).for_store(store.runs, snapshot=store.snapshot)
    for part in ("train", "validation"):
        if not split.parts.get(part):
            raise ValueError(
                f"data.split: {path} puts no run of {store.path} into the part {part}; make a file for this "
                "store with `brainflow split`"
            )
    if split.left_out:
        warnings.warn(
            f"data.split: {path} does not know {listed(split.left_out)}: nothing of theirs is read. To train "
            "on them, make a new file that keeps the test people: brainflow split "
            f"{store.path} --test {path} --out NEW.json",
            SplitWarning,
            stacklevel=3,
        )
    return split
