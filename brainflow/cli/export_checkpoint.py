"""Write a model as `pytorch_model.bin` under the tensor names of 2022.

A model that came from `brainflow import-checkpoint` gives back the very tensors that it was read from.

Examples
--------
  brainflow export-checkpoint run pytorch_model.bin
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `brainflow export-checkpoint`."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Folder of a trained or imported model."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """File to write."""


def run(args: Args) -> int:
    """Write the file and return the exit code."""
    from brainflow.pretrained.legacy import export_checkpoint

    if args.out.is_dir() or not args.out.parent.is_dir():
        raise ValueError(f"FILE: got {args.out}, expected a file in a folder that exists")
    names = export_checkpoint(args.model, args.out)
    print(f"{args.out}: {len(names)} tensors")
    return 0
