"""Models that travel: a card filled in from what was recorded, upload to and download from the hub.

What is uploaded is made anew from the model's folder, in which nothing is changed but a card of our own.
"""

from __future__ import annotations

import html
import importlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from brainflow.models import hub
from brainflow.models.facts import is_number
from brainflow.models.files import open_regular, parse_json, read_text, write_text
from brainflow.models.pretrained import CONFIG, WEIGHTS, load_pretrained, read_config, save_pretrained
from brainflow.models.privacy import HASHED, Subjects, published
from brainflow.storage.text import printable

__all__ = ["from_pretrained", "model_card", "push_to_hub", "save_pretrained", "write_card"]

CARD, METRICS, HEAD = "README.md", "metrics.jsonl", "head.safetensors"
MARKER = "<!-- Made by brainflow, which writes it anew. Delete this line and the card is yours. -->"
VALIDATION = {
    "val_l1": "L1 error of masked values in held-out runs",
    "val_mean_l1": "the same of each network's mean",
    "val_last_l1": "the same of the last value",
}
SHARED = (CONFIG, WEIGHTS, HEAD, CARD)
MOST_LOG = 2**30


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


@dataclass(frozen=True, kw_only=True)
class Upload:
    """What is about to be published.

    Attributes
    ----------
    texts
        Files that are made for it: configuration, and the card unless it is somebody's own.
    files
        Files that go up as they are.
    paths
        Names of the settings from which a path of this machine was removed.
    people
        Number of people whose data the model saw.
    subjects
        What became of their names.
    own_card
        Whether the card was written by hand.
    """

    texts: dict[str, str]
    files: dict[str, Path]
    paths: list[str]
    people: int
    subjects: Subjects
    own_card: bool

    @property
    def names(self) -> list[str]:
        """Names of the files."""
        return [name for name in SHARED if name in self.texts or name in self.files]

    def describe(self) -> str:
        """Return in words what would be seen by whoever downloads it."""
        sizes = {name: len(text.encode()) for name, text in self.texts.items()}
        sizes |= {name: path.stat().st_size for name, path in self.files.items()}
        done = {"keep": "by name", "hash": "each name as a salted hash", "drop": "their number only"}
        lines = [f"  {name}: {sizes[name]:,} bytes" for name in self.names]
        lines.append(f"  people: {self.people}" + (f", {done[self.subjects]}" if self.people else ""))
        lines.append(f"  paths removed: {', '.join(self.paths) or 'none'}")
        if self.own_card:
            lines.append(f"  {CARD} was written by hand: it goes up as it is and is left alone")
        return "\n".join(lines)


def prepare_upload(
    folder: str | os.PathLike[str], *, subjects: Subjects = "hash", license: str = "unknown", name: str = ""
) -> Upload:
    """Check a saved model and make what of it is published; nothing is written.

    Parameters
    ----------
    folder
        Folder of a saved model or decoder.
    subjects
        What becomes of the names of people in configuration and card, see
        :func:`~brainflow.models.privacy.published`.
    license
        Licence of the weights, as the hub abbreviates it (cc-by-4.0).
    name
        What the card calls the model.

    Raises
    ------
    ValueError
        If the model or its head cannot be loaded, or a file is a link that leads out of the folder.
    """
    source = Path(folder)
    config = read_config(source)
    files = {WEIGHTS: source / WEIGHTS}
    if config.get("decoder") is not None:
        files[HEAD] = source / HEAD
    own_card = _own_card(source / CARD)
    if own_card:
        files[CARD] = source / CARD
    if HEAD in files:  # decoders stand above this module, as frameworks do
        importlib.import_module("brainflow.decoding.persist").load_decoder(source)
    else:
        load_pretrained(source)
    for path in (source / CONFIG, *files.values()):
        _stays(path)
    seen = published(config, subjects)
    texts = {CONFIG: json.dumps(seen.config, indent=2, ensure_ascii=False) + "\n"}
    if not own_card:
        texts[CARD] = model_card(
            seen.config,
            validation=_last_validation(source),
            license=license,
            name=name or source.resolve().name,
        )
    return Upload(
        texts=texts, files=files, paths=seen.paths, people=seen.people, subjects=subjects, own_card=own_card
    )


def push_to_hub(
    folder: str | os.PathLike[str],
    repository: str,
    *,
    private: bool = True,
    dry_run: bool = False,
    subjects: Subjects = "hash",
    license: str = "unknown",
    said: Callable[[Upload], object] = lambda upload: None,
) -> list[str]:
    """Upload a saved model with its card.

    Parameters
    ----------
    folder
        Folder of a saved model or decoder.
    repository
        `owner/name` on the hub; made if absent.
    private
        Visibility of a repository that is made; one that is public already is refused.
    dry_run
        Upload nothing and write nothing.
    subjects, license
        See :func:`prepare_upload`.
    said
        Is told what is about to be published, before it is.

    Returns
    -------
    list of str
        Names of the files that are shared: configuration, weights, head, card; no optimizer states, no logs.

    Raises
    ------
    ValueError
        If `repository` is not of the form `owner/name`, is public and should not be, or the model cannot be
        loaded.
    ConnectionError
        If the hub refuses or is not reached.
    """
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repository):
        raise ValueError(f"repository: got {repository!r}, expected owner/name")
    name = repository.partition("/")[2]
    upload = prepare_upload(folder, subjects=subjects, license=license, name=name)
    said(upload)
    if not dry_run:
        _send(upload, repository, private=private)
        if CARD in upload.texts and not (Path(folder) / CARD).is_symlink():  # as the hub's cache has it
            write_text(Path(folder) / CARD, upload.texts[CARD])
    return upload.names


def _send(upload: Upload, repository: str, *, private: bool) -> None:
    client = hub.client()
    contents: dict[str, Any] = {name: text.encode() for name, text in upload.texts.items()} | upload.files
    parts = [
        client.CommitOperationAdd(path_in_repo=name, path_or_fileobj=contents[name]) for name in upload.names
    ]
    try:
        api = client.HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        if private and api.repo_info(repository).private is not True:
            raise ValueError(
                f"repository: {repository} is there already and is public; choose another, or say --public "
                "(private=False) to publish there"
            )
        api.create_commit(repository, operations=parts, commit_message="Share a model of brainflow")
    except (ValueError, OSError):
        raise
    except Exception as error:  # of the client's own transport
        raise ConnectionError(f"hub: {repository}: {type(error).__name__}: {error}; try again") from error


def write_card(folder: str | os.PathLike[str]) -> Path:
    """Write the card of a saved model from its `config.json` and its last validation; return its path.

    A card that is there already and was written by hand is left alone.
    """
    path = Path(folder) / CARD
    if not _own_card(path):
        config = read_config(folder)
        card = model_card(config, validation=_last_validation(Path(folder)), name=path.parent.resolve().name)
        write_text(path, card)
    return path


def _own_card(path: Path) -> bool:
    """Whether there is a card that was written by hand."""
    return path.exists() and MARKER not in read_text(path)


def _stays(path: Path) -> None:
    """Refuse a link out of a folder; those of the hub's cache lead to its own blobs.

    Raises
    ------
    ValueError
        If the file is such a link, or no regular file.
    """
    open_regular(path).close()
    snapshot = path.parent.resolve()
    blobs = snapshot.parent.parent / "blobs"
    if path.is_symlink() and not (snapshot.parent.name == "snapshots" and path.resolve().parent == blobs):
        raise ValueError(
            f"{path}: is a link to {printable(os.fspath(path.resolve()))}, and only files of the folder "
            "itself are shared; put a copy of the file there, or delete the link"
        )


def _last_validation(folder: Path) -> dict[str, Any] | None:
    """Return the last validation line of a run's log; None without one, or where the log is damaged."""
    path = folder / METRICS
    if not path.is_file():
        return None
    for line in reversed(read_text(path, most=MOST_LOG).splitlines()):
        if '"val_loss"' in line:
            found = parse_json(line, f"{path}: the last validation")
            return {key: value for key, value in found.items() if is_number(value)}
    return None


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
    lines += [f"- {_cell(name)}: {count} runs" for name, count in runs.items()] or ["- not recorded"]
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
        scores = {
            key: validation[key] for key in VALIDATION if key == "val_l1" and validation and key in validation
        }
        task, kinds = "masked reconstruction of fMRI", {"val_l1": "mae"}
    if scores:
        metrics = [
            {"type": kinds.get(key, key), "name": key, "value": value} for key, value in scores.items()
        ]
        where = ", ".join(front["datasets"]) or "not recorded"
        result = {
            "task": {"type": "other", "name": task},
            "dataset": {"type": "fmri", "name": where},
            "metrics": metrics,
        }
        front["metrics"] = sorted({str(metric["type"]) for metric in metrics})
        front["model-index"] = [{"name": name, "results": [result]}]
    return ["---", *(f"{key}: {_yaml(value)}" for key, value in front.items() if value), "---"]


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) and re.fullmatch(r"[a-z][a-z0-9-]*", value) else json.dumps(value)


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
