"""Reading a store: its tables, and windows of its runs packed one behind the other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Self
from urllib.parse import unquote

import numpy as np
import zarr

from .buffers import aligned_empty
from .decoding import DecodedRows, chunks_of
from .errors import DamagedChunk, StoreError
from .hints import ReadHints
from .index import read_columns
from .layout import crc32c
from .local import LocalFiles
from .manifest import MANIFEST, Manifest, parse_manifest
from .mapping import MappedShards
from .remote import RemoteFiles, is_remote
from .remote_chunks import RemoteChunks
from .segments import RunTable, SegmentTable

_ATTEMPTS = 5


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

    def __init__(self, files: LocalFiles | RemoteFiles, manifest: bytes, *, check: bool) -> None:
        self.path = files.where
        self._files = files
        self.manifest: Manifest
        self.manifest, self.layout, self.snapshot = parse_manifest(manifest, self.path)
        files.announce(list(self.manifest.files))
        self.networks = self.layout.networks
        self.dtype = self.layout.bold_grid.dtype
        self._window_dtype = self.dtype if self.dtype.kind == "f" else np.dtype("<f4")
        self.generation = self.manifest.generation
        self.attributes: dict[str, Any] = self.layout.to_dict()
        self.runs = RunTable(self.columns("runs"))
        labels = {unquote(name): values for name, values in self.columns("labels").items()}
        self.segments = SegmentTable(self.columns("segments"), labels)
        self.checksums = self.columns("checksums")
        if len(self.runs) != self.manifest.runs or len(self.segments) != self.manifest.segments:
            raise StoreError(f"{self.path}/{MANIFEST}: does not fit the index; restore the store from a copy")
        bold, statistics = self.layout.bold_grid, self.layout.statistics_grid
        present = bold.chunks_in_shards(self.runs.start, self.runs.length)
        self._bold = files.shards(bold, *present, self.checksums["bold"])
        present = statistics.chunks_in_shards(self.runs.slot, np.ones(len(self.runs), np.int64))
        self._statistics = files.shards(statistics, *present, self.checksums["statistics"])
        for shards in (self._bold, self._statistics):
            if check and isinstance(shards, MappedShards):
                shards.check_sizes()
        self._reader, self._rows = _reader(self._bold), _reader(self._statistics)
        self._hints = ReadHints(self._reader) if isinstance(self._reader, MappedShards) else None
        # Where run i - 1 ends, or far below 0 as long as its chunks have not been mapped and checked: windows
        # of known runs need one comparison. Before the first run there is none.
        self._check = check
        self._known_end = np.full(len(self.runs) + 1, np.iinfo(np.int64).min)
        self._damaged_runs: set[int] = set()

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, check: bool = True, fallback: bool = True) -> Self:
        """Open the newest generation of a store.

        Parameters
        ----------
        path : directory of the store, or its URL (s3://, gs://, https://; needs the extra `remote`)
        check : look at the size of every file now, and compare the chunks of a run with their checksums when
            it is first read (remote: always)

        Raises
        ------
        StoreError : if there is no store, or a file of it is missing, truncated or damaged; it is named
        """
        where = str(path) if is_remote(path) else os.path.abspath(path)
        for attempt in range(_ATTEMPTS):
            files = RemoteFiles(where) if is_remote(where) else LocalFiles(where)
            manifest = files.read(MANIFEST).tobytes()
            try:
                return cls(files, manifest, check=check)
            except StoreError:
                # A writer may have committed twice while we read the index of an older generation.
                if attempt == _ATTEMPTS - 1 or _manifest_bytes(where) == manifest:
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
        out : buffer to reuse, [at least sum(lengths), networks] of the result's element type; take one from
            `buffer`

        Returns
        -------
        [sum(lengths), networks] : of the stored type if that is a float, else float32 in units of BOLD;
            the first rows of `out` if that is given

        Raises
        ------
        ValueError : if a window is empty or leaves its run, naming it; if `out` does not fit
        StoreError : if a chunk that a window needs is damaged, naming the run
        """
        starts, lengths, runs = self._locate(starts, lengths)
        out = self._buffer(out, int(np.add.reduce(lengths)))
        if not len(starts):
            return out
        try:
            if self.dtype.kind == "f":
                self._reader.copy(starts, lengths, out)
                return out
            position = 0
            for rows, run in zip(self._reader.windows(starts, lengths), runs.tolist(), strict=True):
                np.multiply(rows, self.scale(run), out=out[position : position + len(rows)])
                position += len(rows)
            return out
        except DamagedChunk as error:
            rows_of = self.layout.bold_grid.chunk_rows
            first = self.runs.start[runs] < (error.chunk + 1) * rows_of
            touched = runs[first & (self.runs.end[runs] > error.chunk * rows_of)]
            raise self._damage(int(touched[0]), error.chunk) from error

    @property
    def rows(self) -> np.ndarray | None:
        """All rows of `bold` where they lie on disk, without a copy: read-only [rows, networks].

        Touch only rows of windows that `check` has let pass; others may kill the process. None if the store
        is remote, compressed or of integers: use `windows`.
        """
        reader = self._reader
        return reader.flat if isinstance(reader, MappedShards) and self.dtype.kind == "f" else None

    def check(self, starts: Sequence[int] | np.ndarray, lengths: Sequence[int] | np.ndarray) -> None:
        """Map what windows need and compare it with its checksums, as `windows` does, without reading them.

        Raises
        ------
        ValueError, StoreError : as `windows`
        """
        self._locate(starts, lengths)

    def buffer(self, rows: int) -> np.ndarray:
        """A buffer for `windows(out=…)`, [rows, networks], aligned so that copies into it are fast."""
        return aligned_empty(rows, self.networks, self._window_dtype)

    def advise(self, starts: np.ndarray, lengths: np.ndarray) -> None:
        """Announce windows that are read soon, such as those of the next batch; returns at once.

        On a local raw store it tells the kernel, which costs a few microseconds a window on a cold store and
        next to nothing on one that is in memory; from a remote store it begins to fetch the chunks. Does
        nothing for local compressed stores.
        """
        starts, lengths = np.asarray(starts, np.int64), np.asarray(lengths, np.int64)
        if self._hints is not None and len(starts):
            self._hints.advise(*self._with_whole_new_runs(starts, lengths))
        elif isinstance(self._bold, RemoteChunks):
            starts, lengths, _ = self._locate(starts, lengths)
            self._bold.advise(chunks_of(self.layout.bold_grid.spans(starts, lengths)))

    @property
    def waits(self) -> int:
        """How often `windows` had to wait for chunks from a server."""
        return self._bold.waits if isinstance(self._bold, RemoteChunks) else 0

    def run(self, run: int) -> np.ndarray:
        """One whole run, [time, networks]; element type as in `windows`."""
        if not -len(self.runs) <= run < len(self.runs):
            raise IndexError(f"run {run}: the store holds {len(self.runs)} runs")
        return self.windows(self.runs.start[run : run + 1 or None], self.runs.length[run : run + 1 or None])

    def statistics(self, run: int) -> dict[str, np.ndarray]:
        """`mean` and `std` over time of each network, and `scale` of integer types: float32 [networks]."""
        return dict(zip(self.layout.statistics, self._row(run), strict=True))

    def scale(self, run: int) -> np.ndarray:
        """Scale of a run in a store of integers, float32 [networks]: BOLD = stored value · scale."""
        return self._row(run)[2]

    @property
    def bold(self) -> zarr.Array:
        """The array `bold[time, network]` as Zarr gives it; zeros between runs."""
        return zarr.open_array(self._files.zarr_store(), path="bold", mode="r")

    def stored(self, array: str, chunk: int) -> np.ndarray:
        """Bytes of a chunk of "bold" or "statistics" as they are stored, uint8 [bytes]."""
        return (self._bold if array == "bold" else self._statistics).stored(chunk)

    def intact(self, starts: Sequence[int] | np.ndarray, lengths: Sequence[int] | np.ndarray) -> np.ndarray:
        """Which windows can be read: bool [windows], False where a chunk that it needs is damaged.

        For training that shall go on over damage: leave such windows out and count them. On a local store all
        windows of a damaged run count as damaged.

        Parameters
        ----------
        starts, lengths : as in `windows`

        Raises
        ------
        ValueError : if a window is empty or leaves its run, naming it
        """
        starts, lengths = np.asarray(starts, np.int64), np.asarray(lengths, np.int64)
        runs = self.runs.locate(starts, lengths)
        if isinstance(self._bold, RemoteChunks):
            spans = self.layout.bold_grid.spans(starts, lengths)
            bad = self._bold.damaged(chunks_of(spans))
            return np.array([bad.isdisjoint(span) for span in spans], bool)
        for run in np.unique(runs[self._known_end[runs + 1] < 0]).tolist():
            if run not in self._damaged_runs:
                try:
                    self._check_runs(np.array([run]))
                except StoreError:
                    self._damaged_runs.add(run)
        return np.array([run not in self._damaged_runs for run in runs.tolist()], bool)

    def columns(self, group: str) -> dict[str, np.ndarray]:
        """Columns of a group of the index, as stored: "runs", "segments", "labels" or "checksums"."""
        return read_columns(self.check_file, self.manifest.files, self.manifest.generation, group)

    def _locate(
        self, starts: Sequence[int] | np.ndarray, lengths: Sequence[int] | np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First rows, lengths and runs of some windows, int64 [windows] each, all of them checked."""
        starts, lengths = np.asarray(starts, np.int64), np.asarray(lengths, np.int64)
        if starts.ndim != 1 or starts.shape != lengths.shape:
            raise ValueError(
                f"starts and lengths must be vectors of one length, got {list(starts.shape)}, "
                f"{list(lengths.shape)}"
            )
        stops = starts + lengths
        before = self.runs.begun(starts)  # runs that begin at or before each window
        good = (starts < stops) & (stops <= self._known_end.take(before))
        runs = before - 1
        if b"\0" in good.tobytes():  # the fastest way to ask
            self.runs.check(starts, lengths, runs)
            self._check_runs(np.unique(runs))
        return starts, lengths, runs

    def _buffer(self, out: np.ndarray | None, rows: int) -> np.ndarray:
        if out is None:
            return self.buffer(rows)
        dtype = self._window_dtype
        if out.dtype != dtype or out.ndim != 2 or out.shape[1] != self.networks or len(out) < rows:
            raise ValueError(
                f"out: got {out.dtype} of shape {list(out.shape)}, expected {dtype} of shape "
                f"[at least {rows}, {self.networks}]"
            )
        return out[:rows]

    def _check_runs(self, runs: np.ndarray) -> None:
        """Map the shards of some local runs and compare all their chunks with their checksums."""
        grid, checksums = self.layout.bold_grid, self.checksums["bold"]
        if self._hints is not None and self._check:
            self._hints.advise(*self._with_whole_new_runs(self.runs.start[runs], self.runs.length[runs]))
        for run in runs[self._known_end[runs + 1] < 0].tolist():
            start, end = int(self.runs.start[run]), int(self.runs.end[run])
            if isinstance(self._reader, MappedShards):
                self._reader.rows(start // grid.shard_rows)
            if self._check and isinstance(self._bold, MappedShards):
                for chunk in range(start // grid.chunk_rows, (end - 1) // grid.chunk_rows + 1):
                    if crc32c(self._bold.stored(chunk)) != checksums[chunk]:
                        raise self._damage(run, chunk)
            self._known_end[run + 1] = end

    def _with_whole_new_runs(self, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Some windows, those of runs whose checksums are still to be looked at as all chunks of the run."""
        before = self.runs.begun(starts)
        new = self._known_end.take(before) < 0
        if not (self._check and new.any()):
            return starts, lengths
        runs, rows = np.unique(before[new] - 1), self.layout.bold_grid.chunk_rows
        begin, end = self.runs.start[runs] // rows * rows, -(-self.runs.end[runs] // rows) * rows
        return np.concatenate([starts[~new], begin]), np.concatenate([lengths[~new], end - begin])

    def _damage(self, run: int, chunk: int) -> StoreError:
        grid = self.layout.bold_grid
        return StoreError(
            f"{self.path}: run {self.runs.key_of(run)}: chunk {chunk} "
            f"({grid.shard_path(chunk // grid.chunks_per_shard)}) is damaged (wrong checksum); "
            "`brainflow verify` lists all damage; restore the file from a copy"
        )

    def _row(self, run: int) -> np.ndarray:
        """Row of a run in `statistics`, float32 [statistics, networks]."""
        try:
            return self._rows.row(int(self.runs.slot[run]))
        except DamagedChunk as error:
            raise StoreError(
                f"{self.path}: run {self.runs.key_of(run)}: chunk {error.chunk} of statistics is damaged "
                "(wrong checksum); `brainflow verify` lists all damage; restore the file from a copy"
            ) from error

    def read_file(self, relative: str) -> np.ndarray:
        """A file of the store: uint8 [bytes]."""
        return self._files.read(relative)

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


def _reader(shards: MappedShards | RemoteChunks) -> MappedShards | DecodedRows:
    """Rows of an array: mapped where that can be done."""
    if isinstance(shards, MappedShards) and shards.grid.compression is None:
        return shards
    return DecodedRows(shards.grid, shards.fetch)


def _manifest_bytes(where: str) -> bytes:
    """The manifest as it stands, or nothing."""
    try:
        files = RemoteFiles(where) if is_remote(where) else LocalFiles(where)
        return files.read(MANIFEST).tobytes()
    except StoreError:
        return b""
