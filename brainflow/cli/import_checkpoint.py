"""Read weights released in 2022 (`pytorch_model.bin`) and write a model that brainflow loads.

Nothing in the file is run: it may hold tensors only. Says which tensors were used, which are only kept for
`brainflow export-checkpoint`, which were ignored, and what the file has nothing for.

Examples
--------
  brainflow import-checkpoint pytorch_model.bin model
  brainflow import-checkpoint pytorch_model.bin model --heads 12 --json
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `brainflow import-checkpoint`."""

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """The released `pytorch_model.bin`."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder to write the model to."""
    heads: int | None = None
    """Attention heads, which the tensors do not tell; by default one for 64 values of width, as published."""
    json: bool = False
    """Print the report as one JSON object."""


def run(args: Args) -> int:
    """Import the checkpoint, print what was used, and return the exit code."""
    # Told before torch is loaded.
    if not args.checkpoint.is_file():
        raise FileNotFoundError(f"{args.checkpoint}: no such file; expected a pytorch_model.bin")
    from brainflow.pretrained.legacy import import_checkpoint, report_json
    from brainflow.storage.text import counted, printable

    report = import_checkpoint(args.checkpoint, args.out, heads=args.heads)
    if args.json:
        print(report_json(report))
        return 0
    c = report.config
    print(
        f"{c.framework}: {counted(c.layers, 'layer')}, width {c.width}, "
        f"{counted(c.heads, 'head')}, {counted(c.networks, 'network')}"
    )
    for title, names in (
        ("used", report.used),
        ("kept for export only", report.carried),
        ("ignored", report.ignored),
        ("not in the file, freshly initialised", report.missing),
    ):
        shown = "" if title == "used" else f": {printable(', '.join(names))}" if names else ""
        print(f"{len(names):4d} tensors {title}{shown}")
    if report.head:
        print("decoding head: head.safetensors")
    if getattr(c, "late_read", False):
        print("late_read is on: these weights were trained with the loss read one position late")
    if getattr(c, "chained_states", False):
        print("chained_states is on: the LSTMs of these weights hand their states from layer to layer")
    print(args.out)
    return 0
