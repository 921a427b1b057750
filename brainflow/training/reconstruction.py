"""A picture of masked BOLD beside what the model makes of it, drawn at each validation."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from brainflow.files import beside, own_folder

from .validation import Example

SHOWN = 4  # networks drawn as curves
_log = logging.getLogger(__name__)


def draw(path: Path, example: Example, step: int) -> bool:
    """Draw one window: all networks as images, a few as curves.

    Returns
    -------
    bool
        False where matplotlib (extra `report`) is not installed: a run does not end for want of a picture.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        _log.info("no reconstruction plots: pip install 'brainflow-fmri[report]'")
        return False
    seconds, bold, prediction = example.seconds, example.bold, example.prediction
    figure = Figure(figsize=(10, 6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"step {step}: a held-out window, masked values and their reconstruction")
    grid = figure.add_gridspec(SHOWN, 2, width_ratios=(1, 1.4))
    limit = float(np.nanpercentile(np.abs(bold), 99)) or 1.0
    half = SHOWN // 2
    for i, (image, title) in enumerate(((bold, "BOLD"), (prediction, "reconstruction (white: not masked)"))):
        axes = figure.add_subplot(grid[i * half : (i + 1) * half, 0])
        axes.imshow(image.T, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        axes.set(title=title, xlabel="time points", ylabel="networks")
    # The networks with the most masked values, spread over the store's order.
    masked = np.isfinite(prediction).sum(0)
    best = np.flatnonzero(masked == masked.max())
    for i, network in enumerate(best[np.linspace(0, len(best) - 1, SHOWN).round().astype(int)]):
        axes = figure.add_subplot(grid[i, 1])
        axes.plot(seconds, bold[:, network], color="0.4", lw=1, label="BOLD")
        axes.plot(seconds, prediction[:, network], "o-", color="C3", ms=3, lw=1, label="reconstruction")
        axes.set_ylabel(f"network {network}", fontsize=8)
        if i == 0:
            axes.legend(loc="upper right", fontsize=7)
        if i == SHOWN - 1:
            axes.set_xlabel("seconds")
    own_folder(path.parent)
    with beside(path) as partial:
        figure.savefig(partial, dpi=80, format="png")
    return True
