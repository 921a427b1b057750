"""Pictures of the quality report, as PNG bytes: motion, tSNR, carpet plots, correlation matrix."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from brainflow.optional import requires

with requires("the quality report", "report"):
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

DOTS_PER_INCH = 200
"""The page shows two pixels of a picture as one."""
LIMIT = 2.0
"""Standard deviations at which a carpet plot saturates."""


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


def carpet(
    bold: np.ndarray, displacement: Sequence[float | None] | None, censor: np.ndarray | None, *, t_r: float
) -> bytes:
    """Draw all networks over time, `bold [time, networks]`, under the framewise displacement in mm."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 3))
    seconds = np.arange(len(bold)) * t_r
    if displacement is not None:
        above.plot(seconds, [np.nan if value is None else value for value in displacement], lw=0.8)
    if censor is not None:
        above.plot(seconds[censor], np.zeros(int(censor.sum())), "|", color="C3")
    above.set(ylabel="FD (mm)", ylim=(0, None))
    extent = (0, len(bold) * t_r, bold.shape[1], 0)
    below.imshow(
        bold.T.astype(np.float32), aspect="auto", cmap="gray", vmin=-LIMIT, vmax=LIMIT, extent=extent
    )
    below.set(xlabel="seconds", ylabel="network")
    return _png(figure)


def correlation(runs: Sequence[np.ndarray]) -> bytes:
    """Draw the correlation between networks, averaged over runs `[time, networks]` through Fisher's z."""
    total = np.zeros((runs[0].shape[1],) * 2)
    for bold in runs:
        with np.errstate(invalid="ignore", divide="ignore"):
            matrix = np.nan_to_num(np.corrcoef(bold.astype(np.float64), rowvar=False)).reshape(total.shape)
        total += np.arctanh(np.clip(matrix, -0.9999, 0.9999))
    mean = np.tanh(total / len(runs))
    np.fill_diagonal(mean, 1.0)
    figure = Figure(figsize=(4.4, 3.8), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(mean, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    axes.set(xlabel="network", ylabel="network")
    figure.colorbar(image, ax=axes, label="correlation")
    return _png(figure)


def _png(figure: Any) -> bytes:
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    with matplotlib.rc_context({"font.size": 9.0}):
        figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return buffer.getvalue()
