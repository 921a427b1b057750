"""How much memory a worker needs: bounded, whatever the length of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence

from brainflow.optional import need
from brainflow.prepare.run import Job
from brainflow.prepare.volumes import BLOCK_BYTES

PROGRAM_BYTES = 300 * 2**20
"""Python with nilearn, scipy, pandas and nibabel."""
_BLOCKS = 4
"""Copies of a block of volumes that are alive at once: read, smoothed, made finite, in nilearn's hands."""
_RESAMPLING = 800
"""Bytes a voxel while the matrix is made that resamples maps."""
_MAP_SHARE = 0.1
"""Share of the voxels that one map covers, stored as 12 bytes each; DiFuMo's maps cover less."""


def worker_bytes(jobs: Sequence[Job]) -> int:
    """Memory that one worker needs for the largest of some runs, in bytes; an upper estimate.

    Volumes are read in blocks. Surfaces are read whole: their size counts twice.
    """
    nibabel = need("nibabel", "reading images", "bids")
    job = max(jobs, key=_file_size)
    try:
        shapes = [nibabel.load(path).shape for path in job.files.images]
    except Exception:  # a damaged image is reported when it is prepared
        return PROGRAM_BYTES + _BLOCKS * BLOCK_BYTES
    if job.kind != "volume":
        size = 4 * max(math.prod(shape) for shape in shapes) if shapes[0] else 0
        return PROGRAM_BYTES + 4 * size
    voxels = math.prod(shapes[0][:3])
    block = min(8 * math.prod(shapes[0]), max(BLOCK_BYTES, 8 * voxels))
    atlases = 0
    for atlas in job.atlases:
        own = nibabel.load(atlas.paths[0]).shape
        if atlas.kind == "labels":
            atlases += 32 * max(voxels, math.prod(own[:3]))
        else:
            block_of_maps = 16 * 16 * math.prod(own[:3])
            atlases += _RESAMPLING * voxels + block_of_maps + int(12 * _MAP_SHARE * voxels * own[3])
    return PROGRAM_BYTES + _BLOCKS * block + atlases


def _file_size(job: Job) -> int:
    return sum(path.stat().st_size for path in job.files.images if path.is_file())
