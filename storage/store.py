"""Reading a store: its tables, and windows of its runs packed one behind the other."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from typing import Any, Self
from urllib.parse import unquote

import numpy as np
import zarr

from .decoding import DecodedRows
from .errors import StoreError
from .hints import ReadHints
from .index import read_columns
from .layout import crc32c
from .manifest import MANIFEST, Manifest, parse_manifest
from .mapping import MappedShards
from .segments import RunTable, SegmentTable

_ATTEMPTS = 5
_SMALL_FILE = 2**16  # read rather than mapped


class BoldStore:
    """A store of fMRI runs, opened for reading at one generation; made by `BoldStore.open`.

    Runs appended later are not seen and do not disturb.

    Attributes
    ----------
    path : str
    networks : int, networks of every run
    dtype : numpy.dtype of the stored elements
    generation : int, number of the commit that this reader sees
    snapshot : str, digest of everything committed at that generation
    attributes : dict, metadata of the store (parcellation, preprocessing, …)
    runs : RunTable
    segments : SegmentTable
    """

    def __init__(self, path: str, directory: int, *, check: bool) -> None:
        self.path = path
        self._directory = directory
        weakref.finalize(self, os.close, directory)
        self._check = check
        self.manifest: Manifest
        self.manifest, self.layout, self.snapshot = parse_manifest(self.read_file(MANIFEST).tobytes(), path)
        self.networks = self.layout.networks
        self.dtype = self.layout.bold_grid.dtype
        self.generation = self.manifest.generation
        self.attributes: dict[str, Any] = self.layout.to_dict()
        self.runs = RunTable(self.columns("runs"))
        labels = {unquote(name): values for name, values in self.columns("labels").items()}
        self.segments = SegmentTable(self.columns("segments"), labels)
        self.checksums = self.columns("checksums")
        if len(self.runs) != self.manifest.runs or len(self.segments) != self.manifest.segments:
            raise StoreError(f"{path}/{MANIFEST}: does not fit the index; restore the store from a copy")
        bold, statistics = self.layout.bold_grid, self.layout.statistics_grid
        present = bold.chunks_in_shards(self.runs.start, self.runs.length)
        self._shards = MappedShards(directory, path, bold, *present)
        present = statistics.chunks_in_shards(self.runs.slot, np.ones(len(self.runs), np.int64))
        self._statistics = MappedShards(directory, path, statistics, *present)
        raw = bold.compression is None
        self._reader: MappedShards | DecodedRows = self._shards if raw else DecodedRows(self._shards)
        self._hints = ReadHints(self._shards) if raw else None
        self._good = np.zeros(len(self.runs), bool)  # runs whose chunks have been checked

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, check: bool = True) -> Self:
        """Open the newest generation of a store.

        Parameters
        ----------
        path : directory of the store
        check : compare the chunks of a run with their checksums when it is first read

        Raises
        ------
        StoreError : if there is no store, or a file of it is missing, truncated or damaged; it is named
        """
        where = os.path.abspath(path)
        for attempt in range(_ATTEMPTS):
            before = _manifest_bytes(where)
            try:
                directory = os.open(where, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError as error:
                raise StoreError(
                    f"{where}: no store here ({error.strerror}); write one with `brainflow ingest` or "
                    "StoreWriter"
                ) from error
            try:
                return cls(where, directory, check=check)
            except StoreError:
                # A writer may have committed twice while we read the index of an older generation.
                if attempt == _ATTEMPTS - 1 or _manifest_bytes(where) == before:
                    raise
        raise AssertionError("not reached")

    def windows(
        self,
        starts: Sequence[int] | np.ndarray,
        lengths: Sequence[int] | np.ndarray,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Windows of runs, packed one behind the other.

        Parameters
        ----------
        starts : int [windows], absolute first rows (`runs.start[i]` + onset)
        lengths : int [windows], time points
        out : buffer to reuse, [at least sum(lengths), networks] of the result's element type

        Returns
        -------
        [sum(lengths), networks] : of the stored type if that is a float, else float32 in units of BOLD;
            the first rows of `out` if that is given

        Raises
        ------
        ValueError : if a window is empty or leaves its run, naming it; if `out` does not fit
        StoreError : if a chunk that a window needs is damaged, naming the run
        """
        starts, lengths = np.asarray(starts, np.int64), np.asarray(lengths, np.int64)
        if starts.ndim != 1 or starts.shape != lengths.shape:
            raise ValueError(
                f"starts and lengths must be vectors of one length, got {list(starts.shape)}, "
                f"{list(lengths.shape)}"
            )
        runs = self.runs.locate(starts, lengths)
        if self._check and np.count_nonzero(self._good[runs]) != len(runs):
            self._check_runs(np.unique(runs[~self._good[runs]]))
        ends = lengths.cumsum().tolist()
        out = self._buffer(out, ends[-1] if ends else 0)
        if self.dtype.kind == "f":
            self._reader.copy(starts, lengths, ends, out)
            return out
        position = 0
        for rows, run in zip(self._reader.windows(starts, lengths), runs.tolist(), strict=True):
            np.multiply(rows, self.scale(run), out=out[position : position + len(rows)])
            position += len(rows)
        return out

    def advise(self, starts: np.ndarray, lengths: np.ndarray) -> None:
        """Tell the kernel that these windows are read soon, such as those of the next batch; returns at once.

        It costs a few microseconds a window on a cold store and next to nothing on one that is in memory.
        Does nothing for compressed stores.
        """
        if self._hints is not None and len(starts):
            self._hints.advise(np.asarray(starts, np.int64), np.asarray(lengths, np.int64))

    def run(self, run: int) -> np.ndarray:
        """One whole run, [time, networks]; element type as in `windows`."""
        if not -len(self.runs) <= run < len(self.runs):
            raise IndexError(f"run {run}: the store holds {len(self.runs)} runs")
        return self.windows(self.runs.start[run : run + 1 or None], self.runs.length[run : run + 1 or None])

    def statistics(self, run: int) -> dict[str, np.ndarray]:
        """`mean` and `std` over time of each network, and `scale` of integer types: float32 [networks]."""
        slot = int(self.runs.slot[run])
        shard, row = divmod(slot, self._statistics.grid.shard_rows)
        values = self._statistics.rows(shard)[row]
        return dict(zip(self.layout.statistics, values, strict=True))

    def scale(self, run: int) -> np.ndarray:
        """Scale of a run in a store of integers, float32 [networks]: BOLD = stored value · scale."""
        shard, row = divmod(int(self.runs.slot[run]), self._statistics.grid.shard_rows)
        return self._statistics.rows(shard)[row, 2]

    @property
    def bold(self) -> zarr.Array:
        """The array `bold[time, network]` as Zarr gives it; zeros between runs."""
        return zarr.open_array(self.path, path="bold", mode="r")

    def stored(self, array: str, chunk: int) -> np.ndarray:
        """Bytes of a chunk of "bold" or "statistics" as they are stored, uint8 [bytes]."""
        return (self._shards if array == "bold" else self._statistics).stored(chunk)

    def columns(self, group: str) -> dict[str, np.ndarray]:
        """Columns of a group of the index, as stored: "runs", "segments", "labels" or "checksums"."""
        return read_columns(self.check_file, self.manifest.files, self.manifest.generation, group)

    def _buffer(self, out: np.ndarray | None, rows: int) -> np.ndarray:
        dtype = self.dtype if self.dtype.kind == "f" else np.dtype("<f4")
        if out is None:
            return np.empty((rows, self.networks), dtype)
        if out.dtype != dtype or out.ndim != 2 or out.shape[1] != self.networks or len(out) < rows:
            raise ValueError(
                f"out: got {out.dtype} of shape {list(out.shape)}, expected {dtype} of shape "
                f"[at least {rows}, {self.networks}]"
            )
        return out[:rows]

    def _check_runs(self, runs: np.ndarray) -> None:
        """Compare all chunks of some runs with their checksums."""
        grid, checksums = self.layout.bold_grid, self.checksums["bold"]
        for run in runs.tolist():
            start, length = int(self.runs.start[run]), int(self.runs.length[run])
            for chunk in range(start // grid.chunk_rows, (start + length - 1) // grid.chunk_rows + 1):
                if crc32c(self._shards.stored(chunk)) != checksums[chunk]:
                    raise StoreError(
                        f"{self.path}: run {self.runs.key_of(run)}: chunk {chunk} "
                        f"({grid.shard_path(chunk // grid.chunks_per_shard)}) is damaged (wrong checksum); "
                        "`brainflow verify` lists all damage; restore the file from a copy"
                    )
            self._good[run] = True

    def read_file(self, relative: str) -> np.ndarray:
        """A file of the store: uint8 [bytes]."""
        try:
            descriptor = os.open(relative, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._directory)
        except OSError as error:
            what = (
                "no store here, or a damaged one"
                if relative == MANIFEST
                else "a file of the store is missing"
            )
            raise StoreError(
                f"{self.path}/{relative}: {what} ({error.strerror}); restore it from a copy"
            ) from error
        with os.fdopen(descriptor, "rb") as file:
            if os.fstat(descriptor).st_size < _SMALL_FILE:
                return np.frombuffer(file.read(), np.uint8)
            return np.memmap(file, np.uint8, "r").view(np.ndarray)

    def check_file(self, relative: str) -> np.ndarray:
        """A file that the manifest lists, uint8 [bytes].

        Raises
        ------
        StoreError : if its size or checksum is not the listed one
        """
        data = self.read_file(relative)
        size, checksum = self.manifest.files.get(relative, [-1, -1])
        if len(data) != size:
            raise StoreError(
                f"{self.path}/{relative}: has {len(data)} bytes, expected {size}; restore it from a copy"
            )
        if crc32c(data) != checksum:
            raise StoreError(f"{self.path}/{relative}: damaged (wrong checksum); restore it from a copy")
        return data


def _manifest_bytes(path: str) -> bytes:
    """The manifest as it stands, or nothing."""
    try:
        with open(os.path.join(path, MANIFEST), "rb") as file:
            return file.read()
    except OSError:
        return b""
