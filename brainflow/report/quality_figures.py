"""Pictures of the quality report, as PNG bytes: motion, tSNR, carpet plots, correlation matrix."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from brainflow.optional import requires

with requires("the quality report", "report"):
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure

DOTS_PER_INCH = 200
"""The page shows two pixels of a picture as one."""
LIMIT = 2.0
"""Standard deviations at which a carpet plot saturates."""
MARKS = 40
"""Names at an axis of networks at most."""


def framewise_displacement(means: Sequence[float], *, limit: float) -> bytes:
    """Draw a histogram of the runs' mean framewise displacement in mm."""
    figure = Figure(figsize=(5.2, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.hist(means, bins=min(30, max(5, len(means))), color="C0")
    axes.axvline(limit, color="C3", ls="--", lw=1)
    axes.set(xlabel="mean framewise displacement (mm)", ylabel="runs")
    return _png(figure)


def run_overview(means: Sequence[float], snr: Sequence[float]) -> bytes:
    """Draw temporal SNR against mean framewise displacement, one dot a run."""
    figure = Figure(figsize=(5.2, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(means, snr, "o", ms=3, alpha=0.6)
    axes.set(xlabel="mean framewise displacement (mm)", ylabel="temporal SNR", ylim=(0, None))
    return _png(figure)


@dataclass(frozen=True, kw_only=True)
class Line:
    """A value of each volume, None where it is not known, and the limit that is drawn with it."""

    label: str
    values: Sequence[float | None]
    limit: float


def carpet(
    stages: Mapping[str, np.ndarray],
    lines: Sequence[Line],
    censor: np.ndarray | None,
    names: Sequence[str],
    *,
    t_r: float,
) -> bytes:
    """Draw all networks over time, `[time, networks]` a stage, under motion and DVARS with their limits.

    Parameters
    ----------
    stages
        Stage → `[time, networks]` in standard deviations.
    lines
        What is drawn above, one a row.
    censor
        bool `[time]`, marked in red; None where nothing is.
    names
        Names of the networks.
    t_r
        Seconds between time points.
    """
    ratios = [1.0] * len(lines) + [3.0] * len(stages)
    figure = Figure(figsize=(8, 0.7 * sum(ratios)), layout="constrained")
    axes = figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios, squeeze=False)[:, 0]
    for line, above in zip(lines, axes, strict=False):
        values = np.array([np.nan if value is None else value for value in line.values])
        seconds = np.arange(len(values)) * t_r
        above.plot(seconds, values, lw=0.8)
        above.axhline(line.limit, color="C3", ls="--", lw=0.8)
        if censor is not None:
            above.plot(seconds[censor], np.zeros(int(censor.sum())), "|", color="C3")
        above.set(ylabel=line.label, ylim=(0, None))
    for (stage, bold), below in zip(stages.items(), axes[len(lines) :], strict=True):
        extent = (0, len(bold) * t_r, bold.shape[1], 0)
        below.imshow(
            bold.T.astype(np.float32), aspect="auto", cmap="gray", vmin=-LIMIT, vmax=LIMIT, extent=extent
        )
        below.set_ylabel(stage)
        _name(below.yaxis, names, offset=0.5)
    axes[-1].set_xlabel("seconds")
    return _png(figure)


def responses(means: np.ndarray, conditions: Sequence[str], names: Sequence[str]) -> bytes:
    """Draw the mean signal of each network under each condition, `[conditions, networks]`."""
    figure = Figure(figsize=(8, 1.2 + 0.22 * len(conditions)), layout="constrained")
    axes = figure.subplots()
    # Where all is 0 there is no range to draw.
    limit = float(np.abs(means).max()) or 1.0
    image = axes.imshow(means, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    axes.set_yticks(range(len(conditions)), conditions)
    _name(axes.xaxis, names)
    figure.colorbar(image, ax=axes, label="mean signal (SD)")
    return _png(figure)


def outline(mean: np.ndarray, labels: np.ndarray, affine: np.ndarray) -> bytes:
    """Draw the borders of labels on a mean image, both [x, y, z], on three planes through their middle.

    Parameters
    ----------
    mean, labels
        `[x, y, z]` on one grid.
    affine
        `[4, 4]` of that grid.
    """
    inside = np.argwhere(labels > 0)
    middle = np.median(inside, axis=0).astype(int) if len(inside) else np.array(labels.shape) // 2
    sides = np.linalg.norm(affine[:3, :3], axis=0)
    # Of a volume with a single slice two planes would be lines.
    planes = [axis for axis in (0, 1, 2) if min(np.delete(labels.shape, axis)) > 1]
    figure = Figure(figsize=(8, 3), layout="constrained")
    for axis, axes in zip(planes, figure.subplots(1, len(planes), squeeze=False)[0], strict=True):
        across, up = np.delete(sides, axis)
        shown, parcels = (np.take(volume, middle[axis], axis).T for volume in (mean, labels))
        # Not the maximum: a few bright voxels would darken all others.
        bright = np.percentile(mean[labels > 0], 99) if len(inside) else None
        axes.imshow(shown, cmap="gray", origin="lower", aspect=up / across, vmin=0, vmax=bright)
        rows, columns = np.nonzero(parcels[:, 1:] != parcels[:, :-1])
        borders = [((x + 0.5, y - 0.5), (x + 0.5, y + 0.5)) for y, x in zip(rows, columns, strict=True)]
        rows, columns = np.nonzero(parcels[1:] != parcels[:-1])
        borders += [((x - 0.5, y + 0.5), (x + 0.5, y + 0.5)) for y, x in zip(rows, columns, strict=True)]
        axes.add_collection(LineCollection(borders, colors="C1", linewidths=0.6))
        axes.set_axis_off()
    return _png(figure)


def _name(axis: Any, names: Sequence[str], *, offset: float = 0.0) -> None:
    """Mark blocks of networks of one kind by name, as in `7Networks_LH_Vis_1`; else some of the networks."""
    kinds = [re.sub(r"^\d+Networks_", "", name) for name in names]
    kinds = ["_".join(kind.split("_")[:2]) for kind in kinds]
    starts = [i for i, kind in enumerate(kinds) if i == 0 or kind != kinds[i - 1]]
    if len(starts) > MARKS:
        places = np.linspace(0, len(names) - 1, MARKS).astype(int)
        ticks = {float(place): names[place] for place in places}
    else:
        ends = [*starts[1:], len(names)]
        ticks = {(a + b - 1) / 2: kinds[a] for a, b in zip(starts, ends, strict=True)}
    axis.set_ticks([place + offset for place in ticks], [name[:24] for name in ticks.values()], fontsize=5)
    if axis.axis_name == "x":
        axis.set_tick_params(rotation=90)


def correlation(runs: Sequence[np.ndarray], names: Sequence[str]) -> bytes:
    """Draw the correlation between networks, averaged over runs `[time, networks]` through Fisher's z."""
    total = np.zeros((runs[0].shape[1],) * 2)
    for bold in runs:
        with np.errstate(invalid="ignore", divide="ignore"):
            # Constant networks have no correlation.
            matrix = np.nan_to_num(np.corrcoef(bold.astype(np.float64), rowvar=False)).reshape(total.shape)
        # arctanh of 1 is infinite.
        total += np.arctanh(np.clip(matrix, -0.9999, 0.9999))
    mean = np.tanh(total / len(runs))
    # Not what the diagonal was clipped to.
    np.fill_diagonal(mean, 1.0)
    # "constrained" would make the colour bar taller than the square matrix
    figure = Figure(figsize=(4.4, 3.8), layout="compressed")
    axes = figure.subplots()
    image = axes.imshow(mean, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    for axis in (axes.xaxis, axes.yaxis):
        _name(axis, names)
    figure.colorbar(image, ax=axes, label="correlation")
    return _png(figure)


def _png(figure: Any) -> bytes:
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    with matplotlib.rc_context({"font.size": 9.0}):
        figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return buffer.getvalue()
