"""Draw the pictures of the site into `docs/figures/`: `python docs/figures.py`.

The masks are drawn by the package's own masks, the accuracies are the rows of a benchmark, `worth.json`.
"""

import json
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from brainflow.kernels import MaskSpec

FIGURES = Path(__file__).parent / "figures"
NETWORKS, LENGTHS = 6, (14, 9)
SEEN, HIDDEN, TARGET, GONE = "#cfdbe3", "#30353a", "#d9694f", "#ffffff"
RED, BLUE, GREY = "#9a3b26", "#2b6c8f", "#666666"


def main() -> None:
    """Draw all of them."""
    FIGURES.mkdir(exist_ok=True)
    plt.rcParams |= {
        "svg.hashsalt": "brainflow",
        "font.size": 9,
        "svg.fonttype": "none",
        "font.family": "sans-serif",
    }
    drawings: dict[str, Callable[[], None]] = {
        "worth": worth, "csm": csm, "seq-bert": seq_bert, "net-bert": net_bert, "autoencoder": autoencoder,
        "packing": packing, "commit": commit,
    }  # fmt: skip
    for name, draw in drawings.items():
        draw()
        plt.savefig(FIGURES / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
        plt.close("all")


def worth() -> None:
    """Accuracy against labelled people, with the best decoder without a model at each number."""
    record = json.loads((FIGURES / "worth.json").read_text())
    people, ours, gain = (
        np.array(record[k]) for k in ("labelled_people", "pretrained", "pretrained_minus_best")
    )
    ends = 100 * np.array([record["low"], record["high"]]).T
    _, axes = plt.subplots(figsize=(6.4, 3.3), layout="constrained")
    axes.fill_between(people, ours - gain, ours, color=RED, alpha=0.12, lw=0)
    axes.plot(people, ours, "o-", color=RED, label="pretrained without labels, adapted by default")
    axes.plot(people, ours - gain, "s--", color=BLUE, label="best of 13 decoders without a model")
    for x, y, more, (low, high) in zip(people, ours, gain, ends, strict=True):
        said = f"+{100 * more:.0f}\n[{low:.0f}, {high:.0f}]"
        axes.text(x, y + 0.03, said, color=RED, ha="center", fontsize=8)
    axes.axhline(record["chance"], color=GREY, lw=0.8)
    axes.text(people[-1], record["chance"] + 0.015, "chance", color=GREY, ha="right")
    axes.set(xscale="log", xticks=people, xticklabels=people, ylim=(0, 1.17), title=record["title"])
    axes.set(xlabel="labelled people", ylabel="accuracy, people never seen")
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 0.14))


def grid(axes: Axes, colours: np.ndarray, title: str) -> None:
    """Draw windows beside each other, a column a time point, a row a network."""
    x = 0.0
    for window, length in enumerate(LENGTHS):
        first = sum(LENGTHS[:window])
        for t in range(length):
            for n in range(NETWORKS):
                square = Rectangle((x + t, n), 0.92, 0.92, fc=colours[first + t, n], ec="#b9c3ca", lw=0.3)
                axes.add_patch(square)
        axes.text(x, -1.5, f"window {window + 1}", color=GREY)
        x += length + 1
    axes.set(xlim=(-0.5, x), ylim=(-1.8, NETWORKS + 0.2), aspect="equal")
    axes.set_title(title, loc="left")
    axes.axis("off")


def masked(mask: MaskSpec) -> np.ndarray:
    """Return which entries of the two windows a mask of the package hides, bool [tokens, networks]."""
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    return mask.dense(bounds, NETWORKS).numpy()


def coloured(hidden: np.ndarray, colour: str) -> np.ndarray:
    """Return a colour for each entry."""
    return np.where(hidden, colour, SEEN).astype(object)


def panels(rows: int) -> np.ndarray:
    """Return axes under each other."""
    _, axes = plt.subplots(rows, 1, figsize=(6.2, 2.35 * rows), layout="constrained", squeeze=False)
    return axes[:, 0]


def csm() -> None:
    """`single` beside `next`."""
    place = np.concatenate([np.arange(n) for n in LENGTHS])[:, None]
    single = masked(MaskSpec.position(seed=3))
    colours = coloured(single, TARGET)
    for window, length in enumerate(LENGTHS):
        rows = slice(sum(LENGTHS[:window]), sum(LENGTHS[:window]) + length)
        at = int(np.flatnonzero(single[rows].any(axis=1))[0])
        colours[rows][at + 1 :] = GONE
    everywhere = np.broadcast_to(place > 0, single.shape)
    first, second = panels(2)
    grid(first, colours, "single (2022): one time point is predicted, what follows is cut off")
    grid(
        second,
        coloured(everywhere, TARGET),
        "dense, next: every time point from those before it, in one pass",
    )


def seq_bert() -> None:
    """Whole time points."""
    (axes,) = panels(1)
    grid(
        axes,
        coloured(masked(MaskSpec.time_points(0.25, seed=2)), TARGET),
        "Seq-BERT: time points, from both sides",
    )


def net_bert() -> None:
    """Whole networks of a window."""
    (axes,) = panels(1)
    grid(
        axes,
        coloured(masked(MaskSpec.networks(0.25, seed=6)), TARGET),
        "Net-BERT: networks, from the other networks",
    )


def autoencoder() -> None:
    """All of a window, from one vector."""
    (axes,) = panels(1)
    every = np.ones((sum(LENGTHS), NETWORKS), bool)
    grid(axes, coloured(every, TARGET), "autoencoder: all of a window, from one vector of it")


def packing() -> None:
    """Draw windows padded and packed, to scale."""
    lengths = (14, 9, 20, 6)
    colours = ("#9dbcd0", "#e3a493", "#b6c99a", "#d5c183")
    _, (above, below) = plt.subplots(2, 1, figsize=(7, 3), height_ratios=(4.4, 1.6), layout="constrained")
    for i, (length, colour) in enumerate(zip(lengths, colours, strict=True)):
        above.add_patch(Rectangle((0, -i), length, 0.8, fc=colour))
        above.add_patch(
            Rectangle((length, -i), 20 - length, 0.8, fc="#f4f4f4", ec="#cccccc", hatch="///", lw=0.5)
        )
        start = sum(lengths[:i])
        below.add_patch(Rectangle((start, 0), length, 0.8, fc=colour))
        below.text(start, -0.55, start, ha="center", color=GREY)
    below.text(sum(lengths), -0.55, sum(lengths), ha="center", color=GREY)
    below.text(-0.5, -1.2, "cu_seqlens (above), int32 [windows + 1]", color=GREY)
    above.set(xlim=(-1, 50), ylim=(-3.3, 1), title="padded: [windows, longest, networks], 39 % of it nothing")
    below.set(xlim=(-1, 50), ylim=(-1.4, 1), title="packed: bold [tokens, networks]")
    for axes in (above, below):
        axes.axis("off")
        axes.title.set_ha("left")
        axes.title.set_x(0.02)


def commit() -> None:
    """Files of a commit in the order in which they are written."""
    _, axes = plt.subplots(figsize=(7, 1.9), layout="constrained")
    steps = (
        "new shards\nbold/c/7/0",
        "new index\nindex/g00000008/",
        "shapes\nbold/zarr.json",
        "root's zarr.json\nrenamed",
    )
    for i, text in enumerate(steps):
        last = i == len(steps) - 1
        axes.add_patch(Rectangle((i * 2.6, 0), 2.2, 1, fc=TARGET if last else SEEN, ec="none"))
        axes.text(i * 2.6 + 1.1, 0.5, text, ha="center", va="center", color="white" if last else HIDDEN)
        if not last:
            axes.annotate(
                "",
                (i * 2.6 + 2.58, 0.5),
                (i * 2.6 + 2.22, 0.5),
                arrowprops={"arrowstyle": "->", "color": GREY},
            )
    axes.annotate(
        "", (7.75, -0.25), (0, -0.25), arrowprops={"arrowstyle": "|-|", "color": GREY, "mutation_scale": 3}
    )
    axes.text(3.9, -0.7, "stopped anywhere here: the store is what it was", ha="center", color=GREY)
    axes.text(8.9, -0.7, "the commit", ha="center", color=RED)
    axes.set(xlim=(-0.1, 10.2), ylim=(-0.9, 1.1))
    axes.axis("off")


if __name__ == "__main__":
    main()
