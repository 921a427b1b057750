"""A light index of a BIDS dataset and its derivatives: one walk over the folders that can hold runs.

Only names are read. 10,000 files take a fraction of a second, where a database of the whole dataset takes
minutes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from brainflow.prepare.files import (
    RUN_ENTITIES,
    BidsFile,
    Query,
    RunFiles,
    entries_of,
    is_folder,
    make_key,
    parse_name,
    passes,
)
from brainflow.prepare.hcp import find_hcp_runs, is_hcp

# No finished runs are in these; nipype leaves images with BIDS names in `work`.
_SKIP = {
    "sourcedata",
    "code",
    "stimuli",
    "logs",
    "anat",
    "dwi",
    "fmap",
    "figures",
    "log",
    "work",
    "node_modules",
}
_HEMISPHERES = ("L", "R")


@dataclass
class _Found:
    sources: list[BidsFile] = field(default_factory=list)
    images: list[BidsFile] = field(default_factory=list)
    confounds: list[BidsFile] = field(default_factory=list)


def check_folders(bids_dir: Path, derivatives: Collection[Path] = ()) -> None:
    """Raise FileNotFoundError if a dataset is not there.

    Raises
    ------
    FileNotFoundError
        Naming the directory.
    """
    for root in (bids_dir, *derivatives):
        if not root.is_dir():
            raise FileNotFoundError(
                f"{root}: no such directory; expected a BIDS dataset or fMRIPrep's output"
            )


def find_runs(bids_dir: Path, query: Query, *, derivatives: Collection[Path] = ()) -> list[RunFiles]:
    """Return runs of a dataset, sorted by key.

    Parameters
    ----------
    bids_dir
        Raw dataset with `derivatives/`, a derivatives dataset, or subjects of the HCP's pipelines.
    query
        Which runs to look for.
    derivatives
        Further datasets to look into.

    Raises
    ------
    FileNotFoundError
        If a directory does not exist.
    """
    if is_hcp(bids_dir):
        found = find_hcp_runs(bids_dir, query, query.dataset or dataset_name(bids_dir))
        return [run for run in found if passes(run.entities, query.filters)]
    runs: dict[tuple[str, ...], _Found] = {}
    tables: list[BidsFile] = []
    check_folders(bids_dir, derivatives)
    for root in (bids_dir, *derivatives):
        for path in _walk(root, query.participants):
            file = _parse(path)
            if file is None:
                continue
            if (
                (file.suffix == "bold" and file.extension == ".json")
                or (file.suffix == "events" and file.extension == ".tsv")
                or file.suffix == "EV"
            ):
                tables.append(file)
            elif _is_image(file, query):
                runs.setdefault(file.recording, _Found()).images.append(file)
            elif _is_source(file):
                runs.setdefault(file.recording, _Found()).sources.append(file)
            elif file.entities.get("desc") == "confounds" and file.extension == ".tsv":
                runs.setdefault(file.recording, _Found()).confounds.append(file)
    dataset = query.dataset or dataset_name(bids_dir)
    attached = _Tables(tables)
    found = [
        _make_run(dataset, files, attached, query)
        for files in runs.values()
        if files.images
        and _is_wanted(files.images[0], query)
        and passes(files.images[0].entities, query.filters)
    ]
    return sorted(found, key=lambda run: run.key)


def dataset_name(bids_dir: Path) -> str:
    """Name of a dataset: its folder's, or that of the folder which holds `derivatives/`."""
    path = bids_dir.resolve()
    parts = path.parts
    if "derivatives" in parts[1:]:
        # The last one: a folder further above may be called so, too.
        path = Path(*parts[: len(parts) - 1 - parts[::-1].index("derivatives")])
    return re.sub(r"[^A-Za-z0-9]", "", path.name) or "dataset"


def _walk(root: Path, participants: Collection[str]) -> Iterator[Path]:
    folders = [str(root)]
    home, linked = os.path.realpath(root), set[str]()
    while folders:
        subfolders = []
        for entry in entries_of(folders.pop()):
            name = entry.name
            if name.startswith(".") or name in _SKIP:
                continue
            if is_folder(entry):
                # Each job of an array asks for one participant, and need not list the folders of all.
                if name.startswith("sub-") and participants and name[4:] not in participants:
                    continue
                if not (entry.is_symlink() and _leads_back(entry.path, home, linked)):
                    subfolders.append(entry.path)
            # By BIDS' inheritance sidecars above the subjects hold for all runs below.
            elif name.startswith(("sub-", "task-")) or name == "bold.json":
                yield Path(entry.path)
        # The last is taken next: reversed, the walk goes by name.
        folders += reversed(subfolders)


def _leads_back(link: str, home: str, linked: set[str]) -> bool:
    """Whether a link leads to what is walked anyway: inside, above, or where another link led."""
    real = os.path.realpath(link)
    known = real in linked or os.path.commonpath([real, home]) in (real, home)
    linked.add(real)
    return known


def _parse(path: Path) -> BidsFile | None:
    """Parse it like `parse_name`, also the event files of the HCP, `sub-…_task-…_EV_<state>.txt`."""
    recording, mark, state = path.name.partition("_EV_")
    if not mark:
        return parse_name(path)
    file = parse_name(Path(f"{recording}_EV.txt"))
    return file and BidsFile(path=path, entities=file.entities, suffix="EV", extension=f"_{state}")


def _is_image(file: BidsFile, query: Query) -> bool:
    space, _, cohort = query.wanted_space.partition(":cohort-")
    if file.suffix != "bold" or file.entities.get("space", "") != space:
        return False
    if cohort and file.entities.get("cohort") != cohort:
        return False
    # Volumes say `res-`, surfaces `den-`.
    resolution = file.entities.get("res", file.entities.get("den", "native"))
    if query.resolution and resolution != query.resolution:
        return False
    if query.kind == "volume":
        return file.extension in (".nii.gz", ".nii") and file.entities.get("desc") == query.description
    if query.kind == "cifti":
        # fMRIPrep gives CIFTI and GIFTI no `desc-` to compare.
        return file.extension == ".dtseries.nii"
    return file.extension == ".func.gii"


def _is_source(file: BidsFile) -> bool:
    """Whether this is an image as the scanner made it, in the raw dataset."""
    derived = {"space", "res", "den", "desc", "hemi"} & set(file.entities)
    return file.suffix == "bold" and file.extension in (".nii.gz", ".nii") and not derived


def _is_wanted(file: BidsFile, query: Query) -> bool:
    chosen = (("sub", query.participants), ("task", query.tasks), ("ses", query.sessions))
    return all(not wanted or file.entities.get(name, "") in wanted for name, wanted in chosen)


class _Tables:
    """Side files, by the recording or the part of the dataset that they describe (BIDS' inheritance)."""

    def __init__(self, files: list[BidsFile]) -> None:
        self._by_subject: dict[str, list[BidsFile]] = {}
        for file in files:
            self._by_subject.setdefault(file.entities.get("sub", ""), []).append(file)

    def of(self, image: BidsFile, suffix: str) -> list[BidsFile]:
        """Return files that apply to an image, the most specific first."""
        fitting = [
            file
            # "" are files of the whole dataset, which name no subject.
            for subject in {image.entities.get("sub", ""), ""}
            for file in self._by_subject.get(subject, [])
            if file.suffix == suffix and _describes(file, image)
        ]
        return sorted(fitting, key=lambda file: (-len(file.entities), str(file.path)))


def _describes(file: BidsFile, image: BidsFile) -> bool:
    """Whether a side file says nothing about the recording that its image does not say."""
    return all(image.entities.get(k) == v for k, v in file.entities.items() if k in RUN_ENTITIES)


def _make_run(dataset: str, found: _Found, tables: _Tables, query: Query) -> RunFiles:
    images = sorted(found.images, key=lambda file: (file.entities.get("hemi", ""), str(file.path)))
    first = images[0]
    entities = {name: first.entities[name] for name in RUN_ENTITIES if first.entities.get(name)}
    problem = ""
    if query.kind == "gifti":
        hemispheres = tuple(file.entities.get("hemi", "") for file in images)
        if hemispheres != _HEMISPHERES:
            problem = f"expected one GIFTI file a hemisphere (L, R), found {', '.join(hemispheres) or 'none'}"
    elif len(images) > 1:
        names = ", ".join(file.path.name for file in images)
        problem = f"several images fit: {names}; choose with --res (native for none) or --space"
    own = {image.path.name.removesuffix(image.extension) for image in images}
    sidecars = [file for file in tables.of(first, "bold") if _applies(file, own)]
    # Stable: behind the image's own the order from specific to general stays.
    sidecars.sort(key=lambda file: file.path.name.removesuffix(".json") not in own)
    # One events.tsv says all of a run, an EV file one state.
    events = tables.of(first, "events")[:1] or tables.of(first, "EV")
    # A recording may stand in several derivatives: the table beside the image is meant.
    confounds = [file for file in found.confounds if file.path.parent == first.path.parent]
    return RunFiles(
        key=make_key(dataset, entities),
        dataset=dataset,
        entities=entities,
        images=tuple(file.path for file in images),
        sidecars=tuple(file.path for file in sidecars),
        confounds=confounds[0].path if confounds else None,
        events=tuple(file.path for file in events),
        # Of several nobody says which one fMRIPrep took.
        source=found.sources[0].path if len(found.sources) == 1 else None,
        space=_space(first),
        description=first.entities.get("desc", ""),
        problem=problem,
    )


def _space(file: BidsFile) -> str:
    """Return the space of an image, with the cohort where templates have several: `MNIInfant:cohort-1`."""
    space, cohort = (file.entities.get(name, "") for name in ("space", "cohort"))
    return f"{space}:cohort-{cohort}" if cohort else space


def _applies(sidecar: BidsFile, own: set[str]) -> bool:
    """Whether a sidecar describes images of these names: it bears one, or describes the raw recording."""
    if sidecar.path.name.removesuffix(".json") in own:
        return True
    return not {"space", "res", "den", "desc", "hemi"} & set(sidecar.entities)
