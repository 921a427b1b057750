"""Sheared images, which fMRIPrep 20.2.0 resampled wrongly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from brainflow.optional import need
from brainflow.prepare.errors import Unusable
from brainflow.storage.ingest.limits import TEXT_BYTES, regular_size

AFFECTED = "20.2.0"


def is_sheared(affine: np.ndarray) -> bool:
    """Whether the axes of an affine are not at right angles, beyond what float32 headers round."""
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    off_diagonal = axes.T @ axes - np.eye(3)
    return bool(np.abs(off_diagonal).max() > 1e-4)


def wrongly_resampled(image: Path, source: Path | None) -> bool:
    """Whether fMRIPrep 20.2.0 made an image from a sheared one of the scanner's.

    Parameters
    ----------
    image : of the derivatives
    source : of the raw dataset; None if it is not there, which gives False

    Raises
    ------
    Unusable : if the source cannot be opened
    """
    if source is None or _fmriprep_version(image) != AFFECTED:
        return False
    nibabel = need("nibabel", "reading images", "bids")
    try:
        regular_size(source)
        return is_sheared(nibabel.load(source).affine)
    except (OSError, EOFError, ValueError, nibabel.filebasedimages.ImageFileError) as error:
        raise Unusable(
            f"{source.name}: cannot be opened to see whether it is sheared, which fMRIPrep 20.2.0 got wrong "
            f"({' '.join(str(error).split())}); fetch it, or take the run with --allow-sheared"
        ) from error


def _fmriprep_version(image: Path) -> str:
    """Version in the `dataset_description.json` above an image, or in the name of the folder."""
    for folder in image.absolute().parents:
        if folder.name.lower() == f"fmriprep-{AFFECTED}":
            return AFFECTED
        description = folder / "dataset_description.json"
        if description.is_file():
            return _version_of(description)
    return ""


def _version_of(description: Path) -> str:
    try:
        regular_size(description, TEXT_BYTES)
        content = json.loads(description.read_text(encoding="utf-8"))
        makers = [*content.get("GeneratedBy", []), content.get("PipelineDescription", {})]
        return next(
            (str(m.get("Version", "")) for m in makers if m.get("Name", "").lower() == "fmriprep"), ""
        )
    except (
        OSError,
        ValueError,
        AttributeError,
        TypeError,
        RecursionError,
    ):  # other people's file: no version is no reason
        return ""
