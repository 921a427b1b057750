"""Attribution of decisions to networks and time points: integrated gradients and occlusion."""

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
from brainflow.storage.files import replacing

Method = Literal["integrated-gradients", "occlusion"]
Logits = Callable[[Tensor], Tensor]
"""`[windows, time, networks]` → `[windows, classes]`."""
STEPS = 32
"""Points on the path of integrated gradients."""
COPIES = 8
"""Copies of at most 64 windows that are read at once: points on the path, or networks left out."""


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
        with replacing(path) as file:
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
    ValueError
        If there is no such method.
    """
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}, expected {' or '.join(METHODS)}")
    explain = METHODS[method]
    decoder.eval()
    device = next(decoder.parameters()).device
    result: list[Any] = [None] * len(windows)
    t_rs = np.broadcast_to(np.asarray(t_r, dtype=np.float64), len(windows))
    shapes = np.array([(len(window), one) for window, one in zip(windows, t_rs, strict=True)])
    # Windows of one length and TR stack into one array.
    for length, one in np.unique(shapes, axis=0):
        rows = np.flatnonzero((shapes == (length, one)).all(axis=1))
        forward = _logits(decoder, float(one))
        for part in np.array_split(rows, -(-len(rows) // 64)):
            x = torch.from_numpy(np.stack([windows[i] for i in part]).astype(np.float32)).to(device)
            target = torch.from_numpy(targets[part]).to(device)
            explained = explain(forward, x, target)
            for i, values in zip(part, explained.cpu().numpy(), strict=True):
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
            # Beyond a group's longest window there is nothing to divide by.
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
        # By an int64 NumPy would divide in float64.
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


def _logits(decoder: Decoder, t_r: float) -> Logits:
    """Return a function from `[windows, time, networks]` to logits, for windows of one length."""

    def forward(x: Tensor) -> Tensor:
        count, time, _ = x.shape
        # Any values will do: lengths and TR are wanted, the BOLD is put in below.
        blank = np.zeros((time, 1), np.float32)
        source = ArrayWindows([blank] * count, t_r=t_r)
        everything = np.arange(count)
        with source.loader(everything, batch=count, shuffle=False, seed=0, device=x.device) as batches:
            packed = next(batches)
        # with the graph that gradients flow through
        logits: Tensor = decoder(replace(packed, bold=x.flatten(0, 1)))
        return logits

    return forward


def _integrated_gradients(forward: Logits, x: Tensor, target: Tensor) -> Tensor:
    """Return x times the mean gradient on the straight path from 0, by Gauss-Legendre quadrature."""
    # Exact for polynomials up to degree 2 · STEPS - 1, where equal steps would need many more points.
    nodes, weights = (torch.from_numpy(v).to(x) / 2 for v in np.polynomial.legendre.leggauss(STEPS))
    total = torch.zeros_like(x)
    for places, weight in zip(nodes.split(COPIES), weights.split(COPIES), strict=True):
        points = ((places + 0.5).view(-1, 1, 1, 1) * x).requires_grad_()  # the nodes are those of [-1, 1]
        chosen = _of(forward(points.flatten(0, 1)), target).sum()  # windows do not see each other
        total += torch.einsum("s,swtn->wtn", weight, torch.autograd.grad(chosen, points)[0])
    return total * x


@torch.no_grad()
def _occlusion(forward: Logits, x: Tensor, target: Tensor) -> Tensor:
    """Return by how much the logit falls when a network is 0, spread evenly over its time points."""
    before = _of(forward(x), target)[0]
    fall = torch.empty_like(x)
    for networks in torch.arange(x.shape[2], device=x.device).split(COPIES):
        blank = x.repeat(len(networks), 1, 1, 1)
        for copy, network in zip(blank, networks, strict=True):
            copy[:, :, network] = 0
        # Shared out over time, so that sums over time, which maps show, are the fall itself.
        falls = before - _of(forward(blank.flatten(0, 1)), target)
        fall[:, :, networks] = (falls.T / x.shape[1])[:, None]
    return fall


def _of(logits: Tensor, target: Tensor) -> Tensor:
    """Return the logits of the windows' targets, `[copies, windows]`, of `[copies * windows, classes]`."""
    return logits.unflatten(0, (-1, len(target)))[:, torch.arange(len(target)), target]


METHODS: dict[str, Callable[[Logits, Tensor, Tensor], Tensor]] = {
    "integrated-gradients": _integrated_gradients,
    "occlusion": _occlusion,
}
