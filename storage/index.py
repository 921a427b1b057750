"""The index of one generation: columns of runs and segments as Zarr arrays of one raw chunk each.

A commit writes a whole new index under `index/g…/`; none is ever changed. Any Zarr client reads the columns,
and we map them, so that a million runs open at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from .errors import StoreError
from .files import replace_durably, sync_directory, write_durably
from .layout import array_metadata, crc32c, group_metadata

Digests = dict[str, list[int]]
"""{path relative to the store: [bytes, CRC-32C]}."""


def directory_of(generation: int) -> str:
    """Where the index of a generation lies in the store."""
    return f"index/g{generation:08d}"


def write_index(root: Path, generation: int, groups: Mapping[str, Mapping[str, np.ndarray]]) -> Digests:
    """Write the groups of columns of a generation and flush them.

    Parameters
    ----------
    root : directory of the store
    groups : {group: {column: array}}, such as {"runs": {"start": int64 [runs]}}

    Returns
    -------
    dict : size and checksum of each file of the index
    """
    digests: Digests = {}

    def put(relative: str, data: bytes) -> None:
        write_durably(root / relative, data)
        digests[relative] = [len(data), crc32c(data)]

    base = directory_of(generation)
    (root / base).mkdir(parents=True)
    bare = group_metadata({})
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
    """Columns of one group of an index, by name.

    Parameters
    ----------
    read : gives the bytes of a file of the store, uint8 [bytes], already checked against `digests`
    digests : files of the store by path

    Raises
    ------
    StoreError : if the metadata of a column cannot be understood
    """
    prefix = f"{directory_of(generation)}/{group}/"
    names = sorted({path[len(prefix) :].split("/")[0] for path in digests if path.startswith(prefix)})
    columns = {}
    for name in names:
        if name == "zarr.json":
            continue
        try:
            metadata = json.loads(read(f"{prefix}{name}/zarr.json").tobytes())
            shape, dtype = tuple(metadata["shape"]), np.dtype(metadata["data_type"]).newbyteorder("<")
            if 0 in shape:
                columns[name] = np.zeros(shape, dtype)
            else:
                chunk = read(f"{prefix}{name}/c/" + "/".join("0" * len(shape)))
                columns[name] = chunk.view(dtype).reshape(shape)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, StoreError):
                raise
            raise StoreError(f"{prefix}{name}: cannot read this column of the index ({error})") from error
    return columns
