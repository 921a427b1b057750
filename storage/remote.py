"""Stores on s3://, gs://, https:// (and memory://, for tests): reading objects with retries, and publishing.

obstore does the transfers: one wheel without dependencies that speaks to all of these, from plain threads.
(fsspec needs one more package a scheme, and s3fs pins botocore.) Credentials and end points come from the
environment variables of each service, such as AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL; public buckets need
AWS_SKIP_SIGNATURE=true.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
from zarr.storage import ObjectStore

from .cache import ChunkCache
from .errors import StoreError, StoreUnavailable
from .layout import Grid, group_metadata
from .manifest import INDEX_GROUP, MANIFEST, manifest_copy
from .remote_chunks import RemoteChunks

SCHEMES = ("s3", "gs", "https", "http", "memory")
ATTEMPTS = 7
FIRST_WAIT, LONGEST_WAIT = 0.1, 10.0  # seconds
TIMEOUT, CONNECT_TIMEOUT = 30.0, 5.0  # seconds
REQUESTS = 32  # at the same time, a store

T = TypeVar("T")
_in_memory: dict[str, Any] = {}


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL."""
    return "://" in str(path)


class RemoteFiles:
    """The objects under a URL.

    Parameters
    ----------
    url : s3://bucket/…, gs://bucket/…, https://host/…, http://host/… or memory://name/…

    Raises
    ------
    StoreError : if the scheme is another, or obstore is not installed
    """

    def __init__(self, url: str) -> None:
        self.where = url.rstrip("/")
        self.store = _connect(self.where)
        self._announced: dict[str, Future[np.ndarray]] = {}

    @cached_property
    def pool(self) -> ThreadPoolExecutor:
        """Threads that wait for answers."""
        return ThreadPoolExecutor(REQUESTS, thread_name_prefix="brainflow-remote")

    def announce(self, sizes: Mapping[str, Sequence[int]]) -> None:
        """Begin to read some whole objects, all at once; each is kept for the next `read`.

        Parameters
        ----------
        sizes : {path: [bytes, …]}
        """
        self._announced = {name: self.pool.submit(self._read, name, size[0]) for name, size in sizes.items()}

    def read(self, relative: str, limit: int) -> np.ndarray:
        """A whole object of at most `limit` bytes, uint8 [bytes]."""
        announced = self._announced.pop(relative, None)
        return self._read(relative, limit) if announced is None else announced.result()

    def _read(self, relative: str, limit: int) -> np.ndarray:
        data = self._retry(relative, lambda: _body(_obstore().get(self.store, relative), limit))
        if len(data) > limit:
            raise StoreError(
                f"{self.where}/{relative}: has more than the {limit} bytes expected; publish the store again"
            )
        return data

    def read_range(self, relative: str, offset: int, size: int) -> np.ndarray:
        """Some bytes of an object, uint8 [size]."""
        return self._read_part(relative, (offset, offset + size), size)

    def read_tail(self, relative: str, size: int) -> np.ndarray:
        """The last bytes of an object, uint8 [size]."""
        return self._read_part(relative, {"suffix": size}, size)

    def _read_part(self, relative: str, part: Any, size: int) -> np.ndarray:
        def read() -> np.ndarray:
            data = _body(_obstore().get(self.store, relative, options={"range": part}), size)
            if len(data) != size:
                raise ConnectionError(f"got {len(data)} of {size} bytes")
            return data

        return self._retry(relative, read)

    def exists(self, relative: str) -> bool:
        """Whether there is such an object."""
        try:
            self._retry(relative, lambda: _obstore().head(self.store, relative))
        except StoreError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return False
            raise
        return True

    def write(self, relative: str, data: bytes | Path) -> None:
        """Put an object, in one step for its readers."""
        self._retry(relative, lambda: _obstore().put(self.store, relative, data))

    def shards(self, grid: Grid, shards: np.ndarray, chunks: np.ndarray, sums: np.ndarray) -> RemoteChunks:
        """The chunks of an array; `sums` are their checksums."""
        return RemoteChunks(self, grid, dict(zip(shards.tolist(), chunks.tolist(), strict=True)), sums)

    def zarr_store(self) -> Any:
        """The store as Zarr opens it."""
        return ObjectStore(self.store, read_only=True)

    @cached_property
    def cache(self) -> ChunkCache | None:
        """Chunks kept on this machine; None if BRAINFLOW_CACHE is set to nothing."""
        return ChunkCache.from_environment(self.where)

    def _retry(self, relative: str, request: Callable[[], T]) -> T:
        """Try a request until it is answered, with growing pauses of random length.

        Raises
        ------
        StoreError : naming the object, if it does not exist
        StoreUnavailable : if it may not be read, or `ATTEMPTS` have failed
        """
        name, fatal = f"{self.where}/{relative}", _fatal_errors()
        for attempt in range(ATTEMPTS):
            try:
                return request()
            except FileNotFoundError as error:
                raise StoreError(
                    f"{name}: does not exist; check the URL, or publish the store again"
                ) from error
            except fatal as error:
                raise StoreUnavailable(
                    f"{name}: {_brief(error)}; check the credentials in the environment (public buckets: "
                    "AWS_SKIP_SIGNATURE=true)"
                ) from error
            except (_obstore().exceptions.BaseError, OSError) as error:
                if attempt == ATTEMPTS - 1:
                    raise StoreUnavailable(
                        f"{name}: gave up after {ATTEMPTS} attempts ({_brief(error)}); check network and "
                        "server"
                    ) from error
                time.sleep(min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1.0))
        raise AssertionError("not reached")


def publish(
    local: str | os.PathLike[str], url: str, progress: Callable[[int, int], None] | None = None
) -> int:
    """Upload a store, or what has been appended to it since it was last published there.

    The root's `zarr.json` goes last: readers see the old generation until then, the new one from then on. One
    process may publish to a URL at a time. Repeat it if it was interrupted.

    Parameters
    ----------
    local : directory of the store
    url : s3://bucket/name, gs://bucket/name, …
    progress : called with (bytes sent, bytes in all)

    Returns
    -------
    int : bytes sent

    Raises
    ------
    StoreError : if another store, or a newer generation, is at `url`
    """
    from .store import BoldStore

    store, files = BoldStore.open(local, fallback=False), RemoteFiles(url)
    published = {"bold": 0, "statistics": 0}  # chunks
    if files.exists(MANIFEST):
        there = BoldStore.open(url, fallback=False)
        if there.snapshot == store.snapshot:
            return 0
        for name in published:
            old, new = there.checksums[name], store.checksums[name]
            if there.generation >= store.generation or not np.array_equal(old, new[: len(old)]):
                raise StoreError(
                    f"{url}: holds another store or a newer generation; publish to another URL, or remove "
                    "it first"
                )
            published[name] = len(old)
    data: dict[str, bytes | Path] = {}
    runs, manifest = store.runs, store.manifest
    arrays = (
        (store.layout.bold_grid, runs.start, runs.length, manifest.rows),
        (store.layout.statistics_grid, runs.slot, np.ones(len(runs), np.int64), manifest.slots),
    )
    for grid, starts, lengths, _ in arrays:
        for shard in grid.chunks_in_shards(starts, lengths)[0].tolist():
            if shard * grid.chunks_per_shard >= published[grid.name]:
                data[grid.shard_path(shard)] = Path(store.path) / grid.shard_path(shard)
    for relative in manifest.files:
        data[relative] = store.check_file(relative).tobytes()
    if manifest.copied:
        data[manifest_copy(manifest.generation)] = store.manifest_bytes
    data[INDEX_GROUP] = group_metadata({})
    last = {f"{grid.name}/zarr.json": store.layout.array_metadata(grid, rows) for grid, _, _, rows in arrays}
    last[MANIFEST] = store.manifest_bytes  # the commit
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
    for name, value in last.items():
        files.write(name, value)
    if progress is not None:
        progress(total, total)
    return total


def _connect(url: str) -> Any:
    """The object store of a URL."""
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES:
        raise StoreError(
            f"{url}: unknown scheme, expected a directory or {', '.join(s + '://' for s in SCHEMES)}"
        )
    stores = _obstore().store
    if parts.scheme == "memory":
        return _in_memory.setdefault(url, stores.MemoryStore())
    endpoint = os.environ.get("AWS_ENDPOINT_URL", "") + os.environ.get("AWS_ENDPOINT", "")
    options: dict[str, Any] = {
        "timeout": timedelta(seconds=TIMEOUT),
        "connect_timeout": timedelta(seconds=CONNECT_TIMEOUT),
        "allow_http": parts.scheme == "http" or endpoint.startswith("http://"),
    }
    return stores.from_url(url, client_options=options, retry_config={"max_retries": 0})


def _obstore() -> Any:
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ImportError as error:
        raise StoreError(
            "stores at URLs need obstore; install it with `pip install 'brainflow-fmri[remote]'`"
        ) from error
    return obstore


def _fatal_errors() -> tuple[type[Exception], ...]:
    """What no repetition mends."""
    errors = _obstore().exceptions
    names = ("PermissionDeniedError", "UnauthenticatedError", "NotSupportedError", "InvalidPathError")
    return (*(getattr(errors, name) for name in names), PermissionError)


def _body(answer: Any, limit: int) -> np.ndarray:
    """The bytes of an answer, a little more than `limit` at most: a server may send without end."""
    pieces, size = [], 0
    for piece in answer.stream(min_chunk_size=limit + 1):
        pieces.append(np.frombuffer(piece, np.uint8))
        size += len(pieces[-1])
        if size > limit:
            break
    if len(pieces) == 1:
        return pieces[0]
    return np.concatenate(pieces) if pieces else np.zeros(0, np.uint8)


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:200] + " …"
