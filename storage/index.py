"""The index of one generation: columns of runs and segments as Zarr arrays of one raw chunk each.

A commit writes a whole new index under `index/g…/`; none is ever changed. Any Zarr client reads the columns,
and we map them, so that a million runs open at once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from .errors import StoreError
from .files import replace_durably, sync_directory, write_durably
from .layout import array_metadata, crc32c, group_metadata

_COLUMN_DTYPES = ("int32", "int64", "float64", "uint8", "uint32")
_COLUMN_METADATA = 2**16  # bytes; ours have some 500

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
    StoreError : if the metadata of a column cannot be understood, or says another size than its file has
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
    """One column; its shape is compared with the size of its file before anything is read or made."""
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
