"""Parcel time series of a volume: smoothed by nilearn, averaged a block of volumes at a time.

Reading, smoothing and averaging work volume by volume, so a run of any length needs the memory of one block.
A label's mean is one row of a sparse matrix, and equals `NiftiLabelsMasker`'s, also in float32 rounding. Maps
are fitted by least squares as in `NiftiMapsMasker` (`resampling_target="data"`), but with normal equations
solved once for all runs on one voxel grid, and in float64: nilearn fits float32 maps to float32 images in
float32, which was off by 3e-4 to 7e-4 of a standard deviation.
"""

from __future__ import annotations

import json
import math
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from brainflow.optional import need
from brainflow.prepare.atlas import BACKGROUND, AtlasSpec, network_names, read_labels
from brainflow.prepare.records import Unusable
from brainflow.storage.ingest.foreign import MAX_TIME
from brainflow.storage.ingest.limits import TEXT_BYTES, budget, regular_size
from brainflow.storage.text import counted

BLOCK_BYTES = 16 * 2**20
"""Bytes of float64 that are read, smoothed and averaged at once; 256 MB, which no cache holds, took 2.5 to
3.5 times as long."""
_GRIDS_KEPT = 4
_MAPS_AT_ONCE = 16
_RANK_CUTOFF = 1e-12
_SHEARED_BY = "20.2.0"  # version of fMRIPrep that resampled sheared images wrongly

Projection = Callable[[np.ndarray], np.ndarray]
"""An atlas on a voxel grid: [voxels, time] → [time, networks]; voxels in the order of NIfTI (Fortran)."""


def open_volume(path: Path) -> Any:
    """Open a 4-D image without reading its voxels.

    Raises
    ------
    Unusable
        If it cannot be opened or is not 4-D.
    """
    nibabel = need("nibabel", "reading NIfTI images", "bids")
    try:
        size = regular_size(path)
        # Blocks are read one after the other: a .gz that is opened anew is unpacked from its beginning.
        image = nibabel.load(path, keep_file_open=True)
        affine = np.asarray(image.affine, np.float64)
    except Exception as error:  # nibabel, zlib and a header that contradicts itself raise many kinds
        raise Unusable(f"{path.name}: cannot be opened ({' '.join(str(error).split())})") from error
    if not np.isfinite(affine).all() or np.linalg.det(affine[:3, :3]) == 0:
        raise Unusable(f"{path.name}: its affine says not where the voxels are ({affine[:3].tolist()})")
    if len(image.shape) != 4 or image.shape[3] < 2 or min(image.shape) < 1:
        raise Unusable(f"{path.name}: has shape {image.shape}, expected a 4-D image of several volumes")
    if 8 * math.prod(image.shape[:3]) > budget(size) or image.shape[3] > MAX_TIME:
        raise Unusable(f"{path.name}: declares shape {image.shape}, more than its {size} bytes can hold")
    return image


def extract(
    image: Any, atlases: Sequence[AtlasSpec], smoothing_fwhm: float | None, dropped: int
) -> list[np.ndarray]:
    """Return the raw time series of several atlases, each [time, networks], in one pass over the image.

    Parameters
    ----------
    image
        4-D, from `open_volume` or in memory.
    atlases
        What is averaged, each brought to the grid of the image.
    smoothing_fwhm
        In mm, or None.
    dropped
        Volumes left out at the start.

    Raises
    ------
    Unusable
        If the voxels cannot be read, a network lies outside the image, or a volume holds nothing.
    """
    smooth = need("nilearn.image", "smoothing", "bids").smooth_img
    nifti = need("nibabel", "reading NIfTI images", "bids").Nifti1Image
    fitted = [_on_grid(atlas, image.shape[:3], image.affine) for atlas in atlases]
    volumes = image.shape[3]
    step = max(1, BLOCK_BYTES // (8 * int(np.prod(image.shape[:3]))))
    series: list[list[np.ndarray]] = [[] for _ in atlases]
    for start in range(0, volumes, step):
        block = _read(image, start, min(start + step, volumes))
        if start + step <= dropped:
            continue
        finite = np.isfinite(block)
        if not finite.all():  # 0 outside of what was recorded; a volume of which nothing was is no volume
            refuse_lost(finite.any(axis=(0, 1, 2)), start, dropped)
            block = np.where(finite, block, 0)
        if smoothing_fwhm is not None:
            block = np.asarray(smooth(nifti(block, image.affine), smoothing_fwhm).dataobj)
        voxels = np.asfortranarray(block).reshape(-1, block.shape[3], order="F")  # a volume is contiguous
        for atlas, parts in zip(fitted, series, strict=True):
            parts.append(atlas(voxels))
    # Blocks of dropped volumes alone were left out above.
    return [np.concatenate(parts)[dropped % step :] for parts in series]


def refuse_lost(found: np.ndarray, start: int = 0, dropped: int = 0) -> None:
    """Refuse a run with volumes of which nothing was recorded; `found` [volumes] says of which something was.

    The first is volume `start` of the run, of which `dropped` are left out anyhow.

    Parameters
    ----------
    found
        bool `[volumes]`: whether anything was recorded.
    start
        Which volume of the run the first of them is.
    dropped
        Volumes at the start of the run that do not matter.

    Raises
    ------
    Unusable
        Naming the first such volume.
    """
    lost = start + np.flatnonzero(~found)
    lost = lost[lost >= dropped]
    if len(lost):
        raise Unusable(
            f"{counted(len(lost), 'volume holds', 'volumes hold')} no finite value "
            f"(first: volume {lost[0]}); repair or drop the run"
        )


def _read(image: Any, start: int, stop: int) -> np.ndarray:
    try:
        block = np.asarray(image.dataobj[..., start:stop])
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise Unusable(
            f"{Path(image.get_filename() or 'image').name}: volumes {start} to {stop - 1} cannot be read; "
            f"the file is truncated or damaged ({' '.join(str(error).split())})"
        ) from error
    # float32 stays, as in nilearn, so that means equal its own.
    return block if block.dtype == np.float32 else block.astype(np.float64)


_grids: OrderedDict[tuple[Any, ...], Projection] = OrderedDict()


def _on_grid(atlas: AtlasSpec, shape: tuple[int, ...], affine: np.ndarray) -> Projection:
    """Return the atlas on a voxel grid; the last few are kept, for the next runs of this process."""
    # Rounded: a difference in the last digits is no other grid.
    key = (atlas.label, atlas.digest, shape, np.round(affine, 6).tobytes())
    if key not in _grids:
        fit = _fit_joined if atlas.parts else _fit_labels if atlas.kind == "labels" else _fit_maps
        _grids[key] = fit(atlas, shape, affine)
        while len(_grids) > _GRIDS_KEPT:
            _grids.popitem(last=False)
    _grids.move_to_end(key)
    return _grids[key]


def _fit_joined(atlas: AtlasSpec, shape: tuple[int, ...], affine: np.ndarray) -> Projection:
    fitted = [_on_grid(part, shape, affine) for part in atlas.parts]
    return lambda data: np.concatenate([part(data) for part in fitted], axis=1)


def _fit_labels(atlas: AtlasSpec, shape: tuple[int, ...], affine: np.ndarray) -> Projection:
    sparse = need("scipy.sparse", "averaging labels", "bids")
    image = need("nibabel", "reading an atlas", "bids").load(atlas.paths[0])
    # Before resampling, which may lose small ones.
    before = np.unique(read_labels(image))
    if not _is_on(image, shape, affine):
        resample = need("nilearn.image", "resampling an atlas", "bids").resample_img
        # A mean of labels 3 and 7 is no label.
        image = resample(image, target_affine=affine, target_shape=shape, interpolation="nearest")
    labels = read_labels(image).reshape(-1, order="F")
    wanted = before[before != BACKGROUND]
    lost = np.setdiff1d(wanted, labels)
    if len(lost):
        names = ", ".join(network_names(atlas, lost[:5].tolist()))
        raise Unusable(
            f"atlas {atlas.label}: {len(lost)} of {len(wanted)} labels are not in the image ({names})"
        )
    voxels = np.flatnonzero(labels != BACKGROUND)
    networks = np.searchsorted(wanted, labels[voxels])
    counts = np.bincount(networks, minlength=len(wanted))
    members = sparse.csr_array((np.ones(len(voxels)), (networks, voxels)), shape=(len(wanted), labels.size))
    # Rounded to the image's type, as NiftiLabelsMasker does it, so that both are equal.
    return lambda data: np.stack([members @ volume / counts for volume in data.T]).astype(data.dtype)


def _fit_maps(atlas: AtlasSpec, shape: tuple[int, ...], affine: np.ndarray) -> Projection:
    sparse = need("scipy.sparse", "fitting maps", "bids")
    nibabel = need("nibabel", "reading an atlas", "bids")
    image = nibabel.load(atlas.paths[0], keep_file_open=True)
    count = image.shape[3]
    weights = (
        None if _is_on(image, shape, affine) else trilinear(image.shape[:3], image.affine, shape, affine)
    )
    rows = []
    for start in range(0, count, _MAPS_AT_ONCE):
        block = np.asarray(image.dataobj[..., start : start + _MAPS_AT_ONCE], np.float64)
        flat = np.where(np.isfinite(block), block, 0).reshape(-1, block.shape[3], order="F")
        few = sparse.csr_array(flat.T)
        rows.append(few if weights is None else few @ weights)
    maps = sparse.vstack(rows, format="csr")  # [networks, voxels]
    empty = np.flatnonzero(np.diff(maps.indptr) == 0)
    if len(empty):
        names = ", ".join(network_names(atlas, (empty[:5] + 1).tolist()))
        raise Unusable(f"atlas {atlas.label}: {len(empty)} of {count} maps are empty in the image ({names})")
    eigenvalues, vectors = np.linalg.eigh((maps @ maps.T).toarray())
    # Maps may depend on each other: they are inverted as far as they can be.
    kept = eigenvalues > _RANK_CUTOFF * eigenvalues[-1]
    inverse = (vectors[:, kept] / eigenvalues[kept]) @ vectors[:, kept].T
    return lambda data: np.stack([inverse @ (maps @ volume) for volume in data.T])


def mean_and_labels(
    path: Path, atlas: AtlasSpec, volumes: int = 20
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return an image and an atlas on one grid, that of the atlas, to look at.

    Parameters
    ----------
    path
        4-D image.
    atlas
        The atlas; of a joined one the grid is that of the first.
    volumes
        So many of the first are averaged.

    Returns
    -------
    mean float [x, y, z]; labels int [x, y, z], of maps the one that weighs most, 0 for none; affine [4, 4]

    Raises
    ------
    Unusable, OSError, ValueError
        If the image or the atlas cannot be read.
    """
    nibabel = need("nibabel", "reading images", "bids")
    resample = need("nilearn.image", "resampling an image", "bids").resample_img
    image = open_volume(path)
    mean = nibabel.Nifti1Image(_read(image, 0, min(volumes, image.shape[3])).mean(axis=3), image.affine)
    first = nibabel.load(atlas.pieces[0].paths[0])
    grid = {"target_affine": first.affine, "target_shape": first.shape[:3]}
    labels = np.zeros(first.shape[:3], np.int32)
    for piece in atlas.pieces:
        volume = nibabel.Nifti1Image(_one_label_a_voxel(piece), nibabel.load(piece.paths[0]).affine)
        if not _is_on(volume, first.shape[:3], first.affine):
            volume = resample(volume, interpolation="nearest", **grid)
        mine = np.asarray(volume.dataobj, np.int32)
        # Labels of an atlas come behind those of the ones before.
        labels = np.where(mine > 0, mine + labels.max(), labels)
    if not _is_on(mean, first.shape[:3], first.affine):
        mean = resample(mean, interpolation="linear", **grid)
    return np.asarray(mean.dataobj, np.float64), labels, first.affine


def _one_label_a_voxel(atlas: AtlasSpec) -> np.ndarray:
    image = need("nibabel", "reading an atlas", "bids").load(atlas.paths[0], keep_file_open=True)
    if atlas.kind == "labels":
        return read_labels(image).astype(np.int32)
    best, labels = np.zeros(image.shape[:3]), np.zeros(image.shape[:3], np.int32)
    for number in range(image.shape[3]):
        weight = np.nan_to_num(np.asarray(image.dataobj[..., number], np.float64))
        labels[weight > best] = number + 1
        best = np.maximum(best, weight)
    return labels


def _is_on(image: Any, shape: tuple[int, ...], affine: np.ndarray) -> bool:
    return image.shape[:3] == tuple(shape) and np.allclose(image.affine, affine)


def trilinear(
    source_shape: tuple[int, ...],
    source_affine: np.ndarray,
    target_shape: tuple[int, ...],
    target_affine: np.ndarray,
) -> Any:
    """Return weights of source voxels in target voxels, csr [source voxels, target voxels].

    Voxels are in Fortran order. nilearn resamples map by map and voxel by voxel, which takes minutes for a
    thousand maps; maps are mostly zeros, and a product of sparse matrices skips them. The values are those of
    its `resample_img(interpolation="linear")`: what lies outside the source grid is 0.

    Parameters
    ----------
    source_shape, target_shape
        Voxels along x, y, z.
    source_affine, target_affine
        [4, 4], voxel indices to mm.
    """
    sparse = need("scipy.sparse", "resampling an atlas", "bids")
    to_source = np.linalg.inv(source_affine) @ target_affine
    targets = np.prod(target_shape)
    index = np.stack(np.unravel_index(np.arange(targets), target_shape, order="F"))
    points = to_source[:3, :3] @ index + to_source[:3, 3:]  # [3, targets], in source voxels
    last = np.array(source_shape)[:, None] - 1
    inside = ((points >= 0) & (points <= last)).all(axis=0)
    points, columns = points[:, inside], np.flatnonzero(inside)
    # On the far edge the last voxel is the upper corner, not the lower one.
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


def is_sheared(affine: np.ndarray) -> bool:
    """Whether the axes of an affine are not at right angles, beyond what float32 headers round."""
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    off_diagonal = axes.T @ axes - np.eye(3)
    return bool(np.abs(off_diagonal).max() > 1e-4)


def wrongly_resampled(image: Path, source: Path | None) -> bool:
    """Whether fMRIPrep 20.2.0 made an image from a sheared one of the scanner's.

    Parameters
    ----------
    image
        Of the derivatives.
    source
        Of the raw dataset; None if it is not there, which gives False.

    Raises
    ------
    Unusable
        If the source cannot be opened.
    """
    if source is None or _fmriprep_version(image) != _SHEARED_BY:
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
    """Return the version in the `dataset_description.json` above an image, or in the name of the folder."""
    for folder in image.absolute().parents:
        if folder.name.lower() == f"fmriprep-{_SHEARED_BY}":
            return _SHEARED_BY
        description = folder / "dataset_description.json"
        if description.is_file():
            return _version_of(description)
    return ""


def _version_of(description: Path) -> str:
    try:
        regular_size(description, TEXT_BYTES)
        content = json.loads(description.read_text(encoding="utf-8"))
        # PipelineDescription is what came before GeneratedBy, until BIDS 1.4.
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
