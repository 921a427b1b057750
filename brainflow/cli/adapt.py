"""Adapt a pretrained model to decode labelled segments of a store; score it beside model-free classifiers.

Every decoder is fitted and tested in the same folds. Intervals are 95 %, over subjects, or over runs where
there is one subject.

Examples
--------
  brainflow adapt store --from run --target condition --out decoding --hrf-shift 5
  brainflow adapt store --from run --target mental_state --split leave-one-subject-out --out decoding
  brainflow adapt store --from run --target condition --freeze --out probe --json
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

if TYPE_CHECKING:
    from brainflow.decoding.result import Result


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `brainflow adapt`."""

    store: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")]
    """Store with labelled segments."""
    from_: Annotated[str, tyro.conf.arg(name="from", metavar="CKPT")]
    """Pretrained model: the directory of a `brainflow pretrain` run."""
    target: Annotated[str, tyro.conf.arg(metavar="COLUMN")]
    """Label column to decode."""
    out: Annotated[str, tyro.conf.arg(metavar="DIR")]
    """Folder for scores, predictions and the confusion matrix."""
    split: Literal["leave-one-run-out", "leave-one-subject-out", "k-fold"] = "leave-one-run-out"
    """What is left out of training and tested in turn; `k-fold` keeps subjects (or runs) whole."""
    folds: int = 5
    """Number of parts of `k-fold`."""
    hrf_shift: float = 0.0
    """Seconds by which segments are moved later, to where their BOLD response is (about 3 to 6; 0 where the
    recorded segments were moved already)."""
    classes: int | None = None
    """Number of classes that the column must hold; by default what is found there is taken."""
    freeze: bool = False
    """Keep the pretrained weights and fit logistic regression on their features (a linear probe)."""
    scratch: bool = False
    """Take the checkpoint's architecture with fresh weights: what pretraining has to beat."""
    pooling: Literal["cls", "last", "mean", "first"] | None = None
    """How one vector is made of a window; by default `cls` for fine-tuning, `mean` with --freeze."""
    steps: int = 500
    """Optimizer steps a fold."""
    batch_size: int = 32
    """Windows a step."""
    lr: float = 3e-4
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    dropout: float = 0.1
    """Dropout of the decoding head."""
    seed: int = 0
    """Seeds fresh weights, dropout and the order of the windows."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is one."""
    json: bool = False
    """Print the scores as one JSON object on stdout; no progress on stderr."""


def run(args: Args) -> int:
    """Adapt, write the results, print the scores, and return the exit code."""
    # torch and scikit-learn cost seconds that --help and a wrong command line need not pay
    from brainflow.decoding.adapt import AdaptConfig, adapt
    from brainflow.decoding.result import baseline, write_results
    from brainflow.decoding.task import TaskConfig, load_task
    from brainflow.storage import BoldStore

    config = AdaptConfig(
        freeze=args.freeze,
        scratch=args.scratch,
        pooling=args.pooling,
        steps=args.steps,
        batch_size=args.batch_size,
        lr=args.lr,
        weight_decay=args.weight_decay,
        dropout=args.dropout,
        seed=args.seed,
    )
    asked = TaskConfig(
        target=args.target, split=args.split, folds=args.folds, hrf_shift=args.hrf_shift, classes=args.classes
    )
    task = load_task(BoldStore.open(args.store), asked)
    columns = (TextColumn("adapt"), BarColumn(), MofNCompleteColumn(), TextColumn("folds"))
    with Progress(*columns, console=Console(stderr=True), disable=args.json, transient=True) as bar:
        line = bar.add_task("adapt", total=len(task.folds))

        def show(done: int, _: int) -> None:
            bar.update(line, completed=done)

        result = adapt(task, args.from_, config, device=args.device, progress=show)
    baselines = [baseline(task, "logistic"), baseline(task, "ridge")]
    write_results(task, result, baselines, Path(args.out))
    if args.json:
        print((Path(args.out) / "scores.json").read_text(encoding="utf-8"), end="")
        return 0
    title = f"{args.target}: {len(task.classes)} classes, {len(task.labels)} windows, {args.split}"
    Console().print(scores_table([result, *baselines], title=title))
    print(f"written to {args.out}")
    return 0


def scores_table(results: list[Result], *, title: str) -> Table:
    """Return a table with one decoder a row."""
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("decoder")
    for name in ("accuracy [95 %]", "chance", "p", "balanced", "macro F1"):
        table.add_column(name, justify="right")
    for result in results:
        s = result.scores
        table.add_row(
            result.name,
            str(s.accuracy).replace("[", r"\["),
            f"{s.chance:.3f}",
            f"{s.permutation_p:.3f}",
            f"{s.balanced_accuracy.value:.3f}",
            f"{s.macro_f1.value:.3f}",
        )
    return table
