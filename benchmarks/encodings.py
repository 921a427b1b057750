"""What element types and codecs save and cost, on real BOLD: the table of `docs/format.md`.

The BOLD is that of the demo (Haxby et al. 2001: 530 voxels, 12 runs of 121 TRs), z-scored per run and voxel.
It is read in turns from stores that hold it 32 times over, 26 to 104 MB raw, on one core: how fast a cache
or a second core is depends on what else the processor does.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from brainflow.data.sampler import WindowSampler
from brainflow.storage import BoldStore, StoreWriter
from brainflow.storage.ingest.nifti import bold_from_nifti
from brainflow.storage.layout import CHUNK_ROWS, ZSTD_LEVEL

from .baselines import loaders as baselines
from .timing import Row, interleave

BATCH, SEQ_MIN, SEQ_MAX = 64, 10, 50
DTYPES = ("float16", "float32", "int16", "int8")
COPIES = 32
"""Copies of the runs in a store that is read: 49 MB of float16."""


def run_rows(*, seconds: float, repeats: int) -> list[Row]:
    """Bytes, error and speed of each element type, raw and as zstd; bytes and speed of other codecs."""
    folder = Path(str(importlib.resources.files("brainflow"))) / "demo_data" / "haxby2001"
    try:
        bold, _ = bold_from_nifti(folder / "bold.nii.gz", folder / "mask.nii.gz")
    except (ImportError, FileNotFoundError) as error:
        print(f"loader: encodings are left out ({error})", file=sys.stderr)
        return []
    runs = [_z_scored(run) for run in np.split(bold.astype(np.float64), 12)]
    with _one_core():
        return _sizes(runs) + _speeds(runs * COPIES, seconds, repeats) + _codecs(runs, seconds, repeats)


@contextlib.contextmanager
def _one_core() -> Iterator[None]:
    """Let this thread, and threads that it starts, run on one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _z_scored(run: np.ndarray) -> np.ndarray:
    std = run.std(axis=0)
    return np.asarray((run - run.mean(axis=0)) / np.where(std > 0, std, 1))


def _sizes(runs: list[np.ndarray]) -> list[Row]:
    """Bytes of the runs in each element type, raw and as zstd, and what is lost by rounding."""
    found = []
    power = (np.concatenate(runs).astype(float) ** 2).mean()
    with tempfile.TemporaryDirectory(prefix="brainflow-bench-") as folder:
        for name, path, store in _write_all(Path(folder), runs):
            size = sum(file.stat().st_size for file in (path / "bold").glob("c/*/0"))
            found.append(_row(name, "bytes", size, "bytes"))
            if not name.endswith("/raw"):
                continue
            error = np.concatenate([store.run(i) - run for i, run in enumerate(runs)]).astype(float)
            ratio = 10 * np.log10(power / (error**2).mean())
            found.append(_row(name, "largest_error", float(np.abs(error).max()), "standard deviations"))
            found.append(_row(name, "signal_to_error", float(ratio), "dB"))
    return found


def _speeds(runs: list[np.ndarray], seconds: float, repeats: int) -> list[Row]:
    """Windows a second of each element type, raw and as zstd."""
    ways: dict[str, Callable[[], object]] = {}
    with tempfile.TemporaryDirectory(prefix="brainflow-bench-") as folder:
        for name, path, store in _write_all(Path(folder), runs):
            store.check(store.runs.start, store.runs.length)  # compares checksums and warms the page cache
            ways[name] = _reader(store)
            if name == "float16/zstd":
                batches = _batches(store)
                ways["zarr"] = baselines.zarr_python(path, batches)
                if not baselines.missing("zarrs"):
                    ways["zarrs"] = baselines.zarr_python(path, batches, pipeline="zarrs.ZarrsCodecPipeline")
        times = interleave(ways, repeats=repeats, seconds=seconds)
    found = []
    for name in (f"{dtype}/{how}" for dtype in DTYPES for how in ("raw", "zstd")):
        for baseline in _baselines(name):
            if baseline in times and baseline != name:
                ratio = times[name].times_faster_than(times[baseline])
                found.append(
                    _row(name, "windows_per_s", BATCH / times[name].p50, "windows/s", baseline, ratio)
                )
    found.append(_row("float16/raw", "windows_per_s", BATCH / times["float16/raw"].p50, "windows/s"))
    return found


def _write_all(folder: Path, runs: list[np.ndarray]) -> Iterator[tuple[str, Path, BoldStore]]:
    """Write a store of each element type, raw and as zstd; yield name, path and store."""
    for dtype in DTYPES:
        for compression in (None, "zstd"):
            name = f"{dtype}/{compression or 'raw'}"
            path = folder / name.replace("/", "-")
            yield name, path, _write(path, runs, dtype, compression)


def _baselines(name: str) -> list[str]:
    """Return what an element type is compared with: its like in float16, and that with what users have."""
    if name == "float16/zstd":
        return ["float16/raw", "zarr", "zarrs"]
    return ["float16/zstd" if name.endswith("/zstd") else "float16/raw"]


def _codecs(runs: list[np.ndarray], seconds: float, repeats: int) -> list[Row]:
    """One chunk of float16 through the codecs that Zarr v3 readers know: bytes, and time to decode it.

    The baseline is the codec of a compressed store. A copy would be a poor one: the chunk fits a cache, and
    how fast that is depends on what else the processor does.
    """
    from numcodecs import LZ4, Blosc, GZip, Zstd

    chunk = np.concatenate(runs).astype(np.float16)[:CHUNK_ROWS]
    codecs: dict[str, Any] = {
        "lz4": LZ4(),
        "gzip-6": GZip(6),
        "zstd-1": Zstd(1),
        "zstd-3": Zstd(3),
        "zstd-19": Zstd(19),
        "blosc-lz4-shuffle": Blosc("lz4", 5, Blosc.SHUFFLE),
        "blosc-zstd-shuffle": Blosc("zstd", 5, Blosc.SHUFFLE),
        "blosc-zstd-bitshuffle": Blosc("zstd", 5, Blosc.BITSHUFFLE),
    }
    ours = f"zstd-{ZSTD_LEVEL}"
    out = np.empty_like(chunk)
    encoded = {name: codec.encode(chunk) for name, codec in codecs.items()}
    ways: dict[str, Callable[[], object]] = {"copy": lambda: np.copyto(out, chunk)}
    ways |= {name: partial(codec.decode, encoded[name]) for name, codec in codecs.items()}
    times = interleave(ways, repeats=repeats, seconds=seconds)
    found = []
    for name in codecs:
        found.append(_row(f"codec/{name}", "bytes", len(encoded[name]) / chunk.nbytes, "of raw"))
        rate = chunk.nbytes / 1e6 / times[name].p50
        ratio = None if name == ours else times[name].times_faster_than(times[ours])
        found.append(_row(f"codec/{name}", "decoding", rate, "MB/s", ours if ratio else "", ratio))
    copied = chunk.nbytes / 1e6 / times["copy"].p50
    return [*found, _row("codec/none", "decoding", copied, "MB/s")]


def _write(path: Path, runs: list[np.ndarray], dtype: str, compression: str | None) -> BoldStore:
    networks = runs[0].shape[1]
    with StoreWriter.create(path, networks=networks, dtype=dtype, compression=compression) as writer:
        for i, run in enumerate(runs):
            writer.append(run, t_r=2.5, dataset="haxby2001", subject="1", run=str(i))
    return BoldStore.open(path)


def _batches(store: BoldStore) -> list[baselines.Batch]:
    sampler = WindowSampler(store.runs, batch=BATCH, seq_min=SEQ_MIN, seq_max=SEQ_MAX)
    return [(w.starts, w.lengths) for w in map(sampler.batch, range(32))]


def _reader(store: BoldStore) -> Callable[[], object]:
    out = store.buffer(BATCH * SEQ_MAX)
    following = baselines.turns(_batches(store))
    return lambda: store.windows(*following(), out=out)


def _row(
    case: str, metric: str, value: float, unit: str, baseline: str = "", ratio: float | None = None
) -> Row:
    return Row(
        suite="loader", case=case, metric=metric, value=value, unit=unit, baseline=baseline, ratio=ratio
    )
