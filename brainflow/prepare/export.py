"""A store → files that other tools read: XCP-D's time series tables, or CIFTI parcel series."""

from __future__ import annotations

import os
import re
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import numpy as np

from brainflow.optional import need
from brainflow.prepare.atlas import BACKGROUND, AtlasSpec, read_labels
from brainflow.prepare.description import GENERATOR, bids_uri, is_ours
from brainflow.storage.files import replace_durably
from brainflow.storage.layout import to_json
from brainflow.storage.store import BoldStore
from brainflow.storage.text import csv_cell, printable

Format = Literal["tsv", "ptseries"]
_LONGEST_NAME = 230  # of 255 bytes; a file is written beside its place under a name that is a little longer
_ENDINGS = {"tsv": "_timeseries.tsv", "ptseries": "_timeseries.ptseries.nii"}


@dataclass(frozen=True, kw_only=True)
class Exported:
    """One file that was written, and the run that it holds."""

    key: str
    path: Path


def export(
    store: BoldStore,
    output: Path,
    form: Format,
    *,
    participants: Collection[str] = (),
    label: str = "",
    space: str = "",
    geometry: AtlasSpec | None = None,
) -> Iterator[Exported]:
    """Write `sub-…/func/…_atlas-…_stat-mean_timeseries.tsv` and its sidecar for each run.

    Parameters
    ----------
    store, output
        What is exported, and the directory to write into.
    form
        "tsv", one column a network with its name above, or "ptseries", CIFTI.
    participants
        Labels to export; all if empty.
    label
        Of the atlas; by default the store's parcellation.
    space
        For the `space-` of the name; by default the one that the store was prepared in, if it knows.
    geometry
        Label image or dlabel of the atlas, which tells a ptseries where its parcels are; without it they have
        names only.

    Raises
    ------
    ValueError
        If nothing is to be exported, the geometry has other networks than the store, a file would lie outside
        `output`, or one is there that this function did not write.
    """
    label = re.sub(r"[^A-Za-z0-9]", "", label or store.attributes["parcellation"]) or "unknown"
    space = space or str(store.attributes["preprocessing"].get("space", ""))
    # BIDS has two entities for what a store says in one text.
    space = f"space-{space}".replace(":cohort-", "_cohort-") if space else ""
    names = list(store.attributes["network_names"] or (str(i) for i in range(1, store.networks + 1)))
    axis = _parcels(names, geometry) if form == "ptseries" else None
    subjects, sessions, keys, datasets = (
        store.runs.subject.tolist(),
        store.runs.session.tolist(),
        store.runs.key.tolist(),
        store.runs.dataset.tolist(),
    )
    chosen = [i for i, subject in enumerate(subjects) if not participants or subject in participants]
    if not chosen:
        raise ValueError(
            f"participant_label: none of {', '.join(participants) or 'the runs'} is in the store"
        )
    # XCP-D's names say no dataset.
    short = {i: keys[i].removeprefix(f"ds-{datasets[i]}_") for i in chosen}
    known = Counter((subjects[i], sessions[i], short[i]) for i in chosen)
    for i in chosen:
        alone = known[subjects[i], sessions[i], short[i]] == 1  # or two datasets have one name for a run
        stem = _part(short[i] if alone else keys[i]) + (f"_{_part(space)}" if space else "")
        stem += f"_atlas-{label}_stat-mean"
        folder = output / f"sub-{_part(subjects[i])}"
        folder = (folder / f"ses-{_part(sessions[i])}" if sessions[i] else folder) / "func"
        path, sidecar_path = folder / f"{stem}{_ENDINGS[form]}", folder / f"{stem}_timeseries.json"
        _make_folder(output, folder, path)
        _check_free(path, sidecar_path)
        bold, t_r = np.asarray(store.run(i), np.float32), float(store.runs.t_r[i])
        sidecar = {"RepetitionTime": t_r, "SkullStripped": True, "Atlas": label, "SamplingFrequency": 1 / t_r}
        sidecar["Sources"] = [bids_uri(Path(store.path), [Path(store.path).parent])]
        # Before the table, which without it would be refused as somebody else's after a kill between the two.
        replace_durably(sidecar_path, to_json({**sidecar, "GeneratedBy": [GENERATOR]}))
        if axis is None:
            _write_tsv(path, bold, names)
        else:
            _write_ptseries(path, bold, axis, t_r)
        yield Exported(key=keys[i], path=path)


def _part(text: str) -> str:
    """Return a stranger's text as part of a file name: BIDS' characters stay, others are percent-encoded."""
    return quote(text, safe="+")


def _make_folder(output: Path, folder: Path, path: Path) -> None:
    """Make the folder of a file, unless links lead it out of `output` or its name is too long."""
    if max(map(len, path.relative_to(output).parts)) > _LONGEST_NAME:
        raise ValueError(
            f"{path.name[:80]}…: the names of this run are too long for a file; leave it out by "
            "participant_label"
        )
    if not folder.resolve().is_relative_to(output.resolve()):
        raise ValueError(f"{folder}: a link leads out of {output}; remove it, or choose another folder")
    folder.mkdir(parents=True, exist_ok=True)


def _check_free(path: Path, sidecar: Path) -> None:
    """Refuse to replace files that this command did not write: those have a sidecar that says so."""
    for file in (path, sidecar):
        if file.is_symlink() or (file.exists() and not (sidecar.exists() and is_ours(sidecar))):
            raise ValueError(
                f"{file}: is there already, and was not written by this command; remove it, or choose "
                "another folder"
            )


def _write_tsv(path: Path, bold: np.ndarray, names: list[str]) -> None:
    # A name that begins with = would be a formula in a spreadsheet.
    header = "\t".join(csv_cell(printable(" ".join(name.split()))) for name in names)
    rows = ("\t".join(map(str, row)) for row in bold)  # the shortest text that reads back as the same float32
    replace_durably(path, "\n".join([header, *rows, ""]).encode())


def _write_ptseries(path: Path, bold: np.ndarray, axis: Any, t_r: float) -> None:
    nibabel = need("nibabel", "writing CIFTI", "bids")
    series = nibabel.cifti2.SeriesAxis(start=0, step=t_r, size=len(bold), unit="SECOND")
    image = nibabel.Cifti2Image(bold, header=(series, axis), dtype=np.float32)
    # nibabel would write "unknown" and not look at the axes.
    image.nifti_header.set_intent("NIFTI_INTENT_CONNECTIVITY_PARCELLATED_SERIES")
    with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as folder:  # a name that nobody can link
        nibabel.save(image, Path(folder) / path.name)
        os.replace(Path(folder) / path.name, path)


def _parcels(names: list[str], geometry: AtlasSpec | None) -> Any:
    nibabel = need("nibabel", "writing CIFTI", "bids")
    axes = nibabel.cifti2.cifti2_axes
    if geometry is None:
        empty = np.zeros((0, 3), np.int64)
        return axes.ParcelsAxis(
            names, [empty] * len(names), [{} for _ in names], np.eye(4), (1, 1, 1), nvertices={}
        )
    image = nibabel.load(geometry.paths[0])
    if geometry.kind == "labels":
        labels = read_labels(image)
        # In ascending order, as a store has its columns.
        values = [value for value in np.unique(labels) if value != BACKGROUND]
        _check_count(values, names, geometry)
        voxels = [np.argwhere(labels == value) for value in values]
        return axes.ParcelsAxis(names, voxels, [{} for _ in names], image.affine, labels.shape, nvertices={})
    if geometry.kind == "dlabel":
        models = image.header.get_axis(1)
        labels = np.rint(np.asarray(image.dataobj)[0]).astype(np.int64)
        values = [value for value in np.unique(labels) if value != BACKGROUND]
        _check_count(values, names, geometry)
        parts = [(name, models[labels == value]) for name, value in zip(names, values, strict=True)]
        return axes.ParcelsAxis.from_brain_models(parts)
    raise ValueError(f"geometry: {geometry.label} holds {geometry.kind}, expected a label image or a dlabel")


def _check_count(values: list[Any], names: list[str], geometry: AtlasSpec) -> None:
    if len(values) != len(names):
        raise ValueError(
            f"geometry: {geometry.label} has {len(values)} labels, the store {len(names)} networks"
        )
