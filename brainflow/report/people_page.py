"""The part of a page that shows how a target of people was decoded."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np

from brainflow.decoding.people_decoders import BASELINES
from brainflow.report import figures
from brainflow.report.page import Picture, Section, Table, ends, number, signed
from brainflow.storage.text import counted

NAMES = {"r2": "R²", "r": "r", "mae": "MAE", "auc": "AUC", "balanced_accuracy": "balanced accuracy"}


def people_facts(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the answer: the decoder's score, the best without a model, their difference."""
    main, chance = _main(summary)
    name = NAMES[main]
    ours = summary["decoder"][main]
    facts = [(number(ours["value"]), f"{name} {ends(ours)}, chance {chance:g}")]
    gain = (summary.get("gains") or {}).get("pretrained - best baseline")
    if gain:
        best = next(one for one in summary["baselines"] if one["name"] == gain["and"])
        facts.append((number(best[main]["value"]), f"{name} of the best without a model: {best['name']}"))
        facts.append((signed(gain["value"]), f"difference {ends(gain)}"))
    return [*facts, (str(summary["tested"]), "tested people")]


def people_section(folder: Path, summary: dict[str, Any]) -> Section:
    """Return scores of all decoders, and what was said of each person."""
    main, chance = _main(summary)
    metrics = [name for name in NAMES if name in summary["decoder"]]
    entries = [*summary["baselines"], summary["decoder"]]
    names = [BASELINES.get(one["name"], one["name"]) for one in entries]
    rows = [
        [name, number(one[main]["value"]), ends(one[main]), number(one["permutation_p"])]
        + [number(one[metric]["value"]) for metric in metrics[1:]]
        for name, one in zip(names, entries, strict=True)
    ]
    values = [one[main] for one in entries]
    pictures = [
        Picture(
            name="decoders",
            png=figures.decoders(
                names,
                [value["value"] for value in values],
                # One group has no interval: its line gets no length.
                [(v["value"], v["value"]) if v["low"] is None else (v["low"], v["high"]) for v in values],
                chance=chance,
                highlight=[one is summary["decoder"] for one in entries],
                unit=NAMES[main],
            ),
            alt=f"{NAMES[main]} of each decoder with its interval, beside chance",
            caption=f"{NAMES[main]} in the same folds; 95 % intervals over {_over(summary)}.",
        )
    ]
    notes = ["p: targets permuted over people."]
    if summary["classes"]:
        png = figures.confusion(np.asarray(summary["decoder"]["confusion"]), summary["classes"])
        caption = "What was named of people of each class."
        pictures.append(Picture(name="confusion", png=png, alt="Confusion matrix", caption=caption))
        notes.append(f"Balanced accuracy by chance: 1/{len(summary['classes'])}.")
    else:
        notes.append("R² is 0 where the same is said of everybody: what training people have on average.")
        if (folder / "predictions.csv").is_file():
            pictures.append(_predictions(folder / "predictions.csv", str(summary["target"])))
    if summary["confounds"]:
        notes.append(f"Regressed out within folds: {', '.join(summary['confounds'])}.")
    notes += [
        f"Left out: {counted(count, 'person', 'people')}, {why}."
        for why, count in summary["left_out"].items()
    ]
    saw = summary["decoder"].get("pretraining_saw") or []
    if saw:
        notes.append(f"The model has seen {len(saw)} of the {summary['tested']} tested people before.")
    return Section(
        title=f"Decoding {summary['target']} of people, {summary['split']}",
        text=["Every decoder sees the same people and folds, none of them the people whom it is tested on."],
        table=Table(
            header=["decoder", NAMES[main], "95 % interval", "p", *(NAMES[one] for one in metrics[1:])],
            rows=rows,
            strong=(len(rows) - 1,),
        ),
        notes=notes,
        pictures=pictures,
    )


def _main(summary: dict[str, Any]) -> tuple[str, float]:
    """Return the score that decoders are compared by, and what chance is worth."""
    return ("auc", 0.5) if summary["classes"] else ("r2", 0.0)


def _over(summary: dict[str, Any]) -> str:
    return f"{summary['groups']['count']} {summary['groups']['kind']}s"


def _predictions(path: Path, target: str) -> Picture:
    """Draw what was said of each person."""
    with path.open(encoding="utf-8", newline="") as handle:
        rows = [(float(row["target"]), float(row["prediction"])) for row in csv.DictReader(handle)]
    truth, said = np.array(rows).T
    return Picture(
        name="predictions",
        png=figures.predictions(truth, said, name=target),
        alt="Predicted against true values, a dot a person",
        caption=f"Predicted against true {target}, a dot a person, each by the fold that tested them.",
    )
