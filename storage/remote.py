"""Objects on s3://, gs://, hf://, https:// (and memory://, for tests), with retries; chunks with checks.

obstore does the transfers: one wheel without dependencies that speaks to all of these, from plain threads.
(fsspec needs one more package a scheme, and s3fs pins botocore.) Credentials and end points come from the
environment variables of each service, such as AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL; public buckets need
AWS_SKIP_SIGNATURE=true. `hf://datasets/owner/name[@revision]/…` (`hf://owner/name/…` for a model) is what the
Hugging Face hub, or the server in HF_ENDPOINT, has to download for everybody.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
from zarr.storage import ObjectStore

from .cache import ChunkCache
from .errors import DamagedChunk, StoreError, StoreUnavailable
from .files import replacing
from .layout import Grid, crc32c

SCHEMES = ("s3", "gs", "hf", "https", "http", "memory")
ATTEMPTS = 7
FIRST_WAIT, LONGEST_WAIT = 0.1, 10.0  # seconds
TIMEOUT, CONNECT_TIMEOUT = 30.0, 5.0  # seconds
REQUESTS = 32  # at the same time, a store

T = TypeVar("T")
_in_memory: dict[str, Any] = {}
_LARGEST_REQUEST = 2**22  # bytes: neighbouring chunks are read together up to this
_CHECKED_READS = 3  # of a chunk with a wrong checksum, before it counts as damaged
_READ_AHEAD = 16  # chunks
_LARGEST_WHOLE = 2**31  # bytes of an object of a server that gives no parts
_HUB = re.compile(r"hf://((?:(?:datasets|spaces)/)?[^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.*))?")

Pending = dict[int, "Future[dict[int, np.ndarray]]"]


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL."""
    return "://" in str(path)


class RemoteFiles:
    """The objects under a URL.

    Parameters
    ----------
    url
        `s3://bucket/…`, `gs://bucket/…`, `hf://…`, `https://host/…`, `http://host/…` or `memory://name/…`.

    Raises
    ------
    StoreError
        If the scheme is another, or obstore is not installed.
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
        sizes
            {path: [bytes, …]}.
        """
        self._announced = {name: self.pool.submit(self._read, name, size[0]) for name, size in sizes.items()}

    def read(self, relative: str, limit: int) -> np.ndarray:
        """Return a whole object of at most `limit` bytes, uint8 [bytes]."""
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
        """Return some bytes of an object, uint8 [size]."""
        return self._read_part(relative, (offset, offset + size), size)

    def read_tail(self, relative: str, size: int) -> np.ndarray:
        """Return the last bytes of an object, uint8 [size]."""
        return self._read_part(relative, {"suffix": size}, size)

    def _read_part(self, relative: str, part: Any, size: int) -> np.ndarray:
        def read() -> np.ndarray:
            data = _body(_obstore().get(self.store, relative, options={"range": part}), size)
            if len(data) != size:
                # An OSError, so that it is tried again.
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

    def entries(self, relative: str) -> dict[str, str]:
        """Return nothing: objects at a URL are not listed."""
        return {}

    def version(self, relative: str) -> tuple[int, str]:
        """Return bytes of an object, and what changes with its content: the ETag, or when it was changed."""

        def ask() -> Any:
            try:  # what is signed to be read, behind a redirection, may not be asked about in another way
                return _obstore().get(self.store, relative, options={"range": (0, 1)}).meta
            except _obstore().exceptions.NotSupportedError:
                return _obstore().head(self.store, relative)

        meta = self._retry(relative, ask)
        return int(meta["size"]), str(meta.get("e_tag") or meta.get("last_modified") or "")

    def download(self, relative: str, target: Path) -> None:
        """Copy an object to a file, in pieces that are each tried again, and in one step for its readers.

        Raises
        ------
        StoreError
            If it does not exist, or is changed meanwhile.
        """
        size, version = self.version(relative)
        with replacing(target) as file:
            try:
                self._copy(relative, size, file.fileno())
            except StoreUnavailable as error:
                if not isinstance(error.__cause__, _obstore().exceptions.NotSupportedError):
                    raise
                file.write(self._read(relative, _LARGEST_WHOLE).tobytes())  # a server that gives no parts
            file.flush()
            if os.fstat(file.fileno()).st_size != size or self.version(relative) != (size, version):
                raise StoreError(f"{self.where}/{relative}: was changed while it was read; read it again")

    def _copy(self, relative: str, size: int, descriptor: int) -> None:
        def piece(offset: int) -> None:
            data = self.read_range(relative, offset, min(_LARGEST_REQUEST, size - offset))
            # Not seek and write: all threads share the descriptor's position.
            os.pwrite(descriptor, data.tobytes(), offset)

        jobs = [self.pool.submit(piece, offset) for offset in range(0, size, _LARGEST_REQUEST)]
        try:
            for job in jobs:
                job.result()
        finally:
            for job in jobs:
                job.cancel()
            wait(jobs)  # none may write to the descriptor once it is another file's

    def write(self, relative: str, data: bytes | Path) -> None:
        """Put an object, in one step for its readers."""
        self._retry(relative, lambda: _obstore().put(self.store, relative, data))

    def shards(self, grid: Grid, shards: np.ndarray, chunks: np.ndarray, sums: np.ndarray) -> RemoteChunks:
        """Return the chunks of an array; `sums` are their checksums."""
        return RemoteChunks(self, grid, dict(zip(shards.tolist(), chunks.tolist(), strict=True)), sums)

    def zarr_store(self) -> Any:
        """Return the store as Zarr opens it."""
        return ObjectStore(self.store, read_only=True)

    @cached_property
    def cache(self) -> ChunkCache | None:
        """Chunks kept on this machine; None if BRAINFLOW_CACHE is set to nothing."""
        return ChunkCache.from_environment(self.where)

    def _retry(self, relative: str, request: Callable[[], T]) -> T:
        """Try a request until it is answered, with growing pauses of random length.

        Raises
        ------
        StoreError
            Naming the object, if it does not exist.
        StoreUnavailable
            If it may not be read, or `ATTEMPTS` have failed.
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
                # Random, so that processes that failed together do not come back together.
                time.sleep(min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1.0))
        raise AssertionError("not reached")


def _connect(url: str) -> Any:
    """Return the object store of a URL."""
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES:
        raise StoreError(
            f"{url}: unknown scheme, expected a directory or {', '.join(s + '://' for s in SCHEMES)}"
        )
    if parts.scheme == "hf":
        url = _hub_url(url)
        parts = urlsplit(url)
    stores = _obstore().store
    if parts.scheme == "memory":
        return _in_memory.setdefault(url, stores.MemoryStore())
    endpoint = os.environ.get("AWS_ENDPOINT_URL", "") + os.environ.get("AWS_ENDPOINT", "")
    options: dict[str, Any] = {
        "timeout": timedelta(seconds=TIMEOUT),
        "connect_timeout": timedelta(seconds=CONNECT_TIMEOUT),
        "allow_http": parts.scheme == "http" or endpoint.startswith("http://"),
    }
    try:
        # No retries of obstore's own: they would multiply with those of `_retry`.
        return stores.from_url(url, client_options=options, retry_config={"max_retries": 0})
    except (_obstore().exceptions.BaseError, ValueError) as error:
        raise StoreError(f"{url}: is no URL that can be opened ({_brief(error)}); correct it") from error


def _hub_url(url: str) -> str:
    """Return where the hub, or the server in HF_ENDPOINT, gives the files of a hf:// URL."""
    match = _HUB.fullmatch(url)
    if match is None or ".." in re.split(r"[/@]", url):
        raise StoreError(f"{url}: expected hf://datasets/owner/name/… or hf://owner/name/…")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    return f"{endpoint}/{match[1]}/resolve/{match[2] or 'main'}/{match[3] or ''}"


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
    """Return what no repetition mends."""
    errors = _obstore().exceptions
    names = ("PermissionDeniedError", "UnauthenticatedError", "NotSupportedError", "InvalidPathError")
    return (*(getattr(errors, name) for name in names), PermissionError)


def _body(answer: Any, limit: int) -> np.ndarray:
    """Return the bytes of an answer, a little more than `limit` at most: a server may send without end."""
    pieces, size = [], 0
    # In one piece where a server keeps to the size, so that nothing has to be joined.
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


class RemoteChunks:
    """Gives the stored bytes of the chunks of an array.

    Parameters
    ----------
    files
        Where the shards are.
    grid
        Layout of the array.
    present
        {shard: number of its chunks}.
    sums
        uint32 [chunks], their CRC-32C.

    Attributes
    ----------
    waits
        int, calls of `fetch` that had to wait for chunks.
    """

    def __init__(self, files: RemoteFiles, grid: Grid, present: dict[int, int], sums: np.ndarray) -> None:
        self.grid = grid
        self._files = files
        self._present = present
        self._sums = sums
        self._ahead: tuple[Pending, Pending] = ({}, {})  # of the last two calls of `advise`
        self._ahead_of_stored: Pending = {}
        self._indexes: dict[int, np.ndarray] = {}
        self.waits = 0

    def fetch(self, chunks: list[int]) -> dict[int, np.ndarray]:
        """Return the stored bytes of some chunks, uint8 [bytes] each.

        Parameters
        ----------
        chunks
            Ascending numbers of chunks that exist.

        Raises
        ------
        DamagedChunk
            If one has a wrong checksum however often it is read.
        StoreError
            If the server does not answer.
        """
        pending = self._submit(chunks, {**self._ahead[0], **self._ahead[1]})
        self.waits += not all(job.done() for job in pending.values())
        return {chunk: pending[chunk].result()[chunk] for chunk in chunks}

    def damaged(self, chunks: list[int]) -> set[int]:
        """Return which of some chunks are damaged."""
        bad: set[int] = set()
        try:
            self.fetch(chunks)
            return bad
        except DamagedChunk:
            pass
        for chunk in chunks:
            try:
                self.fetch([chunk])
            except DamagedChunk:
                bad.add(chunk)
        return bad

    def advise(self, chunks: list[int]) -> None:
        """Begin to fetch chunks that will be needed soon; they are kept until the second next call."""
        self._ahead = self._ahead[1], self._submit(chunks, {**self._ahead[0], **self._ahead[1]})

    def stored(self, chunk: int) -> np.ndarray:
        """Return bytes of a chunk as the server has them, past the cache; reads ahead."""
        if chunk not in self._ahead_of_stored:
            shard = chunk // self.grid.chunks_per_shard
            end = shard * self.grid.chunks_per_shard + self._present[shard]
            jobs: Pending = {}
            for one in range(chunk, min(chunk + _READ_AHEAD, end)):
                jobs[one] = self._files.pool.submit(self._read, [one])
            self._ahead_of_stored = jobs
        try:
            return self._ahead_of_stored[chunk].result()[chunk]
        except DamagedChunk as error:
            raise StoreError(str(error)) from error

    def _submit(self, chunks: list[int], known: Pending) -> Pending:
        """Return requests for some chunks, new ones for those without a known request that has not failed."""
        pending: Pending = {}
        missing = []
        for chunk in chunks:
            job = known.get(chunk)
            if job is None or (job.done() and job.exception() is not None):
                missing.append(chunk)
            else:
                pending[chunk] = job
        for group in self._groups(missing):
            pending |= dict.fromkeys(group, self._files.pool.submit(self._cached, group))
        return pending

    def _groups(self, chunks: list[int]) -> Iterable[list[int]]:
        """Yield neighbouring chunks of one shard together."""
        most = max(1, _LARGEST_REQUEST // self.grid.chunk_bytes)
        group: list[int] = []
        for chunk in chunks:
            if group and (
                chunk != group[-1] + 1 or chunk % self.grid.chunks_per_shard == 0 or len(group) == most
            ):
                yield group
                group = []
            group.append(chunk)
        if group:
            yield group

    def _cached(self, group: list[int]) -> dict[int, np.ndarray]:
        """Return bytes of neighbouring chunks, from the cache of this machine as far as it has them."""
        cache = self._files.cache
        if cache is None:
            return self._read(group)
        name = self.grid.name
        held = {chunk: cache.get(name, chunk, int(self._sums[chunk])) for chunk in group}
        found = {chunk: data for chunk, data in held.items() if data is not None}
        for missing in self._groups([chunk for chunk in group if chunk not in found]):
            read = self._read(missing)
            for chunk, data in read.items():
                cache.put(name, chunk, int(self._sums[chunk]), data)
            found |= read
        return found

    def _read(self, group: list[int]) -> dict[int, np.ndarray]:
        """Return bytes of neighbouring chunks, in one request; repeated if a checksum is wrong."""
        shard = group[0] // self.grid.chunks_per_shard
        places = [self._place(chunk) for chunk in group]
        begin = places[0][0]
        size = places[-1][0] + places[-1][1] - begin
        bad: list[int] = []
        # A transfer may fail on its way; what is wrong each time is wrong on the server.
        for _ in range(_CHECKED_READS):
            data = self._files.read_range(self.grid.shard_path(shard), begin, size)
            pieces = {
                chunk: data[offset - begin :][:length]
                for chunk, (offset, length) in zip(group, places, strict=True)
            }
            bad = [chunk for chunk, piece in pieces.items() if crc32c(piece) != self._sums[chunk]]
            if not bad:
                return pieces
        raise DamagedChunk(bad[0])

    def _place(self, chunk: int) -> tuple[int, int]:
        """Return offset and bytes of a chunk in its shard."""
        shard, position = divmod(chunk, self.grid.chunks_per_shard)
        # Where raw chunks lie is known without asking for the index.
        if self.grid.compression is None:
            return position * self.grid.chunk_bytes, self.grid.chunk_bytes
        if shard not in self._indexes:
            path = self.grid.shard_path(shard)
            tail = self._files.read_tail(path, self.grid.index_bytes).tobytes()
            try:
                self._indexes[shard] = self.grid.read_index(tail, self._present[shard])
            except ValueError as error:
                raise StoreError(f"{self._files.where}/{path}: {error}; publish the store again") from error
        offset, size = self._indexes[shard][position].tolist()
        return int(offset), int(size)
