"""Which generation can be read where the newest one is damaged.

Each index holds a copy of the root's `zarr.json` of its generation, and the index before the newest stays.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .errors import StoreError
from .local import LocalFiles
from .manifest import MANIFEST, MANIFEST_LIMIT, Manifest, directory_of, manifest_copy, parse_manifest

if TYPE_CHECKING:
    from .remote import RemoteFiles

_MOST = 4  # generations that are tried: a writer leaves at most three


def older_manifests(files: LocalFiles | RemoteFiles, root: bytes) -> Iterator[bytes]:
    """Copies of manifests to try, the likeliest first.

    Parameters
    ----------
    root : the root's `zarr.json`, which is damaged or whose generation is
    """
    generation = _generation(root)
    copies = []
    for number in _on_disk(files) if generation is None else [generation - 1][:generation]:
        try:
            copies.append((number, files.read(manifest_copy(number), MANIFEST_LIMIT).tobytes()))
        except StoreError:
            continue
    # What the damaged root still says of its generation goes before the number: the highest index may be of a
    # commit that never was.
    copies.sort(key=lambda copy: (_likeness(copy[0], copy[1], root), copy[0]), reverse=True)
    yield from (copy for _, copy in copies)


def remedy(read: Manifest, root: bytes, where: str) -> str:
    """What is read instead and how the store is mended, for the warning."""
    copy = shlex.join(["cp", f"{where}/{manifest_copy(read.generation)}", f"{where}/{MANIFEST}"])
    if _generation(root) is None:
        return f"Reading generation {read.generation} by the copy of its manifest; to mend the store: {copy}"
    return (
        f"Reading generation {read.generation} ({read.runs} runs) instead of the newest: restore the newest "
        f"from a copy of the store, or give up the runs of its last commit: {copy}"
    )


def _generation(root: bytes) -> int | None:
    """The generation of a manifest that is whole; None for another."""
    try:
        return parse_manifest(root, "")[0].generation
    except StoreError:
        return None


def _on_disk(files: LocalFiles | RemoteFiles) -> list[int]:
    """Generations that have an index, the newest few; objects at a URL are not listed."""
    names = files.entries("index") if isinstance(files, LocalFiles) else {}
    return sorted((int(name[1:]) for name in names if re.fullmatch(r"g\d{8,10}", name)), reverse=True)[:_MOST]


def _likeness(generation: int, copy: bytes, root: bytes) -> int:
    """How much of what tells a generation from others is still in a damaged root."""
    snapshot = re.search(rb'"snapshot": "[0-9a-f]{64}"', copy)
    signs = [f'"{directory_of(generation)}/'.encode(), f'"generation": {generation},'.encode()]
    return sum(sign in root for sign in [*signs, *([snapshot[0]] if snapshot else [])])
