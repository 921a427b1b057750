"""What the index finds: a recording with its files, and what to look for."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from brainflow.prepare.settings import Kind


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """One recording and the files that belong to it.

    Parameters
    ----------
    key : unique name, `ds-<dataset>_sub-…`
    entities : of the recording, without space, resolution and description
    images : the image; left and right hemisphere for GIFTI; several if the choice is ambiguous
    sidecars : JSON files that may hold the repetition time, the most specific first
    confounds : `desc-confounds` table or None
    events : `_events.tsv`, or EV files of the HCP
    source : the scanner's image, where the raw dataset is there
    space, description : `space-` and `desc-` of the image; runs of one store have them in common
    problem : why the run cannot be prepared, known from names alone
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


@dataclass(frozen=True, kw_only=True)
class Query:
    """Which runs to look for; an empty collection takes all."""

    kind: Kind = "volume"
    space: str = ""
    resolution: str = ""
    description: str = "preproc"
    participants: Collection[str] = ()
    tasks: Collection[str] = ()
    sessions: Collection[str] = ()
    dataset: str = ""

    @property
    def wanted_space(self) -> str:
        """The space asked for, or the usual one of the kind."""
        return (
            self.space or {"volume": "MNI152NLin2009cAsym", "cifti": "fsLR", "gifti": "fsaverage5"}[self.kind]
        )
