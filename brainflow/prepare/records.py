"""Outcome of each run, on disk, and the two reasons why there is no time series.

<work>/parts/<atlas>/<key>.part.npz    time series, censor bits and segments of a run under one atlas
<work>/before/<atlas>/<key>.part.npy   the time series before cleaning, coarsely, for the quality report
<work>/runs/<key>.json                 status, reason and quality of a run; written last
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from brainflow.prepare.files import RUN_ENTITIES
from brainflow.storage.files import replace_durably, replacing
from brainflow.storage.layout import to_json
from brainflow.storage.parts import part_path

DONE, EXCLUDED, FAILED = "done", "excluded", "failed"


class Excluded(Exception):
    """A rule that the user chose leaves the run out; not an error. The message is the reason."""


class Unusable(ValueError):
    """The run cannot be prepared: a file is missing, damaged or contradicts another; the message says it."""


def parts_of(work: Path, atlas: str) -> Path:
    """Return the directory with the parts of an atlas."""
    return work / "parts" / atlas


def record_path(work: Path, key: str) -> Path:
    """Return where the record of a run lies."""
    return work / "runs" / f"{key}.json"


def write_record(work: Path, record: dict[str, Any]) -> None:
    """Write the record of a run in one step."""
    path = record_path(work, record["key"])
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_durably(path, to_json(record))


def read_record(work: Path, key: str) -> dict[str, Any] | None:
    """Return the record of a run, or None if there is none, or a damaged one."""
    try:
        record = json.loads(record_path(work, key).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    whole = isinstance(record, dict) and {"fingerprint", "status", "reason", "notes"} <= record.keys()
    return record if whole else None


def read_records(work: Path) -> list[dict[str, Any]]:
    """Return all records, sorted by key.

    Raises
    ------
    FileNotFoundError
        If there are none.
    """
    paths = list((work / "runs").glob("*.json"))
    if not paths:
        raise FileNotFoundError(f"{work}: holds no prepared runs; run the participant level first")
    return sorted(map(_read_or_fail, paths), key=lambda record: record["key"])


def _read_or_fail(path: Path) -> dict[str, Any]:
    """Return a record, or that of a failed run where it is damaged."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["key"] and record["status"] and record["entities"] is not None and record["recipe"]:
            return dict(record)
        raise ValueError("lacks a value")
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        reason = f"{path}: its record is damaged ({type(error).__name__}); run the participant level again"
        return {"key": path.stem, "status": FAILED, "reason": reason, "notes": [], **_names(path.stem)}


def _names(key: str) -> dict[str, Any]:
    """Return dataset and entities from the key of a run."""
    parts = dict(part.split("-", 1) for part in key.split("_") if "-" in part)
    entities = {name: value for name, value in parts.items() if name in RUN_ENTITIES}
    return {"dataset": parts.get("ds", ""), "entities": entities}


def _before_path(work: Path, atlas: str, key: str) -> Path:
    return part_path(work / "before" / atlas, key).with_suffix(".npy")


def write_before(work: Path, atlas: str, key: str, series: np.ndarray) -> None:
    """Keep a run as it was before cleaning, as eighths of a standard deviation of each network in int8.

    Parameters
    ----------
    work, atlas, key
        Directory of parts and records, label of the atlas, key of the run.
    series
        float [time, networks], finite.
    """
    deviation = series - series.mean(axis=0)
    # A constant network becomes 0.
    scale = 8 / np.where(np.ptp(series, axis=0) > 0, series.std(axis=0), np.inf)
    path = _before_path(work, atlas, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        # Enough for a carpet plot, which saturates at 2 SD, and a quarter of float32's bytes.
        np.save(file, np.clip(np.rint(deviation * scale), -127, 127).astype(np.int8))


def read_before(work: Path, atlas: str, key: str) -> np.ndarray | None:
    """Return what `write_before` kept, float32 [time, networks] in standard deviations; None if nothing."""
    try:
        return np.load(_before_path(work, atlas, key), allow_pickle=False).astype(np.float32) / 8
    except (OSError, ValueError, EOFError):
        return None


def forget(work: Path, key: str, atlases: Sequence[str]) -> None:
    """Remove what an earlier preparation of a run left, the record first: it vouches for the parts."""
    record_path(work, key).unlink(missing_ok=True)
    for atlas in atlases:
        part_path(parts_of(work, atlas), key).unlink(missing_ok=True)
        _before_path(work, atlas, key).unlink(missing_ok=True)


def is_complete(work: Path, record: dict[str, Any] | None, fingerprint: str, atlases: Sequence[str]) -> bool:
    """Whether a run was prepared, or excluded by a rule, from the same inputs with the same settings.

    Parameters
    ----------
    work
        Where the parts lie.
    record
        Of the run; None if there is none.
    fingerprint
        Of its inputs and settings now.
    atlases
        Labels of the atlases that are wanted.
    """
    if record is None or record["fingerprint"] != fingerprint or record["status"] == FAILED:
        return False
    return record["status"] == EXCLUDED or all(
        part_path(parts_of(work, atlas), record["key"]).is_file() for atlas in atlases
    )
