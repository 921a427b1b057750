"""Parcellations: label images, maps, CIFTI dlabel files and GIFTI labels, by path or by name, or joined.

A name is looked up in the template of the images: nilearn has DiFuMo and Schaefer in MNI152NLin6Asym only,
while fMRIPrep's images are in MNI152NLin2009cAsym, which TemplateFlow has as well.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from brainflow.optional import need
from brainflow.prepare.files import parse_name
from brainflow.prepare.named import find as find_named
from brainflow.storage.files import replace_durably
from brainflow.storage.layout import to_json

AtlasKind = Literal["labels", "maps", "dlabel", "gifti"]
_INDEX_COLUMNS = ("index", "value", "label_index", "component")
_NAME_COLUMNS = ("name", "label", "difumo_names", "region", "regions")
BACKGROUND = 0


@dataclass(frozen=True, kw_only=True)
class AtlasSpec:
    """An atlas as a user asks for it: small enough to be sent to a worker.

    Parameters
    ----------
    label
        As in XCP-D's file names, `atlas-<label>`: letters and digits.
    paths
        The image; left and right hemisphere for GIFTI.
    kind
        What it holds.
    space
        Template that it is in, from its file name or from nilearn; "" if unknown.
    names
        {label value or map index: name}.
    digest
        sha256 of its files.
    surfaces
        Meshes of the left and right hemisphere, for the coordinates of an atlas on a surface.
    parts
        Atlases that are joined; the networks are those of the first, then those of the second, …
    """

    label: str
    paths: tuple[Path, ...]
    kind: AtlasKind
    space: str = ""
    names: tuple[tuple[int, str], ...] = ()
    digest: str = ""
    surfaces: tuple[Path, ...] = ()
    parts: tuple[AtlasSpec, ...] = ()

    @property
    def pieces(self) -> tuple[AtlasSpec, ...]:
        """The atlases that are joined, or this one alone."""
        return self.parts or (self,)


def find_atlas(text: str, template: str = "", surfaces: Sequence[Path] = ()) -> AtlasSpec:
    """Resolve what a user wrote: `schaefer-400`, `path.nii.gz`, `LABEL=…` of one, or several joined by `+`.

    Parameters
    ----------
    text
        What the user wrote.
    template
        In which a named atlas is wanted; "" for the first that is known, mostly nilearn's copy.
    surfaces
        Meshes of the left and right hemisphere, for an atlas on a surface.

    Raises
    ------
    FileNotFoundError
        If it is neither a file nor a name.
    ConnectionError
        If an atlas that is known by name cannot be downloaded.
    ValueError
        If the file is not a parcellation, a named atlas does not exist in the template, atlases of volumes
        and of surfaces are joined, or one with itself.
    """
    before, equals, behind = text.partition("=")
    # A label stands in file names behind `atlas-`, where BIDS has letters and digits only.
    wanted, label = (behind, re.sub(r"[^A-Za-z0-9]", "", before)) if equals else (text, "")
    path = Path(wanted)
    # A file comes first: its name may be an atlas's, or hold a +.
    if path.is_file():
        return _from_files(path, label, tuple(surfaces))
    parts = wanted.split("+")
    if len(parts) > 1:
        return _join(text, label, [find_atlas(part, template, surfaces) for part in parts])
    named = find_named(wanted, template)
    if named is None:
        raise FileNotFoundError(
            f"atlas {text!r}: no such file, and not a name; `brainflow atlases` lists the names"
        )
    names = _names_of_file(named.table) if named.table is not None else named.names
    return replace(
        _from_files(named.path, named.label, tuple(surfaces)),
        label=label or named.label,
        space=named.template,
        names=tuple(sorted(names.items())),
    )


def _from_files(path: Path, label: str, surfaces: tuple[Path, ...]) -> AtlasSpec:
    nibabel = need("nibabel", "reading an atlas", "bids")
    parsed = parse_name(path)
    entities: Mapping[str, str] = parsed.entities if parsed else {}
    # Absolute: the group level, which reads them again, may be started in another folder.
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
        # A label image may have been saved with a fourth axis of 1.
        kind = "maps" if len(shape) == 4 and shape[3] > 1 else "labels"
    else:
        raise ValueError(f"atlas {path}: expected .nii, .nii.gz, .dlabel.nii or .label.gii")
    stem = path.name.partition(".")[0]
    label = label or entities.get("atlas", "") or entities.get("seg", "") or re.sub(r"[^A-Za-z0-9]", "", stem)
    # TemplateFlow says the number of parcels in `desc-`.
    if entities.get("desc") and "atlas" in entities:
        label += entities["desc"]
    return AtlasSpec(
        label=label,
        paths=paths,
        kind=kind,
        space=_space(entities),
        names=tuple(sorted(_names_beside(path).items())),
        digest=_digest(paths),
        surfaces=tuple(surface.absolute() for surface in surfaces) if kind in ("dlabel", "gifti") else (),
    )


def _space(entities: Mapping[str, str]) -> str:
    space = entities.get("space", "") or entities.get("tpl", "")
    return f"{space}:cohort-{entities['cohort']}" if space and entities.get("cohort") else space


def _both_hemispheres(path: Path) -> tuple[Path, Path]:
    match = re.search(r"(hemi-|[._])(L|R|lh|rh)(?=[._])", path.name)
    if match is None:
        raise ValueError(f"atlas {path}: expected a GIFTI label file with hemi-L or hemi-R in its name")
    swap = {"L": "R", "R": "L", "lh": "rh", "rh": "lh"}
    other = path.with_name(path.name[: match.start(2)] + swap[match[2]] + path.name[match.end(2) :])
    if not other.is_file():
        raise FileNotFoundError(f"atlas {path}: the other hemisphere, {other.name}, does not lie beside it")
    # Left first: points are told apart by the place of their file.
    return (path, other) if match[2] in ("L", "lh") else (other, path)


def _names_beside(path: Path) -> dict[int, str]:
    """Return names of a table or .json of the same name, with or without resolution and hemisphere."""
    stem = path.name.partition(".")[0]
    # TemplateFlow has one table for all resolutions of an atlas.
    for candidate in dict.fromkeys((stem, re.sub(r"_(res|hemi)-[A-Za-z0-9]+", "", stem))):
        for ending in (".tsv", ".csv", ".txt", ".json"):
            table = path.with_name(candidate + ending)
            if table.is_file() and (names := _names_of_file(table)):
                return names
    return {}


def _names_of_file(path: Path) -> dict[int, str]:
    if path.suffix == ".txt":  # one name a line
        return dict(enumerate(path.read_text(encoding="utf-8").splitlines(), 1))
    return _names_of_json(path) if path.suffix == ".json" else _names_of_table(path)


def _names_of_table(path: Path) -> dict[int, str]:
    # Excel begins a file with a byte-order mark.
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
    # A sidecar may say other things, too, under keys that are no numbers.
    return {int(key): str(name) for key, name in content.items() if str(key).isdigit()}


def _digest(paths: Sequence[Path]) -> str:
    sha = hashlib.sha256()
    for path in paths:
        sha.update(path.read_bytes())
    return sha.hexdigest()


def _join(text: str, label: str, parts: Sequence[AtlasSpec]) -> AtlasSpec:
    """Return several atlases as one, its networks those of the first, then of the second, and so on."""
    kinds = {"volume" if part.kind in ("labels", "maps") else part.kind for part in parts}
    if len(kinds) > 1:
        raise ValueError(f"atlas {text}: joins {' and '.join(sorted(kinds))}, expected one kind of image")
    if len({part.paths for part in parts}) < len(parts):
        raise ValueError(f"atlas {text}: joins an atlas with itself, which doubles its networks")
    spaces = {part.space for part in parts} - {""}
    return AtlasSpec(
        label=label or "".join(part.label for part in parts),
        paths=tuple(path for part in parts for path in part.paths),
        kind=parts[0].kind,
        # Nothing where parts differ: `check_space` looks at each of them.
        space=spaces.pop() if len(spaces) == 1 else "",
        digest=hashlib.sha256("".join(part.digest for part in parts).encode()).hexdigest(),
        # All parts were given the same meshes.
        surfaces=parts[0].surfaces,
        parts=tuple(parts),
    )


def save_atlas(spec: AtlasSpec, work: Path) -> None:
    """Note where an atlas lies, for the group level."""
    path = work / "atlases" / f"{spec.label}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    # Twice, because the first time makes texts of paths.
    replace_durably(path, to_json(json.loads(json.dumps(asdict(spec), default=str))))


def saved_atlas(label: str, work: Path) -> AtlasSpec:
    """Return the atlas that the participant level used.

    Raises
    ------
    FileNotFoundError
        If it has moved.
    """
    spec = _restored(json.loads((work / "atlases" / f"{label}.json").read_text(encoding="utf-8")))
    for path in spec.paths:
        if not path.is_file():
            raise FileNotFoundError(
                f"atlas {label}: {path} is not there any more; say where it is with --atlas"
            )
    return spec


def _restored(noted: dict[str, Any]) -> AtlasSpec:
    paths = {name: tuple(map(Path, noted[name])) for name in ("paths", "surfaces")}
    names = tuple((value, name) for value, name in noted["names"])
    parts = tuple(map(_restored, noted.get("parts", ())))
    return AtlasSpec(**{**noted, **paths, "names": names, "parts": parts})


def network_names(
    spec: AtlasSpec, values: Sequence[int], known: Mapping[int, str] | None = None
) -> list[str]:
    """Name of each network: from the table beside the atlas, the image itself (`known`), or its number."""
    names = {**(known or {}), **dict(spec.names)}
    # A table may leave a name empty.
    return [names.get(int(value)) or f"{value}" for value in values]


def check_space(spec: AtlasSpec, space: str) -> None:
    """Refuse an atlas that says it is in another template than the images.

    Raises
    ------
    ValueError
        Naming both.
    """
    for one in spec.pieces:
        if one.space and space and one.space != space:
            raise ValueError(
                f"atlas {one.label}: is in {one.space}, the images in {space}, which differ by millimetres; "
                f"take the atlas in {space} by path (TemplateFlow has DiFuMo and Schaefer in both), images "
                f"in {one.space} with --space, or accept it with --allow-space-mismatch"
            )


def read_labels(image: Any) -> np.ndarray:
    """Return voxels of a label image as int64, background and what is not finite as 0.

    Raises
    ------
    ValueError
        If the labels are not whole numbers.
    """
    data = np.asarray(image.dataobj, np.float64)
    data = np.where(np.isfinite(data), data, BACKGROUND)
    if data.ndim == 4:
        data = data[..., 0]
    labels = np.rint(data).astype(np.int64)
    if not np.array_equal(labels, data):
        raise ValueError("label image: holds values that are not whole numbers; is it a map?")
    return labels
