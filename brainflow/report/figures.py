"""Pictures of a run, as PNG bytes: loss curve, masked reconstruction, decoders, confusion matrix, slice map.

Drawn with matplotlib's Agg canvas and without pyplot, so nothing global changes and no display is needed.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from brainflow.optional import requires

with requires("a report's pictures", "report"):
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

INK, MUTED, FAINT = "#1c2430", "#667085", "#e4e7ec"
ACCENT, SECOND, THIRD = "#2f6fdf", "#c2570c", "#5f7a3a"
STYLE: dict[str, Any] = {
    # Comes with matplotlib: letters are the same on every machine.
    "font.family": "DejaVu Sans",
    "font.size": 10.0,
    # Names may hold a $, which would begin a formula.
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
}
BLUES = LinearSegmentedColormap.from_list("blues", ["#f6f8fb", "#9dbcf0", ACCENT, "#123a86"])
DASHES = (0, (5, 3))
MOST_NAMES = 40
"""Subjects or runs that a figure names."""
LABEL_BESIDE, LONGEST_LABEL = 18, 80
"""Characters of a label of a legend beside a figure, and of one beneath it."""
# The page shows two pixels as one, so that text is sharp on dense screens.
DOTS_PER_INCH = 160


def loss_curve(
    train: tuple[Sequence[float], Sequence[float]],
    validation: tuple[Sequence[float], Sequence[float]],
    references: Mapping[str, float],
    *,
    unit: str = "L1 error (standard deviations)",
) -> bytes:
    """Draw how training and validation go over steps, with what needs no model as lines.

    Parameters
    ----------
    train, validation
        (steps, errors or explained variances); nothing is drawn of an empty training curve.
    references
        Name → the same of a prediction without a model.
    unit
        Label of the vertical axis.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(7.2, 3.9)
        if len(train[0]):
            axes.plot(*train, color=ACCENT, alpha=0.35, linewidth=1.2, label="training")
        axes.plot(*validation, color=ACCENT, linewidth=2.0, marker="o", markersize=4, label="held-out runs")
        for (name, value), color in zip(references.items(), (SECOND, THIRD, MUTED), strict=False):
            axes.axhline(value, color=color, linewidth=1.4, linestyle=DASHES, label=f"{name}: {value:.3f}")
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(unit)
        axes.grid(axis="y", color=FAINT, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.margins(x=0.02)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
        return _png(figure)


def reconstruction(truth: NDArray, prediction: NDArray, *, t_r: float, limit: float = 2.5) -> bytes:
    """Draw a window, its masked reconstruction and the error as three carpets.

    Networks are ordered by their weight in the window's first principal component, the same in all panels.

    Parameters
    ----------
    truth, prediction
        `[time, networks]`, z-scored; the prediction is NaN, and left blank, where nothing was masked.
    t_r
        Seconds between time points.
    limit
        Colours end at ± this many standard deviations.
    """
    centred = truth - truth.mean(axis=0)
    order = np.argsort(np.linalg.svd(centred, full_matrices=False)[2][0])
    panels = {"recorded": truth, "predicted": prediction, "error": truth - prediction}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.9), layout="constrained")
        row = figure.subplots(1, 3, sharey=True)
        for axes, (title, values) in zip(row, panels.items(), strict=True):
            image = axes.imshow(
                values[:, order].T,
                aspect="auto",
                cmap="RdBu_r",
                vmin=-limit,
                vmax=limit,
                interpolation="nearest",
                extent=(0, len(values) * t_r, values.shape[1], 0),
            )
            axes.set_title(title)
            axes.set_xlabel("seconds")
        row[0].set_ylabel(f"{truth.shape[1]} networks")
        figure.colorbar(image, ax=row, label="standard deviations", shrink=0.9, aspect=28)
        return _png(figure)


def decoders(
    names: Sequence[str],
    values: Sequence[float],
    intervals: Sequence[tuple[float, float]],
    *,
    chance: float,
    highlight: Sequence[bool] | None = None,
    unit: str = "accuracy",
) -> bytes:
    """Draw accuracies with their intervals, one decoder a line, beside chance.

    Another score is named by `unit`; it is at most 1, and what lies below -1 is cut off.

    Parameters
    ----------
    names, values, intervals
        One for each decoder; an interval as (low, high).
    chance
        Where the line of chance is.
    highlight
        Which decoders stand out.
    unit
        Label of the axis.
    """
    marks = highlight or [False] * len(names)
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(7.2, 1.3 + 0.42 * len(names))
        for line, (value, (low, high), ours) in enumerate(zip(values, intervals, marks, strict=True)):
            color = ACCENT if ours else MUTED
            axes.plot([low, high], [line, line], color=color, linewidth=2.2, solid_capstyle="round")
            axes.plot(value, line, "o", color=color, markersize=8)
            axes.text(value, line - 0.2, f"{value:.2f}", ha="center", va="bottom", fontsize=9, clip_on=True)
        axes.axvline(chance, color=SECOND, linewidth=1.4, linestyle=DASHES)
        axes.text(chance + 0.008, -0.62, f"chance {chance:.3f}", color=SECOND, fontsize=9, va="center")
        axes.set_yticks(range(len(names)), list(names))
        # Downwards, as in the table, with room above the first for the word "chance".
        axes.set_ylim(len(names) - 0.5, -0.9)
        axes.set_xlim(max(-1.0, min(0.0, *(low for low, _ in intervals))), 1)
        axes.set_xlabel(f"{unit}, 95 % interval")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", color=FAINT, linewidth=0.8)
        axes.set_axisbelow(True)
        return _png(figure)


def learning_curve(
    curves: Mapping[str, Sequence[tuple[float, float, float, float]]], *, unit: str, chance: float
) -> bytes:
    """Draw accuracy over the number of training subjects (or runs), a line a decoder.

    Parameters
    ----------
    curves
        Decoder → points (training groups, accuracy, low, high); NaN where there is no interval. The first is
        drawn strong and with its intervals, of the others those that are best over all points have colours.
    unit
        What is counted, in the plural.
    chance
        Accuracy of always naming the most frequent class.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(7.2, 4.4)
        first, *others = curves
        others.sort(key=lambda name: -float(np.mean([point[1] for point in curves[name]])))
        colors = dict(zip([first, *others], (ACCENT, SECOND, THIRD, "#8a4fbf", "#c0392b", INK), strict=False))
        rest = [name for name in others if name not in colors]
        # What is drawn last is on top: the first decoder.
        for name in [*rest, *reversed(colors)]:
            count, value, low, high = np.array(sorted(curves[name]), dtype=float).T
            label = name if name in colors else f"{len(rest)} others" if name == rest[0] else None
            color, width = colors.get(name, "#c3c9d3"), 2.2 if name == first else 1.2
            axes.plot(count, value, "o-", color=color, linewidth=width, markersize=4, label=label)
            if name == first:
                axes.fill_between(count, low, high, color=color, alpha=0.18, linewidth=0)
        axes.axhline(chance, color=SECOND, linewidth=1.4, linestyle=DASHES, label=f"chance {chance:.3f}")
        if max(max(point[0] for point in points) for points in curves.values()) > 1:
            ticks = sorted({point[0] for points in curves.values() for point in points})
            # From one to one a logarithm has no range, hence the condition.
            axes.set_xscale("log")
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            # A log axis has ticks of its own between ours.
            axes.minorticks_off()
        axes.set_ylim(0, 1.02)
        axes.set_xlabel(f"training {unit}")
        axes.set_ylabel("accuracy, 95 % interval")
        axes.grid(axis="y", color=FAINT, linewidth=0.8)
        lines, labels = axes.get_legend_handles_labels()
        # They were drawn from the last to the first.
        figure.legend(lines[::-1], labels[::-1], loc="outside lower left", ncols=2, fontsize=8.5)
        return _png(figure)


def time_course(values: NDArray, names: Sequence[str]) -> bytes:
    """Draw `[classes, time]` over the time points of a window, a line a class."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(7.2, 3.6)
        colors = matplotlib.colormaps["tab20"]
        for number, (name, row) in enumerate(zip(names, values, strict=True)):
            axes.plot(np.arange(len(row)), row, "o-", markersize=3, color=colors(number % 20), label=name)
        axes.set_xlabel("time point of the window")
        axes.set_ylabel("sum of |attribution|")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color=FAINT, linewidth=0.8)
        if len(names) <= 30:
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
        return _png(figure)


def fit_curve(
    training: tuple[Sequence[float], Sequence[float]], checks: tuple[Sequence[float], Sequence[float]]
) -> bytes:
    """Draw the cross-entropy of fits, (steps, losses), and where there are validation windows, of these."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(7.2, 3.4)
        axes.plot(*training, color=ACCENT, alpha=0.6, linewidth=1.4, label="training")
        if len(checks[0]):
            axes.plot(*checks, color=SECOND, linewidth=2.0, marker="o", markersize=4, label="validation")
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("cross-entropy")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color=FAINT, linewidth=0.8)
        axes.legend()
        return _png(figure)


def confusion(matrix: NDArray, classes: Sequence[str]) -> bytes:
    """Draw a confusion matrix `[classes, classes]`, rows true, as shares of each row, with the counts."""
    # A class may have no window.
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = 2.2 + 0.44 * len(classes)
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(side + 0.6, side, layout="compressed")  # a colour bar as tall as the square
        image = axes.imshow(shares, cmap=BLUES, vmin=0, vmax=1)
        if len(classes) <= 30:
            for (row, column), count in np.ndenumerate(matrix):
                shade = "white" if shares[row, column] > 0.55 else INK
                text = str(int(count)) if count else ""
                axes.text(column, row, text, ha="center", va="center", color=shade, fontsize=9)
        axes.set_xticks(range(len(classes)), list(classes), rotation=40, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(classes)), list(classes))
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("decoded")
        axes.set_ylabel("shown")
        figure.colorbar(image, ax=axes, label="share of the row")
        return _png(figure)


def group_dots(
    per_group: Mapping[str, float], beside: Mapping[str, float], *, chance: float, kind: str
) -> bytes:
    """Draw one dot a subject (or run), sorted by accuracy, and where it is known that of ridge beside it.

    Up to `MOST_NAMES` are named.

    Parameters
    ----------
    per_group
        Group → accuracy.
    beside
        Group → accuracy of ridge; empty where that is not known.
    chance
        Where the line of chance is.
    kind
        What a group is, in the singular.
    """
    names = sorted(per_group, key=lambda name: per_group[name])
    place = np.arange(1, len(names) + 1)
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(7.2, 3.4)
        if beside:
            ridge = [beside.get(name, np.nan) for name in names]
            axes.plot(place, ridge, "o", color=MUTED, markersize=5, markerfacecolor="none", label="ridge")
        axes.plot(
            place, [per_group[name] for name in names], "o", color=ACCENT, markersize=6, label="decoder"
        )
        if len(names) <= MOST_NAMES:
            axes.set_xticks(place, names, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
        axes.axhline(chance, color=SECOND, linewidth=1.4, linestyle=DASHES, label=f"chance {chance:.3f}")
        axes.set_ylim(0, 1.04)
        if len(names) > MOST_NAMES:
            axes.set_xlabel(f"{kind}s, sorted")
        axes.set_ylabel("accuracy")
        axes.grid(axis="y", color=FAINT, linewidth=0.8)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
        return _png(figure)


def predictions(truth: NDArray, said: NDArray, *, name: str) -> bytes:
    """Draw predicted against true values of people, `[people]` each, and the line where they are equal."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(4.8, 4.4)
        span = [min(truth.min(), said.min()), max(truth.max(), said.max())]
        axes.plot(span, span, color=MUTED, linewidth=1.2, linestyle=DASHES)
        axes.plot(truth, said, "o", color=ACCENT, markersize=5, alpha=0.7)
        axes.set_xlabel(name)
        axes.set_ylabel(f"{name}, predicted")
        return _png(figure)


def reliability(confidence: Sequence[float], accuracy: Sequence[float], windows: Sequence[int]) -> bytes:
    """Draw accuracy against confidence, a dot a bin; larger dots hold more windows.

    Parameters
    ----------
    confidence, accuracy, windows
        Means of each bin, and its number of windows.
    """
    sizes = 30 + 200 * np.asarray(windows) / max(windows)
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(4.4, 4.0)
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1.2, linestyle=DASHES)
        axes.scatter(confidence, accuracy, s=sizes, color=ACCENT, alpha=0.8, clip_on=False)
        axes.set_xlim(0, 1)
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("confidence")
        axes.set_ylabel("accuracy")
        return _png(figure)


def slice_map(
    values: NDArray,
    mask: NDArray[np.bool_],
    anatomy: NDArray,
    *,
    voxel_mm: tuple[float, float],
    right_first: bool,
    label: str,
    limit: float | None = None,
) -> bytes:
    """Draw one value per network on the slice that the networks are voxels of.

    Parameters
    ----------
    values
        `[networks]`, in C order of the mask's voxels.
    mask, anatomy
        `[x, y]`: voxels that are networks; backdrop.
    voxel_mm
        Edge lengths of a voxel along x and y.
    right_first
        True where x counts from the participant's right; the picture shows left on the left.
    label
        What the values are.
    limit
        Colours end at ± this value; the 99th percentile of the absolute values if None.

    Raises
    ------
    ValueError
        If there is not one value a voxel.
    """
    if values.shape != (int(mask.sum()),):
        raise ValueError(
            f"values: got shape {values.shape}, expected one for each of {int(mask.sum())} voxels"
        )
    painted = np.full(mask.shape, np.nan)
    painted[mask] = values
    backdrop = np.where(mask, anatomy, np.nan)
    if right_first:
        painted, backdrop = painted[::-1], backdrop[::-1]
    extent = (0.0, mask.shape[0] * voxel_mm[0], 0.0, mask.shape[1] * voxel_mm[1])
    top = limit or max(float(np.percentile(np.abs(values), 99)), 1e-6)
    looks: list[tuple[str, NDArray, dict[str, Any]]] = [
        ("mean image", backdrop, {"cmap": "gray"}),
        (label, painted, {"cmap": "RdBu_r", "vmin": -top, "vmax": top}),
    ]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.1), layout="constrained")
        row = figure.subplots(1, 2)
        for axes, (title, picture, look) in zip(row, looks, strict=True):
            # imshow takes rows for y and begins at the top; here x comes first and y goes up.
            image = axes.imshow(picture.T, origin="lower", extent=extent, interpolation="nearest", **look)
            axes.set_title(title)
            for x, side in ((0.01, "L"), (0.97, "R")):
                axes.text(x, 0.02, side, transform=axes.transAxes, color=MUTED, weight="bold")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
            axes.set_xlabel("back of the head", color=MUTED)
        figure.colorbar(image, ax=row[1], shrink=0.9, aspect=20)
        return _png(figure)


def scatter(points: NDArray, groups: Sequence[str], names: tuple[str, str]) -> bytes:
    """Draw points `[n, 2]` in the plane, in a colour for each of the most frequent groups.

    Parameters
    ----------
    points, groups
        Places, and the group of each point; of more than seven groups the rarer ones are grey.
    names
        What the axes are.
    """
    found, counts = np.unique(groups, return_counts=True)
    # Stable: of equally frequent groups those that come first by name.
    frequent = found[np.argsort(-counts, kind="stable")][:7]
    labels = [_shortened(str(group), LONGEST_LABEL) or "–" for group in frequent]
    beneath = max(map(len, labels)) > LABEL_BESIDE
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(6.4, 4.6 + 0.22 * len(labels) * beneath)
        rest = ~np.isin(groups, frequent)
        if rest.any():
            axes.scatter(*points[rest].T, s=12, color=FAINT, label=f"{len(found) - len(frequent)} others")
        for i, (group, label) in enumerate(zip(frequent, labels, strict=True)):
            chosen = np.asarray(groups) == group
            axes.scatter(*points[chosen].T, s=16, color=f"C{i}", alpha=0.7, label=label)
        axes.set_xlabel(names[0])
        axes.set_ylabel(names[1])
        if len(found) > 1:
            place = "outside lower left" if beneath else "outside right upper"
            figure.legend(loc=place, markerscale=1.5, fontsize=8.5 if beneath else None)
        return _png(figure)


def _shortened(text: str, most: int) -> str:
    """Return a text of at most so many characters, without its middle: names of runs differ at their ends."""
    if len(text) <= most:
        return text
    return f"{text[: (most - 1) // 2]}…{text[-(most // 2) :]}"


def _figure(
    width: float, height: float, *, layout: Literal["constrained", "compressed"] = "constrained"
) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout=layout)
    return figure, figure.subplots()


def _png(figure: Figure) -> bytes:
    """Render on the Agg canvas; without a date, so that equal pictures are equal bytes."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return buffer.getvalue()
