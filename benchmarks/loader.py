"""The data path: windows a second from a warm and a cold store, beside other readers and loaders.

All ways read windows of 10 to 49 time points, 64 a batch, in one interleaved run. `memmap` copies the same
windows from one .npy file into a reused packed batch; it is the baseline of the reader and of the loaders.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from brainflow.data import dali_installed, make_loader
from brainflow.data.sampler import WindowSampler
from brainflow.storage import BoldStore, StoreWriter

from . import baselines, timing
from .storage import BATCH, SEQ_MAX, SEQ_MIN, drawn
from .timing import Row, WrongResultError, speed_rows

_FAST = 128
_SLOW = {"webdataset": 1, "zarr": 1, "zarrs": 1, "tensorstore": 4}
"""Batches a call of the slow ways. The others read `_FAST`: far more than a loader has ready beforehand."""


NETWORKS, RUNS, QUICK_RUNS = 1024, 600, 64


def measurements(quick: bool, device: str) -> dict[str, Callable[[], list[Row]]]:
    """Return what reads one store in every way, warm and cold.

    Parameters
    ----------
    quick
        About 100 MB and few repeats (under half a minute) in place of a 1.5 GB store.
    device
        "cpu", or "cuda" to let the loaders deliver onto the GPU.
    """
    return {"store": lambda: _store(quick, device)}


def _store(quick: bool, device: str) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="brainflow-bench-") as folder:
        path, npy, urls = _prepare(Path(folder), runs=QUICK_RUNS if quick else RUNS)
        found = _warm(path, npy, urls, device, repeats=3 if quick else 5)
        return found + _cold(path, npy, repeats=6 if quick else 18)


def _prepare(folder: Path, *, runs: int) -> tuple[Path, Path, list[str]]:
    """Write the same runs as a store and a .npy file, and some of them as tars."""
    rng = np.random.default_rng(0)
    # Rolled, not drawn anew: random numbers for 1.5 GB take a while.
    noise = rng.standard_normal((2048, NETWORKS), np.float32)
    lengths = rng.integers(600, 2000, runs).tolist() if runs > 100 else [800] * runs
    tars = []
    with StoreWriter.create(
        folder / "store", networks=NETWORKS, dtype="float16", parcellation="noise"
    ) as writer:
        for i, length in enumerate(lengths):
            bold = np.roll(noise[:length], i, axis=1)
            writer.append(bold, t_r=2.0, dataset="bench", subject=f"{i:04d}", task="rest", run="1")
            if i < 64:
                tars.append(bold)
    urls = baselines.write_tars(folder / "tars", tars)
    store = BoldStore.open(folder / "store")
    end = int(store.runs.start[-1] + store.runs.length[-1])
    flat = np.lib.format.open_memmap(folder / "flat.npy", "w+", np.float16, (end, NETWORKS))
    for i, start in enumerate(store.runs.start.tolist()):
        flat[start : start + store.runs.length[i]] = store.run(i)
    flat.flush()
    return folder / "store", folder / "flat.npy", urls


def _warm(path: Path, npy: Path, urls: list[str], device: str, *, repeats: int) -> list[Row]:
    store = BoldStore.open(path)
    for i in range(len(store.runs)):  # checks every run's checksums and warms the page cache
        store.run(i)
    batches = drawn(store, 256)
    following, out = baselines.turns(batches), store.buffer(BATCH * SEQ_MAX)
    _require_same(store, npy, batches[0], out)
    ours: dict[str, Callable[[], object]] = {"reader": lambda: store.windows(*following(), out=out)}
    for kind in ("host", "dali"):
        if kind == "host" or dali_installed():
            sampler = WindowSampler(store.runs, batch=BATCH, seq_min=SEQ_MIN, seq_max=SEQ_MAX)
            loader = make_loader(store, sampler, kind=kind, device=device)
            ours[kind] = loader.__next__
    others = _others(store, path, npy, urls, batches)
    # As many bytes as a batch has in the mean: what copying alone takes.
    source = np.ones((int(np.mean([n.sum() for _, n in batches])), store.networks), store.dtype)
    ways = {**others, **ours, "memcpy": lambda: np.copyto(out[: len(source)], source)}
    times = timing.interleave(
        {name: _repeat(way, _SLOW.get(name, _FAST)) for name, way in ways.items()}, repeats=repeats
    )
    times = {name: timed.per(_SLOW.get(name, _FAST)) for name, timed in times.items()}
    found = []
    for name in ours:
        found += speed_rows(
            "loader", name, times, ours=name, baselines=tuple(others), metric="windows_per_s",
            unit="windows/s", work=BATCH, floor=times["memcpy"].p50,
        )  # fmt: skip
    return found


def _others(
    store: BoldStore, path: Path, npy: Path, urls: list[str], batches: list[baselines.Batch]
) -> dict[str, Callable[[], object]]:
    """Return every other way that is installed; those that are not are named on stderr."""
    window = {"batch": BATCH, "seq_min": SEQ_MIN, "seq_max": SEQ_MAX}
    ways: dict[str, Callable[[], object]] = {
        "memmap": baselines.memmap(npy, batches, store.networks),
        "zarr": baselines.zarr_python(path, batches),
    }
    optional: dict[str, Callable[[], Callable[[], object]]] = {
        "webdataset": lambda: baselines.webdataset(urls, **window),
        "zarrs": lambda: baselines.zarr_python(path, batches, pipeline="zarrs.ZarrsCodecPipeline"),
        "tensorstore": lambda: baselines.tensorstore(path, batches),
    }
    for name, build in optional.items():
        if reason := baselines.missing(name):
            print(f"loader: {name} is left out, it {reason}", file=sys.stderr)
        else:
            ways[name] = build()
    return ways


def _require_same(store: BoldStore, npy: Path, batch: baselines.Batch, out: np.ndarray) -> None:
    expected = np.zeros_like(out)
    baselines.gather(np.load(npy, mmap_mode="r"), *batch, expected)
    tokens = int(batch[1].sum())
    if not np.array_equal(store.windows(*batch, out=out)[:tokens], expected[:tokens]):
        raise WrongResultError("reader: its windows differ from those of the .npy file")


def _repeat(function: Callable[[], object], count: int) -> Callable[[], None]:
    def repeated() -> None:
        for _ in range(count):
            function()

    return repeated


def _drop(folder: Path) -> None:
    """Drop the pages of all files of a folder, or of one file; they must be clean and not mapped."""
    for path in folder.rglob("*") if folder.is_dir() else [folder]:
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _cold(path: Path, npy: Path, *, repeats: int) -> list[Row]:
    """Measure one batch at a time from files whose pages were just dropped; maps are made anew each time."""
    batches = drawn(BoldStore.open(path), 64)
    mine, theirs = baselines.turns(batches), baselines.turns(batches)
    opened: dict[str, object] = {}
    out = BoldStore.open(path).buffer(BATCH * SEQ_MAX)

    def drop(name: str, files: Path, reopen: Callable[[], object]) -> None:
        opened.clear()  # pages that anything still maps are not dropped
        gc.collect()
        _drop(files)
        # Outside the time: in training the store has long been open.
        opened[name] = reopen()

    def reader() -> None:
        store, batch = opened["reader"], mine()
        assert isinstance(store, BoldStore)
        # As the loaders do before they read.
        store.advise(*batch)
        store.windows(*batch, out=out)

    def memmap() -> None:
        rows = opened["memmap"]
        assert isinstance(rows, np.ndarray)
        baselines.gather(rows, *theirs(), out)

    before = {
        "memmap": lambda: drop("memmap", npy, lambda: np.load(npy, mmap_mode="r").view(np.ndarray)),
        # Checksums would be of whole chunks, of which a window is a part.
        "reader": lambda: drop("reader", path / "bold", lambda: BoldStore.open(path, check=False)),
    }
    times = timing.interleave({"memmap": memmap, "reader": reader}, repeats=repeats, before=before)
    return speed_rows(
        "loader", "reader_cold", times, ours="reader", metric="windows_per_s", unit="windows/s", work=BATCH
    )
