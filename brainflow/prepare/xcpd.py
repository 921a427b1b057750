"""XCP-D's parcel time series, `*_atlas-<label>[_stat-mean]_timeseries.{tsv,ptseries.nii}`, → a store."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from brainflow.prepare.bids import dataset_name
from brainflow.prepare.files import RUN_ENTITIES, BidsFile, make_key, parse_name
from brainflow.prepare.records import Unusable
from brainflow.prepare.surfaces import read_parcels
from brainflow.prepare.timing import repetition_time
from brainflow.storage.ingest.foreign import MAX_NETWORKS
from brainflow.storage.ingest.limits import ALLOWANCE, TEXT_BYTES, regular_size
from brainflow.storage.ingest.session import IngestReport, IngestSession
from brainflow.storage.normalise import Kind

_ENDINGS = (".tsv", ".ptseries.nii")  # the first is taken where a run has both


def ingest_xcpd(
    folder: Path,
    store_path: str | os.PathLike[str],
    *,
    atlas: str = "",
    space: str = "",
    dataset: str = "",
    dtype: str = "float16",
    normalise: Kind = "none",
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> IngestReport:
    """Write the parcel time series of an XCP-D output to a store.

    Volumes that XCP-D marked in `_outliers.tsv` are censored. Where it removed them from the series, they are
    put back, interpolated in time, so that the time points are a repetition time apart again. A parcel that
    XCP-D left empty (`n/a`, too little of it was recorded) is 0 throughout. Series that it joined from
    several runs are left out. `notes` of the report say all this.

    Parameters
    ----------
    folder
        XCP-D's output.
    store_path
        Runs are added if the store exists.
    atlas
        Label of the parcellation, such as "4S456Parcels"; needed if there are several.
    space
        Of the series, such as "fsLR"; needed if there are several.
    dataset
        Name of the dataset in the keys of runs; by default that of its folder.
    dtype
        Element type of a new store.
    normalise
        What is done to each run.
    overwrite
        Replace the store.
    progress
        Called with (runs done, runs in all).

    Raises
    ------
    FileNotFoundError
        If there is no such folder.
    ValueError
        If it holds no time series, or of several atlases or spaces and none is chosen.
    StoreError
        If the store cannot be written.
    """
    series, others = _find(folder)
    chosen, label, where = _choose(series, folder, atlas, space)
    joined = [file for file in chosen if _is_joined(file, chosen)]
    chosen = [file for file in chosen if file not in joined]
    names = _first_names(chosen)
    create = {
        "dtype": dtype,
        "parcellation": label,
        "network_names": names,
        "preprocessing": {"space": where, "pipeline": "XCP-D"},
        "provenance": {"made_by": "brainflow ingest xcpd"},
    }
    name = dataset or dataset_name(folder)
    with IngestSession(store_path, create, overwrite=overwrite, normalise=normalise) as session:
        for file in joined:
            session.report.notes[make_key(name, file.entities)] = "XCP-D joined it from runs; they were taken"
        for done, file in enumerate(chosen, 1):
            notes: list[str] = []
            written = session.report.sources
            session.add(str(file.path), _run(file, others, name, names, notes))
            # Only of a run that was written.
            if notes and session.report.sources > written:
                session.report.notes[make_key(name, file.entities)] = "; ".join(notes)
            progress(done, len(chosen))
    return session.report


def _find(folder: Path) -> tuple[list[BidsFile], dict[tuple[str, ...], list[BidsFile]]]:
    """Return all parcel time series, and the sidecars and outliers of each recording."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such directory; expected the output of XCP-D")
    series: list[BidsFile] = []
    others: dict[tuple[str, ...], list[BidsFile]] = {}
    for path in sorted(folder.rglob("sub-*_*")):
        file = parse_name(path)
        if file is None:
            continue
        if file.suffix == "timeseries" and file.extension in _ENDINGS and _label(file):
            if file.entities.get("stat", "mean") == "mean":
                series.append(file)
        elif (file.suffix, file.extension) == ("outliers", ".tsv") or (
            file.suffix in ("timeseries", "bold") and file.extension == ".json"
        ):
            others.setdefault(file.recording, []).append(file)
    return series, others


def _label(file: BidsFile) -> str:
    return file.entities.get("atlas") or file.entities.get("seg", "")  # `seg-` in XCP-D 0.10


def _choose(
    series: Sequence[BidsFile], folder: Path, atlas: str, space: str
) -> tuple[list[BidsFile], str, str]:
    """Return one file a recording, in one parcellation and space."""
    if not series:
        raise ValueError(f"{folder}: holds no sub-*_atlas-*_timeseries.tsv or .ptseries.nii of XCP-D")
    label = _one("atlas", atlas, {_label(file) for file in series})
    series = [file for file in series if _label(file) == label]
    where = _one("space", space, {file.entities.get("space", "") for file in series})
    runs: dict[tuple[str, ...], BidsFile] = {}
    for ending in _ENDINGS:
        for file in series:
            if file.entities.get("space", "") == where and file.extension == ending:
                known = runs.setdefault(file.recording, file)
                if known is not file and known.extension == ending:
                    raise ValueError(
                        f"{known.path}, {file.path}: are the same run; move one of them away, or ingest the "
                        "folders apart"
                    )
    return [runs[recording] for recording in sorted(runs)], label, where


def _is_joined(file: BidsFile, files: Sequence[BidsFile]) -> bool:
    """Whether XCP-D put a series together from others (`--combine-runs`): those say `run-` or `dir-` more."""
    if file.entities.get("run"):
        return False
    mine = {name: file.entities[name] for name in RUN_ENTITIES if file.entities.get(name)}
    return any(
        other is not file
        and other.entities.items() >= mine.items()
        and {name for name in RUN_ENTITIES if other.entities.get(name)} - mine.keys() <= {"run", "dir"}
        for other in files
    )


def _one(option: str, wanted: str, there: set[str]) -> str:
    if wanted in there or (not wanted and len(there) == 1):
        return wanted or next(iter(there))
    got = f"got {wanted!r}" if wanted else "got none"
    raise ValueError(f"{option}: {got}, expected one of {', '.join(sorted(there))}")


def _first_names(files: Sequence[BidsFile]) -> list[str] | None:
    """Return names of the parcels, from the first file that says them; the others are compared with these."""
    for file in files:
        try:
            return _read(file)[1]
        except (ValueError, OSError):  # it fails again, with its reason, when its turn comes
            continue
    return None


def _read(file: BidsFile) -> tuple[np.ndarray, list[str], float | None]:
    """Return [time, parcels] with NaN for `n/a`, names, and seconds of the header."""
    if file.extension != ".tsv":
        return read_parcels(file.path)
    regular_size(file.path, ALLOWANCE)
    header, _, body = file.path.read_text(encoding="utf-8").partition("\n")
    names = [name.strip() for name in header.split("\t")]
    if len(names) > MAX_NETWORKS or len(set(names)) != len(names):
        raise Unusable(f"{file.path.name}: its header has {len(names)} names, expected each once")
    try:
        # loadtxt reads nan, but not the n/a of BIDS.
        values = np.loadtxt(io.StringIO(body.replace("n/a", "nan")), delimiter="\t", ndmin=2)
    except ValueError as error:
        raise Unusable(f"{file.path.name}: is no table of numbers below its header ({error})") from error
    if values.shape[1] != len(names):
        raise Unusable(f"{file.path.name}: has {values.shape[1]} columns and {len(names)} names")
    return values, names, None


def _run(
    file: BidsFile,
    others: dict[tuple[str, ...], list[BidsFile]],
    dataset: str,
    expected: Sequence[str] | None,
    notes: list[str],
) -> Iterator[dict[str, Any]]:
    """Yield the one run of a file, as keyword arguments of `StoreWriter.append`."""
    bold, names, header = _read(file)
    if names != expected:
        raise Unusable(f"{file.path.name}: has other parcels than the first run ({len(names)} of them)")
    beside = others.get(file.recording, [])
    stem = file.path.name.removesuffix(file.extension)
    sidecars = [other.path for other in beside if other.extension == ".json"]
    # Its own comes first: the others are of the same recording, perhaps of another atlas.
    sidecars.sort(key=lambda path: (path.stem != stem, path.name))
    seconds = repetition_time(sidecars, header).seconds
    empty = np.isnan(bold).all(axis=0)
    if empty.all():
        raise Unusable(f"{file.path.name}: all parcels are empty")
    if empty.any():
        bold = np.where(empty, 0.0, bold)
        some = ", ".join(name for name, gone in zip(names, empty, strict=True) if gone)
        notes.append(f"{empty.sum()} of {len(names)} parcels are empty and became 0 ({_short(some)})")
    censor = _censored([other.path for other in beside if other.suffix == "outliers"])
    if censor is not None and len(censor) != len(bold):
        bold = _put_back(bold, censor, file.path.name)
        notes.append(f"{censor.sum()} removed volumes were put back, interpolated and censored")
    entities = file.entities
    yield {
        "bold": bold,
        "t_r": seconds,
        "dataset": dataset,
        "subject": entities.get("sub", ""),
        "session": entities.get("ses", ""),
        "task": entities.get("task", ""),
        "run": entities.get("run", ""),
        "key": make_key(dataset, {name: entities.get(name, "") for name in RUN_ENTITIES}),
        "censor": censor,
    }


def _short(text: str, longest: int = 120) -> str:
    return text if len(text) <= longest else f"{text[:longest]}…"


def _censored(tables: Sequence[Path]) -> np.ndarray | None:
    """Return bool [time], True where XCP-D found an outlier; None if it says nothing."""
    if not tables:
        return None
    if len(tables) > 1:
        raise Unusable(f"{' and '.join(path.name for path in tables)}: both name outliers of one run")
    [path] = tables
    regular_size(path, TEXT_BYTES)
    try:
        values = np.loadtxt(path, delimiter="\t", skiprows=1, ndmin=2)
    except ValueError as error:
        raise Unusable(f"{path.name}: is no table of numbers below its header ({error})") from error
    if not np.isin(values, (0, 1)).all():
        raise Unusable(f"{path.name}: holds {values.max():g}, expected 0 and 1")
    return values[:, 0] == 1


def _put_back(bold: np.ndarray, censor: np.ndarray, name: str) -> np.ndarray:
    """Return the series with the volumes that were removed from it, interpolated in time."""
    kept = np.flatnonzero(~censor)
    if len(kept) != len(bold):
        raise Unusable(
            f"{name}: has {len(bold)} volumes, but its outliers.tsv {len(censor)}, of which {len(kept)} were "
            "kept; expected one of these numbers"
        )
    time = np.arange(len(censor))
    return np.column_stack([np.interp(time, kept, column) for column in bold.T])
