"""Make one self-contained HTML page of a pretraining run or a decoding.

Examples
--------
  brainflow report run
  brainflow report decoding --mask mask.nii.gz
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `brainflow report`."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """What `brainflow pretrain` or `brainflow adapt` wrote."""
    out: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder of the page; by default RUN/report."""
    mask: Annotated[str | None, tyro.conf.arg(metavar="NIFTI")] = None
    """Mask whose voxels are the networks: draws attributions and reconstruction errors on the brain."""
    labels: Annotated[str | None, tyro.conf.arg(metavar="NIFTI")] = None
    """Image of labels that are the networks."""
    maps: Annotated[str | None, tyro.conf.arg(metavar="NIFTI")] = None
    """4-D image of maps that are the networks."""


def run(args: Args) -> int:
    """Write the page and return the exit code."""
    from brainflow.report.run_page import write_report

    masker = None
    if args.mask or args.labels or args.maps:
        from brainflow.report.brain import make_masker

        masker = make_masker(mask=args.mask, labels=args.labels, maps=args.maps)
    print("drawing …", file=sys.stderr, flush=True)
    print(write_report(Path(args.run), masker=masker, out=Path(args.out) if args.out else None))
    return 0
