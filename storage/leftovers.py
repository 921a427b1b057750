"""Files in the directory of a store that no generation of it accounts for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from .errors import StoreError
from .local import LocalFiles
from .manifest import INDEX_GROUP, MANIFEST, MANIFEST_LIMIT, manifest_copy, parse_manifest

if TYPE_CHECKING:
    from .store import BoldStore

_SHOWN = 100
_OF_WRITERS = re.compile(r"(bold|statistics)/c/\d+(/0)+|index/g\d{8,}/.*|(.*/)?\.[^/]*\.tmp")


def unaccounted(store: BoldStore) -> list[str]:
    """Files, links and devices that are not of the store, one note each; none for a store at a URL."""
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
    """Paths of all files of this generation and the one before."""
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
    """Paths of everything in the store that is not a folder; links are not followed."""
    folders = [""]
    while folders:
        folder = folders.pop()
        for name, kind in files.entries(folder or ".").items():
            path = f"{folder}/{name}" if folder else name
            if kind == "folder":
                folders.append(path)
            else:
                yield path
