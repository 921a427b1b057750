"""The manifest: the attributes of the root group, in a file renamed last, say what is committed.

Metadata and manifest stand in one `zarr.json`, so that one rename commits and any Zarr client shows both.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from .attributes import StoreAttributes, brief
from .errors import StoreError, StoreUnavailable
from .index import Digests, directory_of
from .layout import FORMAT_VERSION, group_metadata, to_compact_json

MANIFEST = "zarr.json"
MANIFEST_COPY = "manifest.json"  # in the index of each generation: the bytes of the root's file
INDEX_GROUP = "index/zarr.json"
MANIFEST_LIMIT = 2**25
"""Bytes of a manifest that are read. It grows with label columns (200 bytes each) and networks (100), not
with runs: room for 100,000 of both."""

_MOST_OBJECTS = 2**20  # a list of no elements has two bytes here and sixty in memory


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What is committed.

    Parameters
    ----------
    generation : 0 for a new store, one more with every commit
    runs, segments : rows of the two tables
    rows : rows of `bold`, gaps included
    slots : rows of `statistics`, gaps included
    files : {path: [bytes, CRC-32C]} of the index; chunks have their own checksums, in the index
    """

    generation: int
    runs: int
    segments: int
    rows: int
    slots: int
    files: Digests

    def to_bytes(self, attributes: StoreAttributes) -> bytes:
        """Content of the root's `zarr.json`; `snapshot` is the SHA-256 of the other attributes."""
        body = {**attributes.to_dict(), "manifest": self.__dict__}
        return group_metadata({**body, "snapshot": hashlib.sha256(to_compact_json(body)).hexdigest()})

    @property
    def copied(self) -> bool:
        """Whether each commit left a copy of its manifest in its index, and `INDEX_GROUP` is in `files`."""
        return INDEX_GROUP in self.files

    def faults(self, attributes: StoreAttributes) -> Iterator[str]:
        """What is wrong with the types and ranges of the manifest, the first one that matters first."""
        limits = {"generation": 2**31, "runs": 2**31, "segments": 2**40, "rows": 2**62, "slots": 2**62}
        for name, limit in limits.items():
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value < limit:
                yield f"{name}: got {brief(value)}, expected a whole number from 0 to {limit - 1}"
        for name, rows, grid in (
            ("rows", self.rows, attributes.bold_grid),
            ("slots", self.slots, attributes.statistics_grid),
        ):
            if rows % grid.shard_rows or rows * grid.row_bytes >= 2**62:
                yield f"{name}: got {rows}, expected a multiple of {grid.shard_rows} that can be addressed"
        if not isinstance(self.files, dict):
            yield f"files: got {brief(self.files)}, expected an object"
        else:
            yield from (
                fault for path, entry in self.files.items() if (fault := self._file_fault(path, entry))
            )

    def _file_fault(self, path: str, entry: Any) -> str:
        """What is wrong with one entry of `files`, or nothing."""
        inside = path.startswith(directory_of(self.generation) + "/") or path == INDEX_GROUP
        names = path.split("/")
        if not inside or "\0" in path or any(name in ("", ".", "..") for name in names) or len(names) > 7:
            return f"files: {brief(path)} does not lie in the index of generation {self.generation}"
        if not (
            isinstance(entry, list)
            and [type(number) for number in entry] == [int, int]
            and 0 <= entry[0] < 2**62
            and 0 <= entry[1] < 2**32
        ):
            return f"files: {brief(path)}: got {brief(entry)}, expected [bytes, CRC-32C]"
        return ""


def manifest_copy(generation: int) -> str:
    """Where the copy of the root's `zarr.json` of a generation lies in the store."""
    return f"{directory_of(generation)}/{MANIFEST_COPY}"


def parse_manifest(data: bytes, where: str) -> tuple[Manifest, StoreAttributes, str]:
    """Read the root's `zarr.json`.

    Returns
    -------
    manifest, attributes, snapshot

    Raises
    ------
    StoreError : if it is truncated, damaged, of something else or of another format version; `where` is named
    """
    file = f"{where}/{MANIFEST}"
    if data.count(b"[") + data.count(b"{") > _MOST_OBJECTS:
        raise StoreError(
            f"{file}: is nothing that brainflow wrote; restore this file from a copy of the store"
        )
    try:
        body: dict[str, Any] = json.loads(data)["attributes"]
        snapshot = body.pop("snapshot", None)
        whole = hashlib.sha256(to_compact_json(body)).hexdigest() == snapshot
        try:
            attributes = StoreAttributes.from_dict(body, file)
        except StoreError as error:
            if whole and body.get("format_version") != FORMAT_VERSION:
                raise StoreUnavailable(str(error)) from error
            raise
        manifest = Manifest(**{field.name: body["manifest"][field.name] for field in fields(Manifest)})
        fault = next(manifest.faults(attributes), None)
    except StoreError:
        raise
    # A nesting of thousands, a number of thousands of digits
    except (
        ValueError,
        AttributeError,
        KeyError,
        TypeError,
        RecursionError,
        MemoryError,
        OverflowError,
    ) as error:
        raise StoreError(
            f"{file}: truncated or damaged ({type(error).__name__}: {brief(str(error))}); restore this file "
            "from a copy of the store"
        ) from error
    if not whole:
        raise StoreError(f"{file}: damaged (wrong digest); restore this file from a copy of the store")
    if fault is not None:
        raise StoreError(f"{file}: manifest: {fault}; restore this file from a copy of the store")
    return manifest, attributes, snapshot
