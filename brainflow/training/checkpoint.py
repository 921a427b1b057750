"""Checkpoints to resume from: a directory a step, written aside, made durable, then renamed.

    checkpoints/step-00000100/{shard-00001-….safetensors, …, state.json, COMPLETE}

The tensors go through `torch.distributed.checkpoint`: each rank writes what it holds into a file of its own,
and any number of ranks, in any layout, reads back what it needs. Of its formats the safetensors one is used:
the default one keeps a pickle (`.metadata`) that its reader loads, this one keeps the places of the shards in
the safetensors headers. Nothing is negotiated between ranks while saving (who writes a tensor follows from
its size and name), so a checkpoint is written by a thread, beside the training's own collectives; rank 0
waits for the others' files, lists all of them with size and checksum in COMPLETE, and renames the directory.

Beside the checkpoints a run keeps its release form, for which :func:`facts` says where the weights come from.

Only what cannot be computed from the step is saved: data order, masks, learning rate and the random numbers
of dropout are functions of (seed, step).
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from brainflow.config import PretrainConfig, to_dict
from brainflow.data.splits import Split
from brainflow.files import is_count, read_json
from brainflow.pretrained.compatibility import fingerprint
from brainflow.pretrained.hub import base_model
from brainflow.storage import BoldStore

from .parallel import Ranks

PATIENCE = 900.0  # seconds that rank 0 waits for the files of other ranks
GRACE = 10.0  # the same in a run that is failing
# Attributes of the store that whoever feeds the model must match.
_MATCH = ("parcellation", "network_names", "network_coordinates", "normalisation", "preprocessing")
COMPLETE = "COMPLETE"
POLL = 0.02  # seconds between two looks for the files of other ranks
_STATE = "state.json"
_NAME = re.compile(r"step-(\d+)")

# `no_dist` is what is meant: every rank saves and loads for itself.
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)


class _ShardWriter(dcp.HuggingFaceStorageWriter):
    """Writes one rank's tensors; without a global plan the rank has to name its own file."""

    def __init__(self, path: Path, rank: int) -> None:
        super().__init__(str(path), save_distributed=True)
        self._shard = rank + 1

    def prepare_global_plan(self, plans: list[dcp.SavePlan]) -> list[dcp.SavePlan]:
        return [replace(plan, storage_data={"shard_index": self._shard}) for plan in plans]


def owned(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Return host copies of what this rank has to write.

    Parameters
    ----------
    tensors
        Name → tensor: the same names on all ranks. A sharded one is a DTensor; a plain one is equal on all
        ranks, and one of them writes it.
    ranks
        This rank among the others.
    """
    # By size, in turn, so that every rank writes about as much.
    by_size = sorted(tensors, key=lambda name: (-tensors[name].numel(), name))
    mine = {}
    for place, name in enumerate(by_size):
        value = tensors[name].detach()
        if not isinstance(value, DTensor):
            keep = place % ranks.world == ranks.rank
        else:
            # Of a shard that several ranks hold one writes it, for each tensor another one.
            coordinate: Any = value.device_mesh.get_coordinate()
            keep = value.to_local().numel() > 0 and all(
                at == place % value.device_mesh.size(dim)
                for dim, (at, how) in enumerate(zip(coordinate, value.placements, strict=True))
                if how.is_replicate()
            )
        if keep:
            # A copy on the CPU, too: the next step changes the tensor while a thread writes it.
            mine[name] = value.to("cpu", copy=True)
    return mine


def save(
    root: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    *,
    keep: int,
    permanent_every: int = 0,
    ranks: Ranks | None = None,
    attempt: int = 0,
    patience: Callable[[], bool] = lambda: True,
) -> Path:
    """Write this rank's part of the checkpoint of `step`; rank 0 completes it and deletes older ones.

    Parameters
    ----------
    root
        Folder of the checkpoints.
    step
        Optimizer steps done; names the checkpoint.
    tensors
        What :func:`owned` returned.
    state
        Anything JSON can hold; rank 0's is kept.
    keep
        Newest checkpoints that stay.
    permanent_every
        Checkpoints at multiples of this many steps stay, too; 0 for none.
    ranks
        Who writes; alone if absent.
    attempt
        A number that all ranks share and no earlier process had: shards of different processes never mix.
    patience
        Asked by rank 0 while it waits for other ranks' files; False gives up.

    Raises
    ------
    OSError
        If it cannot be written (disk full, quota, another rank failed): older checkpoints are untouched.
    """
    ranks = ranks or Ranks()
    target = root / f"step-{step:08d}"
    if _step(target) is not None:
        return target
    partial = root / f"{target.name}.{attempt:x}.tmp"
    try:
        partial.mkdir(parents=True, exist_ok=True)
        _write_shard(partial, tensors, ranks.rank)
        if not ranks.first:
            return target
        sizes = _gather_sizes(partial, ranks.world, patience)
        _write_json(partial / _STATE, {"step": step, "world": ranks.world, **state})
        sizes[_STATE] = _measure(partial / _STATE)
        # Last, with the sizes of all: without it, or with other sizes, a directory is no checkpoint.
        _write_json(partial / COMPLETE, sizes)
        _fsync(partial)
        _remove(target)  # left half-deleted by a process that was killed
        partial.rename(target)
        _fsync(root)
    except (OSError, SafetensorError, CheckpointException) as error:
        reason: BaseException = error
        if isinstance(error, CheckpointException):
            # There is only one: with `no_dist` each rank saves for itself.
            reason = next(iter(error.failures.values()))[0]
            if not isinstance(reason, OSError | SafetensorError):
                raise reason from None
        if ranks.first:
            shutil.rmtree(partial, ignore_errors=True)
        else:
            _failed(partial, ranks.rank)
        last = latest(root)
        kept = f"the last checkpoint, {last.name}, is intact" if last else "there is no earlier checkpoint"
        raise OSError(
            f"checkpoint {target} could not be written: {reason}; {kept}. Free space, then resume"
        ) from reason
    # Only now that the new one is there for good.
    for old in complete(root)[:-keep]:
        if not (permanent_every and int(old.name.removeprefix("step-")) % permanent_every == 0):
            _remove(old)
    return target


def complete(root: Path) -> list[Path]:
    """Return the complete checkpoints under `root`, oldest first."""
    if not root.is_dir():
        return []
    found = [(step, path) for path in root.iterdir() if (step := _step(path)) is not None]
    return [path for _, path in sorted(found)]


def latest(root: Path) -> Path | None:
    """Return the newest complete checkpoint, if there is one."""
    found = complete(root)
    return found[-1] if found else None


def remove_partial(root: Path) -> None:
    """Delete what killed processes left half-written; nobody may be writing."""
    for path in root.glob("*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def damaged(path: Path, ranks: Ranks | None = None) -> list[str]:
    """Return this rank's share of the files of a checkpoint whose checksum is not the recorded one."""
    ranks = ranks or Ranks()
    names = sorted(_files(path).items())[ranks.rank :: ranks.world]
    return [name for name, found in names if _measure(path / name) != found]


def names(path: Path) -> set[str]:
    """Return the names of the tensors in a checkpoint."""
    return set(_metadata(path))


def read_into(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill tensors, DTensors among them, with what a checkpoint holds under their names.

    Raises
    ------
    ValueError
        If the checkpoint is not complete, or lacks one of them in that shape.
    """
    reader = dcp.HuggingFaceStorageReader(str(_whole(path)))
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False)
    try:
        dcp.load(tensors, storage_reader=reader, planner=planner, no_dist=True)
    except CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise ValueError(
            f"checkpoint: {path} does not fit this run: {_shown(reason)}; delete it, and the run goes on "
            "from the checkpoint before"
        ) from error


def read_state(path: Path) -> dict[str, Any]:
    """Return what was saved beside the tensors.

    Raises
    ------
    ValueError
        If the checkpoint is not complete, or `step`, `best` and `stale` are no numbers.
    """
    state = read_json(_whole(path) / _STATE)
    wrong: list[str] = [name for name in ("step", "stale") if name in state and not is_count(state[name])]
    best = state.get("best", 0.0)
    if isinstance(best, bool) or not isinstance(best, int | float):  # infinite before the first validation
        wrong.append("best")
    if wrong:
        raise ValueError(
            f"checkpoint: {path / _STATE}: {wrong[0]} is no number; delete {path}, and the run goes on "
            "from the checkpoint before"
        )
    return state


def load(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint, whole, on the CPU.

    Raises
    ------
    ValueError
        If its headers name more than its bytes can hold, or a file of it is damaged.
    """
    found = _metadata(path)
    said = sum(m.size.numel() * m.properties.dtype.itemsize for m in found.values())
    there = sum(size for size, _ in _files(path).values())
    # Compared before memory is taken for what the headers claim.
    if said > there:
        raise ValueError(
            f"checkpoint: {path} has {there} bytes, but its headers name tensors of {said}; delete it, and "
            "the run goes on from the checkpoint before"
        )
    tensors = {name: torch.empty(m.size, dtype=m.properties.dtype) for name, m in found.items()}
    read_into(path, tensors)
    return tensors


def _metadata(path: Path) -> dict[str, Any]:
    """Return name → what the shards' headers say of a tensor.

    Raises
    ------
    ValueError
        If they cannot be read.
    """
    reader = dcp.HuggingFaceStorageReader(str(_whole(path)))
    try:
        return dict(reader.read_metadata().state_dict_metadata)
    except Exception as error:  # torch raises whatever a damaged header leads to
        raise ValueError(
            f"checkpoint: the headers in {path} cannot be read ({_shown(error)}); delete it, and the run "
            "goes on from the checkpoint before"
        ) from error


def _shown(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:200]


def _write_shard(partial: Path, tensors: Mapping[str, Tensor], rank: int) -> None:
    """Write one rank's file and, when that is safe on disk, a note of its size and checksum."""
    if tensors:
        planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
        dcp.save(dict(tensors), storage_writer=_ShardWriter(partial, rank), planner=planner, no_dist=True)
    written = {path.name: _measure(path) for path in partial.glob(f"shard-{rank + 1:05d}-*")}
    note = partial / f"rank-{rank:05d}.json"
    # Renamed when it is whole: rank 0 reads it as soon as it has its name.
    _write_json(note.with_suffix(".partial"), written)
    note.with_suffix(".partial").rename(note)


def _gather_sizes(partial: Path, world: int, patience: Callable[[], bool]) -> dict[str, list[int]]:
    """Wait for the notes of all ranks, and merge and delete them."""
    missing = set(range(world))
    sizes: dict[str, list[int]] = {}
    while missing:
        for rank in sorted(missing):
            note = partial / f"rank-{rank:05d}.json"
            if note.exists():
                sizes.update(json.loads(note.read_text(encoding="utf-8")))
                missing.discard(rank)
        if failed := sorted(partial.glob("rank-*.failed")):
            raise OSError(f"{failed[0].stem} could not write its part; its own message says why")
        if missing and not patience():
            raise OSError(f"no file came from rank {min(missing)}")
        if missing:
            time.sleep(POLL)
    for rank in range(world):
        (partial / f"rank-{rank:05d}.json").unlink()
    return sizes


def _failed(partial: Path, rank: int) -> None:
    """Tell rank 0, if the disk allows, that it waits in vain."""
    with suppress(OSError):
        (partial / f"rank-{rank:05d}.failed").touch()


def _whole(path: Path) -> Path:
    if _step(path) is None:
        raise ValueError(
            f"checkpoint: {path} is not complete; expected a directory that `pretrain` has finished writing"
        )
    return path


def _step(path: Path) -> int | None:
    """Return the step of a complete checkpoint directory; None for all else, a truncated one included."""
    match = _NAME.fullmatch(path.name)
    try:
        files = _files(path).items()
        whole = match and all((path / name).stat().st_size == size for name, (size, _) in files)
    except (OSError, ValueError):
        return None
    return int(match[1]) if match and whole else None


def _files(path: Path) -> dict[str, list[int]]:
    """Return name → [bytes, crc32c] of the files of a checkpoint.

    Raises
    ------
    ValueError
        If COMPLETE is damaged, or names a file that is not in the checkpoint's folder.
    """
    files = read_json(path / COMPLETE)
    for name, found in files.items():
        inside = name not in ("", ".", "..") and "/" not in name and not (path / name).is_symlink()
        if not (inside and isinstance(found, list) and len(found) == 2 and all(map(is_count, found))):
            raise ValueError(
                f"{path / COMPLETE}: damaged at {name[:60]!r}, expected files with size and checksum"
            )
    if _STATE not in files:
        raise ValueError(f"{path / COMPLETE}: does not list {_STATE}")
    return files


def _measure(path: Path) -> list[int]:
    """Return [bytes, crc32c] of a file."""
    checksum, size = 0, 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum = google_crc32c.extend(checksum, block)
            size += len(block)
    return [size, checksum]


def _remove(path: Path) -> None:
    """Delete a checkpoint; without its marker first, so that a half-deleted one is never picked up."""
    (path / COMPLETE).unlink(missing_ok=True)
    if path.exists():
        shutil.rmtree(path)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value) + "\n", encoding="utf-8")
    _fsync(path)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Writer:
    """Writes checkpoints in a thread, one at a time; an error comes up at the next call."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._until = math.inf

    def save(self, *args: Any, **options: Any) -> None:
        """Do :func:`checkpoint.save` in the background; nobody may change the tensors until it is done."""
        self.wait()
        self._until = time.monotonic() + PATIENCE
        # No daemon: Python would end in the middle of a file.
        self._thread = threading.Thread(target=self._run, args=(args, options), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Return when this process's part of the last checkpoint is safe on disk; on rank 0, all of it.

        Raises
        ------
        OSError
            If it could not be written; those before it are intact.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Finish a checkpoint that was begun, whatever went wrong; other ranks get a moment to do theirs."""
        self._until = min(self._until, time.monotonic() + GRACE)
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _patient(self) -> bool:
        return time.monotonic() < self._until

    def _run(self, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        try:
            save(*args, **options, patience=self._patient)
        except BaseException as error:
            self._error = error


def facts(config: PretrainConfig, store: BoldStore, split: Split, step: int) -> dict[str, Any]:
    """Return what `config.json` says beside the architecture.

    Keys: `pretrain` (the run's configuration), `base_model` (where it began from one of the hub), `step`, and
    `data`: the store's snapshot, parcellation, network names and coordinates, normalisation and
    preprocessing, and of the training runs the repetition times in seconds, the number of runs by dataset,
    the subjects whom the run has read, so that nobody evaluates on them unawares, and what the signal is like
    (`fingerprint`; None where every training run has damage), for `brainflow doctor`.
    """
    runs = store.runs
    train = split.part("train", runs)
    datasets = np.asarray(runs.dataset)[train].tolist()
    read = train  # damaged runs were left out of training
    if config.data.on_corrupt == "skip":
        read = train[store.intact(runs.start[train], runs.length[train])]
    data = {
        "store_snapshot": store.snapshot,
        **{name: store.attributes.get(name) for name in _MATCH},
        "t_r": sorted(set(np.asarray(runs.t_r)[train].tolist())),
        "datasets": dict(sorted(Counter(datasets).items())),
        # validation chose weights and share, and the released linear path is fitted to its runs, too
        "training_subjects": sorted(
            {split.subjects[key] for part in ("train", "validation") for key in split.parts[part]}
        ),
        "fingerprint": fingerprint(store, read) if len(read) else None,
    }
    return {"pretrain": to_dict(config), **base_model(config.train.init), "step": step, "data": data}
