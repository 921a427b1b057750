"""The directory of a run: who may write to it, and whether a configuration may continue what it holds."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from brainflow.config import PretrainConfig, to_dict
from brainflow.storage.files import output_folder

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
    "data.loader",
    "train.checkpoint_every",
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
    with (folder / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(
                f"out: another process is training in {folder}; stop it or choose another --out"
            ) from None
        yield


def begin(folder: Path, config: PretrainConfig, *, snapshot: str, resume: Resume) -> Path | None:
    """Write the run's configuration, or compare it with the one that is there.

    Parameters
    ----------
    folder
        Run directory, held by :func:`exclusive`.
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
    if resume == "never":
        for name in (CONFIG, SPLIT, METRICS, TRAIN_CSV, EVAL_CSV, "model.safetensors", "config.json"):
            (folder / name).unlink(missing_ok=True)
        for name in (CHECKPOINTS, BEST, RECONSTRUCTIONS):
            shutil.rmtree(folder / name, ignore_errors=True)
    (folder / MARKER).unlink(missing_ok=True)
    remove_partial(folder / CHECKPOINTS)
    if path.exists() and not _begun(folder):
        path.unlink()  # it failed before its first step: nothing to continue, nothing to lose
    if path.exists():
        # A run of an older version lacks settings that are younger: it had what is their default.
        younger = flatten(to_dict(PretrainConfig(store="", out="")))
        found = younger | flatten(json.loads(path.read_text(encoding="utf-8")))
        changed = [
            f"{key} is {wanted.get(key)!r}, was {found.get(key)!r}"
            for key in sorted(wanted.keys() | found.keys())
            if key not in FREE and wanted.get(key) != found.get(key)
        ]
        if changed:
            raise ValueError(
                f"out: {folder} holds a run with another configuration ({'; '.join(changed)}); "
                "choose another --out, or --no-resume to delete that run and start over"
            )
        return latest(folder / CHECKPOINTS)
    (folder / SPLIT).unlink(missing_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(
        json.dumps({**to_dict(config), "store_snapshot": snapshot}, indent=1) + "\n", encoding="utf-8"
    )
    partial.replace(path)
    return None


def _begun(folder: Path) -> bool:
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
