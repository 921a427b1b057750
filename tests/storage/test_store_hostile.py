"""Stores, parts and servers of strangers: lies behind right checksums, links, pipes, sizes out of the air."""

import json
import os
import shutil
import stat
import struct
import zipfile

import numpy as np
import pytest
from numcodecs import Zstd
from stores import (
    CHUNK,
    NETWORKS,
    index_of,
    lie_in_chunk,
    lie_in_column,
    lie_in_file,
    root_of,
    seal,
    write_store,
)

from brainflow.storage import BoldStore, StoreError, StoreWriter, publish, remote, verify, write_part
from brainflow.storage.cache import ChunkCache
from brainflow.storage.errors import StoreUnavailable, StoreWarning
from brainflow.storage.layout import crc32c
from brainflow.storage.parts import read_part
from brainflow.storage.remote import _body

CHUNK_BYTES = CHUNK * NETWORKS * 2


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("hostile") / "s", commits=(5,))


@pytest.fixture
def copy(original, tmp_path):
    return shutil.copytree(original, tmp_path / "s")


def refused(path, match):
    """A store is refused on open, with checks and without, and is not good to `verify`."""
    for options in ({}, {"check": False}):
        with pytest.raises(StoreError, match=match):
            BoldStore.open(path, **options)
    report = verify(path)
    assert not report.ok
    assert report.chunks == 0


ATTRIBUTES = {
    "networks": [0, -1, 1.0, True, None, "4", [4], 2**23, 2**63, 10**400],
    "dtype": ["object", "O", "float64", "<f2", "i4,O", None, 5, []],
    "chunk_rows": [0, -8, 8.0, "8", 7, 2**31],
    "shard_rows": [0, -64, None, 63, 2**40, 2**31 - 8],
    "compression": ["gzip", 5, [], ""],
    "network_names": [5, "abcd", ["a"], [1] * 4, [["x"]] * 4],
    "network_coordinates": ["x", [[1]], [[1, 2, 3]] * 3, [[1, 2, "3"]] * 4, [[1, 2, 10**400]] * 4],
    "parcellation": [5, None, ["x"]],
    "normalisation": [5, None],
    "preprocessing": ["x", None, [1]],
    "provenance": [1, None, []],
    "format_version": [2, "1", 1.0, True],
}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attributes_of_another_type_or_out_of_range(copy, name):
    good = root_of(copy)
    for value in ATTRIBUTES[name]:
        root = json.loads(json.dumps(good))
        root["attributes"][name] = value
        seal(copy, root)
        refused(copy, name.replace("format_version", "version"))


MANIFESTS = {
    "generation": [-1, "x", 1.0, None, True, 10**30, "../.."],
    "runs": [4, 6, -1, 10**18, "5"],
    "segments": [0, 9, 10**9],
    "rows": [0, -1, 63, 10**18, 2**62 - 64, "x"],
    "slots": [0, 64, 10**18],
    "files": [{}, [], 5, None, {"x": 5}],
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_that_do_not_fit(copy, name):
    good = root_of(copy)
    for value in MANIFESTS[name]:
        root = json.loads(json.dumps(good))
        root["attributes"]["manifest"][name] = value
        seal(copy, root)
        refused(copy, ".")


@pytest.mark.parametrize(
    "path",
    [
        "/dev/zero",
        "../../dev/zero",
        "index/../x",
        "index/g00000000/../x",
        "zarr.json",
        "index/g00000000//x",
        "index/g00000000/runs/\0",
        "index/g00000001/zarr.json",
        "bold/c/0/0",
        "",
    ],
)
def test_files_of_the_index_lie_in_the_index(copy, path):
    root = root_of(copy)
    root["attributes"]["manifest"]["files"][path] = [5, 0]
    seal(copy, root)
    refused(copy, "does not lie in the index of generation 0")


@pytest.mark.parametrize(
    "entry", [None, 5, [], [5], [5, 0, 0], [-1, 0], [5, -1], [5, 2**32], [5.0, 0], [True, 0]]
)
def test_sizes_and_checksums_are_whole_numbers(copy, entry):
    root = root_of(copy)
    root["attributes"]["manifest"]["files"][f"{index_of(copy)}/runs/start/c/0"] = entry
    seal(copy, root)
    refused(copy, "CRC-32C")


def last(value):
    def change(column):
        column[-1] = value
        return column

    return change


COLUMNS = [
    ("runs", "start", lambda x: x[::-1]),
    ("runs", "start", lambda x: x * 0),
    ("runs", "start", last(2**62)),
    ("runs", "start", last(2**63 - 1)),
    ("runs", "start", lambda x: np.r_[-5, x[1:]]),
    ("runs", "start", lambda x: np.r_[x[:1], x[1:] - 2]),
    ("runs", "start", lambda x: x + 7),
    ("runs", "start", lambda x: x[:-1]),
    ("runs", "start", lambda x: x[:, None]),
    ("runs", "start", lambda x: x.astype("f8")),
    ("runs", "start", lambda x: x.astype("u1")),
    ("runs", "length", lambda x: x * 0),
    ("runs", "length", lambda x: -x),
    ("runs", "length", last(2**31 - 1)),
    ("runs", "length", lambda x: x.astype("i8")),
    ("runs", "length", last(64)),
    ("runs", "slot", last(2**40)),
    ("runs", "slot", lambda x: x - 1),
    ("runs", "slot", lambda x: x * 0),
    ("runs", "slot", lambda x: x[::-1]),
    ("runs", "t_r", last(np.nan)),
    ("runs", "t_r", last(np.inf)),
    ("runs", "t_r", last(0)),
    ("runs", "t_r", last(-1)),
    ("runs", "censor", last(10**9)),
    ("runs", "censor", last(2**63 - 1)),
    ("runs", "censor", last(-2)),
    ("runs", "key", lambda x: x[:, 0]),
    ("runs", "key", lambda x: x[:, :0]),
    ("runs", "key", lambda x: x.astype("i8")),
    ("segments", "run", last(5)),
    ("segments", "run", last(-1)),
    ("segments", "onset", last(-1)),
    ("segments", "onset", last(2**31 - 1)),
    ("segments", "length", last(0)),
    ("segments", "length", last(2**31 - 1)),
    ("labels", "n", lambda x: np.r_[x, x]),
    ("labels", "n", lambda x: x.astype("i4")),
    ("labels", "s", lambda x: x | 0x80),
    ("checksums", "bold", lambda x: x[:-1]),
    ("checksums", "bold", lambda x: x.astype("f8")),
    ("checksums", "statistics", lambda x: np.r_[x, x]),
]


@pytest.mark.parametrize("number", range(len(COLUMNS)))
def test_tables_that_contradict_each_other(copy, number):
    group, name, change = COLUMNS[number]
    lie_in_column(copy, group, name, change)
    refused(copy, "." if name in ("s", "slot") else f"{group}/")


@pytest.mark.parametrize("change", [lambda x: x | 0x80, lambda x: np.tile(x[:1], (5, 1)), lambda x: x * 0])
def test_keys_that_are_no_keys_are_found_by_verify(copy, change):
    lie_in_column(copy, "runs", "key", change)
    report = verify(copy)
    assert any("key" in error for error in report.errors)
    store = BoldStore.open(copy)
    with pytest.raises(ValueError, match="leaves run 0"):  # a message that names a key, whatever it is
        store.windows([0], [60])


@pytest.mark.parametrize(
    "lie",
    [
        {"shape": [2**62]},
        {"shape": [2**70]},
        {"shape": [-1]},
        {"shape": [0, 2**62]},
        {"shape": []},
        {"shape": 5},
        {"shape": [True]},
        {"shape": None},
        {"data_type": "object"},
        {"data_type": [["a", "O"]]},
        {"data_type": "uint64"},
        {"data_type": None},
    ],
)
def test_shapes_are_compared_with_bytes(copy, lie):
    file = f"{index_of(copy)}/runs/start/zarr.json"
    metadata = json.loads((copy / file).read_bytes())
    lie_in_file(copy, file, json.dumps(metadata | lie).encode())
    refused(copy, "runs/start")


@pytest.mark.parametrize("name", ["runs/t_r", "runs/key", "segments/run", "checksums/bold"])
def test_columns_that_are_not_there(copy, name):
    root = root_of(copy)
    files = root["attributes"]["manifest"]["files"]
    root["attributes"]["manifest"]["files"] = {k: v for k, v in files.items() if f"/{name}/" not in k}
    seal(copy, root)
    refused(copy, f"{name}: this column is missing")


@pytest.mark.parametrize(
    "text", [b"[" * 200_000, b'{"attributes":{"a":' + b"[" * 100_000, b"9" * 5000, b"\xff", b"[]"]
)
def test_json_that_is_none_of_ours(copy, text):
    lie_in_file(copy, f"{index_of(copy)}/runs/start/zarr.json", text)
    refused(copy, "runs/start")
    for file in (copy / index_of(copy) / "manifest.json", copy / "zarr.json"):
        file.write_bytes(text)
    refused(copy, r"zarr\.json: truncated or damaged")


def test_json_that_takes_far_more_memory_than_bytes(copy):
    for file in (copy / index_of(copy) / "manifest.json", copy / "zarr.json"):
        file.write_bytes(b"[" + b"[]," * 2**20 + b"1]")
    refused(copy, "nothing that brainflow wrote")


def test_a_manifest_that_is_larger_than_any(copy):
    for file in (copy / index_of(copy) / "manifest.json", copy / "zarr.json"):
        os.truncate(file, 10**12)  # a hole
    refused(copy, "expected at most")


NAMES = ["zarr.json", "index/g00000000/runs/start/c/0", "bold/zarr.json", "bold/c/0/0", "statistics/c/0/0/0"]


def use(path, check):
    store = BoldStore.open(path, check=check)
    store.run(0)
    store.statistics(0)


KINDS = ["link", "link to the same", "pipe", "folder", "folder is a link"]
PLACES = [(name, kind) for name in NAMES for kind in KINDS if "/" in name or kind != "folder is a link"]


@pytest.mark.parametrize(("name", "kind"), PLACES)
def test_only_regular_files_of_the_store_are_read(copy, tmp_path, name, kind):
    (copy / index_of(copy) / "manifest.json").unlink()
    file = copy / name
    if kind == "folder is a link":
        folder = copy / name.split("/")[0]
        shutil.move(folder, tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        shutil.move(file, tmp_path / "elsewhere")
        if kind == "pipe":
            os.mkfifo(file)
        elif kind == "folder":
            file.mkdir()
        else:
            file.symlink_to("/dev/zero" if kind == "link" else tmp_path / "elsewhere")
    for check in (True, False):
        if check or name != "bold/zarr.json":
            with pytest.raises(StoreError, match=name.split("/")[0]):
                use(copy, check)
    assert not verify(copy).ok


def test_the_folder_of_a_store_may_be_a_link(copy, tmp_path):
    (tmp_path / "link").symlink_to(copy)
    assert np.array_equal(BoldStore.open(tmp_path / "link").run(1), BoldStore.open(copy).run(1))
    assert verify(tmp_path / "link").ok


def wrap(index):
    index[0] = (2**64 - 8, CHUNK_BYTES)
    return index


def sum_that_wraps(index):
    index[:2] = [(0, 2**64 - 8), (2**64 - 8, int(index[:2, 1].sum()) + 8)]
    return index


SHARD_INDEXES = {
    "sum wraps": sum_that_wraps,
    "wraps": wrap,
    "offset": lambda index: index + np.uint64([[2**63, 0]]),
    "size": lambda index: np.r_[[[np.uint64(0), np.uint64(2**62)]], index[1:]],
    "empty": lambda index: index * np.uint64([[1, 0]]),
    "overlap": lambda index: np.r_[index[:1], index[:1], index[2:]],
    "absent": lambda index: np.r_[np.full((1, 2), 2**64 - 1, np.uint64), index[1:]],
}


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("name", SHARD_INDEXES)
def test_indexes_of_shards_that_lie(tmp_path, name, compression):
    path = write_store(tmp_path / "s", commits=(2,), compression=compression)
    file = path / "bold/c/0/0"
    data, size = file.read_bytes(), 16 * 8 + 4
    tail = (
        SHARD_INDEXES[name](np.frombuffer(data[-size:-4], "<u8").reshape(8, 2).copy()).astype("<u8").tobytes()
    )
    file.write_bytes(data[:-size] + tail + crc32c(tail).to_bytes(4, "little"))
    for check in (True, False):
        with pytest.raises(StoreError, match="one behind the other"):
            BoldStore.open(path, check=check).run(0)
    assert not verify(path).ok


def declared(size):
    return b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", size) + b"\x01\x00\x00"


FRAMES = {
    "declares a terabyte": declared(2**40),
    "declares nothing": b"\x28\xb5\x2f\xfd\x00\x58\x01\x00\x00",
    "holds 16 chunks": Zstd(1).encode(bytes(16 * CHUNK_BYTES)),
    "too short": Zstd(1).encode(bytes(10)),
    "cannot be decoded": declared(CHUNK_BYTES) + b"\xff" * 20,
    "no frame": b"\0" * 30,
    "two frames": Zstd(1).encode(bytes(CHUNK_BYTES)) * 2,
}


@pytest.mark.parametrize("name", FRAMES)
def test_compressed_chunks_that_lie(tmp_path, name):
    path = write_store(tmp_path / "s", commits=(2,), kind="zstd")
    lie_in_chunk(path, FRAMES[name])
    for check in (True, False):
        store = BoldStore.open(path, check=check)
        with pytest.raises(StoreError, match=r"chunk 0 .*is damaged"):
            store.run(0)
    assert any("chunk 0" in error for error in verify(path).errors)


def test_values_that_are_not_finite_are_found_by_verify(copy):
    chunk = np.zeros((CHUNK, NETWORKS), "f2")
    chunk[3, 2] = np.nan
    lie_in_chunk(copy, chunk.tobytes())
    BoldStore.open(copy).run(0)
    assert "not finite" in verify(copy).errors[0]


def test_a_shard_with_more_than_it_should_hold(copy):
    with open(copy / "bold/c/0/0", "r+b") as file:
        data = file.read()
        file.seek(0)
        file.write(bytes(100) + data)
    for check in (True, False):
        with pytest.raises(StoreError, match="bold/c/0/0"):
            BoldStore.open(copy, check=check).run(0)


def part(tmp_path, **options):
    write_part(tmp_path, np.ones((10, 4), "f4"), t_r=2.0, dataset="d", subject="s", **options)
    return next(tmp_path.glob("*.npz"))


def npy(text, body=b""):
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + body


BOLDS = {
    "huge": npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 4), }\n"),
    "wraps": npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387904, 4), }\n"),
    "negative": npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 4), }\n"),
    "objects": npy(b"{'descr': '|O', 'fortran_order': False, 'shape': (1, 4), }\n", b"cos\nsystem\n"),
    "records": npy(b"{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1, 4), }\n", bytes(16)),
    "code": npy(b"{'descr': __import__('os').getpid(), 'fortran_order': False, 'shape': (), }\n"),
    "one dimension": npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (4,), }\n", bytes(16)),
    "no header": npy(b""),
    "nothing": b"",
}


@pytest.mark.parametrize("name", BOLDS)
def test_arrays_of_parts_that_lie(tmp_path, name):
    path = part(tmp_path)
    with zipfile.ZipFile(path) as archive:
        header = archive.read("header.npy")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("bold.npy", BOLDS[name])
        archive.writestr("header.npy", header)
    with pytest.raises(StoreError, match="this part is damaged"):
        read_part(path)


def test_parts_are_what_write_part_makes(tmp_path):
    path = part(tmp_path, censor=np.zeros(10, bool))
    assert read_part(path)["censor"].tolist() == [False] * 10
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bold.npy", npy(b"", bytes(10**8)))  # a bomb
    with pytest.raises(StoreError, match="lists more than it holds"):
        read_part(path)
    for compression in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, data in members.items():
                archive.writestr(name, data)
        with pytest.raises(StoreError, match=r"is compressed|lists more"):
            read_part(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../evil", b"x")
    with pytest.raises(StoreError, match="expected bold"):
        read_part(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(StoreError, match="not a regular file"):
        read_part(path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(StoreError, match="is a link"):
        read_part(path)


def test_a_cache_that_others_may_write_is_not_used(tmp_path, monkeypatch):
    root, data = tmp_path / "above" / "cache", np.arange(100, dtype=np.uint8)
    monkeypatch.setenv("BRAINFLOW_CACHE", str(root))
    cache = ChunkCache.from_environment("s3://x/y")
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    cache.put("bold", 0, crc32c(data), data)
    assert np.array_equal(cache.get("bold", 0, crc32c(data)), data)
    (file,) = (path for path in root.rglob("*") if path.is_file())
    for replace in (lambda: file.symlink_to("/dev/zero"), lambda: os.mkfifo(file)):
        file.unlink()
        replace()
        assert cache.get("bold", 0, crc32c(data)) is None
    for mode in (0o770, 0o702):
        root.chmod(mode)
        with pytest.warns(StoreWarning, match="chmod go-w"):
            assert ChunkCache.from_environment("s3://x/y") is None
    root.chmod(0o755)
    assert ChunkCache.from_environment("s3://x/y") is not None
    monkeypatch.setattr(os, "geteuid", lambda: root.stat().st_uid + 1)
    with pytest.warns(StoreWarning, match="others may write"):
        assert ChunkCache.from_environment("s3://x/y") is None


class Endless:
    """An answer that never ends."""

    def stream(self, min_chunk_size):
        while True:
            yield bytes(min_chunk_size)


def test_an_answer_is_read_up_to_what_was_asked_for():
    assert len(_body(Endless(), 1000)) == 1001
    assert len(_body(Endless(), 0)) == 1


def test_remote_stores_fall_back_and_bound_what_they_read(tmp_path, monkeypatch):
    pytest.importorskip("obstore", reason="obstore (extra `remote`) is not installed")
    path, url = write_store(tmp_path / "s", commits=(3,)), "memory://hostile"
    publish(path, url)
    with StoreWriter.append_to(path) as writer:
        writer.append(np.zeros((5, NETWORKS)), t_r=1.0, dataset="d", subject="new")
    publish(path, url)
    assert verify(url).ok
    files, name = remote.RemoteFiles(url), "index/g00000001/runs/start/c/0"
    good = files.read(name, 10**6).tobytes()
    for wrong in (good[:-1] + b"\xff", good[:-8], good + bytes(2**20)):
        files.write(name, wrong)
        with pytest.warns(StoreWarning, match=name):
            store = BoldStore.open(url)
        assert (store.generation, len(store.runs)) == (0, 3)
        with pytest.raises(StoreError, match=name):
            BoldStore.open(url, fallback=False)
        assert not verify(url).ok
    with pytest.raises(StoreError, match="more than the 10 bytes"):
        files.read("zarr.json", 10)
    files.write(name, good)
    read = remote.RemoteFiles._read

    def without_answer(self, relative, limit):
        if relative == name:
            raise StoreUnavailable(f"{relative}: gave up")
        return read(self, relative, limit)

    monkeypatch.setattr(remote.RemoteFiles, "_read", without_answer)
    with pytest.raises(StoreUnavailable, match="gave up"):
        BoldStore.open(url)
    monkeypatch.undo()
    files.write("index/g00000000/runs/start/c/0", b"x")
    assert not verify(url).ok
