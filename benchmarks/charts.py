"""The report's pictures, as PNG bytes: frameworks, roofline, bandwidth, loaders, scaling."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from brainflow.report.figures import ACCENT, DOTS_PER_INCH, FAINT, INK, MUTED, SECOND, STYLE, THIRD

from .history import Rows
from .show import number

COLORS = (ACCENT, SECOND, THIRD, INK, MUTED)


def framework_bars(rows: Rows) -> bytes | None:
    """Draw predicted time points a second of every framework beside the baselines' own."""
    speeds: dict[str, dict[str, float]] = {}
    for row in _select(rows, "frameworks", "targets_per_s"):
        if row["ratio"] is not None:
            case = speeds.setdefault(row["case"], {"brainflow": row["value"]})
            case[row["baseline"]] = row["value"] / row["ratio"]
    if not speeds:
        return None
    names = list(dict.fromkeys(name for case in speeds.values() for name in case))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        height = 0.8 / len(names)
        for i, name in enumerate(names):
            places = [(k, case[name]) for k, case in enumerate(speeds.values()) if name in case]
            y = [k + (i - (len(names) - 1) / 2) * height for k, _ in places]
            bars = axes.barh(y, [v for _, v in places], height * 0.9, color=COLORS[i], label=name)
            axes.bar_label(bars, [number(v) for _, v in places], padding=3, fontsize=8.5, color=INK)
        axes.set_yticks(range(len(speeds)), list(speeds))
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel("predicted time points a second")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=len(names))

    return _picture(7.2, 1.6 + 0.26 * len(names) * len(speeds), draw)


def loader_bars(rows: Rows) -> bytes | None:
    """Draw windows a second of our ways and of the others, on a logarithmic axis."""
    found = _select(rows, "loader", "windows_per_s")
    ours = {r["case"]: r["value"] for r in found if not r["case"].endswith("_cold")}
    theirs: dict[str, float] = {}
    for row in found:
        if row["case"] in ours and row["ratio"]:
            theirs.setdefault(row["baseline"], row["value"] / row["ratio"])
    if not theirs:
        return None
    bars = sorted({**ours, **theirs}.items(), key=lambda item: -item[1])

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        colors = [ACCENT if name in ours else MUTED for name, _ in bars]
        drawn = axes.barh([name for name, _ in bars], [value for _, value in bars], 0.7, color=colors)
        axes.bar_label(drawn, [number(value) for _, value in bars], padding=4, fontsize=8.5, color=INK)
        _logarithmic(axes, "x")
        axes.invert_yaxis()
        axes.set_xlim(right=3 * bars[0][1])
        axes.set_xlabel("windows a second (logarithmic); blue: brainflow")

    return _picture(7.2, 1.2 + 0.34 * len(bars), draw)


def roofline(rows: Rows) -> bytes | None:
    """Draw the kernels that multiply matrices under the machine's own roof, on logarithmic axes."""
    rates = {r["case"]: r["value"] for r in _select(rows, "kernels", "flops_per_s")}
    moved = {r["case"]: r["value"] for r in _select(rows, "kernels", "bytes_per_s")}
    points = {case: (rate / moved[case], rate) for case, rate in rates.items() if moved.get(case)}
    copies = {r["case"]: r["value"] for r in _select(rows, "ceilings", "bytes_per_s")}
    products = {r["case"]: r["value"] for r in _select(rows, "ceilings", "flops_per_s")}
    if not (points and copies and products):
        return None
    copy = copies.get("device_copy", copies.get("memcpy", 0.0))
    reach = np.geomspace(0.3, 2 * max(*(x for x, _ in points.values()), *products.values()), 200)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for (name, top), color in zip(products.items(), (INK, MUTED, FAINT), strict=False):
            axes.plot(reach, np.minimum(reach * copy, top), color=color, label=f"roof, {name}")
        for i, (case, point) in enumerate(points.items()):
            axes.plot(*point, "o", color=COLORS[i % 3], markersize=7)
            axes.annotate(case, point, xytext=(-6, -12), textcoords="offset points", ha="right", fontsize=8.5)
        _logarithmic(axes, "x")
        _logarithmic(axes, "y")
        axes.set(xlabel="operations a byte that must move", ylabel="GFLOP/s")
        axes.grid(color=FAINT, linewidth=0.8)
        axes.legend(loc="lower right")

    return _picture(7.2, 4.2, draw)


def bandwidth_bars(rows: Rows) -> bytes | None:
    """Draw each kernel's share of the measured copy bandwidth."""
    found = _select(rows, "kernels", "bytes_per_s")
    shares = {r["case"]: 100 * r["floor_share"] for r in found if r["floor_share"] is not None}
    if not shares:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        bars = axes.barh(list(shares), list(shares.values()), 0.7, color=ACCENT)
        axes.bar_label(bars, [f"{v:.0f} %" for v in shares.values()], padding=3, fontsize=8.5, color=INK)
        axes.axvline(100, color=INK, linewidth=1)
        axes.invert_yaxis()
        axes.margins(x=0.1)
        axes.set_xlabel("% of the bytes a second that a large copy moves")

    return _picture(7.2, 1.2 + 0.32 * len(shares), draw)


def scaling_lines(rows: Rows) -> bytes | None:
    """Draw tokens a second over threads, ranks, batch, length and networks."""
    axes_of: dict[str, list[tuple[int, dict[str, Any]]]] = defaultdict(list)
    for row in _select(rows, "scaling", "tokens_per_s"):
        axis, _, amount = row["case"].partition("/")
        axes_of[axis].append((int(amount), row))
    if not axes_of:
        return None

    def draw(figure: Figure) -> None:
        panels = np.atleast_1d(figure.subplots(1, len(axes_of), sharey=True))
        for panel, (axis, points) in zip(panels, axes_of.items(), strict=True):
            points.sort(key=lambda point: point[0])
            amounts = [amount for amount, _ in points]
            panel.plot(amounts, [row["value"] for _, row in points], "o-", color=ACCENT)
            panel.set_xscale("log", base=2)
            panel.set_xticks(amounts, [str(amount) for amount in amounts])
            panel.minorticks_off()
            panel.set_xlabel(axis)
            panel.grid(axis="y", color=FAINT, linewidth=0.8)
        panels[0].set_ylim(bottom=0)
        panels[0].set_ylabel("tokens a second")

    return _picture(1.2 + 2.0 * len(axes_of), 3.2, draw)


CHARTS: Mapping[str, tuple[Callable[[Rows], bytes | None], str, str]] = {
    "frameworks": (
        framework_bars,
        "Throughput by framework",
        "One training step (forward, backward, AdamW) of the same sizes on the same windows. The baseline is "
        "the recipe of 2022, made again: padded batches through Hugging Face models. A dense CSM step "
        "predicts every time point, the recipe's step one a window.",
    ),
    "loader": (
        loader_bars,
        "Loaders",
        "The same random windows of 10–49 time points, 64 a batch, read by one process from warm pages, "
        "in every way that was installed.",
    ),
    "roofline": (
        roofline,
        "Roofline",
        "What a kernel reaches, against what this machine's own copies and matrix products allow.",
    ),
    "bandwidth": (
        bandwidth_bars,
        "Bandwidth of the kernels",
        "Bytes that must move ÷ time, forward and backward where there is one. Data that stay in a cache can "
        "go beyond 100 %.",
    ),
    "scaling": (
        scaling_lines,
        "Scaling",
        "Tokens a second of a dense CSM training step as one thing grows. A flat line over batch, length or "
        "networks means that the cost grows as the work does; over threads and ranks, no gain.",
    ),
}
"""Name → (what draws it, or returns None without its rows; title; caption)."""


def _logarithmic(axes: Axes, which: Literal["x", "y"]) -> None:
    """Make an axis logarithmic, its ticks plain numbers: the style turns math text, hence powers, off."""
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axis.set_minor_formatter(NullFormatter())


def _select(rows: Rows, suite: str, metric: str) -> Sequence[dict[str, Any]]:
    return [row for row in rows if row["suite"] == suite and row["metric"] == metric and row["value"] > 0]


def _picture(width: float, height: float, draw: Callable[[Figure], None]) -> bytes:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        FigureCanvasAgg(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return buffer.getvalue()
