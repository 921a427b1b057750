"""The page of a run: configuration, curves, scores against baselines, confusion, subjects, brain maps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from brainflow.decoding.baselines import DESCRIPTIONS
from brainflow.report import figures
from brainflow.report.page import Page, Picture, Section, Table

PRETRAINING, DECODING, MAPS = "metrics.jsonl", "scores.json", "attributions.npz"


def run_page(folder: Path, *, masker: Any = None) -> Page:
    """Return the page of a pretraining run, of a decoding, or of a folder that holds files of both.

    Parameters
    ----------
    folder
        What `brainflow pretrain` or `brainflow adapt` wrote.
    masker
        Fitted nilearn masker of the parcellation: draws the attributions of `attributions.npz`.

    Raises
    ------
    FileNotFoundError
        If the folder holds neither.
    """
    sections, facts = [], []
    if (folder / PRETRAINING).is_file():
        section, found = _pretraining(folder)
        sections.append(section)
        facts += found
    if (folder / DECODING).is_file():
        summary = json.loads((folder / DECODING).read_text(encoding="utf-8"))
        sections += _decoding(summary)
        sections += _maps(folder, masker)
        value = summary["decoder"]["accuracy"]["value"]
        facts += [(f"{value:.1%}", f"named rightly (chance {summary['decoder']['chance']:.1%})")]
        facts += [(str(summary["tested"]), f"tested windows of {len(summary['classes'])} classes")]
    if not sections:
        raise FileNotFoundError(
            f"{folder}: neither {PRETRAINING} nor {DECODING} there; expected what `brainflow pretrain` or "
            "`brainflow adapt` wrote"
        )
    return Page(
        title=f"brainflow report: {folder.resolve().name}",
        lead="What a run read, did and reached. Every figure comes from the files of the run.",
        facts=facts,
        sections=[*sections, *_configuration(folder)],
        footer=["Made by brainflow report; the page holds everything itself and fetches nothing."],
    )


def _pretraining(folder: Path) -> tuple[Section, list[tuple[str, str]]]:
    lines = [
        json.loads(line)
        for line in (folder / PRETRAINING).read_text(encoding="utf-8").splitlines()
        if line.strip()
    ]
    train = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    held_out = [(line["step"], line["val_l1"]) for line in lines if line.get("val_l1") is not None]
    last: dict[str, Any] = next((line for line in reversed(lines) if "val_loss" in line), {})
    references = {
        name: last[key]
        for name, key in (("mean", "val_mean_l1"), ("last value", "val_last_l1"))
        if last.get(key) is not None
    }
    rows = [["model", _number(last.get("val_l1"))]] + [[n, _number(v)] for n, v in references.items()]
    picture = Picture(
        name="loss",
        png=figures.loss_curve(_columns(train), _columns(held_out), references),
        alt="Training and held-out error over steps",
        caption="Training loss and L1 error of held-out runs. Dashed: predictions without a model.",
    )
    table = Table(header=["prediction of held-out runs", "L1 error"], rows=rows, strong=(0,))
    facts = [(str(lines[-1]["step"] if lines else 0), "optimizer steps of pretraining")]
    return Section(title="Pretraining", table=table, pictures=[picture]), facts


def _decoding(summary: dict[str, Any]) -> list[Section]:
    entries = [*summary["baselines"], summary["decoder"]]
    ours = summary["decoder"]
    kind, count = summary["groups"]["kind"], summary["groups"]["count"]
    rows = [
        [
            DESCRIPTIONS.get(e["name"], e["name"]),
            _number(e["accuracy"]["value"]),
            _ends(e["accuracy"]),
            _number(e["balanced_accuracy"]["value"]),
            _number(e["macro_f1"]["value"]),
            _number(e["permutation_p"]),
            _number(e["calibration"]["error"]) if e.get("calibration") else "",
        ]
        for e in entries
    ]
    header = ["decoder", "accuracy", "95 % interval", "balanced", "macro F1", "p", "ECE"]
    values = [e["accuracy"] for e in entries]
    intervals = [(v["value"], v["value"]) if v["low"] is None else (v["low"], v["high"]) for v in values]
    pictures = [
        Picture(
            name="decoders",
            png=figures.decoders(
                [DESCRIPTIONS.get(e["name"], e["name"]) for e in entries],
                [v["value"] for v in values],
                intervals,
                chance=ours["chance"],
                highlight=[e is ours for e in entries],
            ),
            alt="Accuracy of each decoder with its interval, beside chance",
            caption=f"Accuracy in the same folds; 95 % intervals over {count} {kind}s.",
        ),
        Picture(
            name="confusion",
            png=figures.confusion(np.asarray(ours["confusion"]), summary["classes"]),
            alt="Confusion matrix",
            caption=f"What the decoder ({ours['name']}) named for each class, in windows.",
        ),
        Picture(
            name="subjects",
            png=figures.group_dots(ours["per_group"], chance=ours["chance"], kind=kind),
            alt=f"Accuracy of each {kind}",
            caption=f"Accuracy of each {kind}, sorted.",
        ),
    ]
    if ours.get("calibration"):
        c = ours["calibration"]
        pictures.append(
            Picture(
                name="reliability",
                png=figures.reliability(c["confidence"], c["accuracy"], c["windows"]),
                alt="Accuracy against confidence",
                caption=f"Calibration: expected calibration error {c['error']:.3f}.",
            )
        )
    sections = [
        Section(
            title=f"Decoding {summary['target']}: {len(summary['classes'])} classes, {summary['split']}",
            text=[
                f"Classes: {', '.join(summary['classes'])}. Every decoder sees the same windows and folds."
            ],
            table=Table(header=header, rows=rows, strong=(len(rows) - 1,)),
            notes=[f"p: labels permuted within {kind}s. Chance: always naming the most frequent class."],
            pictures=pictures,
        )
    ]
    curve = summary.get("learning_curve")
    if curve:
        sections.append(
            Section(
                title="Learning curve",
                table=Table(
                    header=["decoder", f"training {curve['unit']}s", "accuracy", "95 % interval"],
                    rows=[
                        [p["decoder"], str(p["train"]), _number(p["value"]), _ends(p)]
                        for p in curve["points"]
                    ],
                ),
                notes=[f"The same test windows at every point; intervals over {curve['interval_over']}."],
            )
        )
    return sections


def _maps(folder: Path, masker: Any) -> list[Section]:
    if masker is None or not (folder / MAPS).is_file():
        return []
    from brainflow.report.brain import brain_pictures  # nilearn's plotting costs seconds

    with np.load(folder / MAPS, allow_pickle=False) as saved:
        names, mean = saved["classes"].tolist(), saved["mean"]
    pictures = [
        picture
        for name, values in zip(names, mean.sum(axis=1), strict=True)
        if np.isfinite(values).all()
        for picture in brain_pictures(str(name), f"Attribution to {name}", values, masker)
    ]
    note = "Sums over time of attributions to the class's logit, averaged over groups."
    return [Section(title="On the brain", notes=[note], pictures=pictures)]


def _configuration(folder: Path) -> list[Section]:
    rows = []
    for file in ("train_config.json", "config.json"):
        if (folder / file).is_file():
            saved = json.loads((folder / file).read_text(encoding="utf-8"))
            rows += _flat(saved)
            break
    if (folder / DECODING).is_file():
        summary = json.loads((folder / DECODING).read_text(encoding="utf-8"))
        rows += _flat({"adapt": summary["decoder"].get("adapt", {}), "store": summary["store_snapshot"]})
    return [Section(title="Configuration", table=Table(header=["setting", "value"], rows=rows))]


def _flat(values: dict[str, Any], prefix: str = "") -> list[list[str]]:
    rows = []
    for key, value in values.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            text = str(value)
            rows.append([prefix + key, text if len(text) < 60 else text[:57] + "…"])
    return rows


def _columns(pairs: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [a for a, _ in pairs], [b for _, b in pairs]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _ends(value: dict[str, Any]) -> str:
    return "one group" if value["low"] is None else f"[{value['low']:.3f}, {value['high']:.3f}]"
