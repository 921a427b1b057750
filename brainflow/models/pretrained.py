"""Trained models on disk: `model.safetensors` beside a `config.json` that says how to build and feed them."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from brainflow.config import ModelConfig, from_dict

WEIGHTS, CONFIG = "model.safetensors", "config.json"
FORMAT = 1


def save_pretrained(
    module: nn.Module, directory: str | os.PathLike[str], extra: Mapping[str, Any] | None = None
) -> Path:
    """Write a framework module in release form; files of an earlier save are replaced one by one.

    Parameters
    ----------
    module
        A module from `brainflow.frameworks.build`.
    directory
        Folder; made if absent.
    extra
        JSON-ready facts that whoever uses the weights needs: TR, normalisation, parcellation, training data.
        They stand in `config.json` beside "model" and "format".

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ValueError
        If `extra` has a key "model" or "format".
    """
    extra = dict(extra or {})
    for key in ("model", "format"):
        if key in extra:
            raise ValueError(f"extra: got a key {key!r}, which config.json uses itself; rename it")
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"format": FORMAT, "model": asdict(module.config), **extra}  # type: ignore[call-overload]
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    tensors = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    save_file(tensors, folder / f"{WEIGHTS}.tmp", metadata={"format": "pt"})
    os.replace(folder / f"{WEIGHTS}.tmp", folder / WEIGHTS)
    (folder / f"{CONFIG}.tmp").write_text(text, encoding="utf-8")
    os.replace(folder / f"{CONFIG}.tmp", folder / CONFIG)
    return folder


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Return `config.json` of a saved model: "model", "format" and what `extra` held.

    Raises
    ------
    FileNotFoundError
        If the folder holds no saved model.
    ValueError
        If the file is no model configuration that this version reads.
    """
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory}: no {CONFIG} there; expected a folder that `brainflow pretrain` or "
            "`brainflow import-checkpoint` wrote"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise ValueError(f"{path}: no 'model' section; expected the config.json of a brainflow model")
    if config.get("format") != FORMAT:
        raise ValueError(
            f"{path}: got format {config.get('format')!r}, but this version reads format {FORMAT}; "
            "use the version of brainflow that wrote it"
        )
    return config


def load_pretrained(directory: str | os.PathLike[str]) -> nn.Module:
    """Return the saved framework module, on the CPU and in evaluation mode.

    Raises
    ------
    FileNotFoundError
        If the folder holds no saved model.
    ValueError
        If configuration and weights do not fit together; the message names the tensors.
    """
    folder = Path(directory)
    config = from_dict(ModelConfig, read_config(folder)["model"])
    path = folder / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no {WEIGHTS} beside {CONFIG}; copy both files of a model")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error}); copy it again") from error
    module = build(config)
    load_tensors(module, tensors, str(path))
    return module.eval()


def build(config: ModelConfig) -> nn.Module:
    """Return the framework module of a configuration, with fresh weights.

    Frameworks stand above models, so their builder is looked up by name when it is needed.
    """
    module: nn.Module = importlib.import_module("brainflow.frameworks").build(config)
    return module


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Copy tensors into a module that has exactly these names and shapes.

    Raises
    ------
    ValueError
        Naming what is missing, unknown or of another shape.
    """
    own = module.state_dict()
    problems = [f"missing {name}" for name in sorted(own.keys() - tensors.keys())]
    problems += [f"unknown {name}" for name in sorted(tensors.keys() - own.keys())]
    problems += [
        f"{name} has shape {list(tensors[name].shape)}, expected {list(own[name].shape)}"
        for name in sorted(own.keys() & tensors.keys())
        if own[name].shape != tensors[name].shape
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(f"{origin}: weights do not fit the model's configuration: {shown}")
    module.load_state_dict(dict(tensors))
