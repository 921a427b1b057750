"""Preparing BOLD: finding runs, averaging labels, fitting maps, and what a second worker process gives.

Baselines: pybids (where it is installed), and nilearn's maskers. Needs the extra `bids`.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from brainflow.storage.ingest.prepare import Query, find_atlas, find_runs
from brainflow.storage.ingest.prepare.volumes import extract, open_volume

from .timing import Row, WrongResultError, interleave, speed_rows

SPACE = "MNI152NLin2009cAsym"
GRID = (97, 115, 97)  # fMRIPrep's 2 mm
TOLERANCE = 1e-5  # of a standard deviation


def measurements(quick: bool, device: str) -> dict[str, Callable[[], list[Row]]]:
    """Name → a function that measures and returns rows; `device` is the CPU whatever it says."""
    found: dict[str, Callable[[], list[Row]]] = {"discover": lambda: _discover(1_000 if quick else 10_000)}
    if importlib.util.find_spec("nilearn") is not None:
        found |= {
            "labels": lambda: _extract("labels", 100 if quick else 400, volumes=10 if quick else 40),
            "maps": lambda: _extract("maps", 16 if quick else 64, volumes=10 if quick else 40),
            "workers": lambda: _workers(runs=4 if quick else 20, volumes=60 if quick else 300),
        }
    return found


def _discover(files: int) -> list[Row]:
    """Seconds to find the runs of a dataset of so many files."""
    with tempfile.TemporaryDirectory(prefix="brainflow-bench-") as folder:
        root = Path(folder)
        _write_names(root, files)
        functions: dict[str, Callable[[], object]] = {"ours": lambda: find_runs(root, Query())}
        if importlib.util.find_spec("bids") is not None:
            functions["pybids"] = lambda: _with_pybids(root)
            if len(find_runs(root, Query())) != _with_pybids(root):
                raise WrongResultError("pybids finds another number of runs")
        times = interleave(functions, repeats=2, warmup=0)
    return speed_rows("prepare", f"discover/{files}_files", times, unit="s")


def _write_names(root: Path, files: int) -> None:
    fmriprep = root / "derivatives" / "fmriprep"
    fmriprep.mkdir(parents=True)
    description = {"Name": "x", "BIDSVersion": "1.9.0"}
    (root / "dataset_description.json").write_text(json.dumps(description))
    derived = {**description, "DatasetType": "derivative", "GeneratedBy": [{"Name": "fMRIPrep"}]}
    (fmriprep / "dataset_description.json").write_text(json.dumps(derived))
    for run in range(files // 4):
        subject = f"sub-{run // 10:04d}"
        func = fmriprep / subject / "func"
        func.mkdir(parents=True, exist_ok=True)
        stem = func / f"{subject}_task-rest_run-{run % 10}"
        for ending in (f"space-{SPACE}_desc-preproc_bold.nii.gz", "desc-confounds_timeseries.tsv"):
            Path(f"{stem}_{ending}").touch()
            Path(f"{stem}_{ending.partition('.')[0]}.json").write_text("{}")


def _with_pybids(root: Path) -> int:
    layout = importlib.import_module("bids").BIDSLayout(root, derivatives=True, validate=False)
    return len(layout.get(suffix="bold", space=SPACE, desc="preproc", extension=".nii.gz"))


def _extract(kind: str, networks: int, *, volumes: int) -> list[Row]:
    """Volumes read from a file and averaged a second, of an atlas that is already on their grid."""
    nibabel, maskers = importlib.import_module("nibabel"), importlib.import_module("nilearn.maskers")
    with tempfile.TemporaryDirectory(prefix="brainflow-bench-") as folder:
        path = Path(folder) / "atlas.nii"
        nibabel.save(nibabel.Nifti1Image(_atlas(kind, networks), np.eye(4)), path)
        data = np.random.default_rng(1).normal(1000, 50, size=(*GRID, volumes)).astype(np.float32)
        image = Path(folder) / "bold.nii"
        nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), image)
        spec = find_atlas(str(path))
        if kind == "labels":
            masker = maskers.NiftiLabelsMasker(str(path), standardize=None, resampling_target=None).fit()
        else:
            masker = maskers.NiftiMapsMasker(str(path), standardize=None, resampling_target=None).fit()
        functions = {"ours": lambda: _ours(image, spec), "nilearn": lambda: masker.transform(str(image))}
        difference = np.abs(functions["ours"]() - functions["nilearn"]()).max()
        if not difference <= TOLERANCE * 50:
            raise WrongResultError(f"differs from nilearn by {difference}")
        times = interleave(functions, repeats=3, warmup=0)
    return speed_rows(
        "prepare", f"{kind}/{networks}", times, metric="volumes_per_s", unit="volumes/s", work=volumes
    )


def _ours(image: Path, spec: Any) -> np.ndarray:
    return extract(open_volume(image), [spec], None, 0)[0]


def _atlas(kind: str, networks: int) -> np.ndarray:
    """Compact blobs around random points of the grid: the nearest point's number, or soft maps (float64)."""
    rng = np.random.default_rng(0)
    centres = rng.uniform(0.2, 0.8, size=(networks, 3)) * GRID
    index = np.stack(np.meshgrid(*map(np.arange, GRID), indexing="ij"), -1).reshape(-1, 3)
    if kind == "labels":
        nearest = importlib.import_module("scipy.spatial").cKDTree(centres)
        distance, number = nearest.query(index)
        labels = np.where(distance < 12, number + 1, 0)
        return labels.reshape(GRID).astype(np.int16)
    maps = np.stack([np.exp(-((index - c) ** 2).sum(1) / 18) for c in centres], -1)
    return np.where(maps < 0.02, 0, maps).reshape(*GRID, networks)


def _workers(runs: int, volumes: int) -> list[Row]:
    """Runs a second of `brainflow prepare --nprocs 2` against `--nprocs 1`; starting up counts."""
    with tempfile.TemporaryDirectory(prefix="brainflow-bench-") as folder:
        root = Path(folder)
        _write_runs(root, runs, volumes)
        words = ["prepare", root / "bids", root / "out", "participant", "--confounds", "none"]
        words += ["--atlas", root / "atlas-slabs_dseg.nii.gz"]

        def prepare(processes: int) -> None:
            shutil.rmtree(root / "out", ignore_errors=True)
            command = [sys.executable, "-m", "brainflow", *map(str, words), "--nprocs", str(processes)]
            subprocess.run(command, check=True, capture_output=True)

        times = interleave({"two": lambda: prepare(2), "one": lambda: prepare(1)}, repeats=2, warmup=0)
    return speed_rows(
        "prepare", "workers/2", times, ours="two", metric="runs_per_s", unit="runs/s", work=runs
    )


def _write_runs(root: Path, runs: int, volumes: int) -> None:
    """Runs at 3 mm, one image under many names."""
    nibabel = importlib.import_module("nibabel")
    shape = (65, 77, 65)
    rng = np.random.default_rng(0)
    data = rng.normal(1000, 50, size=(*shape, volumes)).astype(np.int16)
    image = nibabel.Nifti1Image(data, np.diag([3, 3, 3, 1]))
    image.header.set_zooms((3, 3, 3, 2))
    image.header.set_xyzt_units("mm", "sec")
    nibabel.save(image, root / "image.nii")
    labels = np.arange(data[..., 0].size).reshape(shape, order="F") * 400 // data[..., 0].size + 1
    atlas = nibabel.Nifti1Image(labels.astype(np.int16), np.diag([3, 3, 3, 1]))
    nibabel.save(atlas, root / "atlas-slabs_dseg.nii.gz")
    for run in range(runs):
        func = root / "bids" / f"sub-{run:02d}" / "func"
        func.mkdir(parents=True)
        (func / f"sub-{run:02d}_task-rest_space-{SPACE}_desc-preproc_bold.nii").symlink_to(root / "image.nii")
