"""A fitted decoder on disk: the model's release form, the head beside it, and what its classes are called."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from brainflow.decoding.adapt import Device, background_covariance, load_module
from brainflow.decoding.finetune import Decoder
from brainflow.decoding.fit import AdaptConfig, fit_decoder
from brainflow.decoding.heads import Neighbours, make_head
from brainflow.decoding.readout import SIDES, Readout, layers
from brainflow.decoding.result import Result
from brainflow.decoding.task import DecodingTask, check_classes
from brainflow.devices import resolve_device
from brainflow.files import own_folder
from brainflow.pretrained.card import write_card
from brainflow.pretrained.format import (
    HEAD,
    TensorFile,
    check_digest,
    load_pretrained,
    read_config,
    save_pretrained,
)


def save_decoder(
    decoder: Decoder,
    folder: str | os.PathLike[str],
    *,
    mode: str,
    kind: str,
    classes: tuple[Any, ...],
    facts: dict[str, Any] | None = None,
) -> Path:
    """Write a decoder: `model.safetensors`, `config.json` (with a section `decoder`), `head.safetensors`.

    Parameters
    ----------
    decoder
        Fitted decoder.
    folder
        Folder; made if absent.
    mode
        How it was adapted.
    kind
        What its head is, as :func:`~brainflow.decoding.heads.make_head` calls it.
    classes
        Names of the classes (str, int or float), in the order of the logits.
    facts
        More for `config.json`: the section `data` of the pretrained model, scores.
    """
    head = decoder.head
    section = {
        "mode": mode,
        "head": kind,
        **asdict(decoder.readout),
        "classes": list(classes),
        # Neighbours are kept, so the head is as large as they were many.
        "examples": len(head.keys) if isinstance(head, Neighbours) else 0,
    }
    extra = {**(facts or {}), "decoder": section}
    return save_pretrained(decoder.module, folder, extra, {HEAD: head.state_dict()})


def load_decoder(folder: str | os.PathLike[str]) -> tuple[Decoder, dict[str, Any]]:
    """Return a saved decoder in evaluation mode and its `config.json`.

    Raises
    ------
    ValueError
        If the folder holds a model without a decoder, or head and configuration do not fit.
    """
    config = read_config(folder)
    section = config.get("decoder")
    path = Path(folder) / HEAD
    if section is None or not path.exists():
        raise ValueError(
            f"{folder}: holds a pretrained model but no decoder; fit one with `brainflow adapt --save` or "
            "MentalStateDecoder.save"
        )
    module: Any = load_pretrained(folder)
    with TensorFile(path) as tensors:
        readout = _readout(section, module)
        width = readout.width(module.config)
        with torch.device("meta"):  # no memory before the sizes are those of the file
            tensors.check(_head(section, width).state_dict())
        check_digest(path, config)
        head = _head(section, width)
        head.load_state_dict(tensors.read())
    return Decoder(module, head, readout).eval(), config


def _readout(section: dict[str, Any], module: Any) -> Readout:
    """Return what a decoder reads; of an older version it names its pooling alone."""
    named = {name: section[name] for name in ("pooling", "bins", "layer") if name in section}
    try:
        readout = Readout(**named)
        if readout.layer not in [*layers(module), *SIDES]:
            raise ValueError(
                f"layer: got {readout.layer}, but the model has {len(layers(module)) - 2} blocks"
            )
    except (TypeError, ValueError) as error:
        raise ValueError(f"decoder: {error}") from None
    return readout


def _head(section: dict[str, Any], width: int) -> nn.Module:
    try:
        return make_head(
            # Older decoders name no head: it was that of their mode.
            section.get("head", section["mode"]),
            width=width,
            classes=len(section["classes"]),
            examples=section["examples"],
        )
    except (RuntimeError, TypeError, OverflowError) as error:
        raise ValueError(f"decoder: no head can be as large as the configuration says ({error})") from None


def check_decoder_classes(checkpoint: str | os.PathLike[str], task: DecodingTask) -> None:
    """Refuse a checkpoint that is a decoder of other classes than the task's column holds.

    Raises
    ------
    ValueError
        Naming the labels that are missing and those that are too many.
    """
    section = read_config(checkpoint).get("decoder")
    if not isinstance(section, dict) or not section.get("classes"):
        return
    names = tuple(str(name) for name in section["classes"])
    try:
        check_classes(names, task.classes, origin="checkpoint's head", column=task.config.target)
    except ValueError as error:
        raise ValueError(f"{error}; with --new-classes a fresh head is fitted to the column's") from None


def save_for_task(
    task: DecodingTask,
    checkpoint: str | os.PathLike[str],
    config: AdaptConfig,
    folder: Path,
    result: Result,
    *,
    device: Device = "auto",
) -> Path:
    """Fit a decoder to all labelled windows of a task; write it with the scores of its folds and a card.

    Of the people whom a split file keeps for the test no window is taken, so that they remain unseen.

    Parameters
    ----------
    task
        Labelled windows.
    checkpoint, config
        Pretrained model, and how it is adapted.
    folder
        Folder; made if absent.
    result
        What the folds said of this way of decoding, for `config.json`.
    device
        Where to compute.
    """
    where = resolve_device(device)
    windows = task.folds[0].train if task.people else np.arange(len(task.labels))
    module = load_module(checkpoint, config, where)
    decoder, _ = fit_decoder(
        module,
        task,
        windows,
        config,
        classes=len(task.classes),
        device=where,
        covariance=background_covariance(task, module, config, where),
    )
    own_folder(folder)
    saved = read_config(checkpoint)
    facts: dict[str, Any] = {
        name: saved[name] for name in ("data", "pretrain", "base_model", "step") if name in saved
    }
    scores = result.to_dict()
    facts["decoding"] = {
        "target": task.config.target,
        "split": task.split_name,
        "hrf_shift": task.config.hrf_shift if task.hrf_shift is None else task.hrf_shift,
        "adapt": asdict(config),
        "store_snapshot": task.store.snapshot,
        "subjects": sorted({str(name) for name in task.subjects[windows]}),
        "interval_over": f"{task.group_kind}s",
        **{name: scores[name] for name in ("accuracy", "balanced_accuracy", "macro_f1", "chance")},
    }
    with torch.no_grad():
        names: Any = {"mode": config.mode, "kind": config.head, "classes": task.classes}
        target = save_decoder(decoder.cpu(), folder, **names, facts=facts)
    write_card(target)
    return target
