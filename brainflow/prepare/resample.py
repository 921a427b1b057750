"""Linear resampling of an atlas to the voxel grid of images, as a sparse matrix.

nilearn resamples map by map and voxel by voxel, which takes minutes for a thousand maps; maps are mostly
zeros, and a product of sparse matrices skips them. The values are those of nilearn's
`resample_img(interpolation="linear")`: what lies outside the source grid is 0.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np

from brainflow.optional import need


def trilinear(
    source_shape: tuple[int, ...],
    source_affine: np.ndarray,
    target_shape: tuple[int, ...],
    target_affine: np.ndarray,
) -> Any:
    """Weights of source voxels in target voxels, csr [source voxels, target voxels], voxels in Fortran order.

    Parameters
    ----------
    source_shape, target_shape : voxels along x, y, z
    source_affine, target_affine : [4, 4], voxel indices to mm
    """
    sparse = need("scipy.sparse", "resampling an atlas", "bids")
    to_source = np.linalg.inv(source_affine) @ target_affine
    targets = np.prod(target_shape)
    index = np.stack(np.unravel_index(np.arange(targets), target_shape, order="F"))
    points = to_source[:3, :3] @ index + to_source[:3, 3:]  # [3, targets], in source voxels
    last = np.array(source_shape)[:, None] - 1
    inside = ((points >= 0) & (points <= last)).all(axis=0)
    points, columns = points[:, inside], np.flatnonzero(inside)
    corner = np.minimum(np.floor(points).astype(np.int64), np.maximum(last - 1, 0))
    beyond = points - corner
    rows, weights = [], []
    for step in product((0, 1), repeat=3):
        step_column = np.array(step)[:, None]
        weights.append(np.where(step_column, beyond, 1 - beyond).prod(axis=0))
        neighbour = np.minimum(corner + step_column, last)  # a flat axis has no second voxel; its weight is 0
        rows.append(np.ravel_multi_index(tuple(neighbour), source_shape, order="F"))
    used = np.concatenate(weights) > 0
    matrix = sparse.coo_array(
        (np.concatenate(weights)[used], (np.concatenate(rows)[used], np.tile(columns, 8)[used])),
        shape=(np.prod(source_shape), targets),
    )
    return matrix.tocsr()
