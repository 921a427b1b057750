"""What users would read windows with otherwise: each a function that returns "read the next batch"."""

from __future__ import annotations

import importlib
import io
import itertools
import pickle  # noqa: TID251 - the baseline IS the released format: pickles in tars, written here by ourselves
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Batch = tuple[NDArray[np.int64], NDArray[np.int32]]
"""First rows and lengths of a batch's windows."""
Read = Callable[[], object]


def missing(module: str) -> str:
    """Return why a package cannot be used, or "" if it can."""
    try:
        importlib.import_module(module)
    except Exception as error:  # beside another torch than its own torchvision raises RuntimeError
        return f"cannot be imported ({type(error).__name__}: {error})"
    return ""


def turns(batches: Sequence[Batch]) -> Callable[[], Batch]:
    """Return a function that gives the batches in turn, again and again."""
    state = itertools.cycle(batches)
    return lambda: next(state)


def gather(rows: NDArray[Any], starts: NDArray[Any], lengths: NDArray[Any], out: NDArray[Any]) -> None:
    """Copy windows of one array behind one another into `out`: the bare loop."""
    position = 0
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        out[position : position + length] = rows[start : start + length]
        position += length


def memmap(path: Path, batches: Sequence[Batch], networks: int) -> Read:
    """Read a NumPy memory map of one .npy file, gathered into a reused packed batch."""
    # A slice of a `np.memmap` takes nine times as long as one of an array: the baseline is to be fast.
    rows = np.load(path, mmap_mode="r").view(np.ndarray)
    out = np.empty((max(int(n.sum()) for _, n in batches), networks), rows.dtype)
    following = turns(batches)
    return lambda: gather(rows, *following(), out)


def write_tars(folder: Path, runs: Sequence[NDArray[Any]]) -> list[str]:
    """Write each run as the released data are: one tar with a float32 pickle and the TR."""
    folder.mkdir()
    urls = []
    for i, bold in enumerate(runs):
        key = f"ds-bench_sub-{i:04d}_task-rest"
        urls.append(str(folder / f"{key}.tar"))
        with tarfile.open(urls[-1], "w") as tar:
            for suffix, value in (("bold", bold.astype(np.float32)), ("t_r", 2.0)):
                data = pickle.dumps(value)
                member = tarfile.TarInfo(f"{key}.{suffix}.pyd")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return urls


def webdataset(urls: list[str], batch: int, seq_min: int, seq_max: int) -> Read:
    """Read as in 2022: one tar a run, random order; unpickle it, crop a window, pad that to `seq_max`."""
    import webdataset as wds

    rng = np.random.default_rng(0)

    def crop(sample: dict[str, Any]) -> torch.Tensor:
        bold = pickle.loads(sample["bold.pyd"])  # noqa: S301
        pickle.loads(sample["t_r.pyd"])  # noqa: S301
        length = int(rng.integers(seq_min, seq_max))
        onset = int(rng.choice(np.arange(0, len(bold) - length, length)))
        padded = np.zeros((seq_max, bold.shape[1]), np.float32)
        padded[:length] = bold[onset : onset + length]
        return torch.from_numpy(padded)

    # `resampled` draws the tars at random: nothing is left to shuffle.
    dataset = wds.WebDataset(urls, resampled=True, shardshuffle=False).map(crop)
    loader = iter(torch.utils.data.DataLoader(dataset, batch_size=batch, num_workers=0))
    return lambda: next(loader)


def zarr_python(path: Path, batches: Sequence[Batch], *, pipeline: str | None = None) -> Read:
    """Read the same store by Zarr itself: one slice a window, its own or the `zarrs` codec pipeline."""
    import zarr

    following = turns(batches)
    settings = {"codec_pipeline.path": pipeline} if pipeline else {}
    with zarr.config.set(settings):
        array: Any = zarr.open_array(str(path), path="bold", mode="r")

    def read() -> object:
        with zarr.config.set(settings):
            return [array[s : s + n] for s, n in zip(*(c.tolist() for c in following()), strict=True)]

    return read


def tensorstore(path: Path, batches: Sequence[Batch]) -> Read:
    """Read the same store by TensorStore: all reads of a batch in flight at once."""
    import tensorstore as ts

    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path / "bold")}}
    array = ts.open(spec, read=True, write=False).result()
    following = turns(batches)

    def read() -> object:
        pending = [array[s : s + n].read() for s, n in zip(*(c.tolist() for c in following()), strict=True)]
        return [p.result() for p in pending]

    return read
