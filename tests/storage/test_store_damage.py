"""Damage is found and named: flipped bytes, truncated and missing files."""

import shutil

import numpy as np
import pytest

from brainflow.storage import BoldStore, StoreError, StoreWriter, verify

NETWORKS, CHUNK, SHARD = 5, 4, 64


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    path = tmp_path_factory.mktemp("damage") / "s"
    rng = np.random.default_rng(0)
    with StoreWriter.create(
        path, networks=NETWORKS, dtype="int8", chunk_rows=CHUNK, shard_rows=SHARD
    ) as writer:
        for i in range(60):
            bold = rng.standard_normal((int(rng.integers(5, 30)), NETWORKS))
            writer.append(bold, t_r=2.0, dataset="d", subject=f"{i:02d}")
    return path


@pytest.fixture
def copy(original, tmp_path):
    return shutil.copytree(original, tmp_path / "s")


def flip(file, position, mask=0x10):
    data = bytearray(file.read_bytes())
    data[position] ^= mask
    file.write_bytes(data)


def test_a_flipped_byte_is_found_in_each_of_200_chunks(copy):
    store = BoldStore.open(copy)
    grid = store.layout.bold_grid
    rng = np.random.default_rng(1)
    shards, chunks = grid.chunks_in_shards(store.runs.start, store.runs.length)
    present = [
        int(s) * grid.chunks_per_shard + c for s, n in zip(shards, chunks, strict=True) for c in range(n)
    ]
    bad = sorted(rng.choice(present, 200, replace=False).tolist())
    for chunk in bad:
        shard, position = divmod(chunk, grid.chunks_per_shard)
        offset = position * grid.chunk_bytes + int(rng.integers(grid.chunk_bytes))
        flip(copy / grid.shard_path(shard), offset, int(rng.integers(1, 256)))
    seen = []
    report = verify(copy, lambda done, total: seen.append(done / total))
    assert not report.ok
    assert report.bad_chunks == bad
    assert seen[-1] == 1.0
    ends = store.runs.start + store.runs.length
    touched = [
        store.runs.key_of(i)
        for i in range(len(store.runs))
        if any(store.runs.start[i] < (c + 1) * CHUNK and ends[i] > c * CHUNK for c in bad)
    ]
    assert sorted(report.bad_runs) == sorted(touched)
    reader = BoldStore.open(copy)
    for i in range(len(reader.runs)):
        if reader.runs.key_of(i) in touched:
            with pytest.raises(StoreError, match=reader.runs.key_of(i)):
                reader.run(i)
        else:
            reader.run(i)


def files_of(path):
    return sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())


def test_any_flipped_byte_outside_the_chunks_is_found_too(copy):
    for name in files_of(copy):
        file = copy / name
        good = file.read_bytes()
        position = len(good) - 3 if "/c/" in name else len(good) // 2
        flip(file, position)
        report = verify(copy)
        if name != "index/zarr.json":  # holds nothing
            assert not report.ok, name
            assert any(name.split("/")[0] in error for error in report.errors)
        file.write_bytes(good)
    assert verify(copy).ok


def test_truncated_and_missing_files_are_named_in_open_and_verify(copy):
    for name in files_of(copy):
        if name == "index/zarr.json":  # holds nothing
            continue
        for_others = name.endswith("zarr.json") and name.count("/") in (1, 2, 3)
        file = copy / name
        good = file.read_bytes()
        for damaged in (good[: len(good) // 2], b"", None):
            if damaged is None:
                file.unlink()
            else:
                file.write_bytes(damaged)
            report = verify(copy)
            assert not report.ok, name
            assert name in report.errors[0]
            if not for_others:
                with pytest.raises(StoreError, match=name):
                    BoldStore.open(copy)
            if name.startswith(("bold/c", "statistics/c")):
                assert report.bad_runs, "the runs of a shard that cannot be read are named"
        file.write_bytes(good)
    assert verify(copy).ok


def test_no_store_another_folder_and_a_newer_version(tmp_path, copy):
    with pytest.raises(StoreError, match="no store here"):
        BoldStore.open(tmp_path / "nothing")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreError, match="no store here"):
        BoldStore.open(tmp_path / "folder")
    text = (copy / "zarr.json").read_text()
    (copy / "zarr.json").write_text(text.replace('"format_version": 1', '"format_version": 99'))
    with pytest.raises(StoreError, match="version 99"):
        BoldStore.open(copy)


def test_without_checking_damage_is_not_looked_for(copy):
    flip(copy / "bold/c/0/0", 0)
    BoldStore.open(copy, check=False).run(0)
