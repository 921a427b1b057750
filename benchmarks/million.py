"""What opening a store of a million runs costs: its index is real, its shards are files without data."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from brainflow.storage.attributes import StoreAttributes
from brainflow.storage.index import write_index
from brainflow.storage.layout import CHUNK_ROWS, SHARD_ROWS, Grid
from brainflow.storage.manifest import MANIFEST, Manifest
from brainflow.storage.segments import encode_strings

from .timing import Row, Timing, speed_rows

_OPEN = """
import json, resource, sys, time
from brainflow.storage import BoldStore
def rss():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 1e6
before, began = rss(), time.perf_counter()
store = BoldStore.open(sys.argv[1])
seconds = time.perf_counter() - began
print(json.dumps([seconds, rss() - before, len(store.runs)]))
"""


def run_rows(*, runs: int, repeats: int) -> list[Row]:
    """Time and memory of `BoldStore.open` in fresh processes, with a warm page cache."""
    with tempfile.TemporaryDirectory(prefix="brainflow-bench-") as folder:
        path = Path(folder) / "store"
        write_index_only(path, runs)
        found = []
        for _ in range(repeats + 1):
            command = [sys.executable, "-c", _OPEN, str(path)]
            seconds, megabytes, opened = json.loads(subprocess.check_output(command))
            if opened != runs:
                raise AssertionError(f"opened {opened} runs, wrote {runs}")
            found.append((seconds, megabytes))
    times, memory = np.array(found[1:]).T
    case = f"open_{runs:.0e}_runs".replace("+0", "")
    timing = Timing(seconds=tuple(times.tolist()))
    return [
        *speed_rows("loader", case, {"ours": timing}, unit="s"),
        Row(suite="loader", case=case, metric="memory", value=float(np.median(memory)), unit="MB"),
    ]


def write_index_only(path: Path, runs: int) -> None:
    """Write a store of `runs` runs of 60 to 600 time points, 1,024 networks, whose shards are holes."""
    attributes = StoreAttributes.build(
        networks=1024,
        dtype="float16",
        parcellation="none",
        network_names=None,
        network_coordinates=None,
        preprocessing=None,
        normalisation="",
        provenance=None,
        compression=None,
        chunk_rows=CHUNK_ROWS,
        shard_rows=SHARD_ROWS,
    )
    length = np.random.default_rng(0).integers(60, 600, runs).astype("<i4")
    start = _starts(length)
    number = np.arange(runs)
    subjects = [f"{i:07d}" for i in range(runs)]
    texts = {"dataset": "bench", "session": "", "task": "rest", "run": "1"}
    columns = {
        "start": start,
        "length": length,
        "t_r": np.full(runs, 2.0),
        "slot": number,
        "censor": np.full(runs, -1),
        "censor_bits": np.zeros(0, np.uint8),
        "subject": encode_strings(subjects),
        "key": encode_strings([f"ds-bench_sub-{subject}_task-rest_run-1" for subject in subjects]),
        **{name: _repeated(text, runs) for name, text in texts.items()},
    }
    sums = {}
    for grid, first, rows in (
        (attributes.bold_grid, start, length),
        (attributes.statistics_grid, number, np.ones(runs, np.int64)),
    ):
        sums[grid.name] = _holes(path, grid, first, rows)
    segments = {name: np.zeros(0, "<i4") for name in ("run", "onset", "length")}
    files = write_index(path, 0, {"runs": columns, "segments": segments, "labels": {}, "checksums": sums})
    manifest = Manifest(
        generation=0,
        runs=runs,
        segments=0,
        rows=len(sums["bold"]) * CHUNK_ROWS,
        slots=len(sums["statistics"]) * attributes.statistics_grid.chunk_rows,
        files=files,
    )
    for grid, total in (
        (attributes.bold_grid, manifest.rows),
        (attributes.statistics_grid, manifest.slots),
    ):
        (path / grid.name / "zarr.json").write_bytes(attributes.array_metadata(grid, total))
    (path / MANIFEST).write_bytes(manifest.to_bytes(attributes))


def _starts(length: np.ndarray) -> np.ndarray:
    """First rows: one run behind the other, the next shard if one does not fit in the rest of its shard."""
    starts = np.empty(len(length), "<i8")
    row = 0
    for i, rows in enumerate(length.tolist()):
        if row % SHARD_ROWS + rows > SHARD_ROWS:
            row = -(-row // SHARD_ROWS) * SHARD_ROWS
        starts[i] = row
        row += rows
    return starts


def _holes(path: Path, grid: Grid, first: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Make the shard files of an array without writing them; returns checksums (all 0) of its chunks."""
    shards, chunks = grid.chunks_in_shards(first, rows)
    for shard, count in zip(shards.tolist(), chunks.tolist(), strict=True):
        file = path / grid.shard_path(shard)
        file.parent.mkdir(parents=True)
        with open(file, "wb") as hole:
            hole.truncate(count * grid.chunk_bytes + grid.index_bytes)
    return np.zeros((int(shards[-1]) + 1) * grid.chunks_per_shard, "<u4")


def _repeated(text: str, runs: int) -> np.ndarray:
    encoded = encode_strings([text])
    return np.broadcast_to(encoded, (runs, encoded.shape[1]))
