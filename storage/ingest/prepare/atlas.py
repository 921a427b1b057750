"""Parcellations: label images, maps, CIFTI dlabel files and GIFTI labels, by path or by name."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...files import replace_durably
from ...layout import to_json
from .extra import need
from .names import parse_name

AtlasKind = Literal["labels", "maps", "dlabel", "gifti"]
_INDEX_COLUMNS = ("index", "value", "label_index", "component")
_NAME_COLUMNS = ("name", "label", "difumo_names", "region", "regions")
BACKGROUND = 0


@dataclass(frozen=True, kw_only=True)
class AtlasSpec:
    """An atlas as a user asks for it: small enough to be sent to a worker.

    Parameters
    ----------
    label : as in XCP-D's file names, `atlas-<label>`: letters and digits
    paths : the image; left and right hemisphere for GIFTI
    kind : what it holds
    space : template that it is in, from its file name or from nilearn; "" if unknown
    names : {label value or map index: name}
    digest : sha256 of its files
    """

    label: str
    paths: tuple[Path, ...]
    kind: AtlasKind
    space: str = ""
    names: tuple[tuple[int, str], ...] = ()
    digest: str = ""


def find_atlas(text: str) -> AtlasSpec:
    """Resolve what a user wrote: `difumo-1024`, `schaefer-400`, `path.nii.gz` or `LABEL=path.nii.gz`.

    Raises
    ------
    FileNotFoundError : if it is neither a file nor a name
    ConnectionError : if nilearn cannot fetch an atlas that is known by name
    ValueError : if the file is not a parcellation
    """
    label, equals, path_text = text.partition("=")
    path = Path(path_text if equals else text)
    if not path.is_file():
        named = re.fullmatch(r"(difumo|schaefer)[-_]?(\d+)", text.lower())
        if named is None:
            raise FileNotFoundError(
                f"atlas {text!r}: no such file, and not a name: difumo-64 to difumo-1024, schaefer-100 to "
                f"schaefer-1000"
            )
        return _fetch(named[1], int(named[2]))
    return _from_files(path, re.sub(r"[^A-Za-z0-9]", "", label) if equals else "")


def _from_files(path: Path, label: str) -> AtlasSpec:
    nibabel = need("nibabel", "reading an atlas")
    parsed = parse_name(path)
    entities: Mapping[str, str] = parsed.entities if parsed else {}
    paths: tuple[Path, ...] = (path.absolute(),)
    if path.name.endswith(".label.gii"):
        kind: AtlasKind = "gifti"
        paths = _both_hemispheres(path.absolute())
    elif path.name.endswith(".dlabel.nii"):
        kind = "dlabel"
    elif path.name.endswith((".nii", ".nii.gz")):
        shape = nibabel.load(path).shape
        if len(shape) not in (3, 4):
            raise ValueError(
                f"atlas {path}: has shape {shape}, expected a 3-D label image or a 4-D image of maps"
            )
        kind = "maps" if len(shape) == 4 and shape[3] > 1 else "labels"
    else:
        raise ValueError(f"atlas {path}: expected .nii, .nii.gz, .dlabel.nii or .label.gii")
    stem = path.name.partition(".")[0]
    label = label or entities.get("atlas", "") or entities.get("seg", "") or re.sub(r"[^A-Za-z0-9]", "", stem)
    if entities.get("desc") and "atlas" in entities:
        label += entities["desc"]
    return AtlasSpec(
        label=label,
        paths=paths,
        kind=kind,
        space=entities.get("space", "") or entities.get("tpl", ""),
        names=tuple(sorted(_names_beside(path).items())),
        digest=_digest(paths),
    )


def _both_hemispheres(path: Path) -> tuple[Path, Path]:
    match = re.search(r"(hemi-|[._])(L|R|lh|rh)(?=[._])", path.name)
    if match is None:
        raise ValueError(f"atlas {path}: expected a GIFTI label file with hemi-L or hemi-R in its name")
    swap = {"L": "R", "R": "L", "lh": "rh", "rh": "lh"}
    other = path.with_name(path.name[: match.start(2)] + swap[match[2]] + path.name[match.end(2) :])
    if not other.is_file():
        raise FileNotFoundError(f"atlas {path}: the other hemisphere, {other.name}, does not lie beside it")
    return (path, other) if match[2] in ("L", "lh") else (other, path)


def _names_beside(path: Path) -> dict[int, str]:
    """Names from a .tsv, .csv or .json of the same name, with or without resolution and hemisphere."""
    stem = path.name.partition(".")[0]
    for candidate in dict.fromkeys((stem, re.sub(r"_(res|hemi)-[A-Za-z0-9]+", "", stem))):
        for ending in (".tsv", ".csv"):
            table = path.with_name(candidate + ending)
            if table.is_file():
                return _names_of_table(table)
        sidecar = path.with_name(candidate + ".json")
        if sidecar.is_file():
            names = _names_of_json(sidecar)
            if names:
                return names
    return {}


def _names_of_table(path: Path) -> dict[int, str]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
    columns = {name.lower(): name for name in (rows[0] if rows else {}) if name}
    name = next((columns[c] for c in _NAME_COLUMNS if c in columns), None)
    index = next((columns[c] for c in _INDEX_COLUMNS if c in columns), None)
    if name is None:
        raise ValueError(f"{path}: has no column with names; expected one of {', '.join(_NAME_COLUMNS)}")
    try:
        return {int(row[index]) if index else i: row[name] for i, row in enumerate(rows, 1)}
    except ValueError as error:
        raise ValueError(f"{path}: column {index} must hold whole numbers ({error})") from error


def _names_of_json(path: Path) -> dict[int, str]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(content, dict):
        content = content.get("labels", content)
    if isinstance(content, list):
        return {i: str(name) for i, name in enumerate(content, 1)}
    return {int(key): str(name) for key, name in content.items() if str(key).isdigit()}


def _digest(paths: Sequence[Path]) -> str:
    sha = hashlib.sha256()
    for path in paths:
        sha.update(path.read_bytes())
    return sha.hexdigest()


def _fetch(family: str, size: int) -> AtlasSpec:
    datasets = need("nilearn.datasets", "fetching an atlas")
    try:
        if family == "difumo":
            bunch = datasets.fetch_atlas_difumo(dimension=size, resolution_mm=2)
            path, kind = Path(str(bunch.maps)), "maps"
            names = {i: str(name) for i, name in enumerate(bunch.labels["difumo_names"], 1)}
        else:
            bunch = datasets.fetch_atlas_schaefer_2018(n_rois=size, resolution_mm=2)
            path, kind = Path(str(bunch.maps)), "labels"
            labels = [name.decode() if isinstance(name, bytes) else str(name) for name in bunch.labels]
            names = dict(enumerate([x for x in labels if x.lower() != "background"], 1))
    except ValueError as error:
        raise ValueError(f"atlas {family}-{size}: {' '.join(str(error).split())}") from error
    except Exception as error:  # nilearn, requests and urllib raise many kinds when there is no network
        raise ConnectionError(
            f"atlas {family}-{size}: nilearn could not download it ({type(error).__name__}); fetch it where "
            f"there is "
            f"internet and set NILEARN_DATA to its folder, or give the path of its image"
        ) from error
    label = {"difumo": "DiFuMo", "schaefer": "Schaefer"}[family] + str(size)
    return AtlasSpec(
        label=label,
        paths=(path,),
        kind=kind,  # type: ignore[arg-type]
        space=str(bunch.get("template", "")),
        names=tuple(sorted(names.items())),
        digest=_digest((path,)),
    )


def save_atlas(spec: AtlasSpec, work: Path) -> None:
    """Note where an atlas lies, for the group level."""
    path = work / "atlases" / f"{spec.label}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_durably(path, to_json({**asdict(spec), "paths": [str(p) for p in spec.paths]}))


def saved_atlas(label: str, work: Path) -> AtlasSpec:
    """The atlas that the participant level used.

    Raises
    ------
    FileNotFoundError : if it has moved
    """
    noted = json.loads((work / "atlases" / f"{label}.json").read_text(encoding="utf-8"))
    noted["paths"] = tuple(map(Path, noted["paths"]))
    noted["names"] = tuple((value, name) for value, name in noted["names"])
    for path in noted["paths"]:
        if not path.is_file():
            raise FileNotFoundError(
                f"atlas {label}: {path} is not there any more; say where it is with --atlas"
            )
    return AtlasSpec(**noted)


def network_names(
    spec: AtlasSpec, values: Sequence[int], known: Mapping[int, str] | None = None
) -> list[str]:
    """Name of each network: from the table beside the atlas, the image itself (`known`), or its number."""
    names = {**(known or {}), **dict(spec.names)}
    return [names.get(int(value)) or f"{value}" for value in values]


def coordinates(spec: AtlasSpec) -> np.ndarray | None:
    """Centre of each network in mm by nilearn, float64 [networks, 3]; None for surfaces."""
    if spec.kind not in ("labels", "maps"):
        return None
    plotting = need("nilearn.plotting", "finding the coordinates of an atlas")
    path = str(spec.paths[0])
    if spec.kind == "maps":
        return np.asarray(plotting.find_probabilistic_atlas_cut_coords(path), np.float64)
    found, values = plotting.find_parcellation_cut_coords(
        path, background_label=BACKGROUND, return_label_names=True
    )
    order = np.argsort(np.asarray(values))
    return np.asarray(found, np.float64)[order]


def check_space(spec: AtlasSpec, space: str) -> None:
    """Refuse an atlas that says it is in another template than the images.

    Raises
    ------
    ValueError : naming both
    """
    if spec.space and space and spec.space != space:
        raise ValueError(
            f"atlas {spec.label}: is in {spec.space}, the images in {space}, which differ by millimetres; "
            f"take the atlas in {space} by path (TemplateFlow has DiFuMo and Schaefer in both), images in "
            f"{spec.space} with --space, or accept it with --allow-space-mismatch"
        )


def read_labels(image: Any) -> np.ndarray:
    """Voxels of a label image as int64, background and what is not finite as 0.

    Raises
    ------
    ValueError : if the labels are not whole numbers
    """
    data = np.asarray(image.dataobj, np.float64)
    data = np.where(np.isfinite(data), data, BACKGROUND)
    if data.ndim == 4:
        data = data[..., 0]
    labels = np.rint(data).astype(np.int64)
    if not np.array_equal(labels, data):
        raise ValueError("label image: holds values that are not whole numbers; is it a map?")
    return labels
