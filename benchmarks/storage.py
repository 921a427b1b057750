"""The store itself: what element types and codecs save and cost, and what a million runs cost a window.

The tables of `docs/format.md` are from here. Their BOLD is that of the demo (Haxby et al. 2001: 530 voxels,
12 runs of 121 TRs), z-scored per run and voxel. It is read in turns from stores that hold it 32 times over,
26 to 104 MB raw, on one core: how fast a cache or a second core is depends on what else the processor does.
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
from brainflow.prepare.masker import bold_from_nifti
from brainflow.storage import BoldStore, StoreWriter
from brainflow.storage.layout import CHUNK_ROWS, ZSTD_LEVEL
from brainflow.storage.tables import RunTable, encode_strings

from . import baselines, timing
from .timing import Row, speed_rows

BATCH, SEQ_MIN, SEQ_MAX = 64, 10, 50
DTYPES = ("float16", "float32", "int16", "int8")
COPIES = 32
"""Copies of the runs in a store that is read: 49 MB of float16."""
FEW, MANY = 1_000, 1_000_000


def measurements(quick: bool, device: str) -> dict[str, Callable[[], list[Row]]]:
    """Return name → what measures it, on the CPU; `quick` takes fewer repeats."""
    seconds, repeats = (1.0, 3) if quick else (2.5, 7)
    return {
        "encodings": partial(_encodings, seconds=seconds, repeats=repeats),
        "runs_1e6_over_1e3": partial(_many_runs, repeats=5 if quick else 15),
    }


def _encodings(*, seconds: float, repeats: int) -> list[Row]:
    """Measure bytes, error and speed of each element type, raw and as zstd, and of other codecs."""
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
    """Measure bytes of the runs in each element type, raw and as zstd, and what is lost by rounding."""
    found = []
    power = (np.concatenate(runs).astype(float) ** 2).mean()
    with tempfile.TemporaryDirectory(prefix="brainflow-bench-") as folder:
        for name, path, store in _write_all(Path(folder), runs):
            size = sum(file.stat().st_size for file in (path / "bold").glob("c/*/0"))
            found.append(_row(name, "bytes", size, "bytes"))
            # Compression loses nothing: the errors are those of the raw store.
            if not name.endswith("/raw"):
                continue
            error = np.concatenate([store.run(i) - run for i, run in enumerate(runs)]).astype(float)
            ratio = 10 * np.log10(power / (error**2).mean())
            found.append(_row(name, "largest_error", float(np.abs(error).max()), "standard deviations"))
            found.append(_row(name, "signal_to_error", float(ratio), "dB"))
    return found


def _speeds(runs: list[np.ndarray], seconds: float, repeats: int) -> list[Row]:
    """Measure windows a second of each element type over its like in float16, and over what users have."""
    ways: dict[str, Callable[[], object]] = {}
    with tempfile.TemporaryDirectory(prefix="brainflow-bench-") as folder:
        for name, path, store in _write_all(Path(folder), runs):
            store.check(store.runs.start, store.runs.length)  # compares checksums and warms the page cache
            batches = drawn(store, 32)
            following, out = baselines.turns(batches), store.buffer(BATCH * SEQ_MAX)
            ways[name] = partial(_read, store, following, out)
            if name == "float16/zstd":
                ways["zarr"] = baselines.zarr_python(path, batches)
                if not baselines.missing("zarrs"):
                    ways["zarrs"] = baselines.zarr_python(path, batches, pipeline="zarrs.ZarrsCodecPipeline")
        times = timing.interleave(ways, repeats=repeats, seconds=seconds)
    rows = partial(speed_rows, "loader", times=times, metric="windows_per_s", unit="windows/s", work=BATCH)
    found = rows(case="float16/raw", ours="float16/raw", baselines=())
    for name in (name for name in times if "/" in name and name != "float16/raw"):
        others = [f"float16/{name.rpartition('/')[2]}"]
        if name == "float16/zstd":
            others = ["float16/raw", *(other for other in ("zarr", "zarrs") if other in times)]
        found += rows(case=name, ours=name, baselines=others)
    return found


def _read(store: BoldStore, following: Callable[[], baselines.Batch], out: np.ndarray) -> None:
    store.windows(*following(), out=out)


def _write_all(folder: Path, runs: list[np.ndarray]) -> Iterator[tuple[str, Path, BoldStore]]:
    """Write a store of each element type, raw and as zstd; yield name, path and store."""
    for dtype in DTYPES:
        for compression in (None, "zstd"):
            name = f"{dtype}/{compression or 'raw'}"
            path = folder / name.replace("/", "-")
            with StoreWriter.create(
                path, networks=runs[0].shape[1], dtype=dtype, compression=compression
            ) as writer:
                for i, run in enumerate(runs):
                    writer.append(run, t_r=2.5, dataset="haxby2001", subject="1", run=str(i))
            yield name, path, BoldStore.open(path)


def drawn(store: BoldStore, count: int) -> list[baselines.Batch]:
    """Return first rows and lengths of the windows of the first `count` batches."""
    sampler = WindowSampler(store.runs, batch=BATCH, seq_min=SEQ_MIN, seq_max=SEQ_MAX)
    return [(w.starts, w.lengths) for w in map(sampler.batch, range(count))]


def _codecs(runs: list[np.ndarray], seconds: float, repeats: int) -> list[Row]:
    """Measure one chunk of float16 in the codecs that Zarr v3 readers know: bytes, and time to decode it.

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
    ours, out = f"zstd-{ZSTD_LEVEL}", np.empty_like(chunk)
    encoded = {name: codec.encode(chunk) for name, codec in codecs.items()}
    ways: dict[str, Callable[[], object]] = {"none": lambda: np.copyto(out, chunk)}
    ways |= {name: partial(codec.decode, encoded[name]) for name, codec in codecs.items()}
    times = timing.interleave(ways, repeats=repeats, seconds=seconds)
    found = [
        _row(f"codec/{name}", "bytes", len(data) / chunk.nbytes, "of raw") for name, data in encoded.items()
    ]
    for name in ways:
        found += speed_rows(
            "loader", f"codec/{name}", times, ours=name, baselines=() if name in (ours, "none") else (ours,),
            metric="decoding", unit="MB/s", work=chunk.nbytes / 1e6,
        )  # fmt: skip
    return found


def _many_runs(*, repeats: int) -> list[Row]:
    """Measure a window (drawn, found in the index, copied) with 10^6 runs over one with 10^3."""
    # One array for both numbers of runs: they differ by the index alone.
    data = np.ones((65_536, 1024), np.float16)
    out = np.empty((BATCH * SEQ_MAX, 1024), np.float16)

    def step(runs: int, copy: bool) -> Callable[[], None]:
        table = _table(runs)
        sampler = WindowSampler(table, batch=BATCH)
        number = iter(range(10**12))

        def read() -> None:
            for _ in range(64):
                windows = sampler.batch(next(number))
                table.locate(windows.starts, windows.lengths.astype(np.int64))
                if copy:
                    # The table is of runs without data: they are wrapped onto these.
                    baselines.gather(data, windows.starts % (len(data) - SEQ_MAX), windows.lengths, out)

        return read

    found = []
    for case, copy in (("runs_1e6_over_1e3", True), ("index_1e6_over_1e3", False)):
        ways = {"ours": step(MANY, copy), "1e3_runs": step(FEW, copy)}
        times = timing.interleave(ways, repeats=repeats)
        found += speed_rows("loader", case, {name: timed.per(64) for name, timed in times.items()})
    return found


def _table(runs: int) -> RunTable:
    """Return a table of runs of 60 to 600 time points, without any data."""
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


def _row(case: str, metric: str, value: float, unit: str) -> Row:
    return Row(suite="loader", case=case, metric=metric, value=value, unit=unit)
