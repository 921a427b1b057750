"""Publishing: a store, or what has been appended to it, uploaded to a URL."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import as_completed
from pathlib import Path

import numpy as np

from .errors import StoreError
from .layout import group_metadata
from .manifest import INDEX_GROUP, MANIFEST, manifest_copy
from .remote import RemoteFiles
from .store import BoldStore


def publish(
    local: str | os.PathLike[str], url: str, progress: Callable[[int, int], None] | None = None
) -> int:
    """Upload a store, or what has been appended to it since it was last published there.

    The root's `zarr.json` goes last: readers see the old generation until then, the new one from then on. One
    process may publish to a URL at a time. Repeat it if it was interrupted.

    Parameters
    ----------
    local
        Directory of the store.
    url
        `s3://bucket/name`, `gs://bucket/name` or another remote store.
    progress
        Called with (bytes sent, bytes in all).

    Returns
    -------
    int
        Bytes sent.

    Raises
    ------
    StoreError
        If another store, or a newer generation, is at `url`.
    """
    store, files = BoldStore.open(local, fallback=False), RemoteFiles(url)
    published = {"bold": 0, "statistics": 0}  # chunks
    if files.exists(MANIFEST):
        there = BoldStore.open(url, fallback=False)
        if there.snapshot == store.snapshot:
            return 0
        for name in published:
            old, new = there.checksums[name], store.checksums[name]
            # A commit never changes chunks that are committed, so what is there has to be a beginning of
            # ours.
            if there.generation >= store.generation or not np.array_equal(old, new[: len(old)]):
                raise StoreError(
                    f"{url}: holds another store or a newer generation; publish to another URL, or remove "
                    "it first"
                )
            published[name] = len(old)
    data, last = contents(store, published)
    sizes = {
        name: value.stat().st_size if isinstance(value, Path) else len(value)
        for name, value in {**data, **last}.items()
    }
    total, done = sum(sizes.values()), 0
    jobs = {files.pool.submit(files.write, name, value): name for name, value in data.items()}
    try:
        for job in as_completed(jobs):
            job.result()
            done += sizes[jobs[job]]
            if progress is not None:
                progress(done, total)
    finally:
        files.pool.shutdown(cancel_futures=True)
    # In order: shapes, then the manifest.
    for name, value in last.items():
        files.write(name, value)
    if progress is not None:
        progress(total, total)
    return total


def contents(
    store: BoldStore, published: Mapping[str, int]
) -> tuple[dict[str, bytes | Path], dict[str, bytes]]:
    """Return what of a local store has to be uploaded, by path in it; and what goes last, the commit.

    Parameters
    ----------
    store
        Opened with `fallback=False`.
    published
        {array: number of its chunks that are there already}.

    Raises
    ------
    StoreError
        If a file of its index is damaged.
    """
    data: dict[str, bytes | Path] = {}
    runs, manifest = store.runs, store.manifest
    arrays = (
        (store.layout.bold_grid, runs.start, runs.length, manifest.rows),
        (store.layout.statistics_grid, runs.slot, np.ones(len(runs), np.int64), manifest.slots),
    )
    for grid, starts, lengths, _ in arrays:
        for shard in grid.chunks_in_shards(starts, lengths)[0].tolist():
            # Every commit begins a new shard: one is there as a whole or not at all.
            if shard * grid.chunks_per_shard >= published.get(grid.name, 0):
                data[grid.shard_path(shard)] = Path(store.path) / grid.shard_path(shard)
    for relative in manifest.files:
        data[relative] = store.check_file(relative).tobytes()
    if manifest.copied:
        data[manifest_copy(manifest.generation)] = store.manifest_bytes
    data[INDEX_GROUP] = group_metadata({})
    last = {f"{grid.name}/zarr.json": store.layout.array_metadata(grid, rows) for grid, _, _, rows in arrays}
    last[MANIFEST] = store.manifest_bytes  # the commit
    return data, last
