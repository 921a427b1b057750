"""Draw the loss curves of one or more runs into one picture, or one HTML page with a table of scores.

Solid lines are training losses, dots validation losses. Dashed lines show what predicting the training
set's mean scores on the same masked values (L1), where a run was validated. The page (--out NAME.html) holds
everything itself; it also shows each run's newest reconstruction of masked BOLD.

Examples
--------
  brainflow plot run --out loss.png
  brainflow plot runs/csm runs/seq-bert --out compare.svg --log
  brainflow plot runs/* --out runs.html
"""

from __future__ import annotations

import dataclasses
import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from brainflow.cli.usage import WrongUsage
from brainflow.optional import need

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCORES = {
    "val_loss": "validation loss",
    "val_l1": "L1",
    "val_mse": "MSE",
    "val_explained_variance": "explained variance",
    "val_correlation": "correlation",
    "val_linear_explained_variance": "the same of the best linear predictor",
    "val_mean_l1": "L1 of the mean",
    "val_last_l1": "L1 of the last value",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `brainflow plot`."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Run directories of `brainflow pretrain`."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")] = Path("loss.png")
    """File to write; its ending gives the format (png, svg, pdf, html)."""
    log: bool = False
    """Logarithmic loss axis."""


def run(args: Args) -> int:
    """Write the picture or the page and return the exit code."""
    if not args.runs:
        raise WrongUsage("runs: got none, expected the directory of at least one run")
    need("matplotlib", "plot", "report").use("Agg")
    from brainflow.training.metrics import read_metrics

    lines = {folder: read_metrics(folder) for folder in args.runs}
    for folder, found in lines.items():
        if not found:
            raise ValueError(f"runs: {folder} has no metrics yet")
    figure = _curves({folder.resolve().name: found for folder, found in lines.items()}, log=args.log)
    if args.out.suffix == ".html":
        args.out.write_text(_page(lines, figure), encoding="utf-8")
    else:
        figure.savefig(args.out, dpi=150)
    print(args.out)
    return 0


def _curves(runs: dict[str, list[dict[str, Any]]], *, log: bool) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 8), layout="constrained")
    axes, below = figure.subplots(2, sharex=True)
    for i, (name, lines) in enumerate(runs.items()):
        training = [line for line in lines if "loss" in line]
        validation = [line for line in lines if "val_loss" in line]
        steps, losses = [x["step"] for x in training], [_number(x["loss"]) for x in training]
        axes.plot(steps, losses, color=f"C{i}", lw=1, label=name)
        if validation:
            steps, losses = [x["step"] for x in validation], [_number(x["val_loss"]) for x in validation]
            axes.plot(steps, losses, "o-", color=f"C{i}", label=f"{name}, validation")
            # a loss may have is-next added or be L1: predictions are compared by what they explain
            known = [_number(x.get("val_explained_variance")) for x in validation]
            below.plot(steps, known, "o-", color=f"C{i}", label=name)
            linear = _number(validation[-1].get("val_linear_explained_variance"))
            below.axhline(linear, color=f"C{i}", ls="--", lw=1, label=f"{name}, best linear predictor")
    axes.set(ylabel="loss")
    below.set(xlabel="optimizer steps", ylabel="explained variance")
    below.axhline(0.0, color="0.4", ls=":", lw=1, label="the mean")
    if log:
        axes.set_yscale("log")
    for part in (axes, below):
        part.grid(alpha=0.3)
        if part.get_legend_handles_labels()[0]:
            part.legend()
    return figure


def _page(runs: dict[Path, list[dict[str, Any]]], figure: Figure) -> str:
    from brainflow.report.page import Page, Picture, Section, Table, render
    from brainflow.training.run_dir import RECONSTRUCTIONS

    png = io.BytesIO()
    figure.savefig(png, dpi=110, format="png")
    curves = Picture(
        name="loss", png=png.getvalue(), alt="Loss curves of all runs", caption="Loss over steps"
    )
    rows, pictures = [], []
    for folder, lines in runs.items():
        last: dict[str, Any] = next((line for line in reversed(lines) if "val_loss" in line), {})
        scores = [_number(last.get(key)) for key in SCORES]
        shown = ["" if math.isnan(score) else f"{score:.4f}" for score in scores]
        rows.append([folder.resolve().name, str(lines[-1]["step"]), *shown])
        if drawn := sorted((folder / RECONSTRUCTIONS).glob("*.png")):
            name = folder.resolve().name
            pictures.append(
                Picture(
                    name=f"reconstruction-{name}",
                    png=drawn[-1].read_bytes(),
                    alt=f"Masked BOLD and its reconstruction by {name}",
                    caption=f"{name}: a held-out window",
                )
            )
    table = Table(header=["run", "steps", *SCORES.values()], rows=rows)
    sections = [Section(title="Losses", table=table, pictures=[curves])]
    if pictures:
        sections.append(Section(title="Reconstructions", pictures=pictures))
    return render(
        Page(
            title="brainflow: pretraining runs",
            lead="Losses, scores on held-out runs, and reconstructions of masked BOLD.",
            facts=[(str(len(runs)), "runs")],
            sections=sections,
            footer=["Made by brainflow plot; the page holds everything itself and fetches nothing."],
        )
    )


def _number(value: float | None) -> float:
    """Return a metric; one that was not finite is written as null."""
    return math.nan if value is None else value
