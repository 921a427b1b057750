"""The example data: NIfTI images and a label for every volume → runs `[time, networks]` and labelled blocks.

One participant of Haxby et al. 2001 (Science 293:2425), 12 runs of 121 volumes at 2.5 s, the back half of
one axial slice; every voxel in the brain mask is one network. Licence and credit: `demo_data/haxby2001`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import as_file, files
from itertools import groupby

import numpy as np

from brainflow.optional import requires
from brainflow.storage import Segment, StoreWriter

with requires("the demo", "report"):
    import nibabel
    from nilearn import signal

T_R = 2.5
"""Seconds between volumes."""
REST = "rest"
TARGET = "condition"
PARCELLATION = "voxels of one axial slice (Haxby et al. 2001)"
CONDITION_NAMES = {"scrambledpix": "scrambled"}


@dataclass(frozen=True, kw_only=True)
class Block:
    """One block of pictures of one category: onset and length in volumes, no shift applied."""

    onset: int
    length: int
    condition: str


@dataclass(frozen=True, kw_only=True)
class Haxby:
    """The example data, detrended and z-scored per run.

    Attributes
    ----------
    runs
        float32 `[time, networks]` for each run; mean 0 and standard deviation 1 per network.
    blocks
        The blocks of each run, in the order in which they were shown.
    mask
        bool `[x, y]`: the voxels that are networks, in C order.
    anatomy
        float32 `[x, y]`: mean image over all volumes, as a backdrop for maps.
    voxel_mm
        Edge lengths of a voxel along x and y, in millimetres.
    right_first
        True where x counts from the participant's right to the left.
    """

    runs: list[np.ndarray]
    blocks: list[list[Block]]
    mask: np.ndarray
    anatomy: np.ndarray
    voxel_mm: tuple[float, float]
    right_first: bool

    @property
    def networks(self) -> int:
        """Number of voxels in the mask."""
        return int(self.mask.sum())


def read() -> Haxby:
    """Read the example data that ship with the package.

    Raises
    ------
    ValueError
        If images, mask and labels do not fit each other.
    """
    # `as_file`: nibabel needs a path, and a package may lie in an archive.
    with as_file(files("brainflow") / "demo_data" / "haxby2001") as folder:
        image = nibabel.load(folder / "bold.nii.gz")
        volumes = np.asarray(image.dataobj, dtype=np.float32)[:, :, 0]
        mask = np.asarray(nibabel.load(folder / "mask.nii.gz").dataobj)[:, :, 0] > 0
        labels, run_of = _read_labels((folder / "attributes_literal.txt").read_text())
    if volumes.shape[:2] != mask.shape or volumes.shape[2] != len(labels):
        raise ValueError(
            f"example data: images {volumes.shape}, mask {mask.shape} and {len(labels)} labels do not fit; "
            "the installed files are damaged, install the package again"
        )
    series = volumes[mask].T
    runs = [clean(series[run_of == run]) for run in np.unique(run_of)]
    blocks = [blocks_of(labels[run_of == run]) for run in np.unique(run_of)]
    zooms = image.header.get_zooms()
    return Haxby(
        runs=runs,
        blocks=blocks,
        mask=mask,
        anatomy=volumes.mean(axis=2),
        voxel_mm=(float(zooms[0]), float(zooms[1])),
        right_first=bool(image.affine[0, 0] < 0),
    )


def clean(series: np.ndarray) -> np.ndarray:
    """Remove each network's linear trend and z-score it: `[time, networks]` of one run → float32."""
    cleaned = signal.clean(series, detrend=True, standardize="zscore_sample", t_r=T_R)
    return np.ascontiguousarray(cleaned, dtype=np.float32)


def blocks_of(labels: np.ndarray) -> list[Block]:
    """Return the unbroken stretches of one run's volume labels `[time]` that are not rest.

    Examples
    --------
    >>> blocks_of(np.array(["rest", "face", "face", "rest"]))
    [Block(onset=1, length=2, condition='face')]
    """
    blocks, onset = [], 0
    for label, stretch in groupby(labels.tolist()):
        length = len(list(stretch))
        if label != REST:
            condition = CONDITION_NAMES.get(label, label)
            blocks.append(Block(onset=onset, length=length, condition=condition))
        onset += length
    return blocks


def write_store(data: Haxby, path: str) -> None:
    """Write the example data as a store: one run a scanner run, one labelled segment a block."""
    preprocessing = {
        "detrend": "linear, per run",
        "standardize": "z-score per network and run",
        "source": "PyMVPA 2.6.5 example data, CC BY-SA 3.0",
    }
    with StoreWriter.create(
        path,
        networks=data.networks,
        parcellation=PARCELLATION,
        preprocessing=preprocessing,
        overwrite=True,
    ) as writer:
        for run, (bold, blocks) in enumerate(zip(data.runs, data.blocks, strict=True)):
            writer.append(
                bold,
                t_r=T_R,
                dataset="haxby2001",
                subject="1",
                task="objects",
                run=str(run),
                segments=[
                    Segment(onset=block.onset, length=block.length, labels={TARGET: block.condition})
                    for block in blocks
                ],
            )


def _read_labels(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (label [volumes], run [volumes]) from lines `label run`."""
    rows = [line.split() for line in text.splitlines() if line.strip()]
    return np.array([row[0] for row in rows]), np.array([int(row[1]) for row in rows])
