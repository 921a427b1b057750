"""What `brainflow demo` says of its result: JSON figures, tables in the terminal, the page."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from brainflow.decoding.baselines import DESCRIPTIONS
from brainflow.decoding.result import Result
from brainflow.decoding.scores import Interval
from brainflow.demo import haxby
from brainflow.demo.pipeline import HRF_SHIFT, DemoResult
from brainflow.report import figures
from brainflow.report.page import Page, Picture, Section, Table

CREDIT = (
    "Data: Haxby, Gobbini, Furey, Ishai, Schouten & Pietrini (2001), Distributed and overlapping "
    "representations of faces and objects in ventral temporal cortex, Science 293:2425; example data of "
    "PyMVPA 2.6.5, licensed CC BY-SA 3.0. The pictures on this page are made from them."
)


def summary(result: DemoResult) -> dict[str, Any]:
    """Return the demo's figures, ready for JSON; equal for equal seeds and threads."""
    validation = result.validation
    names = ("val_loss", "val_l1", "val_mean_l1", "val_last_l1", "val_explained_variance")
    pretrained, fresh = result.gain_unseen
    return {
        "pretraining": {name: validation[name] for name in names},
        "pretraining_steps": validation["step"],
        "held_out_runs": list(result.held_out),
        "decoding": [entry.scores.to_dict() | {"name": entry.name} for entry in result.decoders],
        "pretrained_minus_scratch": vars(result.gain),
        "accuracy_in_held_out_runs": {"pretrained": pretrained, "scratch": fresh},
    }


def print_tables(result: DemoResult, console: Console) -> None:
    """Print both tables and their notes."""
    for title, table, notes in (
        ("Pretraining: error of masked time points", pretraining_table(result), pretraining_notes(result)),
        (_decoding_title(result), decoding_table(result), decoding_notes(result)),
    ):
        drawn = RichTable(title=title, title_justify="left", title_style="bold")
        for number, name in enumerate(table.header):
            drawn.add_column(name, justify="right" if number else "left")
        for number, row in enumerate(table.rows):
            drawn.add_row(*(escape(cell) for cell in row), style="bold" if number in table.strong else None)
        console.print(drawn)
        for note in notes:
            console.print(f"  {note}", highlight=False, markup=False)
        console.print()


def pretraining_table(result: DemoResult) -> Table:
    """Validation error beside predictions that need no model."""
    v = result.validation
    rows = [
        ["model (CSM)", f"{v['val_l1']:.3f}", f"{v['val_explained_variance']:.1%}"],
        ["each network's mean", f"{v['val_mean_l1']:.3f}", "0.0%"],
        ["the last value", f"{v['val_last_l1']:.3f}", f"{1 - v['val_last_mse'] / v['val_mean_mse']:.1%}"],
    ]
    return Table(header=["prediction", "L1 error", "explained variance"], rows=rows, strong=(0,))


def pretraining_notes(result: DemoResult) -> list[str]:
    """Say what the pretraining table rests on."""
    v = result.validation
    steps, runs = result.config.pretrain_steps, len(result.data.runs)
    best = min(v["val_mean_l1"], v["val_last_l1"])
    verdict = "below both baselines" if v["val_l1"] < best else "NOT below both baselines"
    return [
        f"After {steps} steps on {runs - len(result.held_out)} runs; measured on the "
        f"{len(result.held_out)} held-out runs ({', '.join(result.held_out)}). The model is {verdict}."
    ]


def decoding_table(result: DemoResult) -> Table:
    """Every decoder's scores on the same windows and folds."""
    rows = [
        [
            label(entry),
            f"{entry.scores.accuracy.value:.3f}",
            _ends(entry.scores.accuracy),
            f"{entry.scores.macro_f1.value:.3f}",
            f"{entry.scores.permutation_p:.3f}",
        ]
        for entry in result.decoders
    ]
    rows.insert(0, ["chance", f"{result.decoders[0].scores.chance:.3f}", "", "", ""])
    return Table(
        header=["decoder", "accuracy", "95 % interval", "macro F1", "p"], rows=rows, strong=(len(rows) - 1,)
    )


def decoding_notes(result: DemoResult) -> list[str]:
    """Say whether pretraining helped, what it saw, and what the intervals mean."""
    gain = result.gain
    if gain.low > 0:
        verdict = "helps"
    elif gain.high < 0:
        verdict = "harms"
    else:
        verdict = "makes no difference that these data can show"
    plain = [entry for entry in result.decoders if entry.name in DESCRIPTIONS]
    best = max(plain, key=lambda entry: entry.scores.accuracy.value)
    ours = result.decoders[-1].scores.accuracy.value
    rank = "above" if ours > best.scores.accuracy.value else "not above"
    pretrained, fresh = result.gain_unseen
    windows = int(np.isin(result.task.runs, result.held_out).sum())
    return [
        f"Pretraining {verdict}: fine-tuned from pretrained minus from fresh weights "
        f"{gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}].",
        f"The fine-tuned model is {rank} the best classifier without a model ({label(best)}).",
        f"Pretraining read no labels, but the BOLD of {len(result.data.runs) - len(result.held_out)} of the "
        f"{len(result.data.runs)} runs that are tested here; in the {windows} windows of the other "
        f"{len(result.held_out)} runs accuracy is {pretrained:.3f} (from fresh weights {fresh:.3f}).",
        f"Each of the {len(result.task.folds)} runs is tested by decoders that never trained on its labels; "
        "intervals resample runs; p: labels permuted within runs. One participant: differences under about "
        "7 points mean nothing.",
    ]


def label(entry: Result) -> str:
    """Return a decoder's name as the table shows it."""
    return DESCRIPTIONS.get(entry.name, entry.name)


def demo_page(result: DemoResult) -> Page:
    """Return the page of the demo."""
    v, data, task = result.validation, result.data, result.task
    decoder = result.decoders[-1]
    scores = decoder.scores
    return Page(
        title="From recorded fMRI to a decoder",
        lead=(
            "One participant looked at pictures of eight categories. A model learned to predict masked time "
            "points of the recording without any labels, and was then adapted to name the category from the "
            "brain's response."
        ),
        facts=[
            (
                f"{scores.accuracy.value:.1%}",
                f"of the picture blocks named rightly (chance {scores.chance:.1%})",
            ),
            (f"{v['val_l1']:.3f}", f"error of masked time points (mean prediction {v['val_mean_l1']:.3f})"),
            (f"{len(data.runs)} × {len(data.runs[0])}", f"runs × volumes, one every {haxby.T_R} s"),
            (str(data.networks), "networks: voxels of one axial slice"),
        ],
        sections=[
            Section(
                title="Pretraining",
                text=[
                    "Causal sequence modelling: every time point of a window is masked in turn and predicted "
                    "from the time points before it."
                ],
                table=pretraining_table(result),
                notes=pretraining_notes(result),
                pictures=[_loss_picture(result), _window_picture(result), _map_picture(result)],
            ),
            Section(
                title=_decoding_title(result),
                text=[
                    "Every decoder sees the same windows: one block of pictures each, taken "
                    f"{HRF_SHIFT:g} s later to allow for the haemodynamic response."
                ],
                table=decoding_table(result),
                notes=decoding_notes(result),
                pictures=[
                    Picture(
                        name="decoders",
                        png=figures.decoders(
                            [label(entry) for entry in result.decoders],
                            [entry.scores.accuracy.value for entry in result.decoders],
                            [(e.scores.accuracy.low, e.scores.accuracy.high) for e in result.decoders],
                            chance=scores.chance,
                            highlight=[entry is decoder for entry in result.decoders],
                        ),
                        alt="Accuracy of each decoder with its interval, beside chance",
                        caption="Accuracy in runs that a decoder never trained on; 95 % intervals over runs.",
                    ),
                    Picture(
                        name="confusion",
                        png=figures.confusion(scores.confusion, task.classes),
                        alt="Confusion matrix of the fine-tuned model over the eight categories",
                        caption=f"What the decoder ({label(decoder)}) named for each category, in blocks.",
                    ),
                ],
            ),
        ],
        footer=[
            f"Seed {result.config.seed}, CPU threads: {result.config.threads}. Store {task.store.snapshot}.",
            CREDIT,
        ],
    )


def _decoding_title(result: DemoResult) -> str:
    task = result.task
    return f"Decoding {len(task.classes)} categories from {len(task.labels)} blocks, each run left out once"


def _loss_picture(result: DemoResult) -> Picture:
    lines = result.metrics
    train = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    held_out = [(line["step"], line["val_l1"]) for line in lines if "val_l1" in line]
    references = {"mean": result.validation["val_mean_l1"], "last value": result.validation["val_last_l1"]}
    return Picture(
        name="loss",
        png=figures.loss_curve(_columns(train), _columns(held_out), references),
        alt="Training and held-out error over steps, beside both baselines",
        caption="Error of masked time points while the model learns. Dashed: predicting each network's mean, "
        "and repeating the last value.",
    )


def _window_picture(result: DemoResult) -> Picture:
    r = result.reconstruction
    return Picture(
        name="reconstruction",
        png=figures.reconstruction(r.truth, r.prediction, t_r=haxby.T_R),
        alt="Three carpets: a recorded window, its masked reconstruction, the error",
        caption=f"A window of the held-out run {r.run}: each time point was masked and predicted from those "
        "before it. Networks are ordered by the window's first principal component.",
    )


def _map_picture(result: DemoResult) -> Picture:
    data, explained = result.data, result.reconstruction.explained
    return Picture(
        name="map",
        png=figures.slice_map(
            explained,
            data.mask,
            data.anatomy,
            voxel_mm=data.voxel_mm,
            right_first=data.right_first,
            label="explained variance",
        ),
        alt="Map of explained variance on the back half of an axial slice",
        caption="Where the masked reconstruction explains variance of the held-out runs (voxel by voxel, "
        f"median {np.median(explained):.1%}), on the mean image of the slice.",
    )


def _columns(pairs: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [a for a, _ in pairs], [b for _, b in pairs]


def _ends(interval: Interval) -> str:
    return f"[{interval.low:.3f}, {interval.high:.3f}]"
