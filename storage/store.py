"""Reading a store: its tables, and windows of its runs packed one behind the other."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Self
from urllib.parse import unquote

import numpy as np
import zarr

from .chunks import DecodedRows, chunks_of
from .errors import DamagedChunk, StoreError, StoreUnavailable, StoreWarning
from .layout import Grid, crc32c
from .local import LocalFiles
from .manifest import (
    MANIFEST,
    MANIFEST_LIMIT,
    Manifest,
    directory_of,
    manifest_copy,
    older_manifests,
    parse_manifest,
    read_columns,
    remedy,
)
from .mapping import MappedShards, ReadHints, aligned_empty
from .remote import RemoteChunks, RemoteFiles, is_remote
from .tables import RunTable, SegmentTable
from .text import counted, html_table
from .validate import table_faults

_ATTEMPTS = 5
_ARRAY_METADATA = 2**16  # bytes; ours has some 800
_GROUPS = ("runs", "segments", "labels", "checksums")


class BoldStore:
    """A store of fMRI runs, opened for reading at one generation; made by `BoldStore.open`.

    Runs appended later are not seen and do not disturb.

    Attributes
    ----------
    path
        Where it is: a directory or a URL.
    networks
        Networks of every run.
    dtype
        Element type as stored.
    generation
        Number of the commit that this reader sees.
    snapshot
        Digest of everything committed at that generation.
    attributes
        Metadata of the store (parcellation, preprocessing, …).
    runs, segments
        Tables of the runs, and of their labelled segments.
    files
        Where the bytes of the store come from.
    manifest_bytes
        The root's `zarr.json` of this generation.
    damage
        What is wrong with the newest generation if it is not the one that is read, and what to do; else None.
    """

    def __init__(self, files: LocalFiles | RemoteFiles, manifest: bytes, *, check: bool) -> None:
        self.path = files.where
        self.damage: str | None = None
        self.files = files
        self.manifest_bytes = manifest
        self.manifest: Manifest
        self.manifest, self.layout, self.snapshot = parse_manifest(manifest, self.path)
        files.announce(self.manifest.files)
        self.networks = self.layout.networks
        self.dtype = self.layout.bold_grid.dtype
        self._window_dtype = self.dtype if self.dtype.kind == "f" else np.dtype("<f4")
        self.generation = self.manifest.generation
        self.attributes: dict[str, Any] = self.layout.to_dict()
        groups = {group: self.columns(group) for group in _GROUPS}
        fault = next(table_faults(self.layout, self.manifest, groups), None)
        if fault is not None:
            raise StoreError(
                f"{self.path}/{directory_of(self.generation)}/{fault}; the store is damaged or not by "
                "brainflow: restore it from a copy"
            )
        self.runs = RunTable(groups["runs"])
        labels = {unquote(name): values for name, values in groups["labels"].items()}
        self.segments = SegmentTable(groups["segments"], labels)
        self.checksums = groups["checksums"]
        bold, statistics = self.layout.bold_grid, self.layout.statistics_grid
        present = bold.chunks_in_shards(self.runs.start, self.runs.length)
        self._bold = files.shards(bold, *present, self.checksums["bold"])
        present = statistics.chunks_in_shards(self.runs.slot, np.ones(len(self.runs), np.int64))
        self._statistics = files.shards(statistics, *present, self.checksums["statistics"])
        for shards in (self._bold, self._statistics):
            if check and isinstance(shards, MappedShards):
                self.check_shape(shards.grid)
                shards.check_sizes()
        self._reader, self._rows = _reader(self._bold), _reader(self._statistics)
        self._hints = ReadHints(self._reader) if isinstance(self._reader, MappedShards) else None
        # Where run i - 1 ends, or far below 0 as long as its chunks have not been mapped and checked: windows
        # of known runs need one comparison. Before the first run there is none.
        self._check = check
        self._known_end = np.full(len(self.runs) + 1, np.iinfo(np.int64).min)
        self._damaged_runs: set[int] = set()
        self._known_statistics: set[int] = set()  # chunks that have been compared with their checksums

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, check: bool = True, fallback: bool = True) -> Self:
        """Open the newest generation of a store, or the one before it where the newest is damaged.

        Parameters
        ----------
        path
            Directory of the store, or its URL (s3://, gs://, https://; needs the extra `remote`).
        check
            Look at the size of every file now, and compare the chunks of a run with their checksums when it
            is first read (remote: always).
        fallback
            Read the generation before with a `StoreWarning` if metadata, index or shards of the newest are
            damaged; what is wrong is then in `damage`.

        Raises
        ------
        StoreError
            If there is no store, or a file of it is missing, truncated or damaged and no generation can be
            read; the file is named.
        """
        where = str(path) if is_remote(path) else os.path.abspath(path)
        for attempt in range(_ATTEMPTS):
            files = _files_at(where)
            root = b""
            try:
                root = files.read(MANIFEST, MANIFEST_LIMIT).tobytes()
                return cls(files, root, check=check)
            except StoreUnavailable:
                # No damage: an older generation is not more available.
                raise
            except StoreError as error:
                # A writer may have committed twice while we read the index of an older generation.
                if attempt < _ATTEMPTS - 1 and _root_bytes(_files_at(where)) != root:
                    continue
                older = cls._open_older(files, root, error, check=check) if fallback else None
                if older is None:
                    raise
                return older
        raise AssertionError("not reached")

    @classmethod
    def _open_older(
        cls, files: LocalFiles | RemoteFiles, root: bytes, error: StoreError, *, check: bool
    ) -> Self | None:
        """Return the newest whole generation, with a warning, or None; `error` says what the root's has."""
        for manifest in older_manifests(files, root):
            try:
                store = cls(files, manifest, check=check)
            except StoreError:
                continue
            store.damage = f"{error}. {remedy(store.manifest, root, store.path)}"
            warnings.warn(store.damage, StoreWarning, stacklevel=4)
            return store
        return None

    def windows(
        self,
        starts: Sequence[int] | np.ndarray,
        lengths: Sequence[int] | np.ndarray,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Return windows of runs, packed one behind the other.

        Parameters
        ----------
        starts
            int [windows], absolute first rows (`runs.start[i]` + onset).
        lengths
            int [windows], time points.
        out
            Buffer to reuse, [at least sum(lengths), networks] of the result's element type; take one from
            `buffer`.

        Returns
        -------
        [sum(lengths), networks]
            Of the stored type if that is a float, else float32 in units of BOLD; the first rows of `out` if
            that is given.

        Raises
        ------
        ValueError
            If a window is empty or leaves its run, naming it; if `out` does not fit.
        StoreError
            If a chunk that a window needs is damaged, naming the run.
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
                np.multiply(rows, self._read_row(run)[2], out=out[position : position + len(rows)])
                position += len(rows)
            return out
        except DamagedChunk as error:
            rows_of = self.layout.bold_grid.chunk_rows
            first = self.runs.start[runs] < (error.chunk + 1) * rows_of
            touched = runs[first & (self.runs.end[runs] > error.chunk * rows_of)]
            raise self._damage(int(touched[0]), error.chunk, error.reason) from error

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        runs, attributes = self.runs, self.attributes
        people = len(set(zip(runs.dataset.tolist(), runs.subject.tolist(), strict=True)))
        facts: dict[str, object] = {
            "runs": f"{len(runs):,} of {counted(people, 'person', 'people')}",
            "datasets": ", ".join(sorted(set(runs.dataset.tolist()))),
            "time points": f"{int(runs.length.sum()):,}",
            "networks": self.networks,
            "TR (s)": ", ".join(f"{value:g}" for value in np.unique(runs.t_r)),
            "segments": f"{len(self.segments):,}",
            **{name: attributes[name] for name in ("parcellation", "normalisation")},
            "damage": self.damage,
        }
        return html_table([], [one for one in facts.items() if one[1]], title=str(self.path))

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
        ValueError, StoreError
            As `windows`.
        """
        self._locate(starts, lengths)

    def buffer(self, rows: int) -> np.ndarray:
        """Return a buffer for `windows(out=…)`, [rows, networks], aligned so that copies into it are fast."""
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
        """Return one whole run, [time, networks]; element type as in `windows`."""
        if not -len(self.runs) <= run < len(self.runs):
            raise IndexError(f"run {run}: the store holds {len(self.runs)} runs")
        return self.windows(self.runs.start[run : run + 1 or None], self.runs.length[run : run + 1 or None])

    def statistics(self, run: int) -> dict[str, np.ndarray]:
        """Return `mean` and `std` over time of each network, `scale` of integer types: float32 [networks]."""
        return dict(zip(self.layout.statistics, self._row(run), strict=True))

    def scale(self, run: int) -> np.ndarray:
        """Scale of a run in a store of integers, float32 [networks]: BOLD = stored value · scale."""
        return self._row(run)[2]

    @property
    def bold(self) -> zarr.Array:
        """The array `bold[time, network]` as Zarr gives it; zeros between runs.

        Raises
        ------
        StoreError
            If its metadata is not what this package writes.
        """
        self.check_shape(self.layout.bold_grid)
        return zarr.open_array(self.files.zarr_store(), path="bold", mode="r")

    def stored(self, array: str, chunk: int) -> np.ndarray:
        """Return bytes of a chunk of "bold" or "statistics" as they are stored, uint8 [bytes]."""
        return (self._bold if array == "bold" else self._statistics).stored(chunk)

    def intact(self, starts: Sequence[int] | np.ndarray, lengths: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return which windows can be read: bool [windows], False where a chunk that it needs is damaged.

        For training that shall go on over damage: leave such windows out and count them. On a local store all
        windows of a damaged run count as damaged.

        Parameters
        ----------
        starts, lengths
            As in `windows`.

        Raises
        ------
        ValueError
            If a window is empty or leaves its run, naming it.
        """
        starts, lengths = np.asarray(starts, np.int64), np.asarray(lengths, np.int64)
        runs = self.runs.locate(starts, lengths)
        if isinstance(self._bold, RemoteChunks):
            spans = self.layout.bold_grid.spans(starts, lengths)
            bad = self._bold.damaged(chunks_of(spans))
            whole = np.array([bad.isdisjoint(span) for span in spans], bool)
            return whole & ~np.isin(runs, self._runs_without_scale(np.unique(runs)))
        for run in np.unique(runs[self._known_end[runs + 1] < 0]).tolist():
            if run not in self._damaged_runs:
                try:
                    self._check_runs(np.array([run]))
                except StoreUnavailable:
                    raise
                except StoreError:
                    self._damaged_runs.add(run)
        return np.array([run not in self._damaged_runs for run in runs.tolist()], bool)

    def columns(self, group: str) -> dict[str, np.ndarray]:
        """Return columns of a group of the index, as stored: "runs", "segments", "labels" or "checksums"."""
        return read_columns(self.check_file, self.manifest.files, self.manifest.generation, group)

    def check_shape(self, grid: Grid) -> None:
        """Compare the `zarr.json` of `bold` or `statistics` with what this package writes, byte for byte.

        Its shape is that of this generation, the newest, or one whose commit is under way or was killed.

        Raises
        ------
        StoreError
            If the file is missing or is another.
        """
        file = f"{grid.name}/zarr.json"
        for _ in range(_ATTEMPTS):
            data = self.read_file(file, _ARRAY_METADATA).tobytes()
            if data == self.layout.array_metadata(grid, _rows(self.manifest, grid)):
                return
            root = _root_bytes(self.files)
            if any(
                data == self.layout.array_metadata(grid, rows) for rows in self._other_rows(grid, root, data)
            ):
                return
            # Nobody has committed while we looked, so it is damage.
            if _root_bytes(self.files) == root:
                break
        raise StoreError(f"{self.path}/{file}: damaged; restore this file from a copy of the store")

    def _other_rows(self, grid: Grid, root: bytes, data: bytes) -> Iterator[int]:
        """Yield rows that an array may have while others write: of the newest generation and the next."""
        newest = self.manifest
        try:
            newest = parse_manifest(root, self.path)[0]
            yield _rows(newest, grid)
        except StoreError:  # damaged; then we read an older generation
            pass
        copied = newest.copied
        for generation in sorted({self.generation + 1, newest.generation + 1}):
            try:
                copy = self.read_file(manifest_copy(generation), MANIFEST_LIMIT).tobytes()
                yield _rows(parse_manifest(copy, self.path)[0], grid)
                copied = True
            except StoreError:
                pass
        if not copied:  # nor did the writer of older versions leave a copy before it wrote the new shape
            shape = re.search(rb'"shape": \[(\d{1,18}),', data)
            if shape and int(shape[1]) > _rows(newest, grid):
                yield int(shape[1])

    def _locate(
        self, starts: Sequence[int] | np.ndarray, lengths: Sequence[int] | np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return first rows, lengths and runs of some windows, int64 [windows] each, all of them checked."""
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
            if self.dtype.kind == "i":
                self._check_statistics(run)
            self._known_end[run + 1] = end

    def _check_statistics(self, run: int) -> None:
        """Compare the chunk of a run's row of `statistics` with its checksum, once (remote: always)."""
        chunk = int(self.runs.slot[run]) // self.layout.statistics_grid.chunk_rows
        if not self._check or isinstance(self._statistics, RemoteChunks) or chunk in self._known_statistics:
            return
        if crc32c(self._statistics.stored(chunk)) != self.checksums["statistics"][chunk]:
            raise self._statistics_damage(run, DamagedChunk(chunk))
        self._known_statistics.add(chunk)

    def _runs_without_scale(self, runs: np.ndarray) -> list[int]:
        """Return those of some runs of integers whose row of `statistics`, hence their scale, is damaged."""
        lost = []
        for run in runs.tolist() if self.dtype.kind == "i" else []:
            try:
                self._row(run)
            except StoreUnavailable:
                raise
            except StoreError:
                lost.append(run)
        return lost

    def _with_whole_new_runs(self, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return some windows; of runs whose checksums are still to be looked at all chunks of the run."""
        before = self.runs.begun(starts)
        new = self._known_end.take(before) < 0
        if not (self._check and new.any()):
            return starts, lengths
        # A run is compared with its checksums as a whole when it is first met. Left to be read page by page
        # then, six cold batches took 24 to 28 s; announced as a whole, 2.4.
        runs, rows = np.unique(before[new] - 1), self.layout.bold_grid.chunk_rows
        begin, end = self.runs.start[runs] // rows * rows, -(-self.runs.end[runs] // rows) * rows
        return np.concatenate([starts[~new], begin]), np.concatenate([lengths[~new], end - begin])

    def _damage(self, run: int, chunk: int, reason: str = "wrong checksum") -> StoreError:
        grid = self.layout.bold_grid
        return StoreError(
            f"{self.path}: run {self.runs.key_of(run)}: chunk {chunk} "
            f"({grid.shard_path(chunk // grid.chunks_per_shard)}) is damaged ({reason}); "
            "`brainflow verify` lists all damage; restore the file from a copy"
        )

    def _row(self, run: int) -> np.ndarray:
        """Return the row of a run in `statistics`, float32 [statistics, networks]."""
        self._check_statistics(run)
        return self._read_row(run)

    def _read_row(self, run: int) -> np.ndarray:
        """Return it as `_row`, of a run whose statistics have been checked."""
        try:
            return self._rows.row(int(self.runs.slot[run]))
        except DamagedChunk as error:
            raise self._statistics_damage(run, error) from error

    def _statistics_damage(self, run: int, error: DamagedChunk) -> StoreError:
        grid = self.layout.statistics_grid
        return StoreError(
            f"{self.path}: run {self.runs.key_of(run)}: chunk {error.chunk} of statistics "
            f"({grid.shard_path(error.chunk // grid.chunks_per_shard)}) {error}; `brainflow verify` lists "
            "all damage; restore the file from a copy"
        )

    def read_file(self, relative: str, limit: int) -> np.ndarray:
        """Return a file of the store of at most `limit` bytes: uint8 [bytes]."""
        return self.files.read(relative, limit)

    def check_file(self, relative: str, manifest: Manifest | None = None) -> np.ndarray:
        """Return a file that the manifest lists, uint8 [bytes].

        Parameters
        ----------
        relative
            Path of the file in the store.
        manifest
            Of another generation; by default this one's.

        Raises
        ------
        StoreError
            If its size or checksum is not the listed one.
        """
        size, checksum = (manifest or self.manifest).files.get(relative, [0, -1])
        data = self.read_file(relative, size)
        if len(data) != size:
            raise StoreError(
                f"{self.path}/{relative}: has {len(data)} bytes, expected {size}; restore it from a copy"
            )
        if crc32c(data) != checksum:
            raise StoreError(f"{self.path}/{relative}: damaged (wrong checksum); restore it from a copy")
        return data

    def is_newest(self) -> bool:
        """Whether nobody has committed to the store since it was opened."""
        return _root_bytes(self.files) == self.manifest_bytes


def _reader(shards: MappedShards | RemoteChunks) -> MappedShards | DecodedRows:
    """Return rows of an array: mapped where that can be done."""
    if isinstance(shards, MappedShards) and shards.grid.compression is None:
        return shards
    return DecodedRows(shards.grid, shards.fetch)


def _files_at(where: str) -> LocalFiles | RemoteFiles:
    return RemoteFiles(where) if is_remote(where) else LocalFiles(where)


def _rows(manifest: Manifest, grid: Grid) -> int:
    return manifest.rows if grid.name == "bold" else manifest.slots


def _root_bytes(files: LocalFiles | RemoteFiles) -> bytes:
    """Return the root's `zarr.json` as it stands, or nothing."""
    try:
        return files.read(MANIFEST, MANIFEST_LIMIT).tobytes()
    except StoreError:
        return b""
