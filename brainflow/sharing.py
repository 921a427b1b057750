"""Models that travel: a card filled in from what was recorded, upload to and download from the hub."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from brainflow.models import hub
from brainflow.models.pretrained import CONFIG, WEIGHTS, load_pretrained, read_config, save_pretrained

__all__ = ["from_pretrained", "model_card", "push_to_hub", "save_pretrained", "write_card"]

CARD, METRICS = "README.md", "metrics.jsonl"
VALIDATION = {
    "L1 error of masked values in held-out runs": "val_l1",
    "the same of each network's mean": "val_mean_l1",
    "the same of the last value": "val_last_l1",
}
SHARED = (CONFIG, WEIGHTS, "head.safetensors", CARD)


def from_pretrained(name: str | os.PathLike[str], *, revision: str | None = None) -> Any:
    """Return a framework module from a folder, or from a repository of the hub (`owner/name`)."""
    return load_pretrained(fetch(name, revision=revision))


def fetch(name: str | os.PathLike[str], *, revision: str | None = None) -> Path:
    """Return the folder of a model: `name` itself, or where the hub's files lie after download.

    Only configuration, weights in safetensors and the card are downloaded: nothing that could be executed.

    Raises
    ------
    FileNotFoundError
        If `name` is neither a model's folder nor to be had from the hub as `owner/name`.
    """
    return hub.fetch(name, SHARED, revision=revision)


def push_to_hub(
    folder: str | os.PathLike[str], repository: str, *, private: bool = True, dry_run: bool = False
) -> list[str]:
    """Upload a saved model with its card.

    Parameters
    ----------
    folder
        Folder of a saved model or decoder.
    repository
        `owner/name` on the hub; made if absent.
    private
        Visibility of a repository that is made.
    dry_run
        Write the card, upload nothing.

    Returns
    -------
    list of str
        Names of the files that are shared: configuration, weights, head, card; no optimizer states, no logs.

    Raises
    ------
    ValueError
        If `repository` is not of the form `owner/name`.
    """
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repository):
        raise ValueError(f"repository: got {repository!r}, expected owner/name")
    source = Path(folder)
    load_pretrained(source)  # what cannot be loaded is not shared
    write_card(source)
    names = [name for name in SHARED if (source / name).is_file()]
    if not dry_run:
        api = hub.client().HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=str(source), allow_patterns=names)
    return names


def write_card(folder: str | os.PathLike[str]) -> Path:
    """Write the card of a saved model from its `config.json` and its last validation; return its path."""
    path, logs = Path(folder) / CARD, Path(folder) / METRICS
    lines = logs.read_text(encoding="utf-8").splitlines() if logs.is_file() else []
    validations = [line for line in map(json.loads, filter(str.strip, lines)) if "val_loss" in line]
    card = model_card(read_config(folder), validation=validations[-1] if validations else None)
    path.write_text(card, encoding="utf-8")
    return path


def model_card(config: dict[str, Any], *, validation: dict[str, Any] | None = None) -> str:
    """Return the card of a model; what was not recorded is said to be unknown.

    Parameters
    ----------
    config
        Its `config.json`.
    validation
        Last validation line of its `metrics.jsonl`.
    """
    model, data = config["model"], config.get("data") or {}
    decoding, decoder = config.get("decoding"), config.get("decoder")
    lines = [
        "---",
        "library_name: brainflow",
        "tags: [fmri, neuroimaging, brainflow]",
        "---",
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
    lines += [f"- {name}: {count} runs" for name, count in runs.items()] or ["- not recorded"]
    people = data.get("training_subjects") or []
    if people:
        shown = ", ".join(people[:20]) + (f" and {len(people) - 20} more" if len(people) > 20 else "")
        lines.append(f"- subjects ({len(people)}), not to be used for evaluation: {shown}")
    if validation:
        known = {name: validation[key] for name, key in VALIDATION.items() if validation.get(key) is not None}
        lines += ["", f"## Validation after {validation['step']} steps", ""]
        lines += [f"- {name}: {value:.3f}" for name, value in known.items()]
    if decoder:
        lines += ["", "## Classes", "", ", ".join(str(name) for name in decoder["classes"])]
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
            f"Of the same procedure in held-out folds ({decoding['split']}; interval over "
            f"{decoding['interval_over']}); the weights here were fitted to all windows afterwards.",
            "",
            f"- accuracy {value['value']:.3f} ({ends}), chance {decoding['chance']:.3f}",
            f"- balanced accuracy {decoding['balanced_accuracy']['value']:.3f}",
            f"- macro F1 {decoding['macro_f1']['value']:.3f}",
        ]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value in (None, "", {}, []):
        return "not recorded"
    if isinstance(value, dict):
        value = "; ".join(f"{key}: {entry}" for key, entry in value.items())
    return str(value).replace("|", "\\|").replace("\n", " ")


def _names(names: Any) -> str:
    return f": {', '.join(map(str, names[:5]))}, …" if names else ", names not recorded"


def _range(t_r: Any) -> str:
    if not t_r:
        return "not recorded"
    return f"{t_r[0]:g} s" if len(t_r) == 1 else f"{min(t_r):g} to {max(t_r):g} s"
