"""What `brainflow demo` says of its result: JSON figures, tables in the terminal, the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from brainflow.decoding.baselines import DESCRIPTIONS
from brainflow.decoding.result import Result
from brainflow.decoding.scores import Interval
from brainflow.demo import haxby, worth
from brainflow.demo.pipeline import HRF_SHIFT, DemoResult, SliceResult, StoryResult
from brainflow.report import figures
from brainflow.report.page import Page, Picture, Section, Table

CREDITS = (
    "Story: Simony, Honey, Chen, Lositsky, Yeshurun, Wiesel & Hasson (2016), Dynamic reconfiguration of the "
    "default mode network during narrative comprehension, Nature Communications 7:12141; by way of "
    "ContextLab/hypertools, MIT licence, © 2016 Contextual Dynamics Laboratory.",
    "Slice: Haxby, Gobbini, Furey, Ishai, Schouten & Pietrini (2001), Distributed and overlapping "
    "representations of faces and objects in ventral temporal cortex, Science 293:2425; example data of "
    "PyMVPA 2.6.5, licensed CC BY-SA 3.0. The map and the window on this page are made from them.",
)
OPPONENTS = {
    "scratch": "the same network from random weights",
    "ridge": "ridge without a model",
    "best": "the better decoder without a model",
}
Gains = Mapping[int, Mapping[str, Interval]]
"""Number of people → opponent → paired difference."""


def summary(result: DemoResult) -> dict[str, Any]:
    """Return the demo's figures, ready for JSON; equal for equal seeds and threads."""
    act, order, part = result.story, result.order, result.slice
    return {
        "story": {
            "decoding": {str(p.groups): _accuracies(p.results) for p in act.points},
            "pretrained_minus": _plain(story_gains(act)),
            "pretraining": _forecast_figures(act.validation),
        },
        "order": {
            "pretrained_on": {
                str(people): found.scores.accuracy.to_dict() for people, found in order.pretrained.items()
            },
            "others": _accuracies(order.others),
            "pretrained_minus": _plain(order.gains),
        },
        "slice": {
            "decoding": _accuracies(part.decoders),
            "pretrained_minus": {"scratch": part.gain.to_dict()},
            "pretraining": _forecast_figures(part.validation),
            "held_out_runs": list(part.held_out),
        },
    }


def _accuracies(results: Sequence[Result]) -> dict[str, Any]:
    return {one.name: one.scores.accuracy.to_dict() for one in results}


def _plain(gains: Gains) -> dict[str, Any]:
    return {
        str(people): {name: one.to_dict() for name, one in against.items()}
        for people, against in gains.items()
    }


def _forecast_figures(validation: Mapping[str, Any]) -> dict[str, Any]:
    names = ("step", "val_loss", "val_mse", "val_mean_mse", "val_last_mse", "val_linear_mse")
    shown = (*names, "val_explained_variance")
    return {name: validation[name] for name in shown if name in validation}


def story_gains(act: StoryResult) -> Gains:
    """Return the pretrained model's differences by number of labelled people."""
    return {point.groups: worth.gains(point) for point in act.points}


def verdicts(gains: Gains, what: str) -> list[str]:
    """Say of each opponent where the pretrained model is above it, below it, or neither can be shown."""
    lines = []
    for name, opponent in OPPONENTS.items():
        above = [people for people, found in gains.items() if found[name].low > 0]
        below = [people for people, found in gains.items() if found[name].high < 0]
        rest = [people for people in gains if people not in (*above, *below)]
        found = {"above it": above, "BELOW it": below, "no difference to be shown": rest}
        said = [f"{word} with {', '.join(map(str, n))} {what}" for word, n in found.items() if n]
        lines.append(f"Pretrained against {opponent}: {'; '.join(said)}.")
    return lines


def print_tables(result: DemoResult, console: Console) -> None:
    """Print the tables and their notes."""
    for section in _sections(result):
        if section.table is None:
            continue
        drawn = RichTable(title=section.title, title_justify="left", title_style="bold")
        for number, name in enumerate(section.table.header):
            drawn.add_column(name, justify="right" if number else "left")
        for number, row in enumerate(section.table.rows):
            style = "bold" if number in section.table.strong else None
            drawn.add_row(*(escape(cell) for cell in row), style=style)
        console.print(drawn)
        for note in section.notes:
            console.print(f"  {note}", highlight=False, markup=False)
        console.print()


def label(entry: Result) -> str:
    """Return a decoder's name as the tables show it."""
    return DESCRIPTIONS.get(entry.name, entry.name)


def demo_page(result: DemoResult) -> Page:
    """Return the page of the demo."""
    act, order = result.story, result.order
    few = act.points[len(act.points) // 2]
    most, ours = max(order.pretrained.items())
    ridge = worth.opponents(few)["ridge"]
    return Page(
        title="What pretraining is worth",
        lead=(
            "A model learns to predict recordings of brain activity without any labels. Is what it learned "
            "worth something where labels are few? Three answers: people who listen to a story, simulated "
            "people of whom there are as many as one likes, and one person who looks at pictures."
        ),
        facts=[
            (
                _accuracy(few.results[0]),
                f"story: pretrained, {few.groups} labelled people ({_accuracy(ridge)} by ridge without a "
                f"model, chance {ridge.scores.chance:.1%})",
            ),
            (
                _accuracy(ours),
                f"simulated: pretrained on {most} people, {result.config.order_count} labelled",
            ),
            (_accuracy(result.slice.decoders[-1]), "pictures that one person saw: fine-tuned, pretrained"),
        ],
        sections=_sections(result),
        footer=[
            f"Seed {result.config.seed}, CPU threads: {result.config.threads}, {result.config.draws} draws "
            "of the labelled people. Nothing was tuned to these data: the settings are the package's.",
            *CREDITS,
        ],
    )


def _sections(result: DemoResult) -> list[Section]:
    return [_story_section(result), _order_section(result), _slice_section(result)]


def _story_section(result: DemoResult) -> Section:
    act, config = result.story, result.config
    people, tested = len(config.people), len(config.test_people)
    names = [label(one) for one in act.points[0].results]
    lines = {
        name: [(p.groups, *_three(p.results[place].scores.accuracy)) for p in act.points]
        for place, name in enumerate(names)
    }
    gains = story_gains(act)
    return Section(
        title="Where in a story is somebody? Real fMRI",
        text=[
            f"{people} people listened to the same story. {people - tested} of them are there for "
            f"pretraining without labels and, a few at a time, for labels; the other {tested} only test. "
            "Every decoder names which of 13 segments of 30 seconds a window is."
        ],
        table=_curve_table([p.groups for p in act.points], lines, gains),
        notes=[
            *verdicts(gains, "labelled people"),
            _forecast_note(act.validation, "people"),
            f"Intervals: 95 %, over {tested} tested people and {config.draws} draws of labelled ones.",
        ],
        pictures=[
            Picture(
                name="story",
                png=figures.learning_curve(
                    lines, unit="people, labelled", chance=act.points[0].results[0].scores.chance
                ),
                alt="Accuracy over the number of labelled people, a line a decoder",
                caption="The same test windows at every point, of people who are in no training.",
            )
        ],
    )


def _order_section(result: DemoResult) -> Section:
    act, config = result.order, result.config
    lines = {
        "pretrained": [(n, *_three(found.scores.accuracy)) for n, found in act.pretrained.items()],
        **{label(one): [(n, *_three(one.scores.accuracy)) for n in act.pretrained] for one in act.others},
    }
    gains = act.gains
    return Section(
        title="What would more people buy? SIMULATED people",
        text=[
            "Nobody here is real. The state of a simulated person is the order in which six groups of "
            "regions become active; everybody has weights, noise and onsets of their own. More and more "
            f"people without labels pretrain; {config.order_count} labelled ones and those who test stay."
        ],
        table=_curve_table(list(act.pretrained), lines, gains),
        notes=[
            *verdicts(gains, "people who pretrained"),
            f"{config.order_steps} steps each. Random weights and decoders without a model do not depend on "
            "who pretrains. What real people would buy depends on whether their states are sequences.",
        ],
        pictures=[
            Picture(
                name="order",
                png=figures.learning_curve(
                    lines, unit="people, without labels", chance=act.others[0].scores.chance
                ),
                alt="Accuracy over the number of simulated people who pretrained, a line a decoder",
                caption="Simulated people: accuracy in others, over the number of people who pretrained.",
            )
        ],
    )


def _slice_section(result: DemoResult) -> Section:
    part, config = result.slice, result.config
    rows = [
        [label(one), f"{one.scores.accuracy.value:.3f}", _ends(one.scores.accuracy)] for one in part.decoders
    ]
    rows.insert(0, ["chance", f"{part.decoders[0].scores.chance:.3f}", ""])
    v, g = part.validation, part.gain
    word = "helps" if g.low > 0 else "HARMS" if g.high < 0 else "makes no difference that can be shown"
    return Section(
        title="What does one person see? One slice, twelve runs, real fMRI",
        text=[
            f"{len(part.task.labels)} blocks of pictures of {len(part.task.classes)} kinds, taken "
            f"{HRF_SHIFT:g} s later to allow for the haemodynamic response; each run is tested by decoders "
            "that never trained on its labels. Every voxel of the slice is a network."
        ],
        table=Table(header=["decoder", "accuracy", "95 % interval"], rows=rows, strong=(len(rows) - 1,)),
        notes=[
            f"Pretraining {word}: {g.value:+.3f} [{g.low:+.3f}, {g.high:+.3f}] over random weights.",
            _forecast_note(v, "runs"),
            f"Pretraining, {config.slice_steps} steps, read the BOLD of "
            f"{len(part.data.runs) - len(part.held_out)} of the {len(part.data.runs)} runs that are tested.",
        ],
        pictures=[_loss_picture(part), _window_picture(part), _map_picture(part)],
    )


def _forecast_note(v: Mapping[str, Any], whom: str) -> str:
    """Say how well held-out people or runs are forecast beside what needs no model."""
    lines = {"the last value": "val_last_mse", "the best linear predictor": "val_linear_mse"}
    others = [
        f"{name} {1 - v[key] / v['val_mean_mse']:.1%}"
        for name, key in lines.items()
        if v.get(key) is not None
    ]
    return (
        f"What was hidden of {whom} that pretraining did not train on: {v['val_explained_variance']:.1%} of "
        f"the variance is explained ({', '.join(others)})."
    )


def _curve_table(
    counts: Sequence[int], lines: Mapping[str, Sequence[tuple[float, ...]]], gains: Gains
) -> Table:
    """Return accuracies with intervals, a column a number of people, and the differences below."""
    rows = [
        [name, *(f"{value:.3f} [{low:.3f}, {high:.3f}]" for _, value, low, high in points)]
        for name, points in lines.items()
    ]
    rows += [
        [f"pretrained − {opponent}", *(_signed(gains[count][name]) for count in counts)]
        for name, opponent in OPPONENTS.items()
    ]
    return Table(header=["people", *map(str, counts)], rows=rows, strong=(0,))


def _loss_picture(part: SliceResult) -> Picture:
    train = [(line["step"], line["loss"]) for line in part.metrics if "loss" in line]
    held_out = [(line["step"], line["val_loss"]) for line in part.metrics if "val_loss" in line]
    return Picture(
        name="loss",
        png=figures.loss_curve(_columns(train), _columns(held_out), {}, unit="loss"),
        alt="Training and held-out loss over steps",
        caption="Loss while the model learns, in training and in held-out runs.",
    )


def _window_picture(part: SliceResult) -> Picture:
    r = part.reconstruction
    return Picture(
        name="reconstruction",
        png=figures.reconstruction(r.truth, r.prediction, t_r=haxby.T_R),
        alt="Three carpets: a recorded window, its prediction, the error",
        caption=f"A window of the held-out run {r.run}: each time point predicted from those before it. "
        "Networks are ordered by the window's first principal component.",
    )


def _map_picture(part: SliceResult) -> Picture:
    data, explained = part.data, part.reconstruction.explained
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
        caption="Where the prediction explains variance of the held-out runs (voxel by voxel, "
        f"median {np.median(explained):.1%}), on the mean image of the slice.",
    )


def _columns(pairs: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [a for a, _ in pairs], [b for _, b in pairs]


def _three(interval: Interval) -> tuple[float, float, float]:
    return interval.value, interval.low, interval.high


def _accuracy(entry: Result) -> str:
    return f"{entry.scores.accuracy.value:.1%}"


def _ends(interval: Interval) -> str:
    return f"[{interval.low:.3f}, {interval.high:.3f}]"


def _signed(interval: Interval) -> str:
    return f"{interval.value:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"
