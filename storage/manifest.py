"""Commits on disk: the manifest, which says what is committed, and the index of columns that it lists.

The manifest is the attributes of the root group. Metadata and manifest stand in one `zarr.json`, so that one
rename commits and any Zarr client shows both. A commit writes a whole new index under `index/g…/`, columns of
runs and segments as Zarr arrays of one raw chunk each; none is ever changed. We map the columns, so that a
million runs open at once.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .attributes import StoreAttributes, brief
from .errors import StoreError, StoreUnavailable
from .files import replace_durably, sync_directory, write_durably
from .layout import FORMAT_VERSION, array_metadata, crc32c, group_metadata, to_compact_json
from .text import counted

MANIFEST = "zarr.json"
MANIFEST_COPY = "manifest.json"  # in the index of each generation: the bytes of the root's file
INDEX_GROUP = "index/zarr.json"
MANIFEST_LIMIT = 2**25
"""Bytes of a manifest that are read. It grows with label columns (200 bytes each) and networks (100), not
with runs: room for 100,000 of both."""

_MOST_OBJECTS = 2**20  # a list of no elements has two bytes here and sixty in memory
_COLUMN_DTYPES = ("int32", "int64", "float64", "uint8", "uint32")
_COLUMN_METADATA = 2**16  # bytes; ours have some 500

Digests = dict[str, list[int]]
"""{path relative to the store: [bytes, CRC-32C]}."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What is committed.

    Parameters
    ----------
    generation
        0 for a new store, one more with every commit.
    runs, segments
        Rows of the two tables.
    rows
        Rows of `bold`, gaps included.
    slots
        Rows of `statistics`, gaps included.
    files
        {path: [bytes, CRC-32C]} of the index; chunks have their own checksums, in the index.
    """

    generation: int
    runs: int
    segments: int
    rows: int
    slots: int
    files: Digests

    def to_bytes(self, attributes: StoreAttributes) -> bytes:
        """Return the content of the root's `zarr.json`; `snapshot` is the SHA-256 of the other attributes."""
        body = {**attributes.to_dict(), "manifest": self.__dict__}
        return group_metadata({**body, "snapshot": hashlib.sha256(to_compact_json(body)).hexdigest()})

    @property
    def copied(self) -> bool:
        """Whether each commit left a copy of its manifest in its index, and `INDEX_GROUP` is in `files`."""
        return INDEX_GROUP in self.files

    def faults(self, attributes: StoreAttributes) -> Iterator[str]:
        """Yield what is wrong with the types and ranges of the manifest, the first one that matters first."""
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
        """Return what is wrong with one entry of `files`, or nothing."""
        inside = path.startswith(directory_of(self.generation) + "/") or path == INDEX_GROUP
        names = path.split("/")
        # The deepest is index/g…/labels/NAME/c/0/0.
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
    """Return where the copy of the root's `zarr.json` of a generation lies in the store."""
    return f"{directory_of(generation)}/{MANIFEST_COPY}"


def parse_manifest(data: bytes, where: str) -> tuple[Manifest, StoreAttributes, str]:
    """Read the root's `zarr.json`.

    Returns
    -------
    manifest, attributes, snapshot

    Raises
    ------
    StoreError
        If it is truncated, damaged, of something else or of another format version; `where` is named.
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
            # Not damaged, only newer: to read an older generation would be no remedy.
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


def directory_of(generation: int) -> str:
    """Return where the index of a generation lies in the store."""
    return f"index/g{generation:08d}"


def write_index(root: Path, generation: int, groups: Mapping[str, Mapping[str, np.ndarray]]) -> Digests:
    """Write the groups of columns of a generation and flush them.

    Parameters
    ----------
    root
        Directory of the store.
    generation
        Number of the commit.
    groups
        {group: {column: array}}, such as {"runs": {"start": int64 [runs]}}.

    Returns
    -------
    dict
        Size and checksum of each file of the index.
    """
    digests: Digests = {}

    def put(relative: str, data: bytes) -> None:
        write_durably(root / relative, data)
        digests[relative] = [len(data), crc32c(data)]

    base = directory_of(generation)
    # Fails if it is there: no index is ever written twice.
    (root / base).mkdir(parents=True)
    bare = group_metadata({})
    # All generations share this file, and their manifests list its checksum.
    if not (root / "index/zarr.json").is_file() or (root / "index/zarr.json").read_bytes() != bare:
        replace_durably(root / "index/zarr.json", bare)
    digests["index/zarr.json"] = [len(bare), crc32c(bare)]
    put(f"{base}/zarr.json", bare)
    for group, columns in groups.items():
        (root / base / group).mkdir()
        put(f"{base}/{group}/zarr.json", group_metadata({"columns": list(columns)}))
        for name, values in columns.items():
            column = f"{base}/{group}/{name}"
            (root / column).mkdir()
            dimensions = [group, "byte"][: values.ndim]
            put(
                f"{column}/zarr.json",
                array_metadata(
                    shape=values.shape, chunk_shape=values.shape, dtype=values.dtype, dimensions=dimensions
                ),
            )
            if values.size:
                chunk = root / column / "c" / "/".join("0" * values.ndim)
                chunk.parent.mkdir(parents=True)
                put(chunk.relative_to(root).as_posix(), np.ascontiguousarray(values).tobytes())
                # From the file outwards: each folder is flushed once its entries are there.
                for directory in list(chunk.parents)[: values.ndim]:
                    sync_directory(directory)
            sync_directory(root / column)
        sync_directory(root / base / group)
    sync_directory(root / base)
    sync_directory(root / "index")
    sync_directory(root)
    return digests


def read_columns(
    read: Callable[[str], np.ndarray], digests: Digests, generation: int, group: str
) -> dict[str, np.ndarray]:
    """Return columns of one group of an index, by name.

    Parameters
    ----------
    read
        Gives the bytes of a file of the store, uint8 [bytes], already checked against `digests`.
    digests
        Files of the store by path.
    generation, group
        Number of the commit, and which of its groups.

    Raises
    ------
    StoreError
        If the metadata of a column cannot be understood, or says another size than its file has.
    """
    prefix = f"{directory_of(generation)}/{group}/"
    names = sorted({path[len(prefix) :].split("/")[0] for path in digests if path.startswith(prefix)})
    columns = {}
    for name in names:
        if name == "zarr.json":
            continue
        try:
            columns[name] = _read_column(read, digests, f"{prefix}{name}")
        except StoreError:
            raise
        except (KeyError, TypeError, ValueError, RecursionError, MemoryError, OverflowError) as error:
            raise StoreError(
                f"{prefix}{name}: cannot read this column of the index ({type(error).__name__}: {error}); "
                "restore it from a copy"
            ) from error
    return columns


def _read_column(read: Callable[[str], np.ndarray], digests: Digests, column: str) -> np.ndarray:
    """Return one column; its shape is compared with the size of its file before anything is read or made."""
    file = f"{column}/zarr.json"
    if digests.get(file, [0, 0])[0] > _COLUMN_METADATA:
        raise ValueError(f"zarr.json has more than {_COLUMN_METADATA} bytes")
    metadata = json.loads(read(file).tobytes())
    shape, dtype = metadata["shape"], metadata["data_type"]
    if dtype not in _COLUMN_DTYPES:
        raise ValueError(f"data_type is not one of {', '.join(_COLUMN_DTYPES)}")
    if len(shape) not in (1, 2) or not all(type(n) is int and 0 <= n < 2**48 for n in shape):
        raise ValueError("shape is not [rows] or [rows, width]")
    chunk, size = f"{column}/c/" + "/".join("0" * len(shape)), math.prod(shape) * np.dtype(dtype).itemsize
    if size == 0:
        return np.zeros(shape, dtype)
    if digests.get(chunk, [-1, 0])[0] != size:
        raise ValueError(f"shape says {size} bytes, the manifest lists {digests.get(chunk, ['none'])[0]}")
    return read(chunk).view(np.dtype(dtype).newbyteorder("<")).reshape(shape)


_MOST_GENERATIONS = 4  # that are tried: a writer leaves at most three


class Files(Protocol):
    """What is asked of the place where a store lies: a directory, or the objects under a URL."""

    def read(self, relative: str, limit: int) -> np.ndarray: ...  # noqa: D102
    def entries(self, relative: str) -> dict[str, str]: ...  # noqa: D102


# Each index holds a copy of the root's `zarr.json` of its generation, and the index before the newest stays:
# where the newest generation is damaged, one of the copies says how to read an older one.
def older_manifests(files: Files, root: bytes) -> Iterator[bytes]:
    """Yield copies of manifests to try, the likeliest first.

    Parameters
    ----------
    files
        Files of the store.
    root
        The root's `zarr.json`, which is damaged or whose generation is.
    """
    generation = _generation(root)
    copies = []
    # Before generation 0 there is none: the slice is empty then.
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
    """Return what is read instead and how the store is mended, for the warning."""
    copy = shlex.join(["cp", f"{where}/{manifest_copy(read.generation)}", f"{where}/{MANIFEST}"])
    if _generation(root) is None:
        return f"Reading generation {read.generation} by the copy of its manifest; to mend the store: {copy}"
    return (
        f"Reading generation {read.generation} ({counted(read.runs, 'run')}) instead of the newest: "
        f"restore the newest from a copy of the store, or give up the runs of its last commit: {copy}"
    )


def _generation(root: bytes) -> int | None:
    """Return the generation of a manifest that is whole; None for another."""
    try:
        return parse_manifest(root, "")[0].generation
    except StoreError:
        return None


def _on_disk(files: Files) -> list[int]:
    """Return generations that have an index, the newest few, where a place can be listed."""
    names = files.entries("index")
    numbers = (int(name[1:]) for name in names if re.fullmatch(r"g\d{8,10}", name))
    return sorted(numbers, reverse=True)[:_MOST_GENERATIONS]


def _likeness(generation: int, copy: bytes, root: bytes) -> int:
    """Return how much of what tells a generation from others is still in a damaged root."""
    snapshot = re.search(rb'"snapshot": "[0-9a-f]{64}"', copy)
    signs = [f'"{directory_of(generation)}/'.encode(), f'"generation": {generation},'.encode()]
    return sum(sign in root for sign in [*signs, *([snapshot[0]] if snapshot else [])])
