"""Folders as the HCP's pipelines write them: <subject>/MNINonLinear/Results/<run>/, by name only.

A run's folder holds its image (`<run>.nii.gz`, `<run>_Atlas*.dtseries.nii`), `Movement_Regressors.txt`
(twelve columns: three translations in mm, three rotations in degrees, and their derivatives) and, for tasks,
`EVs/<state>.txt`. Names of runs are `tfMRI_MOTOR_LR`, `rfMRI_REST1_RL`, `rfMRI_REST1_7T_PA`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from brainflow.prepare.files import Query, RunFiles, entries_of, make_key
from brainflow.prepare.records import Unusable

RESULTS = ("MNINonLinear", "Results")
MOVEMENT = "Movement_Regressors.txt"
SPACES = {"volume": "MNI152NLin6Asym", "cifti": "fsLR"}
HEAD_RADIUS = 50.0
"""mm; turns rotations into displacements (Power et al. 2012)."""
_RUN = re.compile(r"[rt]fMRI_([A-Za-z0-9]+?)(?:_([37]T))?_(LR|RL|AP|PA)")


def is_hcp(root: Path) -> bool:
    """Whether a directory holds subjects of the HCP's pipelines."""
    return root.is_dir() and any(True for _ in _subjects(root))


def _subjects(root: Path) -> Iterator[Path]:
    paths = (Path(entry.path) for entry in entries_of(root))
    return (path for path in paths if os.path.isdir(path.joinpath(*RESULTS)))


def find_hcp_runs(root: Path, query: Query, dataset: str) -> list[RunFiles]:
    """Return runs of all subjects, sorted by key.

    Parameters
    ----------
    root
        Directory with one folder a subject.
    query
        `description` chooses among images of one run by what follows its name, such as `hp2000_clean` or
        `Atlas_MSMAll`; "preproc" is the plain one.
    dataset
        Name of the dataset in keys.

    Raises
    ------
    ValueError
        For GIFTI or sessions, which this layout does not have.
    """
    if query.sessions:
        raise ValueError("session_id: the HCP's folders have no sessions")
    if query.kind == "gifti":
        raise ValueError("input: got gifti, expected volume or cifti; the HCP's runs are no GIFTI files")
    runs = []
    for subject in _subjects(root):
        label = subject.name.removeprefix("sub-")
        if query.participants and label not in query.participants:
            continue
        for entry in entries_of(subject.joinpath(*RESULTS)):
            folder = Path(entry.path)
            name = _RUN.fullmatch(folder.name)
            if name is None or (query.tasks and name[1] not in query.tasks):
                continue
            run = _run(dataset, label, folder, name, query)
            if run is not None:
                runs.append(run)
    return sorted(runs, key=lambda run: run.key)


def _run(dataset: str, subject: str, folder: Path, name: re.Match[str], query: Query) -> RunFiles | None:
    images, problem = _images(folder, query)
    if not images:
        return None
    # BIDS has no entity for the field: `acq-7T` keeps such runs apart from those at 3 T.
    entities = {"sub": subject, "task": name[1], "acq": name[2] or "", "dir": name[3]}
    entities = {key: value for key, value in entities.items() if value}
    movement = folder / MOVEMENT
    return RunFiles(
        key=make_key(dataset, entities),
        dataset=dataset,
        entities=entities,
        images=images,
        confounds=movement if movement.is_file() else None,
        # All of them: what is no state of the task, as cue.txt, `read_ev` passes over.
        events=tuple(sorted((folder / "EVs").glob("*.txt"))),
        space=SPACES[query.kind],
        description=query.description,
        problem=problem,
    )


def _images(folder: Path, query: Query) -> tuple[tuple[Path, ...], str]:
    """Return the image of a run, or all that fit and why none was chosen."""
    ending = ".nii.gz" if query.kind == "volume" else ".dtseries.nii"
    plain = "" if query.kind == "volume" else "_Atlas"
    wanted = plain if query.description == "preproc" else f"_{query.description}"
    chosen = folder / f"{folder.name}{wanted}{ending}"
    if chosen.is_file():
        return (chosen,), ""
    others = sorted(folder.glob(f"{folder.name}*{ending}"))
    if not others:
        return (), ""
    names = ", ".join(path.name for path in others)
    return tuple(others), f"{chosen.name} is not there, but {names}; choose with --hcp-image"


def read_movement(path: Path, volumes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return motion parameters of a run and its framewise displacement.

    Returns
    -------
    tuple of float64 arrays: [time, 6] (mm, degrees) and [time] (mm, NaN first; Power et al. 2012: the sum of
    the absolute differences, rotations on a sphere of 50 mm)

    Raises
    ------
    Unusable
        If it is no table of numbers with six columns or more and one row a volume.
    """
    try:
        table = np.loadtxt(path, ndmin=2)
    except ValueError as error:
        raise Unusable(f"{path.name}: cannot be read as a table of numbers ({error})") from error
    if table.shape[1] < 6 or len(table) != volumes:
        raise Unusable(
            f"{path.name}: has shape {table.shape}, expected {volumes} rows and at least 6 columns"
        )
    motion = table[:, :6]
    bad = np.flatnonzero(~np.isfinite(motion).all(axis=1))
    if len(bad):
        raise Unusable(
            f"{path.name}: is not a number in {len(bad)} of {len(motion)} rows, first in row {bad[0]}"
        )
    steps = np.abs(np.diff(motion, axis=0))
    steps[:, 3:] *= HEAD_RADIUS * np.pi / 180
    return motion, np.r_[np.nan, steps.sum(axis=1)]
