"""Preparing BOLD: averaging labels and fitting maps, beside nilearn's maskers."""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from brainflow.prepare import find_atlas
from brainflow.prepare.volumes import extract, open_volume

from . import baselines, timing
from .timing import Row, WrongResultError, speed_rows

GRID = (97, 115, 97)  # fMRIPrep's 2 mm
TOLERANCE = 1e-5  # of a standard deviation


def measurements(quick: bool, device: str) -> dict[str, Callable[[], list[Row]]]:
    """Name → a function that measures and returns rows; `device` is the CPU whatever it says."""
    if baselines.missing("nilearn"):
        print("prepare: left out, it needs nilearn: pip install 'brainflow-fmri[bids]'", file=sys.stderr)
        return {}
    return {
        "labels": lambda: _extract("labels", 100 if quick else 400, volumes=10 if quick else 40),
        "maps": lambda: _extract("maps", 16 if quick else 64, volumes=10 if quick else 40),
    }


def _extract(kind: str, networks: int, *, volumes: int) -> list[Row]:
    """Measure volumes read from a file and averaged a second, of an atlas that is already on their grid."""
    nibabel, maskers = importlib.import_module("nibabel"), importlib.import_module("nilearn.maskers")
    with tempfile.TemporaryDirectory(prefix="brainflow-bench-") as folder:
        path = Path(folder) / "atlas.nii"
        nibabel.save(nibabel.Nifti1Image(_atlas(kind, networks), np.eye(4)), path)
        data = np.random.default_rng(1).normal(1000, 50, size=(*GRID, volumes)).astype(np.float32)
        image = Path(folder) / "bold.nii"
        nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), image)
        spec = find_atlas(str(path))
        # As ours does: nothing is standardised or resampled.
        if kind == "labels":
            masker = maskers.NiftiLabelsMasker(str(path), standardize=None, resampling_target=None).fit()
        else:
            masker = maskers.NiftiMapsMasker(str(path), standardize=None, resampling_target=None).fit()
        functions = {"ours": lambda: _ours(image, spec), "nilearn": lambda: masker.transform(str(image))}
        difference = np.abs(functions["ours"]() - functions["nilearn"]()).max()
        # 50 is the standard deviation of the data.
        if not difference <= TOLERANCE * 50:
            raise WrongResultError(f"{kind}: differs from nilearn by {difference}")
        # The comparison was the first call.
        times = timing.interleave(functions, repeats=3, warmup=0)
    return speed_rows(
        "prepare", f"{kind}/{networks}", times, metric="volumes_per_s", unit="volumes/s", work=volumes
    )


def _ours(image: Path, spec: Any) -> np.ndarray:
    return extract(open_volume(image), [spec], None, 0)[0]


def _atlas(kind: str, networks: int) -> np.ndarray:
    """Return compact blobs around random points: the number of the nearest, or soft maps (float64)."""
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
