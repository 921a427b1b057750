"""Reading images: the voxels inside a mask as networks. Needs nibabel, which the extra `report` brings."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from brainflow.optional import need
from brainflow.prepare.timing import nifti_repetition_time
from brainflow.storage.ingest.limits import regular_size


def bold_from_nifti(
    image: str | os.PathLike[str], mask: str | os.PathLike[str], t_r: float | None = None
) -> tuple[np.ndarray, float]:
    """Time series of the voxels inside a mask.

    Parameters
    ----------
    image : 4-D NIfTI file
    mask : 3-D NIfTI file on the same grid; voxels that are not zero are taken
    t_r : repetition time in seconds; by default that of the header

    Returns
    -------
    bold : float32 [time, voxels], voxels in C order of the mask
    t_r : seconds

    Raises
    ------
    ValueError : if shapes or grids differ, or the header has no usable repetition time and none is given
    ImportError : if nibabel is not installed
    """
    nibabel = need("nibabel", "reading NIfTI", "report")
    regular_size(Path(image))
    regular_size(Path(mask))
    volumes, inside = nibabel.load(image), nibabel.load(mask)
    if len(volumes.shape) != 4 or inside.shape != volumes.shape[:3]:
        raise ValueError(
            f"{image}: expected [x, y, z, time] on the grid of the mask {list(inside.shape)}, got "
            f"{list(volumes.shape)}"
        )
    if not np.allclose(volumes.affine, inside.affine, atol=1e-3):
        raise ValueError(f"{image}: its affine differs from that of {mask}; resample one to the other")
    if t_r is None:
        t_r = nifti_repetition_time(volumes.header)
        if t_r is None:
            raise ValueError(f"{image}: its header has no repetition time; give t_r in seconds")
    selected = np.asanyarray(inside.dataobj) != 0
    return np.asarray(volumes.dataobj, np.float32)[selected].T.copy(), float(t_r)
