"""Parcellations: label images, maps, CIFTI dlabel files and GIFTI labels, by path or by name.

A name is looked up in the template of the images: nilearn has DiFuMo and Schaefer in MNI152NLin6Asym only,
while fMRIPrep's images are in MNI152NLin2009cAsym, which TemplateFlow has as well. Files are taken from
TemplateFlow's folder; its client, if installed, downloads what is missing.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from brainflow.optional import need
from brainflow.prepare.files import parse_name
from brainflow.storage.files import replace_durably
from brainflow.storage.layout import to_json

AtlasKind = Literal["labels", "maps", "dlabel", "gifti"]
Family = Literal["difumo", "schaefer"]
_INDEX_COLUMNS = ("index", "value", "label_index", "component")
_NAME_COLUMNS = ("name", "label", "difumo_names", "region", "regions")
BACKGROUND = 0
NILEARN_TEMPLATE = "MNI152NLin6Asym"
SIZES = {"difumo": (64, 128, 256, 512, 1024), "schaefer": tuple(range(100, 1001, 100))}
_TITLES = {"difumo": "DiFuMo", "schaefer": "Schaefer"}
_TEMPLATEFLOW = {
    "difumo": ("DiFuMo", "{}dimensions", "probseg"),
    "schaefer": ("Schaefer2018", "{}Parcels7Networks", "dseg"),
}


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
    surfaces : meshes of the left and right hemisphere, for the coordinates of an atlas on a surface
    """

    label: str
    paths: tuple[Path, ...]
    kind: AtlasKind
    space: str = ""
    names: tuple[tuple[int, str], ...] = ()
    digest: str = ""
    surfaces: tuple[Path, ...] = ()


def find_atlas(text: str, template: str = "", surfaces: Sequence[Path] = ()) -> AtlasSpec:
    """Resolve what a user wrote: `difumo-1024`, `schaefer-400`, `path.nii.gz` or `LABEL=path.nii.gz`.

    Parameters
    ----------
    template : in which a named atlas is wanted; "" for nilearn's copy
    surfaces : meshes of the left and right hemisphere, for an atlas on a surface

    Raises
    ------
    FileNotFoundError : if it is neither a file nor a name
    ConnectionError : if an atlas that is known by name cannot be downloaded
    ValueError : if the file is not a parcellation, or a named atlas does not exist in the template
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
        family: Family = "difumo" if named[1] == "difumo" else "schaefer"
        return _named(family, int(named[2]), template)
    return _from_files(path, re.sub(r"[^A-Za-z0-9]", "", label) if equals else "", tuple(surfaces))


def _from_files(path: Path, label: str, surfaces: tuple[Path, ...]) -> AtlasSpec:
    nibabel = need("nibabel", "reading an atlas", "bids")
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
        surfaces=tuple(surface.absolute() for surface in surfaces) if kind in ("dlabel", "gifti") else (),
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


def _named(family: Family, size: int, template: str) -> AtlasSpec:
    """An atlas by name, 2 mm, Schaefer's with 7 networks; "" as template takes nilearn's copy."""
    if size not in SIZES[family]:
        sizes = ", ".join(map(str, SIZES[family]))
        raise ValueError(f"atlas {family}-{size}: has no such size, expected one of {sizes}")
    if template in ("", NILEARN_TEMPLATE):
        path, space, names = _from_nilearn(family, size)
    else:
        path, space = _from_templateflow(family, size, template), template
        names = _names_beside(path)
    return AtlasSpec(
        label=f"{_TITLES[family]}{size}",
        paths=(path.absolute(),),
        kind="maps" if family == "difumo" else "labels",
        space=space,
        names=tuple(sorted(names.items())),
        digest=_digest((path,)),
    )


def templateflow_home() -> Path:
    """Folder in which TemplateFlow's client keeps its files."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.get("TEMPLATEFLOW_HOME", cache / "templateflow"))


def _from_templateflow(family: Family, size: int, template: str) -> Path:
    atlas, description, suffix = _TEMPLATEFLOW[family]
    description = description.format(size)
    name = f"tpl-{template}_res-02_atlas-{atlas}_desc-{description}_{suffix}.nii.gz"
    path = templateflow_home() / f"tpl-{template}" / name
    if not _is_fetched(path) and importlib.util.find_spec("templateflow") is not None:
        client = need("templateflow.api", "fetching an atlas", "bids")
        wanted = {"atlas": atlas, "desc": description, "suffix": suffix}
        try:
            client.get(template, resolution=2, extension=".nii.gz", **wanted)
            client.get(template, extension=".tsv", **wanted)
        except Exception as error:  # requests and the client raise many kinds when there is no network
            raise _not_downloaded(family, size, "TemplateFlow", "TEMPLATEFLOW_HOME", error) from error
    if not _is_fetched(path):
        raise ValueError(
            f"atlas {family}-{size}: nilearn has it in {NILEARN_TEMPLATE}, the images are in {template}, and "
            f"it is not in TemplateFlow's folder ({templateflow_home()}): the extra `bids` fetches it from "
            "TemplateFlow if that has it, TEMPLATEFLOW_HOME names another folder, --allow-space-mismatch "
            "takes nilearn's, as the published models did; for surfaces, give a file by path"
        )
    return path


def _is_fetched(path: Path) -> bool:
    """TemplateFlow puts empty files where it has not downloaded anything yet."""
    return path.is_file() and path.stat().st_size > 0


def _from_nilearn(family: Family, size: int) -> tuple[Path, str, dict[int, str]]:
    datasets = need("nilearn.datasets", "fetching an atlas", "bids")
    try:
        bunch: Any
        if family == "difumo":
            bunch = datasets.fetch_atlas_difumo(dimension=size, resolution_mm=2)
            names = [str(name) for name in bunch.labels["difumo_names"]]
        else:
            bunch = datasets.fetch_atlas_schaefer_2018(n_rois=size, resolution_mm=2)
            texts = [name.decode() if isinstance(name, bytes) else str(name) for name in bunch.labels]
            names = [text for text in texts if text.lower() != "background"]
    except Exception as error:  # nilearn, requests and urllib raise many kinds when there is no network
        raise _not_downloaded(family, size, "nilearn", "NILEARN_DATA", error) from error
    return Path(str(bunch.maps)), str(bunch.get("template", "")), dict(enumerate(names, 1))


def _not_downloaded(family: Family, size: int, who: str, variable: str, error: Exception) -> ConnectionError:
    return ConnectionError(
        f"atlas {family}-{size}: {who} could not download it ({type(error).__name__}); fetch it where there "
        f"is internet and set {variable} to its folder, or give the path of its image"
    )


def save_atlas(spec: AtlasSpec, work: Path) -> None:
    """Note where an atlas lies, for the group level."""
    path = work / "atlases" / f"{spec.label}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    paths = {name: [str(p) for p in getattr(spec, name)] for name in ("paths", "surfaces")}
    replace_durably(path, to_json({**asdict(spec), **paths}))


def saved_atlas(label: str, work: Path) -> AtlasSpec:
    """The atlas that the participant level used.

    Raises
    ------
    FileNotFoundError : if it has moved
    """
    noted = json.loads((work / "atlases" / f"{label}.json").read_text(encoding="utf-8"))
    noted["paths"], noted["surfaces"] = tuple(map(Path, noted["paths"])), tuple(map(Path, noted["surfaces"]))
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
