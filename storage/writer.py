"""Writing a store: runs are appended one at a time and become visible together, at the commit."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from .attributes import FORMAT_NAME, StoreAttributes
from .columns import PendingRuns, check_segments
from .errors import StoreError
from .files import lock, move_into_place, replace_durably, sync_directory
from .index import directory_of, write_index
from .layout import CHUNK_ROWS, SHARD_ROWS, run_key
from .manifest import MANIFEST, Manifest
from .quantise import Overflow, encode, run_statistics
from .remote import is_remote
from .segments import Segment
from .shards import ShardWriter
from .store import BoldStore


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
        self, root: Path, *, target: Path | None, attributes: StoreAttributes, descriptor: int
    ) -> None:
        self._root = root
        self._target = target  # where a new store goes at its first commit; None once it is there
        self._attributes = attributes
        self._descriptor: int | None = descriptor
        if target is None:
            committed = BoldStore.open(root, check=False)
            self._manifest = committed.manifest
            self._runs = PendingRuns(
                {group: committed.columns(group) for group in ("runs", "segments", "labels")}
            )
            self._checksums: dict[str, np.ndarray] = committed.checksums
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
        path : directory to be made
        networks : networks (parcels) of every run
        dtype : "float16", "float32", or "int16", "int8" with one scale per run and network
        parcellation : name of the atlas and its version
        network_names : one name per network
        network_coordinates : [networks, 3], centre of each network in mm
        preprocessing : what was done to the data, as JSON values
        normalisation : normalisation already applied to the runs, such as "z-scored per run and network"
        provenance : where the data come from, as JSON values; no time stamps, if equal inputs shall give
            equal bytes
        compression : None (mapped by the reader, fast) or "zstd"
        overwrite : replace the store at `path`, in one step, at the first commit
        chunk_rows, shard_rows : rows of a chunk and of a shard file; a run is at most `shard_rows` long

        Raises
        ------
        StoreError : if `path` exists and `overwrite` is false, or is not a store, or somebody else writes it
        ValueError : if an argument does not fit the others
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
        target = Path(path).absolute()
        if target.exists():
            if not overwrite:
                raise StoreError(
                    f"{target}: already exists; add runs with StoreWriter.append_to, or pass overwrite=True "
                    "(--overwrite) to replace it"
                )
            if not _is_store(target):
                raise StoreError(
                    f"{target}: is not a brainflow store, so it will not be overwritten; remove it first"
                )
        target.parent.mkdir(parents=True, exist_ok=True)
        root = target.with_name(f".{target.name}.partial")
        root.mkdir(exist_ok=True)
        descriptor = lock(root)
        for left_over in root.iterdir():  # of a writer that was killed
            shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
        return cls(root, target=target, attributes=attributes, descriptor=descriptor)

    @classmethod
    def append_to(cls, path: str | os.PathLike[str]) -> Self:
        """Add runs to an existing store, in new shards.

        Raises
        ------
        StoreError : if there is no store at `path`, it is damaged, or another process is writing it
        """
        _refuse_url(path)
        root = Path(path).absolute()
        attributes = BoldStore.open(root, check=False).layout
        descriptor = lock(root)
        try:
            return cls(root, target=None, attributes=attributes, descriptor=descriptor)
        except BaseException:
            os.close(descriptor)
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
        bold : real [time, networks], finite
        t_r : repetition time in seconds
        dataset, subject, session, task, run : its entities, without the prefixes of BIDS
        key : unique name; by default `ds-…_sub-…[_ses-…]_task-…[_run-…]`
        censor : bool [time], True where the preparation marked a time point as bad
        segments : labelled stretches, inside the run

        Returns
        -------
        int : index of the run in `store.runs`

        Raises
        ------
        StoreError : if a run with this key is in the store already
        ValueError, TypeError : if an argument is not as described; the run and, for a value, the network are
            named
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
        StoreError : if a run with this key has been written since it was prepared
        """
        self._check_open()
        self._runs.check_new(prepared.row["key"])
        start = self._bold.append(prepared.values)
        slot = self._statistics.append(prepared.statistics)
        return self._runs.add(start=start, length=len(prepared.values), slot=slot, **prepared.row)

    @property
    def attributes(self) -> StoreAttributes:
        """Layout and metadata of the store."""
        return self._attributes

    def commit(self) -> None:
        """Make all runs appended so far visible, atomically; nothing to do if there are none."""
        self._check_open()
        if self._target is None and len(self._runs) == self._manifest.runs:
            return
        for shards in (self._bold, self._statistics):
            shards.close_shard()
        generation = self._manifest.generation + 1
        groups = self._runs.merge()
        checksums = {
            shards.grid.name: self._all_checksums(shards) for shards in (self._bold, self._statistics)
        }
        index = self._root / directory_of(generation)
        shutil.rmtree(index, ignore_errors=True)  # of a writer that was killed
        files = write_index(self._root, generation, {**groups, "checksums": checksums})
        for shards in (self._bold, self._statistics):
            metadata = self._attributes.array_metadata(shards.grid, shards.row)
            (self._root / shards.grid.name).mkdir(exist_ok=True)
            replace_durably(self._root / shards.grid.name / "zarr.json", metadata)
        manifest = Manifest(
            generation=generation,
            runs=len(self._runs),
            segments=self._runs.segments,
            rows=self._bold.row,
            slots=self._statistics.row,
            files=files,
        )
        replace_durably(self._root / MANIFEST, manifest.to_bytes(self._attributes))  # the commit
        if self._target is not None:
            sync_directory(self._root)
            move_into_place(self._root, self._target)
            self._root, self._target = self._target, None
        self._runs.committed(groups)
        self._checksums, self._manifest = checksums, manifest
        self._start_shards()

    def _all_checksums(self, shards: ShardWriter) -> np.ndarray:
        """Checksums of all chunks of an array, uint32 [shards · chunks_per_shard], 0 for absent ones."""
        merged = np.zeros(shards.row // shards.grid.chunk_rows, np.uint32)
        old = self._checksums.get(shards.grid.name)
        if old is not None:
            merged[: len(old)] = old
        if shards.checksums:
            merged[list(shards.checksums)] = list(shards.checksums.values())
        return merged

    def _start_shards(self) -> None:
        """Begin new shards behind the committed ones, and remove what a killed writer left there."""
        self._bold = ShardWriter(self._root, self._attributes.bold_grid, self._manifest.rows)
        self._statistics = ShardWriter(self._root, self._attributes.statistics_grid, self._manifest.slots)
        for shards in (self._bold, self._statistics):
            first = shards.row // shards.grid.shard_rows
            for directory in (self._root / shards.grid.name / "c").glob("[0-9]*"):
                if int(directory.name) >= first:
                    shutil.rmtree(directory)
        for directory in (self._root / "index").glob("g*"):
            if not self._manifest.generation - 1 <= int(directory.name[1:]) <= self._manifest.generation:
                shutil.rmtree(directory)

    def _check_open(self) -> None:
        if self._descriptor is None:
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
        """Release the lock; remove what was not committed."""
        if self._descriptor is None:
            return
        for shards in (self._bold, self._statistics):
            shards.abort()
        if self._target is not None:
            shutil.rmtree(self._root)
        else:
            self._start_shards()
        os.close(self._descriptor)
        self._descriptor = None


def _refuse_url(path: str | os.PathLike[str]) -> None:
    if is_remote(path):
        raise ValueError(
            f"{path}: stores are written on a local disk; upload it then with "
            "brainflow.storage.publish(local, url)"
        )


def _is_store(path: Path) -> bool:
    """Whether `path` holds a store of ours, be it damaged: only such a directory may be overwritten."""
    try:
        return f'"format": "{FORMAT_NAME}"' in (path / MANIFEST).read_text()
    except (OSError, UnicodeDecodeError):
        return False
