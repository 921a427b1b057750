"""Networks of an atlas, in the order of a store's columns: their names and their centres in mm.

Centres are nilearn's for volumes, and for surfaces the vertex or voxel nearest to the mean.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from brainflow.optional import need
from brainflow.prepare.atlas import BACKGROUND, AtlasSpec, network_names, read_labels
from brainflow.prepare.named import templateflow_home
from brainflow.prepare.surfaces import labels_of

_FSLR_VERTICES, _FSAVERAGE5_VERTICES = 32_492, 10_242
# Names of CIFTI, and the numbers that `surfaces` gives to a pair of GIFTI files.
_CORTEX = {"CIFTI_STRUCTURE_CORTEX_LEFT": 0, "CIFTI_STRUCTURE_CORTEX_RIGHT": 1, "0": 0, "1": 1}
# A thousand maps at once would take gigabytes.
_MAPS_AT_ONCE = 16


def networks_of(atlas: AtlasSpec) -> list[str]:
    """Name of each network: labels in ascending order without the background, or maps in their order.

    Of joined atlases in which a name stands twice, all names get the label of their atlas before them.
    """
    if atlas.parts:
        names = [networks_of(part) for part in atlas.parts]
        if len(set().union(*names)) < sum(map(len, names)):
            names = [
                [f"{part.label} {name}" for name in own] for part, own in zip(atlas.parts, names, strict=True)
            ]
        return [name for own in names for name in own]
    if atlas.kind in ("dlabel", "gifti"):
        labelled, known = labels_of(atlas)
        return network_names(atlas, sorted(set(labelled.values()) - {BACKGROUND}), known)
    image = need("nibabel", "reading an atlas", "bids").load(atlas.paths[0])
    if atlas.kind == "maps":
        return network_names(atlas, range(1, image.shape[3] + 1))
    values = np.unique(read_labels(image))
    return network_names(atlas, values[values != BACKGROUND].tolist())


def coordinates(spec: AtlasSpec) -> np.ndarray | None:
    """Return the centre of each network in mm, float64 [networks, 3].

    Volumes: nilearn's `find_parcellation_cut_coords` and `find_probabilistic_atlas_cut_coords`, each network
    cut out before. Surfaces: the vertex or voxel of a network that is nearest to their mean.

    Returns
    -------
    None for an atlas on a surface whose mesh is not known: neither in `spec.surfaces`, nor nilearn's
    fsaverage5, nor in TemplateFlow's folder
    """
    if spec.parts:
        found = [coordinates(part) for part in spec.parts]
        known = [one for one in found if one is not None]
        return np.concatenate(known) if len(known) == len(found) else None
    if spec.kind == "labels":
        return _of_labels(spec.paths[0])
    if spec.kind == "maps":
        return _of_maps(spec.paths[0])
    return _of_surfaces(spec)


def _of_labels(path: Path) -> np.ndarray:
    find = need(
        "nilearn.plotting", "finding the coordinates of an atlas", "bids"
    ).find_parcellation_cut_coords
    image = need("nibabel", "reading an atlas", "bids").load(path)
    data = read_labels(image)
    values = np.unique(data[data != BACKGROUND])
    labels = np.where(data == BACKGROUND, 0, np.searchsorted(values, data) + 1)  # 1, 2, … without gaps
    across = int(np.abs(image.affine[0, :3]).argmax())  # nilearn tells hemispheres apart: keep all of x
    boxes = need("scipy.ndimage", "finding the coordinates of an atlas", "bids").find_objects(labels)
    found = []
    for number, box in enumerate(boxes, 1):
        box = tuple(slice(0, None) if axis == across else part for axis, part in enumerate(box))
        # Cut out, because nilearn would look at the whole volume for each network.
        found.append(find(_cut(labels == number, box, image.affine, np.int16))[0])
    return np.asarray(found, np.float64)


def _of_maps(path: Path) -> np.ndarray:
    find = need("nilearn.plotting", "finding the coordinates of an atlas", "bids").find_xyz_cut_coords
    image = need("nibabel", "reading an atlas", "bids").load(path, keep_file_open=True)
    found = []
    for start in range(0, image.shape[3], _MAPS_AT_ONCE):
        block = np.asarray(image.dataobj[..., start : start + _MAPS_AT_ONCE])
        block = np.where(np.isfinite(block), block, 0)
        for data in np.moveaxis(block, 3, 0):
            filled = [np.flatnonzero(data.any(axis=others)) for others in ((1, 2), (0, 2), (0, 1))]
            box = tuple(slice(f[0], f[-1] + 1) if len(f) else slice(0, None) for f in filled)
            found.append(find(_cut(data, box, image.affine, data.dtype)))
    return np.asarray(found, np.float64)


def _cut(data: np.ndarray, box: tuple[slice, ...], affine: np.ndarray, dtype: Any) -> Any:
    """Return a part of a volume as an image that lies where it lay."""
    moved = affine.copy()
    moved[:3, 3] += affine[:3, :3] @ [part.start for part in box]
    return need("nibabel", "cutting out a network", "bids").Nifti1Image(data[box].astype(dtype), moved)


def _of_surfaces(spec: AtlasSpec) -> np.ndarray | None:
    labelled, _ = labels_of(spec)
    affine, vertices = _geometry(spec)
    members: dict[int, list[np.ndarray]] = {}
    meshes: dict[int, np.ndarray | None] = {}
    for (structure, point), value in labelled.items():
        if value == BACKGROUND:
            continue
        if isinstance(point, tuple):
            position = affine[:3, :3] @ point + affine[:3, 3]
        else:
            side = _CORTEX.get(structure)
            if side is None:
                return None
            if side not in meshes:
                meshes[side] = _mesh(spec, side, vertices.get(structure, 0))
            mesh = meshes[side]
            if mesh is None:
                return None
            position = mesh[point]
        members.setdefault(value, []).append(position)
    centres = []
    for value in sorted(members):
        positions = np.array(members[value])
        centres.append(positions[((positions - positions.mean(axis=0)) ** 2).sum(axis=1).argmin()])
    return np.asarray(centres, np.float64)


def _geometry(spec: AtlasSpec) -> tuple[np.ndarray, dict[str, int]]:
    """Return the affine of the voxels, and the number of vertices of each surface."""
    nibabel = need("nibabel", "reading an atlas", "bids")
    if spec.kind == "gifti":
        sizes = [len(nibabel.load(path).darrays[0].data) for path in spec.paths]
        return np.eye(4), {str(side): size for side, size in enumerate(sizes)}
    axis = nibabel.load(spec.paths[0]).header.get_axis(1)
    return np.eye(4) if axis.affine is None else axis.affine, {str(k): v for k, v in axis.nvertices.items()}


def _mesh(spec: AtlasSpec, side: int, vertices: int) -> np.ndarray | None:
    """Return vertices of a hemisphere in mm, float64 [vertices, 3].

    Raises
    ------
    ValueError
        If the user's mesh has another number of vertices than the atlas.
    """
    if spec.surfaces:
        path = spec.surfaces[side]
    elif vertices == _FSAVERAGE5_VERTICES:
        meshes = need("nilearn.datasets", "finding a mesh", "bids").fetch_surf_fsaverage(
            "fsaverage5"
        )  # bundled
        # nilearn has no midthickness of fsaverage.
        path = Path(meshes["pial_left" if side == 0 else "pial_right"])
    elif vertices == _FSLR_VERTICES:
        folder = templateflow_home() / "tpl-fsLR"
        path = folder / f"tpl-fsLR_den-32k_hemi-{'LR'[side]}_midthickness.surf.gii"
    else:
        return None
    # TemplateFlow puts empty files where it has not downloaded anything yet.
    if not spec.surfaces and not (path.is_file() and path.stat().st_size):
        return None
    points = need("nibabel", "reading a mesh", "bids").load(path).agg_data("pointset")
    if len(points) != vertices:
        raise ValueError(f"surfaces: {path} has {len(points)} vertices, atlas {spec.label} has {vertices}")
    return np.asarray(points, np.float64)
