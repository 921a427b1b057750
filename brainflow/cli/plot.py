"""Draw the loss curves of one or more runs into one picture.

Solid lines are training losses, dots validation losses. Dashed lines show what predicting the training
set's mean scores on the same masked values (L1), where a run was validated.

Examples
--------
  brainflow plot run --out loss.png
  brainflow plot runs/csm runs/seq-bert --out compare.svg --log
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `brainflow plot`."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Run directories of `brainflow pretrain`."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")] = Path("loss.png")
    """Picture to write; its ending gives the format (png, svg, pdf)."""
    log: bool = False
    """Logarithmic loss axis."""


def run(args: Args) -> int:
    """Write the picture and return the exit code."""
    if not args.runs:
        raise ValueError("runs: got none, expected the directory of at least one run")
    try:
        import matplotlib
    except ImportError:
        raise ImportError("plot needs matplotlib: pip install 'brainflow-fmri[report]'") from None
    from brainflow.training.metrics import read_metrics

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for i, folder in enumerate(args.runs):
        _draw(axes, read_metrics(folder), folder.resolve().name, f"C{i}")
    axes.set(xlabel="optimizer steps", ylabel="loss")
    if args.log:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(args.out, dpi=150)
    pyplot.close(figure)
    print(args.out)
    return 0


def _draw(axes: Axes, lines: list[dict[str, Any]], name: str, color: str) -> None:
    training = [line for line in lines if "loss" in line]
    validation = [line for line in lines if "val_loss" in line]
    if not lines:
        raise ValueError(f"runs: {name} has no metrics yet")
    axes.plot(
        [x["step"] for x in training], [_number(x["loss"]) for x in training], color=color, lw=1, label=name
    )
    steps = [x["step"] for x in validation]
    if validation:
        axes.plot(
            steps,
            [_number(x["val_loss"]) for x in validation],
            "o-",
            color=color,
            label=f"{name}, validation",
        )
        mean = _number(validation[-1]["val_mean_l1"])
        axes.axhline(mean, color=color, ls="--", lw=1, label=f"{name}, predicting the mean")


def _number(value: float | None) -> float:
    """Return a metric; one that was not finite is written as null."""
    return math.nan if value is None else value
