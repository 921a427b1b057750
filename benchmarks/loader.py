"""The data path: windows a second from a warm and a cold store, and what a million runs cost.

All ways read windows of 10 to 49 time points, 64 a batch, in one interleaved run. `memmap` copies the same
windows from one .npy file into a reused packed batch; it is the baseline of the reader and of the loaders.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from brainflow.data import dali_installed, make_loader
from brainflow.data.sampler import WindowSampler
from brainflow.storage import BoldStore, StoreWriter
from brainflow.storage.buffers import aligned_empty
from brainflow.storage.segments import RunTable, encode_strings

from . import encodings, million
from .baselines import loaders as baselines
from .timing import Row, Timing, interleave, speed_rows

BATCH, SEQ_MIN, SEQ_MAX = 64, 10, 50
_FAST = 128
_SLOW = {
    "webdataset": 1, "zarr": 1, "zarrs": 1, "tensorstore": 4, "litdata": 2, "streaming": 1, "dali_numpy": 16,
}  # fmt: skip
"""Batches a call of the slow ways. The others read `_FAST`: far more than a loader has ready beforehand."""

_HOW = {
    "litdata": " (it asks for torchvision, which must belong to your torch: pip install --no-deps litdata)",
    "streaming": " (mosaicml-streaming asks for numpy < 2.2: pip install --no-deps, with torchvision)",
}


def measurements(quick: bool, device: str) -> dict[str, Callable[[], list[Row]]]:
    """Return name → what measures it.

    Parameters
    ----------
    quick
        About 100 MB and few repeats (under half a minute) in place of a 1.5 GB store.
    device
        "cpu", or "cuda" to let the loaders deliver onto the GPU.
    """
    return {
        "store": lambda: _store_rows(quick, device),
        "encodings": lambda: encodings.run_rows(seconds=1.0 if quick else 2.5, repeats=3 if quick else 7),
        "runs_1e6_over_1e3": lambda: _many_runs(repeats=5 if quick else 15),
        "open_1e6_runs": lambda: million.run_rows(runs=1_000_000, repeats=2 if quick else 5),
    }


def _store_rows(quick: bool, device: str) -> list[Row]:
    """Readers and loaders of one store, warm and cold."""
    with tempfile.TemporaryDirectory(prefix="brainflow-bench-") as folder:
        store_path, npy, urls = _prepare(Path(folder), runs=64 if quick else 600)
        found = _warm(store_path, npy, urls, device, repeats=3 if quick else 5)
        return found + _cold(store_path, npy, repeats=3 if quick else 9)


def _prepare(folder: Path, *, runs: int) -> tuple[Path, Path, list[str]]:
    """Write the same runs as a store and a .npy file, and some of them as tars."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((2048, 1024), np.float32)
    lengths = rng.integers(600, 2000, runs).tolist() if runs > 100 else [800] * runs
    tars = []
    with StoreWriter.create(folder / "store", networks=1024, dtype="float16", parcellation="noise") as writer:
        for i, length in enumerate(lengths):
            bold = np.roll(noise[:length], i, axis=1)
            writer.append(bold, t_r=2.0, dataset="bench", subject=f"{i:04d}", task="rest", run="1")
            if i < 64:
                tars.append(bold)
    urls = baselines.write_tars(folder / "tars", tars)
    store = BoldStore.open(folder / "store")
    end = int(store.runs.start[-1] + store.runs.length[-1])
    flat = np.lib.format.open_memmap(folder / "flat.npy", "w+", np.float16, (end, 1024))
    for i, start in enumerate(store.runs.start.tolist()):
        flat[start : start + store.runs.length[i]] = store.run(i)
    flat.flush()
    return folder / "store", folder / "flat.npy", urls


def _batches(store: BoldStore, count: int) -> list[baselines.Batch]:
    sampler = WindowSampler(store.runs, batch=BATCH, seq_min=SEQ_MIN, seq_max=SEQ_MAX)
    drawn = [sampler.batch(step) for step in range(count)]
    return [(w.starts, w.lengths) for w in drawn]


def _warm(path: Path, npy: Path, urls: list[str], device: str, *, repeats: int) -> list[Row]:
    store = BoldStore.open(path)
    for i in range(len(store.runs)):  # checks every run's checksums and warms the page cache
        store.run(i)
    batches = _batches(store, 256)
    following = baselines.turns(batches)
    out = store.buffer(BATCH * SEQ_MAX)
    some = [store.run(i) for i in range(min(64, len(store.runs)))]
    window = {"batch": BATCH, "seq_min": SEQ_MIN, "seq_max": SEQ_MAX}
    ways: dict[str, Callable[[], object]] = {
        "memmap": baselines.memmap(npy, batches, store.networks),
        "reader": lambda: store.windows(*following(), out=out),
    }
    for kind in ("host", "dali"):
        if kind == "host" or dali_installed():
            sampler = WindowSampler(store.runs, batch=BATCH, seq_min=SEQ_MIN, seq_max=SEQ_MAX)
            loader = make_loader(store, sampler, kind=kind, device=device)
            ways[kind] = loader.__next__
    ways["zarr"] = baselines.zarr_python(path, batches)
    optional = {
        "webdataset": lambda: baselines.webdataset(urls, **window),
        "zarrs": lambda: baselines.zarr_python(path, batches, pipeline="zarrs.ZarrsCodecPipeline"),
        "tensorstore": lambda: baselines.tensorstore(path, batches),
        "litdata": lambda: baselines.litdata(npy.with_name("litdata"), some, **window),
        "streaming": lambda: baselines.streaming(npy.with_name("streaming"), some, **window),
        "nvidia.dali": lambda: baselines.dali_numpy(npy.with_name("runs"), some, **window),
    }
    for module, build in optional.items():
        if reason := baselines.missing(module):
            print(f"loader: {module} {reason}, left out{_HOW.get(module, '')}", file=sys.stderr)
        else:
            ways[{"nvidia.dali": "dali_numpy"}.get(module, module)] = build()
    source = np.ones((int(np.mean([n.sum() for _, n in batches])), store.networks), store.dtype)
    ways["memcpy"] = lambda: np.copyto(out[: len(source)], source)
    times = interleave({n: _repeat(way, _SLOW.get(n, _FAST)) for n, way in ways.items()}, repeats=repeats)
    times = {name: timing.per(_SLOW.get(name, _FAST)) for name, timing in times.items()}
    ways_of_ours = [name for name in ("reader", "host", "dali") if name in times]
    others = [name for name in times if name not in (*ways_of_ours, "memcpy")]
    found = []
    for name in ways_of_ours:
        found += speed_rows(
            "loader", name, times, ours=name, baselines=others, metric="windows_per_s", unit="windows/s",
            work=BATCH, floor=times["memcpy"].p50,
        )  # fmt: skip
    return found


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
    """One batch at a time from files whose pages were dropped just before; maps are made anew each time."""
    batches = _batches(BoldStore.open(path), 2 * repeats)
    out = aligned_empty(BATCH * SEQ_MAX, 1024, np.dtype(np.float16))
    seconds: dict[str, list[float]] = {"memmap": [], "reader": []}
    gc.collect()  # pages that anything still maps are not dropped
    for starts, lengths in batches:
        _drop(npy)
        rows = np.load(npy, mmap_mode="r").view(np.ndarray)
        began = time.perf_counter()
        baselines.gather(rows, starts, lengths, out)
        seconds["memmap"].append(time.perf_counter() - began)
        del rows
        _drop(path / "bold")
        store = BoldStore.open(path, check=False)
        began = time.perf_counter()
        store.advise(starts, lengths)
        store.windows(starts, lengths, out=out)
        seconds["reader"].append(time.perf_counter() - began)
        del store
    times = {name: Timing(seconds=tuple(values)) for name, values in seconds.items()}
    return speed_rows(
        "loader", "reader_cold", times, ours="reader", metric="windows_per_s", unit="windows/s", work=BATCH
    )


def _table(runs: int) -> RunTable:
    """A run table without any data: runs of 60 to 600 time points."""
    length = np.random.default_rng(0).integers(60, 600, runs).astype(np.int32)
    text = encode_strings(["x"])
    columns: dict[str, Any] = {
        "start": np.concatenate([[0], np.cumsum(length.astype(np.int64))[:-1]]),
        "length": length,
        "t_r": np.full(runs, 2.0),
        "slot": np.arange(runs),
        "censor": np.full(runs, -1),
        "censor_bits": np.zeros(0, np.uint8),
    }
    for name in ("dataset", "subject", "session", "task", "run", "key"):
        columns[name] = np.broadcast_to(text, (runs, text.shape[1]))
    return RunTable(columns)


def _many_runs(*, repeats: int) -> list[Row]:
    """Cost of a window (drawn, found in the index, copied) with 10^6 runs over that with 10^3."""
    data = np.ones((65_536, 1024), np.float16)
    out = np.empty((BATCH * SEQ_MAX, 1024), np.float16)

    def step(runs: int, copy: bool) -> Callable[[], None]:
        table = _table(runs)
        sampler = WindowSampler(table, batch=BATCH)
        number = iter(range(10**12))

        def read() -> None:
            windows = sampler.batch(next(number))
            table.locate(windows.starts, windows.lengths.astype(np.int64))
            if copy:
                baselines.gather(data, windows.starts % (len(data) - SEQ_MAX), windows.lengths, out)

        return _repeat(read, 64)

    names = {("index", False), ("window", True)}
    ways = {f"{name}_{runs}": step(runs, copy) for name, copy in names for runs in (1_000, 1_000_000)}
    times = interleave(ways, repeats=repeats)
    found = []
    for name, case in (("window", "runs_1e6_over_1e3"), ("index", "index_1e6_over_1e3")):
        both = {"ours": times[f"{name}_1000000"].per(64), "1e3_runs": times[f"{name}_1000"].per(64)}
        found += speed_rows("loader", case, both)
    return found
