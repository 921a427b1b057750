"""Writing a store: runs are appended one at a time and become visible together, at the commit."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from .attributes import StoreAttributes
from .columns import PendingRuns, check_segments
from .errors import StoreError
from .files import (
    Lock,
    move_into_place,
    remove,
    replace_durably,
    restore_interrupted_move,
    sync_directory,
    write_durably,
)
from .layout import CHUNK_ROWS, SHARD_ROWS, Grid, run_key
from .manifest import (
    MANIFEST,
    MANIFEST_COPY,
    MANIFEST_LIMIT,
    Manifest,
    directory_of,
    parse_manifest,
    write_index,
)
from .quantise import Overflow, encode, run_statistics
from .remote import is_remote
from .shards import ShardWriter
from .staging import OURS, check_target, discard, stage
from .store import BoldStore
from .tables import Segment


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """A run that has been checked and rounded: values and statistics as stored, and its row of the tables."""

    values: np.ndarray
    statistics: np.ndarray
    row: dict[str, Any]


class StoreWriter:
    """Writes runs to a store. Made by `create` or `append_to`; use it in a `with` block.

    Leaving the block without an error commits; with an error, the store is as it was before. Killed at any
    instant, the store is as it was at the last commit. One writer at a time: another one is refused. Several
    processes write parts instead (`write_part`, `gather`).

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> path = tempfile.mkdtemp() + "/rest.zarr"
    >>> with StoreWriter.create(path, networks=3, parcellation="three parcels") as writer:
    ...     run = writer.append(np.zeros((8, 3)), t_r=2.0, dataset="mine", subject="01", task="rest")
    >>> BoldStore.open(path).run(0).shape
    (8, 3)
    """

    def __init__(
        self, root: Path, *, target: Path | None, attributes: StoreAttributes, locks: list[Lock]
    ) -> None:
        self._root = root
        self._target = target  # where a new store goes at its first commit; None once it is there
        self._staging = None if target is None else root
        self._attributes = attributes
        self._locks = locks  # of `root`, and of the store that a new one replaces; none once closed
        self._content = b""  # of the manifest of the last commit that was begun
        if target is None:
            # No fallback: runs appended to an older generation would be the end of the newest.
            committed = BoldStore.open(root, check=False, fallback=False)
            self._manifest = committed.manifest
            self._runs = PendingRuns(
                {group: committed.columns(group) for group in ("runs", "segments", "labels")}
            )
            self._checksums: dict[str, np.ndarray] = committed.checksums
            self._remove_uncommitted(self._manifest)
        else:
            self._manifest = Manifest(generation=-1, runs=0, segments=0, rows=0, slots=0, files={})
            self._runs = PendingRuns()
            self._checksums = {}
        self._start_shards()

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        *,
        networks: int,
        dtype: str = "float16",
        parcellation: str = "",
        network_names: Sequence[str] | None = None,
        network_coordinates: Sequence[Sequence[float]] | np.ndarray | None = None,
        preprocessing: Mapping[str, Any] | None = None,
        normalisation: str = "",
        provenance: Mapping[str, Any] | None = None,
        compression: str | None = None,
        overwrite: bool = False,
        chunk_rows: int = CHUNK_ROWS,
        shard_rows: int = SHARD_ROWS,
    ) -> Self:
        """Begin a new store; it appears at `path` with the first commit.

        Parameters
        ----------
        path
            Directory to be made.
        networks
            Networks (parcels) of every run.
        dtype
            "float16", "float32", or "int16", "int8" with one scale per run and network.
        parcellation
            Name of the atlas and its version.
        network_names
            One name per network.
        network_coordinates
            [networks, 3], centre of each network in mm.
        preprocessing
            What was done to the data, as JSON values.
        normalisation
            Normalisation already applied to the runs, such as "z-scored per run and network".
        provenance
            Where the data come from, as JSON values; no time stamps, if equal inputs shall give equal bytes.
        compression
            None (mapped by the reader, fast) or "zstd".
        overwrite
            Replace the store at `path`, in one step, at the first commit.
        chunk_rows, shard_rows
            Rows of a chunk and of a shard file; a run is at most `shard_rows` long.

        Raises
        ------
        StoreError
            If `path` exists and `overwrite` is false, or is not a store, or somebody else writes it.
        ValueError
            If an argument does not fit the others.
        """
        attributes = StoreAttributes.build(
            networks=networks,
            dtype=dtype,
            parcellation=parcellation,
            network_names=network_names,
            network_coordinates=network_coordinates,
            preprocessing=preprocessing,
            normalisation=normalisation,
            provenance=provenance,
            compression=compression,
            chunk_rows=chunk_rows,
            shard_rows=shard_rows,
        )
        _refuse_url(path)
        # Links are resolved once: lock, staging directory and rename have to mean the same place.
        target = Path(os.path.realpath(path))
        check_target(target, overwrite)
        target.parent.mkdir(parents=True, exist_ok=True)
        root, staging = stage(target)
        locks = [staging]
        try:
            restore_interrupted_move(target)
            check_target(target, overwrite)  # again: another writer may have come first
            if os.path.lexists(target):
                locks.append(Lock(target))  # nobody may append to what is being replaced
            return cls(root, target=target, attributes=attributes, locks=locks)
        except BaseException:
            if staging.holds(root):
                discard(root)
            for lock in locks:
                lock.release()
            raise

    @classmethod
    def append_to(cls, path: str | os.PathLike[str]) -> Self:
        """Add runs to an existing store, in new shards.

        Raises
        ------
        StoreError
            If there is no store at `path`, it is damaged, or another process is writing it.
        """
        _refuse_url(path)
        root = Path(os.path.realpath(path))
        restore_interrupted_move(root)
        try:
            lock = Lock(root)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise StoreError(
                f"{root}: no store here ({error.strerror}); write one with `brainflow ingest` or StoreWriter"
            ) from error
        try:
            # Under the lock, so that no commit can come between this look and ours.
            attributes = BoldStore.open(root, check=False, fallback=False).layout
            return cls(root, target=None, attributes=attributes, locks=[lock])
        except BaseException:
            lock.release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.commit()
        finally:
            self._close()

    def append(
        self,
        bold: np.ndarray,
        *,
        t_r: float,
        dataset: str,
        subject: str,
        session: str = "",
        task: str = "",
        run: str = "",
        key: str | None = None,
        censor: np.ndarray | None = None,
        segments: Iterable[Segment] = (),
    ) -> int:
        """Add one run; it becomes visible at the next commit.

        Parameters
        ----------
        bold
            Real [time, networks], finite.
        t_r
            Repetition time in seconds.
        dataset, subject, session, task, run
            Its entities, without the prefixes of BIDS.
        key
            Unique name; by default `ds-…_sub-…[_ses-…]_task-…[_run-…]`.
        censor
            bool [time], True where the preparation marked a time point as bad.
        segments
            Labelled stretches, inside the run.

        Returns
        -------
        int
            Index of the run in `store.runs`.

        Raises
        ------
        StoreError
            If a run with this key is in the store already.
        ValueError, TypeError
            If an argument is not as described; the run and, for a value, the network are named.
        """
        return self.write(
            self.prepare(
                bold,
                t_r=t_r,
                dataset=dataset,
                subject=subject,
                session=session,
                task=task,
                run=run,
                key=key,
                censor=censor,
                segments=segments,
            )
        )

    def prepare(
        self,
        bold: np.ndarray,
        *,
        t_r: float,
        dataset: str,
        subject: str,
        session: str = "",
        task: str = "",
        run: str = "",
        key: str | None = None,
        censor: np.ndarray | None = None,
        segments: Iterable[Segment] = (),
    ) -> PreparedRun:
        """Check and round one run without writing it; parameters and errors as in `append`."""
        self._check_open()
        entities = {"dataset": dataset, "subject": subject, "session": session, "task": task, "run": run}
        key = run_key(**entities) if key is None else key
        bold = self._check_bold(bold, key)
        segments = check_segments(segments, key, len(bold))
        self._runs.check(key=key, t_r=t_r, censor=censor, length=len(bold), segments=segments, **entities)
        try:
            values, scale = encode(bold, self._bold.grid.dtype)
        except Overflow as overflow:
            name = self._attributes.network_label(overflow.network)
            raise ValueError(
                f"run {key}: {name}, time point {overflow.time}: {overflow.reason}; repair or drop the "
                "run, or choose another dtype"
            ) from None
        statistics = [*run_statistics(bold), *([] if scale is None else [scale])]
        row = {"t_r": float(t_r), "key": key, "censor": censor, "segments": segments, **entities}
        return PreparedRun(values=values, statistics=np.stack(statistics)[None], row=row)

    def write(self, prepared: PreparedRun) -> int:
        """Add a run that `prepare` made; returns its index in `store.runs`.

        Raises
        ------
        StoreError
            If a run with this key has been written since it was prepared, or the disk is full or fails: the
            writer is then closed, and the store as it was.
        """
        self._check_open()
        self._runs.check_new(prepared.row["key"])
        with self._all_or_nothing():
            start = self._bold.append(prepared.values)
            slot = self._statistics.append(prepared.statistics)
            return self._runs.add(start=start, length=len(prepared.values), slot=slot, **prepared.row)

    @property
    def attributes(self) -> StoreAttributes:
        """Layout and metadata of the store."""
        return self._attributes

    def commit(self) -> None:
        """Make all runs appended so far visible, atomically; nothing to do if there are none.

        Raises
        ------
        StoreError
            If the disk is full or fails. The writer is then closed, as after any exception here, and the
            store holds either all the new runs or none of them; the message says which.
        """
        self._check_open()
        if self._target is None and len(self._runs) == self._manifest.runs:
            return
        with self._all_or_nothing():
            self._commit()

    def _commit(self) -> None:
        # Data, then the index, then the manifest that names both: killed before the last, nobody sees any of
        # them.
        for shards in (self._bold, self._statistics):
            shards.close_shard()
        generation = self._manifest.generation + 1
        groups = self._runs.merge()
        checksums = {
            shards.grid.name: self._all_checksums(shards) for shards in (self._bold, self._statistics)
        }
        files = write_index(self._root, generation, {**groups, "checksums": checksums})
        manifest = Manifest(
            generation=generation,
            runs=len(self._runs),
            segments=self._runs.segments,
            rows=self._bold.row,
            slots=self._statistics.row,
            files=files,
        )
        self._content = content = manifest.to_bytes(self._attributes)
        if len(content) > MANIFEST_LIMIT:
            raise StoreError(
                f"{self._root}/{MANIFEST}: would have {len(content)} bytes, more than the {MANIFEST_LIMIT} "
                "that readers take; shorten provenance and preprocessing, or use fewer label columns"
            )
        parse_manifest(content, str(self._root))  # what readers would refuse is not committed
        index = self._root / directory_of(generation)
        # A second copy: readers fall back to it where the root's file is damaged, and to that of the
        # generation before where more is. It also says what the shapes that are written next are for.
        write_durably(index / MANIFEST_COPY, content)
        sync_directory(index)
        for shards in (self._bold, self._statistics):
            (self._root / shards.grid.name).mkdir(exist_ok=True)
        # Before the manifest: for an instant Zarr shows rows that are not committed; the other way round it
        # would miss some that are.
        self._write_shapes(manifest)
        replace_durably(self._root / MANIFEST, content)  # the commit
        if self._target is not None:
            self._publish(self._target)
        self._runs.committed(groups)
        self._checksums, self._manifest = checksums, manifest
        self._remove_uncommitted(manifest)
        self._start_shards()

    def _publish(self, target: Path) -> None:
        """Put a new store in its place, and remove the one that it replaces."""
        # `bold` was made without a mode, so it has the one that the user's umask gives.
        staging, mode = self._root, stat.S_IMODE((self._root / "bold").stat().st_mode)
        (staging / OURS).unlink()
        staging.chmod(mode)  # it was private so far
        sync_directory(staging)
        move_into_place(staging, target, overwrite=len(self._locks) > 1)
        self._root, self._target = target, None
        # The exchange has put the replaced store here.
        for replaced in self._locks[1:]:
            discard(staging)
            replaced.release()
        del self._locks[1:]

    @contextlib.contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Close the writer after any exception, Ctrl-C included; say of a failing disk what it left."""
        try:
            yield
        except BaseException as error:
            self._close()
            if not isinstance(error, OSError):
                raise
            file = error.filename2 or error.filename or self._root
            raise StoreError(
                f"{file}: could not be written ({error.strerror or error}); {self._outcome()}; make room or "
                "repair the disk, then run the same command again"
            ) from error

    def _outcome(self) -> str:
        """Return what a reader finds after a commit that failed."""
        where = self._target or self._root
        try:
            now = (where / MANIFEST).read_bytes()
        except OSError:
            return f"nothing was written to {where}"
        if now == self._content:
            return f"{where} is whole and holds the new runs already"
        return f"{where} is as it was before"

    def _all_checksums(self, shards: ShardWriter) -> np.ndarray:
        """Return checksums of all chunks of an array, uint32 [shards · chunks_per_shard], 0 where absent."""
        merged = np.zeros(shards.row // shards.grid.chunk_rows, np.uint32)
        old = self._checksums.get(shards.grid.name)
        if old is not None:
            merged[: len(old)] = old
        if shards.checksums:
            merged[list(shards.checksums)] = list(shards.checksums.values())
        return merged

    def _start_shards(self) -> None:
        """Begin new shards behind the committed ones."""
        self._bold = ShardWriter(self._root, self._attributes.bold_grid, self._manifest.rows)
        self._statistics = ShardWriter(self._root, self._attributes.statistics_grid, self._manifest.slots)

    def _rows(self, manifest: Manifest) -> list[tuple[Grid, int]]:
        """Return both arrays, and how many rows each has by `manifest`."""
        return [
            (self._attributes.bold_grid, manifest.rows),
            (self._attributes.statistics_grid, manifest.slots),
        ]

    def _write_shapes(self, manifest: Manifest) -> None:
        """Let the metadata of both arrays say how many rows they have by `manifest`."""
        for grid, rows in self._rows(manifest):
            path, metadata = self._root / grid.name / "zarr.json", self._attributes.array_metadata(grid, rows)
            if not path.is_file() or path.read_bytes() != metadata:
                replace_durably(path, metadata)

    def _remove_uncommitted(self, manifest: Manifest) -> None:
        """Remove what neither `manifest`, which is the one on disk, nor the one before it names."""
        for grid, rows in self._rows(manifest):
            for shard in _numbered(self._root / grid.name / "c", r"\d+"):
                # Every commit begins new shards, so these are of no committed run.
                if int(shard.name) >= rows // grid.shard_rows:
                    remove(shard)
        for folder in ("", "bold", "statistics", "index"):
            for temporary in _numbered(self._root / folder, r"\..*\.tmp"):
                remove(temporary)
        # The index of a commit that did not happen goes last: until then it explains the arrays' new shapes.
        self._write_shapes(manifest)
        # The index before stays: readers may be opening it, and damage falls back to it.
        kept = (manifest.generation - 1, manifest.generation)
        for index in _numbered(self._root / "index", r"g\d{8,}"):
            if int(index.name[1:]) not in kept:
                remove(index)

    def _check_open(self) -> None:
        if not self._locks:
            raise StoreError(f"{self._root}: this writer is closed; open another with StoreWriter.append_to")

    def _check_bold(self, bold: np.ndarray, key: str) -> np.ndarray:
        bold = np.asarray(bold)
        networks, longest = self._attributes.networks, self._attributes.shard_rows
        if bold.dtype.kind not in "fiu":
            raise TypeError(f"run {key}: bold must hold real numbers, got dtype {bold.dtype}")
        if bold.ndim != 2 or bold.shape[1] != networks:
            raise ValueError(
                f"run {key}: bold must have shape [time, {networks} networks], got {list(bold.shape)}"
            )
        if not 1 <= len(bold) <= longest:
            raise ValueError(
                f"run {key}: has {len(bold)} time points, expected 1 to {longest} (shard_rows of the store)"
            )
        return bold

    def _close(self) -> None:
        """Release the lock; remove what was not committed.

        What was is asked of the disk: an exception may have come right behind the rename that commits, and
        nothing that the manifest there names is ever removed.
        """
        locks, self._locks = self._locks, []
        try:
            if locks:
                for shards in (self._bold, self._statistics):
                    shards.abort()
                self._tidy(locks)
        except (OSError, StoreError):  # the disk fails; the next writer removes what is left
            pass
        finally:
            for lock in locks:
                lock.release()

    def _tidy(self, locks: list[Lock]) -> None:
        # The staging place may be another writer's by now. Under our lock there is the store that we did not
        # finish, or, if it has taken its place already, the one that it has replaced.
        if self._staging is not None and any(lock.holds(self._staging) for lock in locks):
            discard(self._staging)
        if self._target is not None:
            if not locks[0].holds(self._target):
                return
            self._root, self._target = self._target, None
        manifest = parse_manifest((self._root / MANIFEST).read_bytes(), str(self._root))[0]
        self._remove_uncommitted(manifest)


def _numbered(folder: Path, pattern: str) -> list[Path]:
    """Return entries of a folder, if it is there, whose whole name matches a pattern."""
    if not folder.is_dir():
        return []
    return [entry for entry in folder.iterdir() if re.fullmatch(pattern, entry.name, re.ASCII)]


def _refuse_url(path: str | os.PathLike[str]) -> None:
    if is_remote(path):
        raise ValueError(
            f"{path}: stores are written on a local disk; upload it then with "
            "brainflow.storage.publish(local, url)"
        )
