"""Files of a recording: what BIDS names say, the files that belong to one run, and what to look for."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from brainflow.storage.text import printable

Kind = Literal["volume", "cifti", "gifti"]
_LOG = logging.getLogger(__name__)
RUN_ENTITIES = ("sub", "ses", "task", "acq", "ce", "rec", "dir", "run", "echo", "part")
"""Entities that tell one recording from another, in the order in which BIDS names have them."""
# BIDS has + in labels; dots are common all the same.
_ENTITY = re.compile(r"([A-Za-z]+)-([A-Za-z0-9+.]+)")


@dataclass(frozen=True, kw_only=True)
class BidsFile:
    """A file and what its name says."""

    path: Path
    entities: Mapping[str, str]
    suffix: str
    extension: str

    @property
    def recording(self) -> tuple[str, ...]:
        """Values of `RUN_ENTITIES`, "" where the name has none: the same for all files of one recording."""
        return tuple(self.entities.get(name, "") for name in RUN_ENTITIES)


def parse_name(path: Path) -> BidsFile | None:
    """Take a file name apart; None if it is not a BIDS name.

    Examples
    --------
    >>> file = parse_name(Path("sub-01_task-rest_desc-preproc_bold.nii.gz"))
    >>> file.entities, file.suffix, file.extension
    ({'sub': '01', 'task': 'rest', 'desc': 'preproc'}, 'bold', '.nii.gz')
    """
    stem, dot, extension = path.name.partition(".")
    while dot and not _is_extension(extension):  # a dot inside an entity, as in `sub-01.2`
        more, dot, extension = extension.partition(".")
        stem = f"{stem}.{more}"
    *parts, suffix = stem.split("_")
    entities: dict[str, str] = {}
    for part in parts:
        match = _ENTITY.fullmatch(part)
        if match is None:
            return None
        entities[match[1]] = match[2]
    # A name ends in a suffix, not in an entity.
    if not dot or "-" in suffix:
        return None
    return BidsFile(path=path, entities=entities, suffix=suffix, extension=f".{extension}")


def entries_of(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    """Return what a folder holds, by name; a folder that cannot be read is warned of, and stops nothing."""
    try:
        with os.scandir(folder) as entries:
            # Sorted: file systems have orders of their own.
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        _LOG.warning(
            "%s: cannot be read (%s); runs in it are not found", printable(str(folder)), error.strerror
        )
        return []


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder, or a link to one; a link that leads nowhere is not."""
    try:
        return entry.is_dir()
    except OSError as error:
        _LOG.warning("%s: is passed over (%s)", printable(entry.path), error.strerror)
        return False


def _is_extension(text: str) -> bool:
    return "_" not in text and "-" not in text


def make_key(dataset: str, entities: Mapping[str, str]) -> str:
    """Return the key of a run in a store, `ds-<dataset>_sub-…[_ses-…]_task-…[_run-…]`, as released."""
    parts = [f"{name}-{entities[name]}" for name in RUN_ENTITIES if entities.get(name)]
    return "_".join([f"ds-{dataset}", *parts])


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """One recording and the files that belong to it.

    Parameters
    ----------
    key
        Unique name, `ds-<dataset>_sub-…`.
    entities
        Of the recording, without space, resolution and description.
    images
        The image; left and right hemisphere for GIFTI; several if the choice is ambiguous.
    sidecars
        JSON files that may hold the repetition time, the most specific first.
    confounds
        `desc-confounds` table or None.
    events
        `_events.tsv`, or EV files of the HCP.
    source
        The scanner's image, where the raw dataset is there.
    space, description
        `space-` and `desc-` of the image; runs of one store have them in common.
    problem
        Why the run cannot be prepared, known from names alone.
    """

    key: str
    dataset: str
    entities: dict[str, str]
    images: tuple[Path, ...]
    sidecars: tuple[Path, ...] = ()
    confounds: Path | None = None
    events: tuple[Path, ...] = ()
    source: Path | None = None
    space: str = ""
    description: str = ""
    problem: str = ""

    @property
    def inputs(self) -> tuple[Path, ...]:
        """All files that the prepared run depends on."""
        others = tuple(path for path in (self.confounds, self.source) if path is not None)
        return (*self.images, *self.sidecars, *others, *self.events)


def passes(entities: Mapping[str, str], filters: Mapping[str, Collection[str | None]]) -> bool:
    """Whether a recording has one of the values of each filter: None for no value, "*" for any.

    Numbers are compared as such: 1 is 01.
    """
    return all(
        any(_fits(entities.get(name, ""), wanted) for wanted in values) for name, values in filters.items()
    )


def _fits(value: str, wanted: str | None) -> bool:
    if wanted in (None, "*"):
        return bool(value) == (wanted == "*")
    assert wanted is not None
    return value == wanted or (value.isdigit() and wanted.isdigit() and int(value) == int(wanted))


@dataclass(frozen=True, kw_only=True)
class Query:
    """Which runs to look for; an empty collection takes all.

    `resolution` is the label of `res-` or `den-`, "native" for images without one. `filters` are the values
    of `RUN_ENTITIES` to take, see `passes`.
    """

    kind: Kind = "volume"
    space: str = ""
    resolution: str = ""
    description: str = "preproc"
    participants: Collection[str] = ()
    tasks: Collection[str] = ()
    sessions: Collection[str] = ()
    dataset: str = ""
    filters: Mapping[str, Collection[str | None]] = field(default_factory=dict)

    @property
    def wanted_space(self) -> str:
        """The space asked for, or the usual one of the kind; that of a cohort as `MNIInfant:cohort-1`."""
        return (
            self.space or {"volume": "MNI152NLin2009cAsym", "cifti": "fsLR", "gifti": "fsaverage5"}[self.kind]
        )
