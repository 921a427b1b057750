"""Reading all of a store and comparing it with its checksums, and its tables with each other."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from .chunks import DecodedRows
from .errors import DamagedChunk, StoreError, StoreWarning
from .layout import Grid, crc32c, group_metadata
from .local import LocalFiles
from .manifest import (
    INDEX_GROUP,
    MANIFEST,
    MANIFEST_LIMIT,
    Manifest,
    directory_of,
    manifest_copy,
    parse_manifest,
)
from .store import BoldStore
from .tables import RUN_STRINGS, decode_strings

_PROGRESS_BYTES = 16 * 2**20
_SHOWN = 100
_OF_WRITERS = re.compile(r"(bold|statistics)/c/\d+(/0)+|index/g\d{8,}/.*|(.*/)?\.[^/]*\.tmp")


@dataclass(kw_only=True)
class VerifyReport:
    """What `verify` found.

    Attributes
    ----------
    errors
        One line for each thing that is wrong.
    notes
        One line for each thing that harms nobody, such as files that are not of the store.
    bad_chunks
        Numbers of the damaged chunks of `bold`.
    bad_runs
        Keys of the runs that they touch.
    chunks
        Chunks read.
    """

    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    bad_chunks: list[int] = field(default_factory=list)
    bad_runs: list[str] = field(default_factory=list)
    chunks: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.errors


def verify(path: str | os.PathLike[str], progress: Callable[[int, int], None] | None = None) -> VerifyReport:
    """Read every byte of a store, compare it with its checksums, and the tables with each other.

    Parameters
    ----------
    path
        Directory or URL of the store.
    progress
        Called with (bytes read, bytes in all).

    Returns
    -------
    VerifyReport
        A store whose newest generation cannot be opened has the reason as its one error.
    """
    report = VerifyReport()
    try:
        # Unchecked: all is looked at below, where a fault does not end the search for others.
        store = BoldStore.open(path, check=False, fallback=False)
    except StoreError as error:
        report.errors.append(str(error))
        report.notes += _what_can_be_read(path)
        return report
    report.errors += [*_bad_metadata(store), *_bad_copies(store), *_bad_texts(store)]
    report.notes += _unaccounted(store)
    runs = store.runs
    jobs = [
        (store.layout.bold_grid, runs.start, runs.length),
        (store.layout.statistics_grid, runs.slot, np.ones(len(runs), np.int64)),
    ]
    total = sum(int(grid.chunks_in_shards(s, n)[1].sum()) * grid.chunk_bytes for grid, s, n in jobs)
    done = shown = 0
    for grid, starts, lengths in jobs:
        decode = DecodedRows(grid, lambda chunks: {}).decode
        for shard, chunks in zip(*grid.chunks_in_shards(starts, lengths), strict=True):
            first = int(shard) * grid.chunks_per_shard
            for chunk in range(first, first + int(chunks)):
                reason = _fault(store, grid, chunk, decode)
                if reason:
                    _note(report, store, grid, chunk, reason, starts, lengths)
                report.chunks += 1
                done += grid.chunk_bytes
                if progress is not None and (done - shown >= _PROGRESS_BYTES or done == total):
                    progress(done, total)
                    shown = done
    return report


def _what_can_be_read(path: str | os.PathLike[str]) -> list[str]:
    """Return the generation that a reader falls back to, if there is one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StoreWarning)
        try:
            damage = BoldStore.open(path).damage
        except StoreError:
            return []
    return [] if damage is None else [f"{path}: can be read in part: {damage}"]


def _bad_metadata(store: BoldStore) -> Iterator[str]:
    """Yield what is wrong with the index of this generation and with the metadata of groups and arrays."""
    if store.manifest_bytes != store.manifest.to_bytes(store.layout):
        yield (
            f"{store.path}/{MANIFEST}: not as brainflow writes it; restore this file from a copy of the store"
            + (f", or copy {manifest_copy(store.generation)} over it" if store.manifest.copied else "")
        )
    yield from _bad_files(store, store.manifest)
    if not store.manifest.copied and not _is_bare_group(store):
        yield f"{store.path}/{INDEX_GROUP}: missing or damaged; restore it from a copy"
    for grid in (store.layout.bold_grid, store.layout.statistics_grid):
        try:
            store.check_shape(grid)
        except StoreError as error:
            yield str(error)


def _is_bare_group(store: BoldStore) -> bool:
    """Whether the group of the indexes is as all versions wrote it; newer ones list it in the manifest."""
    bare = group_metadata({})
    try:
        return store.read_file(INDEX_GROUP, len(bare)).tobytes() == bare
    except StoreError:
        return False


def _bad_files(store: BoldStore, manifest: Manifest) -> Iterator[str]:
    """Yield files of an index that are missing or damaged."""
    for relative in manifest.files:
        try:
            store.check_file(relative, manifest)
        except StoreError as error:
            yield str(error)


def _bad_copies(store: BoldStore) -> Iterator[str]:
    """Yield what is wrong with what readers fall back to: the manifest's copy, and the generation before."""
    if not store.manifest.copied:
        return  # the writer of older versions left none
    copy = manifest_copy(store.generation)
    try:
        same = store.read_file(copy, MANIFEST_LIMIT).tobytes() == store.manifest_bytes
    except StoreError:
        same = False
    if not same:
        yield f"{store.path}/{copy}: missing or damaged; copy {MANIFEST} over it"
    errors = list(_bad_older_generation(store)) if store.generation else []
    if errors and store.is_newest():  # else a writer has committed, and removed it, meanwhile
        yield from errors


def _bad_older_generation(store: BoldStore) -> Iterator[str]:
    copy = manifest_copy(store.generation - 1)
    try:
        data = store.read_file(copy, MANIFEST_LIMIT).tobytes()
    except StoreError as error:
        if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            return  # of the writer of older versions, or not published
        yield str(error)
        return
    try:
        older, layout, _ = parse_manifest(data, f"{store.path}/{directory_of(store.generation - 1)}")
    except StoreError:
        older = None
    if older is None or data != older.to_bytes(layout) or older.generation != store.generation - 1:
        yield f"{store.path}/{copy}: damaged; the next commit but one removes it, or restore it from a copy"
        return
    yield from _bad_files(store, older)


def _bad_texts(store: BoldStore) -> Iterator[str]:
    """Yield texts of the runs that are not UTF-8, and keys that are empty or there twice."""
    columns = store.columns("runs")
    for name in RUN_STRINGS:
        try:
            texts = decode_strings(columns[name])
        except StoreError as error:
            yield f"{store.path}: runs/{name}: {error}"
            continue
        if name == "key" and len(np.unique(texts)) < len(texts):
            yield f"{store.path}: runs/key: two runs have the same key"
        if name == "key" and (texts == "").any():
            yield f"{store.path}: runs/key: a run has no key"


def _fault(store: BoldStore, grid: Grid, chunk: int, decode: Callable[[int, np.ndarray], np.ndarray]) -> str:
    """Return what is wrong with a chunk, or nothing."""
    try:
        stored = store.stored(grid.name, chunk)
        if crc32c(stored) != store.checksums[grid.name][chunk]:
            raise DamagedChunk(chunk)
        values = decode(chunk, stored)
    except (StoreError, OSError, DamagedChunk) as error:
        return str(error)
    if values.dtype.kind == "f" and not _all_finite(values):
        return "holds values that are not finite, so it was not written by brainflow: write the store anew"
    return ""


def _all_finite(values: np.ndarray) -> bool:
    """Whether all numbers are finite, by their exponents: NumPy's isfinite of float16 takes longer."""
    bits, exponent = {2: ("<u2", 0x7C00), 4: ("<u4", 0x7F800000)}[values.itemsize]
    return bool((np.bitwise_and(values.view(bits), exponent) != exponent).all())


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


def _unaccounted(store: BoldStore) -> list[str]:
    """Return files, links and devices that are not of the store, one note each; none for a store at a URL."""
    files = store.files
    if not isinstance(files, LocalFiles):
        return []
    known = _known(store)
    notes = []
    for path in sorted(_walk(files)):
        if path not in known:
            what = "left over from a writer" if _OF_WRITERS.fullmatch(path) else "not of this store"
            notes.append(f"{store.path}/{path}: {what}; nothing reads it")
    more = len(notes) - _SHOWN
    return notes if more <= 0 else [*notes[:_SHOWN], f"{store.path}: and {more} more such files"]


def _known(store: BoldStore) -> set[str]:
    """Return paths of all files of this generation and the one before."""
    layout, runs, generation = store.layout, store.runs, store.generation
    known = {MANIFEST, INDEX_GROUP, manifest_copy(generation), *store.manifest.files}
    ones = np.ones(len(runs), np.int64)
    for grid, starts, lengths in (
        (layout.bold_grid, runs.start, runs.length),
        (layout.statistics_grid, runs.slot, ones),
    ):
        known.add(f"{grid.name}/zarr.json")
        known |= {grid.shard_path(shard) for shard in grid.chunks_in_shards(starts, lengths)[0].tolist()}
    older = manifest_copy(generation - 1)
    try:
        known |= {older, *parse_manifest(store.read_file(older, MANIFEST_LIMIT).tobytes(), "")[0].files}
    except StoreError:
        known.add(older)
    return known


def _walk(files: LocalFiles) -> Iterator[str]:
    """Yield paths of everything in the store that is not a folder; links are not followed."""
    folders = [""]
    while folders:
        folder = folders.pop()
        for name, kind in files.entries(folder or ".").items():
            path = f"{folder}/{name}" if folder else name
            if kind == "folder":
                folders.append(path)
            else:
                yield path
