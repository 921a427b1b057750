"""Parts: runs written by independent processes, one file each, that a later step gathers into a store."""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from .errors import StoreError
from .files import replacing
from .layout import run_key, to_json
from .part_reader import read_part
from .quantise import run_statistics
from .segments import Segment
from .store import BoldStore
from .writer import StoreWriter

SUFFIX = ".part.npz"
_LONGEST_NAME = 180
_EPOCH = (1980, 1, 1, 0, 0, 0)


def write_part(
    directory: str | os.PathLike[str],
    bold: np.ndarray,
    *,
    t_r: float,
    dataset: str,
    subject: str,
    session: str = "",
    task: str = "",
    run: str = "",
    key: str | None = None,
    censor: np.ndarray | None = None,
    segments: Iterable[Segment] = (),
) -> bool:
    """Write one run as a part, atomically; any number of processes may do so in one directory.

    Parameters
    ----------
    directory : made if it is not there
    bold, t_r, … : as in `StoreWriter.append`

    Returns
    -------
    bool : False if this part was there already, which is then left as it is
    """
    entities = {"dataset": dataset, "subject": subject, "session": session, "task": task, "run": run}
    key = run_key(**entities) if key is None else key
    path = part_path(directory, key)
    if path.exists():
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    labelled = [
        {
            "onset": int(s.onset),
            "length": int(s.length),
            "labels": {k: _plain(v) for k, v in s.labels.items()},
        }
        for s in segments
    ]
    header = {"key": key, "t_r": float(t_r), "segments": labelled, **entities}
    arrays = {"bold": np.asarray(bold), "header": np.frombuffer(to_json(header), np.uint8)}
    if censor is not None:
        arrays["censor"] = np.asarray(censor, bool)
    with replacing(path) as file:
        _write_npz(file, arrays)
    return True


def part_path(directory: str | os.PathLike[str], key: str) -> Path:
    """File of the part of a run, by its key."""
    name = quote(key, safe="")
    if len(name) > _LONGEST_NAME:
        name = f"{name[: _LONGEST_NAME - 17]}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    return Path(directory) / (re.sub(r"^\.", "%2E", name) + SUFFIX)


def gather(
    parts: str | os.PathLike[str],
    store: str | os.PathLike[str],
    *,
    progress: Callable[[int, int], None] | None = None,
    **create: Any,
) -> int:
    """Commit the parts of a directory to a store, in the order of their keys, all at once.

    Parts that the store holds already are passed over, so a gather may be repeated.

    Parameters
    ----------
    parts : directory that `write_part` filled
    store : runs are added if it exists, unless `overwrite=True` is among `create`
    progress : called with (parts done, parts in all)
    create : keyword arguments of `StoreWriter.create` for a new store, without `networks`

    Returns
    -------
    int : runs added

    Raises
    ------
    StoreError : if there are no parts, one is damaged, or one differs from the run of its key in the store
    """
    files = sorted(
        (read_part(path)["key"], path) for path in Path(parts).glob(f"*{SUFFIX}") if path.name[0] != "."
    )
    if not files:
        raise StoreError(f"{parts}: holds no parts (*{SUFFIX}); write them with write_part")
    committed: dict[str, int] = {}
    appending = Path(store).exists() and not create.get("overwrite")
    if appending:
        writer = StoreWriter.append_to(store)
    else:
        networks = int(read_part(files[0][1])["bold"].shape[1])
        writer = StoreWriter.create(store, networks=networks, **create)
    added = 0
    with writer:
        if appending:
            opened = BoldStore.open(store, fallback=False)
            committed = {key: i for i, key in enumerate(opened.runs.key.tolist())}
        for done, (key, path) in enumerate(files):
            part = read_part(path)
            if key in committed:
                _compare(opened, committed[key], part, path)
            else:
                writer.append(**part)
                added += 1
            if progress is not None:
                progress(done + 1, len(files))
    return added


def _compare(store: BoldStore, run: int, part: dict[str, Any], path: Path) -> None:
    """Refuse a part that is not the run of its key."""
    mean, std = run_statistics(part["bold"])
    held = store.statistics(run)
    same = len(part["bold"]) == store.runs.length[run] and part["t_r"] == store.runs.t_r[run]
    if not (same and np.array_equal(mean, held["mean"]) and np.array_equal(std, held["std"])):
        raise StoreError(
            f"{path}: the store holds another run under the key {part['key']}; give it another key"
        )


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _write_npz(file: Any, arrays: dict[str, np.ndarray]) -> None:
    """An uncompressed .npz without time stamps."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy", _EPOCH), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)
