"""A second reader, written from docs/format.md alone with NumPy and the standard library; nothing of ours.

It reads runs, tables and statistics, checks every digest and checksum, and must find what was written.
"""

import hashlib
import json
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import zarr

from brainflow.storage import BoldStore, Segment, StoreWriter

ABSENT = 2**64 - 1


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 & -(crc & 1))
    return crc ^ 0xFFFFFFFF


class Reader:
    def __init__(self, path):
        self.path = Path(path)
        body = json.loads((self.path / "zarr.json").read_bytes())["attributes"]
        snapshot = body.pop("snapshot")
        text = json.dumps(body, sort_keys=True, ensure_ascii=False)  # separators ", " and ": "
        assert hashlib.sha256(text.encode()).hexdigest() == snapshot
        assert (body["format"], body["format_version"]) == ("brainflow", 1)
        self.attributes, self.manifest = body, body["manifest"]
        for name, (size, checksum) in self.manifest["files"].items():
            data = (self.path / name).read_bytes()
            assert (len(data), crc32c(data)) == (size, checksum), name
        index = self.path / "index" / f"g{self.manifest['generation']:08d}"
        self.groups = {
            group.name: {column.name: self.column(column) for column in group.iterdir() if column.is_dir()}
            for group in index.iterdir()
            if group.is_dir()
        }

    @staticmethod
    def column(folder):
        meta = json.loads((folder / "zarr.json").read_bytes())
        dtype = np.dtype(meta["data_type"]).newbyteorder("<")
        if 0 in meta["shape"]:
            return np.zeros(meta["shape"], dtype)
        chunk = folder / "c" / "/".join("0" * len(meta["shape"]))
        return np.frombuffer(chunk.read_bytes(), dtype).reshape(meta["shape"])

    @staticmethod
    def strings(column):
        return [bytes(row).rstrip(b"\0").decode() for row in column]

    def rows(self, array, row_shape, dtype, chunk_rows, shard_rows, first, count):
        """Rows of `bold` or `statistics`, with the checksums of all chunks that they lie in."""
        shard = first // shard_rows
        data = (self.path / array / "c" / str(shard) / "/".join("0" * len(row_shape))).read_bytes()
        chunks = shard_rows // chunk_rows
        index = np.frombuffer(data[-16 * chunks - 4 : -4], "<u8").reshape(chunks, 2)
        assert int.from_bytes(data[-4:], "little") == crc32c(data[-16 * chunks - 4 : -4])
        row_bytes = int(np.prod(row_shape)) * dtype.itemsize
        sums = self.groups["checksums"][array]
        for i, (offset, size) in enumerate(index.tolist()):
            if offset == ABSENT:
                assert size == ABSENT
                assert shard * chunks + i >= len(sums) or sums[shard * chunks + i] == 0
            else:
                assert (offset, size) == (i * chunk_rows * row_bytes, chunk_rows * row_bytes)
                assert crc32c(data[offset : offset + size]) == sums[shard * chunks + i]
        begin = first % shard_rows * row_bytes
        return np.frombuffer(data, dtype, count * row_bytes // dtype.itemsize, begin).reshape(
            count, *row_shape
        )

    def run(self, i):
        runs, a = self.groups["runs"], self.attributes
        dtype = np.dtype(a["dtype"]).newbyteorder("<")
        place = int(runs["start"][i]), int(runs["length"][i])
        assert place[0] // a["shard_rows"] == (sum(place) - 1) // a["shard_rows"]
        bold = self.rows("bold", (a["networks"],), dtype, a["chunk_rows"], a["shard_rows"], *place)
        return bold if dtype.kind == "f" else bold * self.statistics(i)["scale"]

    def statistics(self, i):
        names = json.loads((self.path / "statistics" / "zarr.json").read_bytes())["attributes"]["statistics"]
        shape = (len(names), self.attributes["networks"])
        slot = int(self.groups["runs"]["slot"][i])
        return dict(
            zip(names, self.rows("statistics", shape, np.dtype("<f4"), 64, 4096, slot, 1)[0], strict=True)
        )

    def censor(self, i):
        runs = self.groups["runs"]
        if runs["censor"][i] == -1:
            return None
        length = int(runs["length"][i])
        packed = runs["censor_bits"][runs["censor"][i] :][: -(-length // 8)]
        return np.unpackbits(packed)[:length].astype(bool)


@pytest.mark.parametrize("dtype", ["float16", "float32", "int16", "int8"])
def test_a_reader_written_from_the_page_finds_what_was_written(tmp_path, dtype):
    rng = np.random.default_rng(0)
    written, path = [], tmp_path / "s"
    for part in range(3):  # three commits
        with (
            StoreWriter.append_to(path)
            if part
            else StoreWriter.create(path, networks=5, dtype=dtype, chunk_rows=4, shard_rows=32)
        ) as writer:
            for i in range(4):
                bold = rng.standard_normal((int(rng.integers(3, 30)), 5))
                censor = rng.random(len(bold)) < 0.3 if i % 2 else None
                labels = [{"état %": "né"}, {"n": 3, "x": 0.5}][i % 2]
                segments = [Segment(onset=1, length=2, labels=labels)]
                written.append((bold, censor, labels, f"{part}{i}"))
                writer.append(
                    bold, t_r=0.7 + i, dataset="d", subject=written[-1][3], censor=censor, segments=segments
                )
    reader = Reader(path)
    runs, segments, labels = (reader.groups[name] for name in ("runs", "segments", "labels"))
    labels = {unquote(name): column for name, column in labels.items()}
    assert reader.strings(runs["subject"]) == [name for *_, name in written]
    assert (np.diff(runs["start"]) > 0).all()
    ours = BoldStore.open(path)
    for i, (bold, censor, expected, _) in enumerate(written):
        found = reader.run(i)
        assert np.array_equal(found.astype(np.float32), ours.run(i).astype(np.float32))
        assert (
            np.abs(found - bold).max()
            <= {"float32": 1e-6, "float16": 4e-3, "int16": 1e-4, "int8": 2e-2}[dtype]
        )
        statistics = reader.statistics(i)
        assert np.allclose(statistics["mean"], bold.mean(axis=0), atol=1e-6)
        assert np.allclose(statistics["std"], bold.std(axis=0), atol=1e-6)
        assert runs["t_r"][i] == 0.7 + i % 4
        mine = reader.censor(i)
        assert mine is None if censor is None else np.array_equal(mine, censor)
        assert (segments["run"][i], segments["onset"][i], segments["length"][i]) == (i, 1, 2)
        assert reader.strings(labels["état %"][i : i + 1])[0] == expected.get("état %", "")
        assert labels["n"][i] == expected.get("n", -(2**63))
        assert labels["x"][i] == expected["x"] if "x" in expected else np.isnan(labels["x"][i])


def test_any_zarr_client_reads_a_compressed_store(tmp_path):
    runs = [np.random.default_rng(i).standard_normal((20 + i, 5)).astype(np.float16) for i in range(4)]
    options = {"networks": 5, "chunk_rows": 4, "shard_rows": 32, "compression": "zstd"}
    with StoreWriter.create(tmp_path / "s", **options) as writer:
        for i, bold in enumerate(runs):
            writer.append(bold, t_r=1.0, dataset="d", subject=str(i))
    group = zarr.open_group(tmp_path / "s", mode="r")
    generation = group.attrs["manifest"]["generation"]
    table = group[f"index/g{generation:08d}/runs"]
    for bold, start, length in zip(runs, table["start"][:], table["length"][:], strict=True):
        assert np.array_equal(group["bold"][start : start + length], bold)
