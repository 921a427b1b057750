"""The directory of a run: who may write to it, and whether a configuration may continue what it holds."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from brainflow.config import PretrainConfig, to_dict
from brainflow.files import read_json
from brainflow.frameworks.settings import check_settings, model_config, without_foreign
from brainflow.storage.files import output_folder, write_text

from .checkpoint import latest, remove_partial
from .interrupt import MARKER
from .metrics import EVAL_CSV, METRICS, TRAIN_CSV

CONFIG, SPLIT, CHECKPOINTS, BEST = "train_config.json", "split.json", "checkpoints", "best"
RECONSTRUCTIONS = "reconstructions"
# These may change on resume: where and how often a run writes and how fast it reads, not what it computes.
FREE = (
    "store",
    "out",
    "device",
    "model.attention",
    "data.loader",
    "train.checkpoint_every",
    "train.compile",
    "train.keep",
    "train.permanent_every",
    "train.parallel",
    "train.plot",
    "train.tracker",
)
Resume = Literal["auto", "never"]


class Busy(ValueError):
    """Another process is training in the run directory."""


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the run directory, made if absent, for this process alone.

    Raises
    ------
    Busy
        If another process is training in it.
    ValueError
        If it is a file, or a store.
    """
    output_folder(folder, "run")
    descriptor = _open_lock(folder / ".lock")
    try:
        try:
            # The kernel lets go of it when the process ends, however that happens: no lock stays behind.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(
                f"out: another process is training in {folder}; stop it or choose another --out"
            ) from None
        yield
    finally:
        os.close(descriptor)


def _open_lock(path: Path) -> int:
    """Open the lock file, which nobody reads or writes; what a link in its place names is not touched."""
    flags = os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        return os.open(path, flags, 0o644)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError(f"out: {path} is a link, expected a file of the run; delete it") from None
        raise


def begin(folder: Path, config: PretrainConfig, *, snapshot: str, resume: Resume) -> Path | None:
    """Write the run's configuration, or compare it with the one that is there.

    Parameters
    ----------
    folder
        Run directory, held by :func:`exclusive`.
    config
        Configuration of the run, written or compared.
    snapshot
        Digest of the store's content; it belongs to the configuration, the path of the store does not.
    resume
        "auto" continues from the newest complete checkpoint; "never" deletes what an earlier run left.

    Returns
    -------
    Path or None
        The checkpoint to start from.

    Raises
    ------
    ValueError
        If the directory belongs to a run with another configuration; the message names each field.
    """
    wanted = {**flatten(to_dict(config)), "store_snapshot": snapshot}
    path = folder / CONFIG
    for name in (CHECKPOINTS, BEST, RECONSTRUCTIONS):
        if (folder / name).is_symlink():
            raise ValueError(
                f"out: {folder / name} is a link, through which a run writes nothing; delete it, or choose "
                "as --out the folder that it stands for"
            )
    if resume == "never":
        for name in (CONFIG, SPLIT, METRICS, TRAIN_CSV, EVAL_CSV, "model.safetensors", "config.json"):
            (folder / name).unlink(missing_ok=True)
        for name in (CHECKPOINTS, BEST, RECONSTRUCTIONS):
            shutil.rmtree(folder / name, ignore_errors=True)
    (folder / MARKER).unlink(missing_ok=True)
    remove_partial(folder / CHECKPOINTS)
    for left in [*folder.glob("*.partial"), *(folder / BEST).glob("*.partial")]:
        left.unlink()  # by a process that was killed, or a link where a file is going to be written
    if path.exists() and not begun(folder):
        path.unlink()  # it failed before its first step: nothing to continue, nothing to lose
    if path.exists():
        saved = saved_config(folder)
        # A run of an older version lacks settings that are younger: it had what is their default.
        model = model_config(saved.get("model", {}).get("framework", "csm"))
        found = flatten(to_dict(PretrainConfig(store="", out="", model=model))) | flatten(saved)
        changed = [
            f"{key} is {wanted[key]!r}, was {found.get(key)!r}"
            for key in sorted(wanted.keys() & found.keys() | {"store_snapshot"})
            if key not in FREE and wanted[key] != found.get(key)
        ]
        if changed:
            raise ValueError(
                f"out: {folder} holds a run with another configuration ({'; '.join(changed)}); "
                "choose another --out, or --no-resume to delete that run and start over"
            )
        return latest(folder / CHECKPOINTS)
    # Of a run that never began, perhaps with other settings.
    (folder / SPLIT).unlink(missing_ok=True)
    write_text(path, json.dumps({**to_dict(config), "store_snapshot": snapshot}, indent=1) + "\n")
    return None


def saved_config(folder: Path) -> dict[str, Any]:
    """Return the configuration that a run began with, as nested dicts; empty if there is none.

    Raises
    ------
    ValueError
        If the file is damaged; the message names it and what to do.
    """
    path = folder / CONFIG
    if not path.exists():
        return {}
    try:
        values = read_json(path)
        train = values.get("train") if isinstance(values, dict) else None
        if isinstance(train, dict) and isinstance(train.get("compile"), bool):  # before there was auto
            train["compile"] = "on" if train["compile"] else "off"
        model = values.get("model") if isinstance(values, dict) else None
        if isinstance(model, dict):
            values["model"] = without_foreign(model)
        check_settings({name: value for name, value in values.items() if name != "store_snapshot"})
    except ValueError as error:
        raise ValueError(
            f"out: the configuration of this run cannot be read ({error}); put a copy of {path} back, choose "
            "another --out, or --no-resume to delete the run and start over"
        ) from None
    return values


def begun(folder: Path) -> bool:
    """Whether a run has left anything but its configuration."""
    metrics = folder / METRICS
    return (metrics.exists() and metrics.stat().st_size > 0) or (folder / CHECKPOINTS).exists()


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dicts as one dict with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
