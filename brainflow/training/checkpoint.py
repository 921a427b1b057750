"""Checkpoints to resume from: a directory a step, written aside, made durable, then renamed.

    checkpoints/step-00000100/{model.safetensors, optimizer.safetensors, state.json, COMPLETE}

`torch.distributed.checkpoint` is not used: its default reader unpickles the `.metadata` file of whatever
directory it is given. Safetensors and JSON hold the same and cannot run code.

Sharded tensors are gathered, one at a time, and rank 0 writes them whole: a checkpoint does not say how many
ranks made it, and any number of them, in any layout, continues it.

Only what cannot be computed from the step is saved: data order, masks, learning rate and the random numbers
of dropout are functions of (seed, step).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

COMPLETE = "COMPLETE"
_STATE = "state.json"
_NAME = re.compile(r"step-(\d+)")


def save(
    root: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    keep: int,
    permanent_every: int = 0,
) -> Path:
    """Write the checkpoint of `step`; when it is safe on disk, delete all but the newest `keep`.

    Parameters
    ----------
    root
        Folder of the checkpoints.
    tensors
        File name without ending → its named tensors.
    state
        Anything JSON can hold.
    keep
        Newest checkpoints that stay.
    permanent_every
        Checkpoints at multiples of this many steps stay, too; 0 for none.

    Raises
    ------
    OSError
        If it cannot be written (disk full, quota): older checkpoints are untouched.
    """
    target = root / f"step-{step:08d}"
    if _step(target) is not None:
        return target
    partial = root / f"{target.name}.tmp"
    try:
        _remove(partial)
        _remove(target)  # left half-deleted by a process that was killed
        partial.mkdir(parents=True)
        for name, group in tensors.items():
            save_file(
                {key: value.detach().contiguous() for key, value in group.items()},
                partial / f"{name}.safetensors",
            )
        (partial / _STATE).write_text(json.dumps({"step": step, **state}, indent=1) + "\n", encoding="utf-8")
        sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        (partial / COMPLETE).write_text(json.dumps(sizes) + "\n", encoding="utf-8")
        for path in (*partial.iterdir(), partial):
            _fsync(path)
        partial.rename(target)
        _fsync(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        last = latest(root)
        kept = f"the last checkpoint, {last.name}, is intact" if last else "there is no earlier checkpoint"
        raise OSError(
            f"checkpoint {target} could not be written: {error}; {kept}. Free space, then resume"
        ) from error
    for old in complete(root)[:-keep]:
        if not (permanent_every and int(old.name.removeprefix("step-")) % permanent_every == 0):
            _remove(old)
    return target


class Writer:
    """Writes checkpoints in a thread, one at a time; an error comes up at the next call."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, *args: Any, **options: Any) -> None:
        """Do :func:`save` in the background; nobody may change the tensors until :meth:`wait` returns."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(args, options), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Return when the last checkpoint is safe on disk.

        Raises
        ------
        OSError
            If it could not be written; those before it are intact.
        """
        self.join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def join(self) -> None:
        """Return when the last checkpoint is safe on disk or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        try:
            save(*args, **options)
        except BaseException as error:
            self._error = error


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


def load(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read back (tensors, state) of one checkpoint; tensors on the CPU.

    Raises
    ------
    ValueError
        If the checkpoint is not complete.
    """
    if _step(path) is None:
        raise ValueError(
            f"checkpoint: {path} is not complete; expected a directory that `pretrain` has finished writing"
        )
    tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    return tensors, json.loads((path / _STATE).read_text(encoding="utf-8"))


def _step(path: Path) -> int | None:
    """Return the step of a complete checkpoint directory; None for all else, a truncated one included."""
    match = _NAME.fullmatch(path.name)
    try:
        sizes = json.loads((path / COMPLETE).read_text(encoding="utf-8"))
        whole = match and all((path / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return None
    return int(match[1]) if match and whole else None


def _remove(path: Path) -> None:
    """Delete a checkpoint; without its marker first, so that a half-deleted one is never picked up."""
    (path / COMPLETE).unlink(missing_ok=True)
    if path.exists():
        shutil.rmtree(path)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
