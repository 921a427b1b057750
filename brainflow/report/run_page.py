"""The page of a run: configuration, curves, scores against baselines, confusion, subjects, brain maps."""

from __future__ import annotations

import csv
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from brainflow.data.splits import Split
from brainflow.decoding.baselines import DESCRIPTIONS
from brainflow.decoding.readout import read_line
from brainflow.files import open_regular, own_folder, read_json
from brainflow.pretrained.format import CONFIG, load_pretrained, read_config
from brainflow.report import figures
from brainflow.report.page import Page, Picture, Section, Table, ends, number, write_page
from brainflow.report.people_page import people_facts, people_section
from brainflow.report.reconstruction import reconstruct
from brainflow.storage import BoldStore
from brainflow.storage.files import replacing
from brainflow.training.metrics import METRICS, explained, read_metrics
from brainflow.training.run_dir import SPLIT

DECODING, MAPS = "scores.json", "attributions.npz"
RIDGE = DESCRIPTIONS["ridge"]
FITS, CHECKS, RECONSTRUCTION = "train_history.csv", "eval_history.csv", "reconstruction.npz"


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
    sections: list[Section] = []
    facts: list[tuple[str, str]] = []
    if (folder / METRICS).is_file():
        found, facts = _pretraining(folder, masker)
        sections += found
    if (folder / DECODING).is_file():
        summary = read_json(folder / DECODING)
        with _shaped(folder / DECODING):
            if summary.get("level") == "subject":
                sections.append(people_section(folder, summary))
                facts = [*people_facts(summary), *facts]
            else:
                sections += _decoding(folder, summary)
                facts = [*_answer(summary), *facts]
        if summary.get("level") != "subject":
            sections += _explained(folder, masker, summary)
    if not sections:
        raise FileNotFoundError(
            f"{folder}: neither {METRICS} nor {DECODING} there; expected what `brainflow pretrain` or "
            "`brainflow adapt` wrote"
        )
    with _shaped(folder / (DECODING if (folder / DECODING).is_file() else CONFIG)):
        about, settings = _data(folder), _configuration(folder)
    return Page(
        title=f"brainflow report: {folder.resolve().name}",
        lead="What a run read, did and reached. Every figure comes from the files of the run.",
        facts=facts,
        sections=[*sections, *about, *settings],
        footer=["Made by brainflow report; the page holds everything itself and fetches nothing."],
    )


def write_report(folder: Path, *, masker: Any = None, out: Path | None = None) -> Path:
    """Write the page of :func:`run_page`, by default to `folder`/report; return its path."""
    page = run_page(folder, masker=masker)
    return write_page(page, out or own_folder(folder / "report"))


@contextmanager
def _shaped(path: Path) -> Iterator[None]:
    """Name the file whose content the block takes apart, where it is not what brainflow writes."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError) as error:
        raise ValueError(
            f"{path}: is not what brainflow writes ({type(error).__name__}: {error}); restore it, or run the "
            "command that wrote it again"
        ) from error


def _pretraining(folder: Path, masker: Any) -> tuple[list[Section], list[tuple[str, str]]]:
    lines = read_metrics(folder)
    held_out = [
        (line["step"], line["val_explained_variance"])
        for line in lines
        if line.get("val_explained_variance") is not None
    ]
    last: dict[str, Any] = next((line for line in reversed(lines) if "val_loss" in line), {})
    found = explained(last)
    rows = [[name, number(value)] for name, value in found.items()] + [["the mean", number(0.0)]]
    references = {name: value for name, value in found.items() if name not in ("model", "network alone")}
    picture = Picture(
        name="loss",
        png=figures.loss_curve(([], []), _columns(held_out), references, unit="explained variance"),
        alt="Explained variance of held-out runs over steps",
        caption="Variance of masked values in held-out runs that the model explains. Dashed: predictions "
        "without a network.",
    )
    table = Table(header=["prediction of held-out runs", "explained variance"], rows=rows, strong=(0,))
    facts = [(str(lines[-1]["step"] if lines else 0), "optimizer steps of pretraining")]
    section = Section(title="Pretraining", table=table, pictures=[picture])
    return [section, *_reconstruction(folder, masker)], facts


def _reconstruction(folder: Path, masker: Any) -> list[Section]:
    """Return what the model predicts of its validation runs, if they still lie where they were."""
    if not ((folder / CONFIG).is_file() and (folder / SPLIT).is_file()):
        return []
    config = read_config(folder)
    pretrained = config.get("pretrain") or {}
    path, title = pretrained.get("store") or "", "Masked reconstruction"
    snapshot = (config.get("data") or {}).get("store_snapshot")
    if not path or not Path(path).is_dir() or BoldStore.open(path).snapshot != snapshot:
        note = f"The training store is not at {path} any more, or has changed: nothing was predicted."
        return [Section(title=title, notes=[note])]
    store = BoldStore.open(path)
    ids = Split.load(folder / SPLIT).part("validation", store.runs)
    ids = ids[store.intact(store.runs.start[ids], store.runs.length[ids])]
    if not len(ids):
        note = "The split has no validation run that is free of damage: nothing was predicted."
        return [Section(title=title, notes=[note])]
    runs = tuple(store.runs.key[ids].tolist())
    longest = (pretrained.get("data") or {}).get("seq_max", 50)
    if not isinstance(longest, int) or longest < 2:
        raise ValueError(f"{folder / CONFIG}: pretrain.data.seq_max: got {longest!r}, expected at least 2")
    # `seq_max` is exclusive.
    length = longest - 1
    r = reconstruct(store, load_pretrained(folder), runs, length=length)
    with replacing(folder / RECONSTRUCTION) as file:
        np.savez(file, error=r.error, mean_error=r.mean_error, explained=r.explained)
    picture = Picture(
        name="reconstruction",
        png=figures.reconstruction(r.truth, r.prediction, t_r=r.t_r),
        alt="Three carpets: a recorded window, its masked reconstruction, the error",
        caption=f"A window of the validation run {r.run}; blank where nothing was masked. Networks are "
        "ordered by the window's first principal component.",
    )
    median = [float(np.nanmedian(v)) for v in (r.error, r.mean_error, r.explained)]
    note = (
        f"Over {r.windows} windows of {len(runs)} validation runs, median of networks: mean absolute error "
        f"{median[0]:.3f} (predicting each network's mean: {median[1]:.3f}), explained "
        f"variance {median[2]:.1%}."
    )
    sections = [Section(title=title, notes=[note], pictures=[picture])]
    if masker is not None:
        from brainflow.report.brain import brain_section  # nilearn's plotting costs seconds

        names = ["reconstruction error (L1)", "explained variance"]
        # A masker knows no NaN.
        values = np.nan_to_num(np.stack([r.error, r.explained]))
        sections.append(
            brain_section("Reconstruction on the brain", names, values, masker, prefix="reconstruction")
        )
    return sections


def _answer(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Return how much is named rightly, by the best decoder without a model, and the paired difference."""
    ours = summary["decoder"]
    accuracy = ours["accuracy"]
    facts = [
        (f"{accuracy['value']:.1%}", f"named rightly {_shares(accuracy)} (chance {ours['chance']:.1%})"),
    ]
    gain = (summary.get("gains") or {}).get("pretrained - best baseline")
    if gain:
        best = next(one for one in summary["baselines"] if one["name"] == gain["and"])
        name = DESCRIPTIONS.get(best["name"], best["name"])
        facts.append((f"{best['accuracy']['value']:.1%}", f"by the best without a model: {name}"))
        facts.append((f"{gain['value']:+.1%}", f"paired difference {_shares(gain)}"))
    return [*facts, (str(summary["tested"]), f"tested windows of {len(summary['classes'])} classes")]


def _at_chance(summary: dict[str, Any]) -> bool:
    """Whether a decoder may as well have guessed, by its interval or, without one, by permutation."""
    ours = summary["decoder"]
    low = ours["accuracy"]["low"]
    return bool(ours["permutation_p"] > 0.05 if low is None else low <= ours["chance"])


def _decoding(folder: Path, summary: dict[str, Any]) -> list[Section]:
    entries = [*summary["baselines"], summary["decoder"]]
    ours = summary["decoder"]
    kind, count = summary["groups"]["kind"], summary["groups"]["count"]
    rows = [
        [
            DESCRIPTIONS.get(e["name"], e["name"]),
            number(e["accuracy"]["value"]),
            ends(e["accuracy"]),
            number(e["balanced_accuracy"]["value"]),
            number(e["macro_f1"]["value"]),
            number(e["permutation_p"]),
            number(e["calibration"]["error"]) if e.get("calibration") else "",
        ]
        for e in entries
    ]
    header = ["decoder", "accuracy", "95 % interval", "balanced", "macro F1", "p", "ECE"]
    beside: dict[str, float] = next(
        (e["per_group"] for e in entries if e["name"] == "ridge" and e is not ours), {}
    )
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
            png=figures.group_dots(ours["per_group"], beside, chance=ours["chance"], kind=kind),
            alt=f"Accuracy of each {kind}",
            caption=f"Accuracy of each {kind}, sorted" + (f"; {RIDGE} beside it." if beside else "."),
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
    if (folder / FITS).is_file():
        fits, checks = (_mean_by_step(folder / name) for name in (FITS, CHECKS))
        pictures.append(
            Picture(
                name="fits",
                png=figures.fit_curve(fits, checks),
                alt="Cross-entropy over optimizer steps",
                caption=f"Fitting the decoder ({ours['name']}): means over folds and seeds.",
            )
        )
    saw = ours.get("pretraining_saw") or []
    notes = [f"p: labels permuted within {kind}s. Chance: always naming the most frequent class."]
    if summary.get("within_subject"):
        notes.append("Decoding within subjects: other runs of the tested subjects train.")
    if saw:
        notes.append(
            f"The model has seen {len(saw)} of the {len(ours['per_subject'])} tested subjects before: "
            f"{', '.join(saw[:5])}{', …' if len(saw) > 5 else ''}."
        )
    if ours.get("read"):  # of a decoding by an older version it is not known
        notes.append(f"The decoder {read_line(ours['read'])}.")
    sections = [
        Section(
            title=f"Decoding {summary['target']}: {len(summary['classes'])} classes, {summary['split']}",
            text=["Every decoder sees the same windows and folds."],
            table=Table(header=header, rows=rows, strong=(len(rows) - 1,)),
            notes=notes,
            pictures=pictures,
        )
    ]
    curve = summary.get("learning_curve")
    if curve:
        sections.append(_learning_curve(curve, ours["chance"]))
    return sections


def _learning_curve(curve: dict[str, Any], chance: float) -> Section:
    lines: dict[str, list[tuple[float, float, float, float]]] = {}
    for p in curve["points"]:
        limits = (np.nan, np.nan) if p["low"] is None else (p["low"], p["high"])
        name = DESCRIPTIONS.get(p["decoder"], p["decoder"])
        lines.setdefault(name, []).append((p["train"], p["value"], *limits))
    picture = Picture(
        name="learning_curve",
        png=figures.learning_curve(lines, unit=f"{curve['unit']}s", chance=chance),
        alt="Accuracy over the number of training subjects or runs, a line a decoder",
        caption="The same test windows at every point. Intervals (all are in learning_curve.csv) hold "
        f"95 % over {curve['interval_over']}.",
    )
    counts = sorted({p["train"] for p in curve["points"]})
    found = {(p["decoder"], p["train"]): number(p["value"]) for p in curve["points"]}
    rows = [
        [DESCRIPTIONS.get(name, name), *(found.get((name, count), "") for count in counts)]
        for name in dict.fromkeys(p["decoder"] for p in curve["points"])
    ]
    header = [f"accuracy, by training {curve['unit']}s", *map(str, counts)]
    return Section(title="Learning curve", table=Table(header=header, rows=rows), pictures=[picture])


def _explained(folder: Path, masker: Any, summary: dict[str, Any]) -> list[Section]:
    """Return attributions: which networks, when, and on the brain if there is a masker."""
    with _shaped(folder / DECODING):
        guessed, kind = _at_chance(summary), str(summary["groups"]["kind"])
        method = (summary.get("command") or {}).get("attribute")
    if not (folder / MAPS).is_file():
        return []
    with _shaped(folder / MAPS), open_regular(folder / MAPS) as file:
        # Compressed ones may unpack to more than fits into memory.
        if any(part.compress_type != zipfile.ZIP_STORED for part in zipfile.ZipFile(file).infolist()):
            raise ValueError("has compressed arrays, expected plain ones")
    with _shaped(folder / MAPS), np.load(folder / MAPS, allow_pickle=False) as saved:
        names, mean, error = saved["classes"].tolist(), saved["network_mean"], saved["network_error"]
        networks = saved["network_names"].tolist()
        over_time = np.nansum(np.abs(saved["mean"]), axis=2)
    notes = [
        "How far a network's values raise the logit of a window's own class: sums over time, "
        f"means over {kind}s with their standard errors, each window explained by the decoder of the fold "
        "that tested it."
    ]
    rows = []
    for name, values, errors in zip(names, mean, error, strict=True):
        if np.isfinite(values).all():
            best = np.argsort(-values)[:3]
            rows.append([name, *(f"{networks[i]}: {values[i]:+.3f} ± {errors[i]:.3f}" for i in best)])
    header = ["class", *("strongest", "second", "third")[: min(3, mean.shape[1])]]
    if guessed:
        notes.append("The decoder is not above chance: what it goes by says nothing of the brain.")
    pictures = []
    if method != "occlusion":  # which leaves a network out of the whole window: it knows no when
        pictures.append(
            Picture(
                name="attribution_time",
                png=figures.time_course(over_time, names),
                alt="Attribution over the time points of a window, a line a class",
                caption="When: sums over networks of the absolute mean attribution at each time point of a "
                "window.",
            )
        )
    title = "What the decoder goes by"
    table = Table(header=header, rows=rows)
    sections = [Section(title=title, table=table, notes=notes, pictures=pictures)]
    if masker is not None:
        from brainflow.report.brain import brain_section  # nilearn's plotting costs seconds

        titles = [f"attribution to {name}" for name in names]
        sections.append(
            brain_section(
                "On the brain", titles, mean, masker, prefix="attribution", errors=error, grey=guessed
            )
        )
    return sections


def _data(folder: Path) -> list[Section]:
    """Return what was read: by the decoding, or else by the pretraining."""
    if (folder / DECODING).is_file():
        facts = read_json(folder / DECODING).get("data") or {}
    elif (folder / CONFIG).is_file():
        facts = dict(read_config(folder).get("data") or {})
        people = facts.pop("training_subjects", None) or []
        facts["training subjects"] = len(people)
        names = facts.pop("network_names", None)
        facts.pop("network_coordinates", None)
        facts["network names"] = ", ".join(names[:5]) + ", …" if names else None
    else:
        return []
    rows = _flat(
        {name.replace("_", " "): "not recorded" if v in (None, "") else v for name, v in facts.items()}
    )
    return [Section(title="Data", table=Table(header=["what", "value"], rows=rows))]


def _configuration(folder: Path) -> list[Section]:
    rows = []
    for file in ("train_config.json", "config.json"):
        if (folder / file).is_file():
            rows += _flat(read_json(folder / file))
            break
    if (folder / DECODING).is_file():
        summary = read_json(folder / DECODING)
        rows += _flat({"adapt": summary["decoder"].get("adapt", {}), "store": summary["store_snapshot"]})
    return [Section(title="Configuration", table=Table(header=["setting", "value"], rows=rows))]


def _flat(values: dict[str, Any], prefix: str = "") -> list[list[str]]:
    rows = []
    for key, value in values.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            rows.append([prefix + key, text if len(text) < 60 else text[:57] + "…"])
    return rows


def _shares(value: dict[str, Any]) -> str:
    return "" if value["low"] is None else f"[{value['low']:.1%}, {value['high']:.1%}]"


def _mean_by_step(path: Path) -> tuple[list[float], list[float]]:
    """Return the steps of a history and the mean loss of its fits at each; empty without the file."""
    losses: dict[int, list[float]] = {}
    if path.is_file():
        with _shaped(path), path.open(encoding="utf-8", newline="") as handle:
            for row in csv.DictReader(handle):
                losses.setdefault(int(row["step"]), []).append(float(row["loss"]))
    return [float(step) for step in losses], [float(np.mean(found)) for found in losses.values()]


def _columns(pairs: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [a for a, _ in pairs], [b for _, b in pairs]
