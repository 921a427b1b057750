"""Which networks, at which time, carry a decision: integrated gradients and occlusion, by captum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from brainflow.decoding.finetune import Decoder
from brainflow.decoding.persist import load_decoder
from brainflow.decoding.task import DecodingTask
from brainflow.decoding.windows import ArrayWindows

Method = Literal["integrated-gradients", "occlusion"]
STEPS = 32
"""Points on the path of integrated gradients."""


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """Attributions averaged per class.

    Attributes
    ----------
    classes
        Names of the classes.
    mean
        float64 `[classes, time, networks]`: mean over groups of how much a value raises the logit of the
        window's class; NaN for classes without windows.
    error
        float64, same shape: its standard error over groups (subjects or runs); NaN for fewer than 2 groups.
    groups
        Number of groups of each class.
    """

    classes: tuple[str, ...]
    mean: NDArray[np.float64]
    error: NDArray[np.float64]
    groups: NDArray[np.int64]

    def networks(self) -> NDArray[np.float64]:
        """Return the sum over time, `[classes, networks]`: one value a network, for maps."""
        return np.asarray(self.mean.sum(axis=1))


def attribute(
    decoder: Decoder,
    windows: list[NDArray],
    targets: NDArray[np.int64],
    *,
    t_r: float,
    method: Method = "integrated-gradients",
) -> list[NDArray[np.float32]]:
    """Attribute the logit of a class to the values of each window.

    Parameters
    ----------
    decoder
        Fitted decoder; put into evaluation mode.
    windows
        Arrays `[time, networks]`; the baseline is 0, the mean of a z-scored network.
    targets
        int64 `[windows]`: class whose logit is explained, usually the true one.
    t_r
        Seconds between time points.
    method
        `integrated-gradients` (Sundararajan et al. 2017) or `occlusion`: one network over the whole window
        set to 0 at a time.

    Returns
    -------
    list of ndarray
        float32 `[time, networks]` for each window.

    Raises
    ------
    ImportError
        If captum is not installed.
    """
    captum = _captum()
    decoder.eval()
    device = next(decoder.parameters()).device
    result: list[Any] = [None] * len(windows)
    lengths = np.array([len(window) for window in windows])
    for length in np.unique(lengths):
        rows = np.flatnonzero(lengths == length)
        forward = _logits(decoder, t_r)
        for part in np.array_split(rows, -(-len(rows) // 64)):
            x = torch.from_numpy(np.stack([windows[i] for i in part]).astype(np.float32)).to(device)
            target = torch.from_numpy(targets[part]).to(device)
            if method == "integrated-gradients":
                explained = captum.IntegratedGradients(forward).attribute(
                    x, target=target, n_steps=STEPS, internal_batch_size=512
                )
            elif method == "occlusion":
                with torch.no_grad():
                    explained = captum.Occlusion(forward).attribute(
                        x, target=target, sliding_window_shapes=(int(length), 1), perturbations_per_eval=8
                    )
            else:
                raise ValueError(f"method: got {method!r}, expected integrated-gradients or occlusion")
            for i, values in zip(part, explained.detach().float().cpu().numpy(), strict=True):
                result[i] = values
    return result


def average(
    values: list[NDArray[np.float32]],
    labels: NDArray[np.int64],
    *,
    groups: NDArray,
    classes: tuple[str, ...],
) -> Attribution:
    """Average attributions per class with their standard error over groups.

    Parameters
    ----------
    values
        `[time, networks]` for each window; shorter ones count where they have time points.
    labels
        Class of each window.
    groups
        Subject (or run) of each window: means of groups are what varies.
    classes
        Names of the classes.
    """
    time, networks = max(len(value) for value in values), values[0].shape[1]
    mean = np.full((len(classes), time, networks), np.nan)
    error = np.full_like(mean, np.nan)
    count = np.zeros(len(classes), dtype=np.int64)
    for label in np.unique(labels):
        per_group = []
        for group in np.unique(groups[labels == label]):
            mine = np.flatnonzero((labels == label) & (groups == group))
            total, seen = np.zeros((time, networks)), np.zeros((time, 1))
            for i in mine:
                total[: len(values[i])] += values[i]
                seen[: len(values[i])] += 1
            per_group.append(total / np.maximum(seen, 1))
        stacked = np.stack(per_group)
        count[label] = len(stacked)
        mean[label] = stacked.mean(axis=0)
        if len(stacked) > 1:
            error[label] = stacked.std(axis=0, ddof=1) / np.sqrt(len(stacked))
    return Attribution(classes=classes, mean=mean, error=error, groups=count)


def attribute_task(task: DecodingTask, decoder: Path, path: Path, *, method: Method) -> Attribution:
    """Explain a saved decoder on the windows of a task and write `classes`, `mean`, `error` as NPZ."""
    fitted, _ = load_decoder(decoder)
    bold, lengths = task.read()
    windows = np.split(np.asarray(bold, dtype=np.float32), np.cumsum(lengths)[:-1])
    t_r = float(np.median(np.asarray(task.store.runs.t_r)))
    values = attribute(fitted, windows, task.labels, t_r=t_r, method=method)
    result = average(values, task.labels, groups=task.groups, classes=task.classes)
    np.savez(path, classes=np.array(result.classes), mean=result.mean, error=result.error)
    return result


def _logits(decoder: Decoder, t_r: float) -> Callable[[Tensor], Tensor]:
    """Return a function from `[windows, time, networks]` to logits, as captum wants it."""

    def forward(x: Tensor) -> Tensor:
        count, time, _ = x.shape
        blank = np.zeros((time, 1), np.float32)
        source = ArrayWindows([blank] * count, t_r=t_r)
        everything = np.arange(count)
        with source.loader(everything, batch=count, shuffle=False, seed=0, device=x.device) as batches:
            packed = next(batches)
        # with the graph that gradients flow through
        logits: Tensor = decoder(replace(packed, bold=x.flatten(0, 1)))
        return logits

    return forward


def _captum() -> Any:
    try:
        import captum.attr
    except ImportError as error:
        raise ImportError(
            "attributions need captum, which is not installed; pip install 'brainflow-fmri[explain]'"
        ) from error
    return captum.attr
