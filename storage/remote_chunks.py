"""Chunks of a remote array: concurrent range reads of just those that are needed, each checked."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future
from typing import TYPE_CHECKING

import numpy as np

from .errors import DamagedChunk, StoreError
from .layout import Grid, crc32c

if TYPE_CHECKING:
    from .remote import RemoteFiles

_LARGEST_REQUEST = 2**22  # bytes: neighbouring chunks are read together up to this
_CHECKED_READS = 3  # of a chunk with a wrong checksum, before it counts as damaged
_READ_AHEAD = 16  # chunks

Pending = dict[int, "Future[dict[int, np.ndarray]]"]


class RemoteChunks:
    """Gives the stored bytes of the chunks of an array.

    Parameters
    ----------
    files : where the shards are
    grid : layout of the array
    present : {shard: number of its chunks}
    sums : uint32 [chunks], their CRC-32C

    Attributes
    ----------
    waits : int, calls of `fetch` that had to wait for chunks
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
        """Stored bytes of some chunks, uint8 [bytes] each.

        Parameters
        ----------
        chunks : ascending numbers of chunks that exist

        Raises
        ------
        DamagedChunk : if one has a wrong checksum however often it is read
        StoreError : if the server does not answer
        """
        pending = self._submit(chunks, {**self._ahead[0], **self._ahead[1]})
        self.waits += not all(job.done() for job in pending.values())
        return {chunk: pending[chunk].result()[chunk] for chunk in chunks}

    def damaged(self, chunks: list[int]) -> set[int]:
        """Which of some chunks are damaged."""
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
        """Bytes of a chunk as the server has them, past the cache; reads ahead."""
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
        """Requests for some chunks, new ones for those without a known request that has not failed."""
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
        """Neighbouring chunks of one shard together."""
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
        """Bytes of neighbouring chunks, from the cache of this machine as far as it has them."""
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
        """Bytes of neighbouring chunks, in one request; repeated if a checksum is wrong."""
        shard = group[0] // self.grid.chunks_per_shard
        places = [self._place(chunk) for chunk in group]
        begin = places[0][0]
        size = places[-1][0] + places[-1][1] - begin
        bad: list[int] = []
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
        """Offset and bytes of a chunk in its shard."""
        shard, position = divmod(chunk, self.grid.chunks_per_shard)
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
