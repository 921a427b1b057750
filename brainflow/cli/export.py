"""Write a store's runs as files that other tools read: tables named as XCP-D's, or CIFTI parcel series.

Examples
--------
  brainflow export out/ds-ds000030_atlas-Schaefer400.zarr xcp --format tsv
  brainflow export store.zarr xcp --format ptseries --geometry atlas.dlabel.nii --participant-label 01
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `brainflow export`."""

    store: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")]
    """Store to read."""
    output: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUTPUT_DIR")]
    """Directory to write `sub-…` folders into; files that another program wrote are not replaced."""
    format: Literal["tsv", "ptseries"] = "tsv"
    """`tsv`: one column a network, its name above; `ptseries`: CIFTI."""
    participant_label: tuple[str, ...] = ()
    """Participants, with or without `sub-`; all if not given."""
    label: str = ""
    """Label of the atlas in the file names; by default the store's parcellation."""
    space: str = ""
    """Space for the file names; by default the one that the store was prepared in."""
    geometry: str = ""
    """Label image or dlabel of the atlas, so that a ptseries knows where its parcels lie."""


def run(args: Args) -> int:
    """Write the files and return the exit code."""
    from brainflow.prepare import find_atlas
    from brainflow.prepare.description import write_description
    from brainflow.prepare.export import export
    from brainflow.storage import BoldStore
    from brainflow.storage.text import counted, printable

    store = BoldStore.open(args.store)
    files = export(
        store,
        args.output,
        args.format,
        participants=tuple(label.removeprefix("sub-") for label in args.participant_label),
        label=args.label,
        space=args.space,
        geometry=find_atlas(args.geometry) if args.geometry else None,
    )
    count = sum(1 for _ in files)
    write_description(args.output, [args.store.parent])
    print(f"{printable(str(args.output))}: {counted(count, 'run')} as {args.format}")
    return 0
