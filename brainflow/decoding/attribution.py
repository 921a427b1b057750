"""Which networks, at which time, carry a decision: integrated gradients and occlusion, by captum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from brainflow.decoding.finetune import Decoder
from brainflow.decoding.task import DecodingTask
from brainflow.decoding.windows import ArrayWindows
from brainflow.files import beside
from brainflow.optional import need

Method = Literal["integrated-gradients", "occlusion"]
STEPS = 32
"""Points on the path of integrated gradients."""


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """Attributions averaged per class, each with its standard error over groups (subjects or runs).

    What is averaged is how much a value raises the logit of the window's own class. NaN stands for a class
    without windows, and for the error of fewer than 2 groups.

    Attributes
    ----------
    classes
        Names of the classes.
    mean, error
        float64 `[classes, time, networks]`.
    network_mean, network_error
        float64 `[classes, networks]`, of the sums over time: one value a network, for maps.
    groups
        int64 `[classes]`: number of groups of each class.
    network_names
        Names of the networks; their numbers where these are not known.
    """

    classes: tuple[str, ...]
    mean: NDArray[np.float64]
    error: NDArray[np.float64]
    network_mean: NDArray[np.float64]
    network_error: NDArray[np.float64]
    groups: NDArray[np.int64]
    network_names: tuple[str, ...]

    def save(self, path: Path) -> None:
        """Write all arrays as NPZ, under their names."""
        texts = {name: np.array(getattr(self, name)) for name in ("classes", "network_names")}
        arrays: dict[str, Any] = {**vars(self), **texts}
        with beside(path) as partial, partial.open("wb") as file:
            np.savez(file, **arrays)


def attribute(
    decoder: Decoder,
    windows: list[NDArray],
    targets: NDArray[np.int64],
    *,
    t_r: float | NDArray,
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
        Seconds between time points, one for all windows or `[windows]`.
    method
        `integrated-gradients` (Sundararajan et al. 2017), or `occlusion`: how far the logit falls when one
        network is set to 0 over the whole window, spread evenly over its time points.

    Returns
    -------
    list of ndarray
        float32 `[time, networks]` for each window.

    Raises
    ------
    ImportError
        If captum is not installed.
    """
    captum = need("captum.attr", "attribution", "explain")
    decoder.eval()
    device = next(decoder.parameters()).device
    result: list[Any] = [None] * len(windows)
    t_rs = np.broadcast_to(np.asarray(t_r, dtype=np.float64), len(windows))
    shapes = np.array([(len(window), one) for window, one in zip(windows, t_rs, strict=True)])
    for length, one in np.unique(shapes, axis=0):
        rows = np.flatnonzero((shapes == (length, one)).all(axis=1))
        forward = _logits(decoder, float(one))
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
                explained = explained / length
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
    network_names: Sequence[str] | None = None,
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
    classes, network_names
        Names of the classes and, where known, of the networks.
    """
    time, networks = max(len(value) for value in values), values[0].shape[1]
    mean = np.full((len(classes), time, networks), np.nan)
    error = np.full_like(mean, np.nan)
    network_mean, network_error = (np.full((len(classes), networks), np.nan) for _ in range(2))
    count = np.zeros(len(classes), dtype=np.int64)
    for label in np.unique(labels):
        per_group, sums = [], []
        for group in np.unique(groups[labels == label]):
            mine = np.flatnonzero((labels == label) & (groups == group))
            total, seen = np.zeros((time, networks)), np.zeros((time, 1))
            for i in mine:
                total[: len(values[i])] += values[i]
                seen[: len(values[i])] += 1
            per_group.append(total / np.maximum(seen, 1))
            sums.append(total.sum(axis=0) / len(mine))
        count[label] = len(per_group)
        mean[label], error[label] = _mean_and_error(np.stack(per_group))
        network_mean[label], network_error[label] = _mean_and_error(np.stack(sums))
    return Attribution(
        classes=classes,
        mean=mean,
        error=error,
        network_mean=network_mean,
        network_error=network_error,
        groups=count,
        network_names=tuple(network_names or map(str, range(networks))),
    )


class HeldOut:
    """Collects attributions of the windows of a task, each by the decoder of the fold that tests it.

    Give it to :func:`~brainflow.decoding.adapt.adapt` as `explain`. Windows that several seeds explain are
    averaged.

    Parameters
    ----------
    task
        Labelled windows and folds.
    method
        See :func:`attribute`.
    """

    def __init__(self, task: DecodingTask, method: Method) -> None:
        need("captum.attr", "attribution", "explain")  # missing is better known before hours of fitting
        bold, lengths = task.read()
        self._task, self._method = task, method
        self._windows = np.split(np.asarray(bold, dtype=np.float32), np.cumsum(lengths)[:-1])
        self._t_r = np.asarray(task.store.runs.t_r)[np.asarray(task.store.segments.run)[task.segments]]
        self._sums = [np.zeros_like(window) for window in self._windows]
        self._times = np.zeros(len(self._windows), dtype=np.int64)

    def __call__(self, decoder: Decoder, windows: NDArray[np.int64]) -> None:
        """Explain the true classes of some windows."""
        mine = [self._windows[i] for i in windows]
        targets, t_r = self._task.labels[windows], self._t_r[windows]
        for i, values in zip(
            windows, attribute(decoder, mine, targets, t_r=t_r, method=self._method), strict=True
        ):
            self._sums[i] += values
            self._times[i] += 1

    def average(self) -> Attribution:
        """Return the averages over the windows that were explained."""
        rows, task = np.flatnonzero(self._times), self._task
        values = [self._sums[i] / np.float32(self._times[i]) for i in rows]
        return average(
            values,
            task.labels[rows],
            groups=task.groups[rows],
            classes=task.classes,
            network_names=task.store.attributes.get("network_names"),
        )


def _mean_and_error(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64] | float]:
    error = values.std(axis=0, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return values.mean(axis=0), error


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
