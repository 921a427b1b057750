"""Parcel time series of surfaces: CIFTI `.dtseries.nii` with a dlabel, pairs of GIFTI with label files.

A network's time series is the mean over its vertices and voxels. Surfaces are not smoothed here: that needs
the geodesic distances of a mesh (`wb_command -cifti-smoothing` does it beforehand).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from brainflow.optional import need
from brainflow.prepare.atlas import BACKGROUND, AtlasSpec, network_names
from brainflow.prepare.precheck import check_cifti, check_gifti
from brainflow.prepare.records import Unusable
from brainflow.prepare.volumes import refuse_lost
from brainflow.storage.ingest.limits import budget, regular_size


@dataclass(frozen=True, kw_only=True)
class Dense:
    """A run on grayordinates or vertices.

    Parameters
    ----------
    data : float32 [time, points]
    points : one (structure, index) a column: a vertex number, or a voxel as (i, j, k)
    t_r : seconds from the header, None where it has none
    """

    data: np.ndarray
    points: list[tuple[str, Any]]
    t_r: float | None


def read_cifti(path: Path) -> Dense:
    """Read a dense time series.

    Raises
    ------
    Unusable : if it cannot be read or is no time series
    """
    image = _load(path)
    axes = _axes(image, path)
    if len(axes) != 2 or type(axes[0]).__name__ != "SeriesAxis" or type(axes[1]).__name__ != "BrainModelAxis":
        raise Unusable(
            f"{path.name}: is no dense time series (its axes are {', '.join(type(a).__name__ for a in axes)})"
        )
    series = axes[0]
    t_r = float(series.step) if series.unit == "SECOND" and series.step > 0 else None
    return Dense(data=_data(image, path), points=_points(axes[1]), t_r=t_r)


def read_parcels(path: Path) -> tuple[np.ndarray, list[str], float | None]:
    """Read a CIFTI parcel series: float32 [time, parcels], names of the parcels, seconds of the header.

    Raises
    ------
    Unusable : if it cannot be read or is no parcel series
    """
    image = _load(path)
    axes = _axes(image, path)
    if [type(axis).__name__ for axis in axes] != ["SeriesAxis", "ParcelsAxis"]:
        raise Unusable(f"{path.name}: is no parcel series")
    series = axes[0]
    t_r = float(series.step) if series.unit == "SECOND" and series.step > 0 else None
    return _data(image, path), [str(name) for name in axes[1].name], t_r


def read_gifti(paths: Sequence[Path]) -> Dense:
    """Read a pair of hemispheres, one data array a time point.

    Raises
    ------
    Unusable : if a file cannot be read or the hemispheres have different numbers of time points
    """
    hemispheres = [_gifti_arrays(path) for path in paths]
    lengths = [len(data) for data in hemispheres]
    if len(set(lengths)) != 1 or lengths[0] < 2:
        names = ", ".join(path.name for path in paths)
        raise Unusable(
            f"{names}: have {' and '.join(map(str, lengths))} time points, expected equally many, and more "
            f"than one"
        )
    points = [(side, vertex) for side, data in enumerate(hemispheres) for vertex in range(data.shape[1])]
    return Dense(data=np.hstack(hemispheres), points=[(str(side), v) for side, v in points], t_r=None)


def extract(run: Dense, atlases: Sequence[AtlasSpec], dropped: int) -> list[np.ndarray]:
    """Mean time series of each label.

    Raises
    ------
    Unusable : if a label of an atlas has no point in the run, or nothing was recorded at a volume
    """
    return [np.hstack([_means(run, part, dropped) for part in atlas.pieces]) for atlas in atlases]


def _means(run: Dense, atlas: AtlasSpec, dropped: int) -> np.ndarray:
    sparse = need("scipy.sparse", "averaging labels", "bids")
    labelled, known = labels_of(atlas)
    wanted = np.array(sorted(set(labelled.values()) - {BACKGROUND}), np.int64)
    labels = np.array([labelled.get(point, BACKGROUND) for point in run.points], np.int64)
    lost = np.setdiff1d(wanted, labels)
    if len(lost):
        examples = ", ".join(network_names(atlas, lost[:5].tolist(), known))
        raise Unusable(
            f"atlas {atlas.label}: {len(lost)} of {len(wanted)} labels are not in the run ({examples})"
        )
    points = np.flatnonzero(labels != BACKGROUND)
    networks = np.searchsorted(wanted, labels[points])
    weights = 1.0 / np.bincount(networks, minlength=len(wanted))[networks]
    matrix = sparse.csr_array((weights, (networks, points)), shape=(len(wanted), len(labels)))
    finite = np.isfinite(run.data)
    refuse_lost(finite.any(axis=1), dropped=dropped)
    data = np.where(finite, run.data, 0)[dropped:]
    return (matrix @ data.T.astype(np.float64)).T


def labels_of(atlas: AtlasSpec) -> tuple[dict[tuple[str, Any], int], dict[int, str]]:
    """Label of each point of a dlabel or a pair of GIFTI files, and the names that they hold."""
    if atlas.kind == "dlabel":
        path = atlas.paths[0]
        image = _load(path)
        axes = _axes(image, path)
        values = np.rint(_data(image, path)[0]).astype(np.int64)
        table = axes[0].label[0]
        known = {int(value): str(name) for value, (name, _) in table.items()}
        return dict(zip(_points(axes[1]), values.tolist(), strict=True)), known
    if atlas.kind != "gifti":
        raise Unusable(
            f"atlas {atlas.label}: is a volume; surfaces need a .dlabel.nii or a pair of .label.gii files"
        )
    labelled: dict[tuple[str, Any], int] = {}
    names: dict[int, str] = {}
    shift = 0
    for side, path in enumerate(atlas.paths):
        values = np.rint(_gifti_arrays(path)[0]).astype(np.int64)
        own = {int(k): str(v) for k, v in _load(path).labeltable.get_labels_as_dict().items()}
        clash = [
            value for value in own if value in names and names[value] != own[value] and value != BACKGROUND
        ]
        shift = (
            max(names) if clash else 0
        )  # both hemispheres count from 1: the right one goes behind the left
        for vertex, value in enumerate(values.tolist()):
            labelled[str(side), vertex] = value + shift if value != BACKGROUND else BACKGROUND
        names |= {value + shift if value != BACKGROUND else value: name for value, name in own.items()}
    return labelled, names


def _points(axis: Any) -> list[tuple[str, Any]]:
    """(structure, vertex) or (structure, (i, j, k)) of each grayordinate."""
    voxels = [tuple(voxel) for voxel in axis.voxel.tolist()]
    return [
        (str(name), vertex if vertex >= 0 else voxel)
        for name, vertex, voxel in zip(axis.name, axis.vertex.tolist(), voxels, strict=True)
    ]


def _gifti_arrays(path: Path) -> np.ndarray:
    """float32 [time, vertices]."""
    arrays = getattr(_load(path), "darrays", [])
    if not arrays:
        raise Unusable(f"{path.name}: holds no data arrays")
    try:
        return np.stack([np.asarray(array.data, np.float32).reshape(-1) for array in arrays])
    except (ValueError, TypeError) as error:
        raise Unusable(f"{path.name}: its data arrays differ in length ({error})") from error


def _load(path: Path) -> Any:
    nibabel = need("nibabel", "reading surfaces", "bids")
    try:
        size = regular_size(path)
        if path.name.endswith(".gii"):
            check_gifti(path)
        else:
            check_cifti(path, size)
        return nibabel.load(path)
    except Unusable:
        raise
    except Exception as error:  # expat, zlib and nibabel raise many kinds for a damaged file
        raise Unusable(f"{path.name}: cannot be opened ({' '.join(str(error).split())})") from error


def _axes(image: Any, path: Path) -> list[Any]:
    if type(image).__name__ != "Cifti2Image":
        raise Unusable(f"{path.name}: is no CIFTI-2 file")
    if 4 * math.prod(image.shape) > budget(path.stat().st_size):
        raise Unusable(f"{path.name}: declares shape {list(image.shape)}, more than its bytes can hold")
    try:
        return [image.header.get_axis(i) for i in range(image.ndim)]
    except Exception as error:  # a header that contradicts itself fails in any way
        raise Unusable(
            f"{path.name}: its header cannot be understood ({' '.join(str(error).split())})"
        ) from error


def _data(image: Any, path: Path) -> np.ndarray:
    try:
        return np.asarray(image.dataobj, np.float32)
    except (OSError, EOFError, ValueError, OverflowError) as error:
        raise Unusable(
            f"{path.name}: cannot be read; the file is truncated or damaged ({' '.join(str(error).split())})"
        ) from error
