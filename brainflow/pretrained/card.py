"""Model cards, filled in from what was recorded."""

from __future__ import annotations

import html
import json
import os
import re
from pathlib import Path
from typing import Any

from brainflow.files import is_number, parse_json, read_text
from brainflow.pretrained.format import CARD, CONFIG, read_config
from brainflow.pretrained.privacy import HASHED, without_paths
from brainflow.storage import BoldStore
from brainflow.storage.files import write_text
from brainflow.storage.text import counted, printable

METRICS = "metrics.jsonl"
MARKER = "<!-- Made by brainflow, which writes it anew. Delete this line and the card is yours. -->"
VALIDATION = {
    "val_explained_variance": "explained variance of masked values in held-out runs",
    "val_linear_explained_variance": "the same of the best linear predictor",
    "val_l1": "L1 error of masked values in held-out runs",
    "val_mean_l1": "the same of each network's mean",
    "val_last_l1": "the same of the last value",
}
MOST_LOG = 2**30
YAML_WORDS = {"y", "yes", "n", "no", "on", "off", "true", "false", "null"}


def write_card(folder: str | os.PathLike[str]) -> Path:
    """Write the card of a saved model from its `config.json` and its last validation; return its path.

    A card that is there already and was written by hand is left alone.
    """
    path = Path(folder) / CARD
    if not own_card(path):
        config = read_config(folder)
        validation = last_validation(Path(folder), config.get("step"))
        card = model_card(config, validation=validation, name=path.parent.resolve().name)
        write_text(path, card)
    return path


def own_card(path: Path) -> bool:
    """Whether there is a card that was written by hand."""
    return path.exists() and MARKER not in read_text(path)


def last_validation(folder: Path, step: int | None = None) -> dict[str, Any] | None:
    """Return a validation line of a run's log, of the released step or else the last; None without one.

    Parameters
    ----------
    folder
        The run.
    step
        Optimizer steps of the weights that were released, which may be fewer than the run had.
    """
    path = folder / METRICS
    if not path.is_file():
        return None
    last = None
    for line in reversed(read_text(path, most=MOST_LOG).splitlines()):
        # Only validations are parsed: a log may have a million lines.
        if '"val_loss"' in line:
            found = parse_json(line, f"{path}: the last validation")
            numbers = {key: value for key, value in found.items() if is_number(value)}
            if step is None or numbers.get("step") == step:
                return numbers
            last = last or numbers
    return last


def model_card(
    config: dict[str, Any],
    *,
    validation: dict[str, Any] | None = None,
    license: str = "unknown",
    name: str = "model",
) -> str:
    """Return the card of a model; what was not recorded is said to be unknown.

    Parameters
    ----------
    config
        Its `config.json`.
    validation
        Last validation line of its `metrics.jsonl`.
    license
        Licence of the weights, as the hub abbreviates it.
    name
        What the card calls the model.
    """
    model, data = config["model"], config.get("data") or {}
    decoding, decoder = config.get("decoding"), config.get("decoder")
    lines = [
        *_front_matter(config, validation, license, name),
        MARKER,
        "",
        f"# A {model['framework']} model of fMRI" + (", adapted to decode" if decoder else ""),
        "",
        f"{model['layers']} layers of width {model['width']} over {model['networks']} networks. Load it with "
        + ("`brainflow.MentalStateDecoder.load(folder)`." if decoder else "`brainflow.load(folder)`."),
        "",
        "## What data must look like",
        "",
        "| | the model saw |",
        "|---|---|",
        f"| parcellation | {_cell(data.get('parcellation'))} |",
        f"| networks, in this order | {model['networks']}{_names(data.get('network_names'))} |",
        f"| repetition time | {_range(data.get('t_r'))} |",
        f"| normalisation | {_cell(data.get('normalisation'))} |",
        f"| preprocessing | {_cell(data.get('preprocessing'))} |",
        "",
        "`brainflow adapt` compares these with a store and refuses one that differs; `brainflow doctor` says "
        "how far other data are from them.",
        "",
        "## Training data",
        "",
    ]
    runs = data.get("datasets") or {}
    lines += [f"- {_cell(name)}: {counted(count, 'run')}" for name, count in runs.items()] or [
        "- not recorded"
    ]
    lines += _people(data)
    if validation and "step" in validation:
        lines += ["", f"## Validation after {validation['step']} steps", ""]
        lines += [f"- {text}: {validation[key]:.3f}" for key, text in VALIDATION.items() if key in validation]
    if decoder:
        lines += ["", "## Classes", "", ", ".join(_cell(name) for name in decoder["classes"])]
    if decoding:
        value = decoding["accuracy"]
        ends = (
            "no interval"
            if value["low"] is None
            else f"95 % interval {value['low']:.3f} to {value['high']:.3f}"
        )
        lines += [
            "",
            "## Scores",
            "",
            f"Of the same procedure in held-out folds ({_cell(decoding['split'])}; interval over "
            f"{_cell(decoding['interval_over'])}); the weights here were fitted to all windows afterwards.",
            "",
            f"- accuracy {value['value']:.3f} ({ends}), chance {decoding['chance']:.3f}",
            f"- balanced accuracy {decoding['balanced_accuracy']['value']:.3f}",
            f"- macro F1 {decoding['macro_f1']['value']:.3f}",
        ]
    return "\n".join(lines) + "\n"


def store_card(store: BoldStore, repository: str, *, license: str = "unknown") -> str:
    """Return the card of a published store.

    Parameters
    ----------
    store
        What is published.
    repository
        `owner/name` on the hub.
    license
        Licence of the data, as the hub abbreviates it.
    """
    runs, attributes = store.runs, store.attributes
    people = {(str(d), str(s)) for d, s in zip(runs.dataset, runs.subject, strict=True)}
    front = {"license": license, "tags": ["fmri", "neuroimaging", "brainflow"]}
    name = re.sub(r".*/", "", repository)
    lines = [
        "---",
        *(f"{key}: {_yaml(value)}" for key, value in front.items()),
        "---",
        MARKER,
        "",
        f"# {name}: parcellated fMRI as a brainflow store",
        "",
        "| | |",
        "|---|---|",
        f"| runs | {len(runs)} of {counted(len(people), 'person', 'people')} |",
        f"| data sets | {', '.join(map(_cell, sorted(set(map(str, runs.dataset)))))} |",
        f"| time points | {int(runs.length.sum())} |",
        f"| repetition time | {_range(sorted(set(runs.t_r.tolist())))} |",
        f"| networks | {store.networks} |",
        f"| parcellation | {_cell(without_paths(str(attributes['parcellation'])))} |",
        f"| normalisation | {_cell(without_paths(str(attributes['normalisation'])))} |",
        f"| snapshot | `{store.snapshot}` |",
        "",
        f'Read it with `BoldStore.open("hf://datasets/{repository}")`, or train on it with '
        f"`brainflow pretrain hf://datasets/{repository}`: only what is read is downloaded, and every chunk "
        "is compared with its checksum.",
    ]
    return "\n".join(lines) + "\n"


def _front_matter(
    config: dict[str, Any], validation: dict[str, Any] | None, license: str, name: str
) -> list[str]:
    """Return what the hub reads of a card. JSON is YAML, so no text can become a key of its own."""
    data, decoding = config.get("data") or {}, config.get("decoding")
    front: dict[str, Any] = {
        "library_name": "brainflow",
        "license": license,
        "tags": ["fmri", "neuroimaging", "brainflow"],
        "datasets": [one for one in data.get("datasets") or {} if re.fullmatch(r"\w[\w./-]*", one)],
        "base_model": config.get("base_model"),
    }
    if decoding:
        scores = {key: decoding[key]["value"] for key in ("accuracy", "balanced_accuracy", "macro_f1")}
        task, kinds = "mental-state decoding", {"macro_f1": "f1"}
    else:
        # Metrics under the names that `evaluate` and scikit-learn give them.
        kinds = {"val_explained_variance": "explained_variance", "val_l1": "mae"}
        scores = {key: validation[key] for key in kinds if validation and key in validation}
        task = "masked reconstruction of fMRI"
    if scores:
        metrics = [
            {"type": kinds.get(key, key), "name": key, "value": value} for key, value in scores.items()
        ]
        where = ", ".join(front["datasets"]) or "not recorded"
        result = {
            # The hub has a list of tasks, and none of ours is in it.
            "task": {"type": "other", "name": task},
            "dataset": {"type": "fmri", "name": where},
            "metrics": metrics,
        }
        front["metrics"] = sorted({str(metric["type"]) for metric in metrics})
        front["model-index"] = [{"name": name, "results": [result]}]
    return ["---", *(f"{key}: {_yaml(value)}" for key, value in front.items() if value), "---"]


def _yaml(value: Any) -> str:
    # Without quotes YAML takes some words for other types.
    plain = isinstance(value, str) and re.fullmatch(r"[a-z][a-z0-9-]*", value) and value not in YAML_WORDS
    return value if plain else json.dumps(value)


def _people(data: dict[str, Any]) -> list[str]:
    """Return the card's line on the people whose data the model saw, none where there are none."""
    people = data.get("training_subjects") or []
    count = len(people) or data.get("people")
    if not count:
        return []
    line = f"- subjects ({count}), not to be used for evaluation"
    if not people:
        return [f"{line}: their names are not published"]
    if people[0].startswith(HASHED):
        return [f"{line}: by hash in `{CONFIG}`; `brainflow adapt` says which of a store's it saw"]
    shown = ", ".join(_cell(one) for one in people[:20])
    return [f"{line}: {shown}" + (f" and {count - 20} more" if count > 20 else "")]


def _cell(value: Any) -> str:
    """Return a text of a stranger for the card: no HTML, no line of its own, no control characters."""
    if value in (None, "", {}, []):
        return "not recorded"
    if isinstance(value, dict):
        value = "; ".join(f"{key}: {entry}" for key, entry in value.items())
    plain = html.escape(printable(" ".join(str(value).split())), quote=False)
    return re.sub(r"([\\|`\[\]*])", r"\\\1", plain)


def _names(names: Any) -> str:
    return f": {', '.join(map(_cell, names[:5]))}, …" if names else ", names not recorded"


def _range(t_r: Any) -> str:
    if not t_r:
        return "not recorded"
    return f"{t_r[0]:g} s" if len(t_r) == 1 else f"{min(t_r):g} to {max(t_r):g} s"
