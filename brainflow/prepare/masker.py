"""In Python: images and an atlas, or a fitted nilearn masker, to arrays and to a store."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from brainflow.optional import need
from brainflow.prepare import volumes
from brainflow.prepare.atlas import AtlasSpec, check_space, find_atlas
from brainflow.prepare.confounds import Confounds, clean
from brainflow.prepare.files import parse_name
from brainflow.prepare.settings import CleanSettings
from brainflow.prepare.timing import nifti_repetition_time
from brainflow.storage.ingest.limits import regular_size
from brainflow.storage.normalise import APPLIED, Kind
from brainflow.storage.normalise import normalise as normalised
from brainflow.storage.store import BoldStore
from brainflow.storage.writer import StoreWriter


def extract(
    images: Any,
    atlas: Any,
    *,
    t_r: float | None = None,
    confounds: Any = None,
    settings: CleanSettings | None = None,
) -> np.ndarray | list[np.ndarray]:
    """Return the cleaned time series of one image or of several.

    Parameters
    ----------
    images
        A 4-D image (path or nibabel object), or a list of them.
    atlas
        What `--atlas` takes (a path or a name), an `AtlasSpec`, or a fitted nilearn masker, which does all of
        the work.
    t_r
        Repetition time in seconds; by default the header's.
    confounds
        [time, confounds] array or DataFrame; a list of them for a list of images.
    settings
        How to clean; the published defaults if not given; not with a masker, which has its own.

    Returns
    -------
    float32 [time, networks], or a list of them for a list of images

    Raises
    ------
    ValueError
        If the numbers of images and confounds differ, the repetition time is not known, or the names of image
        and atlas say that they are in different templates.
    """
    several = isinstance(images, list | tuple)
    files = list(images) if several else [images]
    tables = list(confounds) if several and confounds is not None else [confounds] * len(files)
    if len(tables) != len(files):
        raise ValueError(f"confounds: got {len(tables)} for {len(files)} images, expected one each")
    if is_masker(atlas):
        if settings is not None:
            raise ValueError("settings: a masker has its own; pass settings with an atlas only")
        series = [_with_masker(atlas, file, table) for file, table in zip(files, tables, strict=True)]
    else:
        spec = atlas if isinstance(atlas, AtlasSpec) else _atlas_for(str(atlas), files)
        series = [
            _with_atlas(spec, file, table, t_r, settings or CleanSettings())
            for file, table in zip(files, tables, strict=True)
        ]
    return series if several else series[0]


def store_from_masker(
    path: str | os.PathLike[str],
    masker: Any,
    images: Sequence[Any],
    *,
    dataset: str,
    subjects: Sequence[str],
    t_r: float | None = None,
    confounds: Sequence[Any] | None = None,
    runs: Sequence[str] | None = None,
    network_names: Sequence[str] | None = None,
    entities: Sequence[Mapping[str, str]] | None = None,
    normalise: Kind = "none",
    dtype: str = "float16",
) -> BoldStore:
    """Write a store of what a fitted nilearn masker makes of images.

    Parameters
    ----------
    path
        Store to make.
    masker
        Fitted.
    images, subjects, confounds, runs
        One of each a run; `runs` numbers the images of a subject if not given.
    dataset
        Name of the dataset in the keys of runs.
    t_r
        Seconds; by default the masker's, then each image's own.
    network_names
        By default those that the masker knows.
    entities
        Further entities of each run: `session`, `task`.
    normalise
        What is done to each run behind what the masker does.
    dtype
        Element type of the store.

    Raises
    ------
    ValueError
        If their numbers differ, a repetition time is not known or a run cannot be normalised.
    """
    given = {"subjects": subjects, "confounds": confounds, "runs": runs, "entities": entities}
    for name, values in given.items():
        if values is not None and len(values) != len(images):
            raise ValueError(f"{name}: got {len(values)} for {len(images)} images, expected one each")
    if not images:
        raise ValueError("images: got none, expected at least one")
    t_r = t_r if t_r is not None else getattr(masker, "t_r", None)
    tables = confounds if confounds is not None else [None] * len(images)
    first = _with_masker(masker, images[0], tables[0])
    names = network_names if network_names is not None else _names_of(masker, first.shape[1])
    counts: dict[str, int] = {}
    with StoreWriter.create(
        path,
        networks=first.shape[1],
        dtype=dtype,
        parcellation=type(masker).__name__,
        network_names=names,
        preprocessing={"masker": type(masker).__name__, **_parameters(masker)},
        normalisation=APPLIED.get(normalise, ""),
    ) as writer:
        for i, (image, subject, table) in enumerate(zip(images, subjects, tables, strict=True)):
            # The first run said how many networks there are; it is not made twice.
            bold = first if i == 0 else _with_masker(masker, image, table)
            counts[subject] = counts.get(subject, 0) + 1
            more = entities[i] if entities is not None else {}
            writer.append(
                normalised(bold, normalise),
                t_r=t_r if t_r is not None else _header_t_r(image),
                dataset=dataset,
                subject=subject,
                run=runs[i] if runs is not None else str(counts[subject]),
                session=more.get("session", ""),
                task=more.get("task", ""),
            )
    return BoldStore.open(path)


def is_masker(thing: Any) -> bool:
    """Whether something is one of nilearn's maskers (or behaves like one)."""
    return hasattr(thing, "transform") and hasattr(thing, "fit")


def _atlas_for(text: str, images: Sequence[Any]) -> AtlasSpec:
    """Return an atlas in the template that the images' names state."""
    named = [parse_name(Path(image)) for image in images if isinstance(image, str | os.PathLike)]
    templates = {file.entities["space"] for file in named if file and "space" in file.entities}
    # Any of them: if there are several, one is refused below.
    spec = find_atlas(text, min(templates, default=""))
    for template in templates:
        check_space(spec, template)
    return spec


def _with_masker(masker: Any, image: Any, confounds: Any) -> np.ndarray:
    file = str(image) if isinstance(image, Path) else image
    return np.ascontiguousarray(masker.transform(file, confounds=confounds), np.float32)


def _with_atlas(
    atlas: AtlasSpec, image: Any, confounds: Any, t_r: float | None, settings: CleanSettings
) -> np.ndarray:
    if settings.dummy_scans < 0:
        raise ValueError("dummy_scans: -1 (automatic) needs fMRIPrep's files; give a number of volumes")
    opened = volumes.open_volume(Path(image)) if isinstance(image, str | os.PathLike) else image
    seconds = t_r if t_r is not None else _header_t_r(opened)
    raw = volumes.extract(opened, [atlas], settings.smoothing_fwhm, settings.dummy_scans)[0]
    table = None
    if confounds is not None:
        values = np.asarray(confounds, np.float64)
        if len(values) != opened.shape[3]:
            raise ValueError(f"confounds: have {len(values)} rows for {opened.shape[3]} volumes")
        table = Confounds(
            values=values[settings.dummy_scans :],
            names=tuple(map(str, getattr(confounds, "columns", ()))),
            censor=np.zeros(len(raw), bool),
            displacement=None,
            steady_from=0,
        )
    return clean(raw, table, settings, seconds)


def _header_t_r(image: Any) -> float:
    opened = (
        need("nibabel", "reading images", "bids").load(image)
        if isinstance(image, str | os.PathLike)
        else image
    )
    seconds = nifti_repetition_time(opened.header)
    if seconds is None:
        raise ValueError("t_r: the image header does not state it; pass t_r= in seconds")
    return seconds


def _names_of(masker: Any, networks: int) -> list[str] | None:
    names = getattr(masker, "region_names_", None)
    if isinstance(names, Mapping):
        names = [names[i] for i in sorted(names)]
    return [str(name) for name in names] if names is not None and len(names) == networks else None


def _parameters(masker: Any) -> dict[str, Any]:
    """Return parameters of a masker that are plain values."""
    kinds = (str, int, float, bool, type(None))
    return {name: value for name, value in sorted(masker.get_params().items()) if isinstance(value, kinds)}


def bold_from_nifti(
    image: str | os.PathLike[str], mask: str | os.PathLike[str], t_r: float | None = None
) -> tuple[np.ndarray, float]:
    """Time series of the voxels inside a mask.

    Parameters
    ----------
    image
        4-D NIfTI file.
    mask
        3-D NIfTI file on the same grid; voxels that are not zero are taken.
    t_r
        Repetition time in seconds; by default that of the header.

    Returns
    -------
    bold
        float32 [time, voxels], voxels in C order of the mask.
    t_r
        Seconds.

    Raises
    ------
    ValueError
        If shapes or grids differ, or the header has no usable repetition time and none is given.
    ImportError
        If nibabel is not installed.
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
    # A micrometre: affines of one grid, in float32, differ by rounding from tool to tool.
    if not np.allclose(volumes.affine, inside.affine, atol=1e-3):
        raise ValueError(f"{image}: its affine differs from that of {mask}; resample one to the other")
    if t_r is None:
        t_r = nifti_repetition_time(volumes.header)
        if t_r is None:
            raise ValueError(f"{image}: its header has no repetition time; give t_r in seconds")
    selected = np.asanyarray(inside.dataobj) != 0
    return np.asarray(volumes.dataobj, np.float32)[selected].T.copy(), float(t_r)
