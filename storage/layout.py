"""The arithmetic of the layout: rows, chunks, shards, and the Zarr v3 metadata that describes them.

A `Grid` is an array whose first axis is cut into chunks of `chunk_rows` rows, `chunks_per_shard` of which lie
in one shard file. Runs are laid end to end along that axis and none straddles two shards, so that a window is
one contiguous piece of one file. See `docs/format.md`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np

FORMAT_VERSION = 1
CHUNK_ROWS = 128
SHARD_ROWS = 65_536
STATISTICS_CHUNK_ROWS = 64
STATISTICS_SHARD_ROWS = 4_096
DTYPES = ("float16", "float32", "int16", "int8")
# Z-scored BOLD hardly compresses: zstd saves 5 to 15 %, lz4 nothing, gzip decodes five times as slowly.
COMPRESSIONS = (None, "zstd")
# Level 1 gives as many bytes; 19 gives one per cent fewer, decoded more slowly (docs/format.md).
ZSTD_LEVEL = 3
MISSING_CHUNK = np.uint64(2**64 - 1)


def crc32c(data: Any) -> int:
    """Return CRC-32C (Castagnoli) of a bytes-like object or a C-contiguous array, without copying it."""
    view = data.reshape(-1).view(np.uint8) if isinstance(data, np.ndarray) else np.frombuffer(data, np.uint8)
    view = view[:]
    view.flags.writeable = False
    return int(google_crc32c.value(view))


@dataclass(frozen=True, kw_only=True)
class Grid:
    """How one array of shape [rows, *row_shape] lies in shard files.

    Parameters
    ----------
    name
        Path of the array inside the store, such as "bold".
    row_shape
        Shape of one row: (networks,) for `bold`, (statistics, networks) for `statistics`.
    dtype
        Element type, stored little-endian.
    chunk_rows, shard_rows
        Rows of a chunk and of a shard; the second is a multiple of the first.
    compression
        None for raw chunks (which are mapped), or "zstd".
    """

    name: str
    row_shape: tuple[int, ...]
    dtype: np.dtype
    chunk_rows: int
    shard_rows: int
    compression: str | None = None

    def __post_init__(self) -> None:
        if self.chunk_rows < 1 or self.shard_rows < 1 or self.shard_rows % self.chunk_rows:
            raise ValueError(
                f"shard_rows must be a positive multiple of chunk_rows, got shard_rows={self.shard_rows}, "
                f"chunk_rows={self.chunk_rows}"
            )

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.row_shape) * self.dtype.itemsize

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk before compression."""
        return self.chunk_rows * self.row_bytes

    @property
    def chunks_per_shard(self) -> int:
        """Chunks that a shard has room for."""
        return self.shard_rows // self.chunk_rows

    @property
    def index_bytes(self) -> int:
        """Bytes of the shard index with its checksum, at the end of every shard file."""
        return 16 * self.chunks_per_shard + 4

    def shard_path(self, shard: int) -> str:
        """Return the path of a shard file relative to the store."""
        return f"{self.name}/c/{shard}" + "/0" * len(self.row_shape)

    def chunks_in_shards(self, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return shards that exist and how many chunks each holds, from the runs laid in it.

        Parameters
        ----------
        starts, lengths
            int [runs], first row and number of rows of each run, ascending.

        Returns
        -------
        shards
            int64 [shards], numbers of the shard files, ascending.
        chunks
            int64 [shards], chunks present in each; they are its first ones.
        """
        if len(starts) == 0:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        starts = np.asarray(starts, np.int64)
        shard = starts // self.shard_rows
        last = np.flatnonzero(np.append(np.diff(shard) != 0, True))
        shards = shard[last]
        end = starts[last] + lengths[last] - shards * self.shard_rows
        return shards, -(-end // self.chunk_rows)

    def spans(self, starts: np.ndarray, lengths: np.ndarray) -> list[range]:
        """Return the chunks that each window lies in, from int64 [windows] first rows and numbers of rows."""
        firsts, lasts = starts // self.chunk_rows, (starts + lengths - 1) // self.chunk_rows
        return [range(a, b + 1) for a, b in zip(firsts.tolist(), lasts.tolist(), strict=True)]

    def pack_index(self, entries: list[tuple[int, int]]) -> bytes:
        """Encode a shard's index: (offset, bytes) of each chunk, absent ones as 2⁶⁴ - 1, then its CRC-32C."""
        index = np.full((self.chunks_per_shard, 2), MISSING_CHUNK, "<u8")
        if entries:
            index[: len(entries)] = entries
        body = index.tobytes()
        return body + crc32c(body).to_bytes(4, "little")

    def read_index(self, tail: bytes, chunks: int) -> np.ndarray:
        """Decode a shard's index.

        Parameters
        ----------
        tail
            Last `index_bytes` of the shard file.
        chunks
            Chunks that are present; they lie one behind the other.

        Returns
        -------
        int64 [chunks, 2]
            Offset and bytes of each.

        Raises
        ------
        ValueError
            If length or checksum are wrong, or the chunks do not lie so.
        """
        if len(tail) != self.index_bytes or crc32c(tail[:-4]) != int.from_bytes(tail[-4:], "little"):
            raise ValueError("the shard's index is damaged (wrong checksum)")
        index = np.frombuffer(tail, "<u8", count=2 * self.chunks_per_shard).reshape(-1, 2)
        sizes = index[:chunks, 1]
        # What zstd may make of bytes that it cannot compress: 1/256 more, and up to 64 bytes for small ones.
        most = self.chunk_bytes + (0 if self.compression is None else self.chunk_bytes // 256 + 64)
        fewest = self.chunk_bytes if self.compression is None else 1
        good = bool((sizes >= fewest).all() and (sizes <= most).all())  # so that no sum below wraps
        ends = np.cumsum(sizes)
        if not (
            good and (index[:chunks, 0] == ends - sizes).all() and (index[chunks:] == MISSING_CHUNK).all()
        ):
            raise ValueError(
                "its chunks do not lie one behind the other, so it was not written by brainflow; write the "
                "store anew with StoreWriter"
            )
        return index[:chunks].astype(np.int64)

    def metadata(self, rows: int, attributes: dict[str, Any], dimensions: list[str]) -> bytes:
        """Return `zarr.json` of the array when it has `rows` rows."""
        bytes_codec = {"name": "bytes", "configuration": {"endian": "little"}}
        codecs: list[dict[str, Any]] = [bytes_codec]
        if self.compression == "zstd":
            # Without zstd's own checksum: the index of the store has a CRC-32C of every chunk.
            codecs.append({"name": "zstd", "configuration": {"level": ZSTD_LEVEL, "checksum": False}})
        sharding = {
            "name": "sharding_indexed",
            "configuration": {
                "chunk_shape": [self.chunk_rows, *self.row_shape],
                "codecs": codecs,
                "index_codecs": [bytes_codec, {"name": "crc32c"}],
                "index_location": "end",
            },
        }
        return array_metadata(
            shape=(rows, *self.row_shape),
            chunk_shape=(self.shard_rows, *self.row_shape),
            dtype=self.dtype,
            codecs=[sharding],
            attributes=attributes,
            dimensions=dimensions,
        )


def array_metadata(
    *,
    shape: tuple[int, ...],
    chunk_shape: tuple[int, ...],
    dtype: np.dtype,
    codecs: list[dict[str, Any]] | None = None,
    attributes: dict[str, Any] | None = None,
    dimensions: list[str] | None = None,
) -> bytes:
    """Return `zarr.json` of a Zarr v3 array with a regular grid and the default chunk keys."""
    return to_compact_json(
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(shape),
            "data_type": dtype.name,
            "chunk_grid": {
                "name": "regular",
                # Zarr refuses chunks of 0.
                "configuration": {"chunk_shape": [max(1, n) for n in chunk_shape]},
            },
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0 if dtype.kind in "iu" else 0.0,
            "codecs": codecs or [{"name": "bytes", "configuration": {"endian": "little"}}],
            "attributes": attributes or {},
            "dimension_names": dimensions,
            "storage_transformers": [],
        }
    )


def group_metadata(attributes: dict[str, Any]) -> bytes:
    """Return `zarr.json` of a Zarr v3 group."""
    return to_compact_json({"zarr_format": 3, "node_type": "group", "attributes": attributes})


def to_json(value: Any) -> bytes:
    """Return JSON as this package writes it: keys in order, no NaN, the same bytes for the same value."""
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n").encode()


def to_compact_json(value: Any) -> bytes:
    """Return JSON on one line: an index has dozens of such files, and it is ten times faster."""
    return json.dumps(value, sort_keys=True, allow_nan=False, ensure_ascii=False).encode()


def run_key(*, dataset: str, subject: str, session: str, task: str, run: str) -> str:
    """Return the key of a run from its entities, `ds-…_sub-…[_ses-…]_task-…[_run-…]`, empty ones left out."""
    parts = [("ds", dataset), ("sub", subject), ("ses", session), ("task", task), ("run", run)]
    return "_".join(f"{name}-{value}" for name, value in parts if value)
