"""Reading the released data: WebDataset tars of pickled runs (upstream) or trials (downstream)."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import StoreError
from ..normalise import Kind
from ..tables import Label, Segment
from .limits import regular_size
from .session import IngestReport, IngestSession
from .unpickle import Value, restricted_loads

PICKLES = (".pyd", ".pickle", ".pkl")
_TRIAL = re.compile(r"(?P<run>.+)_sample[_-](?P<number>\d{1,9})")
_LONGEST_PADDING = 16 * 2**20  # tar fills its last record with zeros, usually to 10 KiB
_ENTITIES = {"ds": "dataset", "sub": "subject", "ses": "session", "task": "task", "run": "run"}


def ingest_tar(
    paths: Sequence[str | os.PathLike[str]],
    store_path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    normalise: Kind = "none",
    progress: Callable[[int, int], None] | None = None,
    **create: Any,
) -> IngestReport:
    """Write the runs of WebDataset tars to a store.

    An upstream tar holds one sample, a whole run. A downstream tar holds one sample a trial, with keys that
    end in `_sample_001`: the trials of a run are laid one behind the other, each a segment with its label
    columns and its number as `sample`. What lay between the trials was not released, so time jumps at their
    borders.

    Parameters
    ----------
    paths
        Tars, uncompressed.
    store_path
        Runs are added if the store exists.
    overwrite
        Replace the store.
    normalise
        What is done to each run; the trials of a run count as one.
    progress
        Called with (tars done, tars in all).
    create
        Keyword arguments of `StoreWriter.create` for a new store, without `networks`.

    Returns
    -------
    IngestReport
        A bad tar is in `failures` with its reason, and nothing of it is in the store.

    Raises
    ------
    StoreError
        If the store itself cannot be written.
    """
    with IngestSession(store_path, create, overwrite=overwrite, normalise=normalise) as session:
        for done, path in enumerate(paths):
            session.add(os.fspath(path), read_tar(path))
            if progress is not None:
                progress(done + 1, len(paths))
    return session.report


def read_tar(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Yield runs of one tar, as keyword arguments of `StoreWriter.append`.

    Raises
    ------
    StoreError
        If the tar is damaged, incomplete or not of the released form, naming it and the member.
    """
    where = os.fspath(path)
    samples: dict[str, dict[str, bytes]] = {}
    for name, data in _members(Path(path)):
        key, _, kind = name.rpartition("/")[2].partition(".")
        sample = samples.setdefault(key, {})
        if kind in sample:
            raise StoreError(f"{where}: member {name} is there twice")
        sample[kind] = data
    runs: dict[str, dict[int | None, str]] = {}
    for key in samples:
        trial = _TRIAL.fullmatch(key)
        run, number = (trial["run"], int(trial["number"])) if trial else (key, None)
        trials = runs.setdefault(run, {})
        if number in trials:
            raise StoreError(f"{where}: {key} and {trials[number]} are the same sample")
        trials[number] = key
    for run, trials in runs.items():
        if None in trials and len(trials) > 1:
            raise StoreError(f"{where}: {run} is there as a whole run and as trials")
        yield _assemble(where, run, {number: samples[key] for number, key in trials.items()})


def parse_key(key: str) -> dict[str, str]:
    """Return entities of `ds-…_sub-…[_ses-…]_task-…[_acq-…][_run-…]`; others stay in the key only.

    Raises
    ------
    ValueError
        If dataset or subject is missing.
    """
    pairs = [part.partition("-") for part in key.split("_")]
    entities = {_ENTITIES[name]: value for name, _, value in pairs if name in _ENTITIES and value}
    if not {"dataset", "subject"} <= entities.keys():
        raise ValueError(f"key {key!r}: expected ds-<dataset>_sub-<subject>[_ses-…]_task-…[_run-…]")
    return entities


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of each member of a tar that is complete to its end."""
    size = regular_size(path)
    try:
        # "r:" opens uncompressed tars only: a compressed one could become any size.
        with tarfile.open(path, "r:") as tar:
            end = 0
            for member in tar:
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if member.isdir():
                    end = member.offset_data
                    continue
                if not member.isreg() or member.issparse() or not 0 <= member.size <= size:
                    raise StoreError(f"{path}: member {member.name[:80]!r} is not a plain file")
                file = tar.extractfile(member)
                assert file is not None
                yield member.name, file.read()
                tar.members.clear()  # type: ignore[attr-defined]  # a tar of empty members would take twice
    except StoreError:
        raise
    except Exception as error:  # a damaged header fails in any way
        raise StoreError(f"{path}: not a readable tar ({type(error).__name__}: {error})") from None
    # `tarfile` takes a tar that was cut between two members for a whole one.
    if not tarfile.BLOCKSIZE <= size - end <= _LONGEST_PADDING or any(_read_from(path, end)):
        raise StoreError(f"{path}: the tar is truncated or damaged behind byte {end}; download it again")


def _read_from(path: Path, begin: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(begin)
        return file.read()


def _assemble(where: str, run: str, trials: Mapping[int | None, Mapping[str, bytes]]) -> dict[str, Any]:
    """Return one run from its whole-run sample or from its trials in order of their numbers."""
    try:
        entities = parse_key(run)
    except ValueError as error:
        raise StoreError(f"{where}: {error}") from None
    blocks: list[np.ndarray] = []
    segments: list[Segment] = []
    t_rs: set[float] = set()
    onset = 0
    for number in sorted(trials, key=lambda n: -1 if n is None else n):
        member = run if number is None else f"{run}_sample_{number:03d}"
        values = {
            _label_name(kind): _read(data, kind, f"{where}: {member}.{kind}")
            for kind, data in trials[number].items()
        }
        bold, t_r = values.pop("bold", None), values.pop("t_r", None)
        if not isinstance(bold, np.ndarray) or bold.ndim != 2 or t_r is None:
            raise StoreError(f"{where}: {member}: expected bold.pyd [time, networks] and t_r.pyd")
        if blocks and blocks[0].shape[1] != bold.shape[1]:
            raise StoreError(
                f"{where}: {member}: has {bold.shape[1]} networks, others have {blocks[0].shape[1]}"
            )
        t_rs.add(_number(t_r, f"{where}: {member}.t_r"))
        labels = {name: _label(value, f"{where}: {member}.{name}") for name, value in values.items()}
        if number is not None:
            labels["sample"] = number
        if labels:
            segments.append(Segment(onset=onset, length=len(bold), labels=labels))
        blocks.append(bold)
        onset += len(bold)
    if len(t_rs) != 1:
        raise StoreError(f"{where}: {run}: its trials have different repetition times, {sorted(t_rs)} s")
    return {"bold": _concatenate(blocks), "t_r": t_rs.pop(), "key": run, "segments": segments, **entities}


def _concatenate(blocks: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.asarray(block) for block in blocks])


def _label_name(kind: str) -> str:
    for suffix in (*PICKLES, ".txt"):
        kind = kind.removesuffix(suffix)
    return kind


def _read(data: bytes, kind: str, where: str) -> Value:
    if kind.endswith(PICKLES):
        return restricted_loads(data, where)
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise StoreError(f"{where}: expected text in UTF-8 or a pickle named .pyd") from None


def _label(value: Value, where: str) -> Label:
    if isinstance(value, np.ndarray):
        if value.size != 1:
            raise StoreError(f"{where}: expected one label, got an array of shape {list(value.shape)}")
        return value.reshape(-1)[0].item()
    return value


def _number(value: Value, where: str) -> float:
    label = _label(value, where)
    try:
        return float(label)
    except (ValueError, OverflowError):
        raise StoreError(f"{where}: expected a number of seconds") from None
