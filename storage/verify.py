"""Reading all of a store and comparing it with its checksums."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .errors import StoreError
from .layout import Grid, crc32c
from .store import BoldStore


@dataclass(kw_only=True)
class VerifyReport:
    """What `verify` found.

    Attributes
    ----------
    errors : one line for each thing that is wrong
    bad_chunks : numbers of the damaged chunks of `bold`
    bad_runs : keys of the runs that they touch
    chunks : chunks read
    """

    errors: list[str] = field(default_factory=list)
    bad_chunks: list[int] = field(default_factory=list)
    bad_runs: list[str] = field(default_factory=list)
    chunks: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.errors


_PROGRESS_BYTES = 16 * 2**20


def verify(path: str | os.PathLike[str], progress: Callable[[int, int], None] | None = None) -> VerifyReport:
    """Read every chunk of a store and every file of its index, and compare them with their checksums.

    Parameters
    ----------
    path : directory or URL of the store
    progress : called with (bytes read, bytes in all)

    Returns
    -------
    VerifyReport : a store that cannot be opened has the reason as its one error
    """
    report = VerifyReport()
    try:
        store = BoldStore.open(path, check=False)
    except StoreError as error:
        report.errors.append(str(error))
        return report
    report.errors += _bad_files(store)
    runs = store.runs
    jobs = [
        (store.layout.bold_grid, runs.start, runs.length),
        (store.layout.statistics_grid, runs.slot, np.ones(len(runs), np.int64)),
    ]
    total = sum(int(grid.chunks_in_shards(s, n)[1].sum()) * grid.chunk_bytes for grid, s, n in jobs)
    done = shown = 0
    for grid, starts, lengths in jobs:
        for shard, chunks in zip(*grid.chunks_in_shards(starts, lengths), strict=True):
            first = int(shard) * grid.chunks_per_shard
            for chunk in range(first, first + int(chunks)):
                reason = _fault(store, grid, chunk)
                if reason:
                    _note(report, store, grid, chunk, reason, starts, lengths)
                report.chunks += 1
                done += grid.chunk_bytes
                if progress is not None and (done - shown >= _PROGRESS_BYTES or done == total):
                    progress(done, total)
                    shown = done
    return report


def _bad_files(store: BoldStore) -> list[str]:
    """What is wrong with the metadata and the index."""
    errors = []
    for relative in store.manifest.files:
        try:
            store.check_file(relative)
        except StoreError as error:
            errors.append(str(error))
    for grid, rows in (
        (store.layout.bold_grid, store.manifest.rows),
        (store.layout.statistics_grid, store.manifest.slots),
    ):
        file = f"{grid.name}/zarr.json"
        try:
            data = store.read_file(file).tobytes()
            present = int(json.loads(data)["shape"][0])  # more than `rows` if somebody has appended since
            good = present >= rows and data == store.layout.array_metadata(grid, present)
        except (StoreError, ValueError, KeyError, TypeError, IndexError):
            good = False
        if not good:
            errors.append(
                f"{store.path}/{file}: missing or damaged; restore this file from a copy of the store"
            )
    return errors


def _fault(store: BoldStore, grid: Grid, chunk: int) -> str:
    """What is wrong with a chunk, or nothing."""
    try:
        good = crc32c(store.stored(grid.name, chunk)) == store.checksums[grid.name][chunk]
    except (StoreError, OSError) as error:
        return str(error)
    return "" if good else "is damaged (wrong checksum)"


def _note(
    report: VerifyReport,
    store: BoldStore,
    grid: Grid,
    chunk: int,
    reason: str,
    starts: np.ndarray,
    lengths: np.ndarray,
) -> None:
    """Write down a damaged chunk of an array and the runs that have rows in it."""
    first, last = chunk * grid.chunk_rows, (chunk + 1) * grid.chunk_rows
    begin = int(np.searchsorted(starts + lengths, first, "right"))
    touched = range(begin, int(np.searchsorted(starts, last, "left")))
    keys = [store.runs.key_of(run) for run in touched]
    report.errors.append(
        f"{grid.name}: chunk {chunk} ({grid.shard_path(chunk // grid.chunks_per_shard)}): {reason}; it "
        "touches "
        f"{', '.join(keys)}"
    )
    report.bad_runs += [key for key in keys if key not in report.bad_runs]
    if grid.name == "bold":
        report.bad_chunks.append(chunk)
