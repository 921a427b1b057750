"""The F-BERT corpus, 27,835 parcellated recordings from OpenNeuro, as it lies on the hub → a store.

    windows.npy              float32 [windows, regions, 80], z-scored per region
    window_to_recording.npy  int [windows], index into recordings.json
    recordings.json          <dataset>/<subject>/<subject>_task-<task>
    licenses.json            {dataset: licence}

The corpus does not say the repetition times, which differ between its data sets (0.75 to 3 s); they are taken
from the data sets' own sidecars.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from brainflow.prepare.files import RUN_ENTITIES, BidsFile, make_key, parse_name
from brainflow.prepare.records import Unusable
from brainflow.prepare.timing import repetition_time
from brainflow.storage.columns import shown
from brainflow.storage.errors import StoreError
from brainflow.storage.ingest.limits import TEXT_BYTES, regular_size
from brainflow.storage.ingest.session import IngestReport, IngestSession


def ingest_fbert(
    folder: Path,
    store_path: str | os.PathLike[str],
    *,
    sidecars: Path,
    dtype: str = "float16",
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> IngestReport:
    """Write the windows of the corpus to a store, each as a run of its own.

    How far the windows of a recording lie apart is not published, so they are not put together. Their keys
    are `ds-…_sub-…_task-…_chunk-<number>`.

    Parameters
    ----------
    folder
        The corpus.
    store_path
        Runs are added if the store exists.
    sidecars
        One folder a data set, with its `_bold.json` files anywhere below.
    dtype
        Element type of a new store.
    overwrite
        Replace the store.
    progress
        Called with (recordings done, recordings in all).

    Returns
    -------
    IngestReport
        A recording without a repetition time, or with several, is in `failures`.

    Raises
    ------
    StoreError
        If a file of the corpus is not as described above, or the store cannot be written.
    FileNotFoundError
        If a file or folder is not there.
    """
    if not sidecars.is_dir():
        raise FileNotFoundError(
            f"{sidecars}: no such directory; expected folders of data sets with _bold.json"
        )
    recordings, licences = _texts(folder)
    windows, owner = _arrays(folder, len(recordings))
    # Stable: windows of a recording keep their order, by which they are numbered.
    order = np.argsort(owner, kind="stable")
    bounds = np.searchsorted(owner[order], np.arange(len(recordings) + 1))
    create = {
        "dtype": dtype,
        "parcellation": "Schaefer400+TianS3 of fbert-corpus",
        "preprocessing": {"pipeline": "fMRIPrep", "high_pass": 0.01, "low_pass": 0.08},
        "normalisation": "z-scored per region, as released",
        "provenance": {"made_by": "brainflow ingest fbert", "licences": licences},
    }
    times = _RepetitionTimes(sidecars)
    with IngestSession(store_path, create, overwrite=overwrite) as session:
        for number, recording in enumerate(recordings):
            mine = order[bounds[number] : bounds[number + 1]]
            session.add(recording, _runs(recording, windows, mine, times))
            progress(number + 1, len(recordings))
    return session.report


def _texts(folder: Path) -> tuple[list[str], dict[str, Any]]:
    recordings, licences = (_json(folder / name) for name in ("recordings.json", "licenses.json"))
    if not isinstance(recordings, list) or not all(isinstance(name, str) for name in recordings):
        raise StoreError(f"{folder / 'recordings.json'}: expected a list of texts")
    if len(set(recordings)) != len(recordings):
        raise StoreError(f"{folder / 'recordings.json'}: has a recording twice")
    if not isinstance(licences, dict):
        raise StoreError(f"{folder / 'licenses.json'}: expected a licence for each data set")
    return recordings, licences


def _json(path: Path) -> Any:
    regular_size(path, TEXT_BYTES)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path}: cannot be read as JSON ({error})") from error


def _arrays(folder: Path, recordings: int) -> tuple[np.ndarray, np.ndarray]:
    """Return windows, mapped, and the recording of each."""
    windows, owner = (_npy(folder / name) for name in ("windows.npy", "window_to_recording.npy"))
    if windows.ndim != 3 or windows.dtype.kind != "f":
        raise StoreError(
            f"{folder / 'windows.npy'}: has shape {list(windows.shape)} of {windows.dtype}, expected "
            "[windows, regions, time] of floats"
        )
    if owner.shape != windows.shape[:1] or owner.dtype.kind not in "iu":
        raise StoreError(
            f"{folder / 'window_to_recording.npy'}: has shape {list(owner.shape)} of {owner.dtype}, expected "
            f"[{len(windows)}] of integers"
        )
    if len(owner) and not 0 <= owner.min() <= owner.max() < recordings:
        raise StoreError(
            f"{folder / 'window_to_recording.npy'}: holds {owner.min()} to {owner.max()}, expected 0 to "
            f"{recordings - 1}, the lines of recordings.json"
        )
    return windows, np.asarray(owner)


def _npy(path: Path) -> np.ndarray:
    regular_size(path)
    try:
        # Mapped: all windows together are 15 GB.
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise StoreError(f"{path}: cannot be read as .npy ({error}); download it again") from error


def _runs(
    recording: str, windows: np.ndarray, mine: np.ndarray, times: _RepetitionTimes
) -> Iterator[dict[str, Any]]:
    """Yield the windows of a recording, as keyword arguments of `StoreWriter.append`."""
    dataset, _, rest = recording.partition("/")
    file = parse_name(Path(f"{rest.rpartition('/')[2]}_bold.nii"))
    if not rest or file is None or not file.entities.get("sub"):
        raise Unusable(f"{shown(recording)}: expected <dataset>/<subject>/<subject>_task-<task>")
    key = make_key(dataset, file.entities)
    seconds = times.of(dataset, file)
    for chunk, window in enumerate(mine, 1):
        yield {
            "bold": np.asarray(windows[window]).T,
            "t_r": seconds,
            "dataset": dataset,
            "subject": file.entities["sub"],
            "session": file.entities.get("ses", ""),
            "task": file.entities.get("task", ""),
            "run": file.entities.get("run", ""),
            "key": f"{key}_chunk-{chunk:03d}",
        }


class _RepetitionTimes:
    """Repetition times from the sidecars of many data sets; those of one are listed once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, dict[str, list[BidsFile]]] = {}

    def of(self, dataset: str, recording: BidsFile) -> float:
        """Return seconds of a recording, from its own sidecars, else from those of its data set."""
        by_subject = self._sidecars(dataset)
        general = [file for file in by_subject.get("", []) if _describes(file, recording.entities)]
        subject = by_subject.get(recording.entities["sub"], [])
        own = [file for file in subject if _describes(file, recording.entities)]
        paths = [file.path for file in sorted(general, key=lambda file: -len(file.entities))]
        if not own and not general:
            raise Unusable(f"no _bold.json below {self._folder / dataset} describes it")
        # Names of the corpus lack entities such as `run-`: where several sidecars fit, they have to agree.
        found = {repetition_time([file.path, *paths], None).seconds for file in own or general}
        if len(found) > 1:
            several = ", ".join(f"{seconds:g}" for seconds in sorted(found))
            raise Unusable(f"its sidecars have several repetition times: {several} s")
        return found.pop()

    def _sidecars(self, dataset: str) -> dict[str, list[BidsFile]]:
        if dataset not in self._known:
            grouped = self._known.setdefault(dataset, {})
            for path in sorted((self._folder / dataset).rglob("*bold.json")):
                if (file := parse_name(path)) is not None and file.suffix == "bold":
                    grouped.setdefault(file.entities.get("sub", ""), []).append(file)
        return self._known[dataset]


def _describes(sidecar: BidsFile, entities: Mapping[str, str]) -> bool:
    """Whether a sidecar contradicts nothing that a recording's name says; such names lack some entities."""
    return all(
        entities.get(name, value) == value for name, value in sidecar.entities.items() if name in RUN_ENTITIES
    )
