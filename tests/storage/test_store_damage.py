"""Damage is found and named: flipped bytes, truncated and missing files."""

import errno
import os
import shlex
import shutil
import subprocess
import warnings

import numpy as np
import pytest
from stores import KINDS, read_all, rewrite, root_of, seal, write_store

from brainflow.storage import BoldStore, StoreError, StoreWriter, verify
from brainflow.storage.errors import StoreUnavailable, StoreWarning

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
        assert not report.ok, name
        assert any(name.split("/")[0] in error for error in report.errors)
        file.write_bytes(good)
    assert verify(copy).ok


def test_truncated_and_missing_files_are_named_in_open_and_verify(copy):
    for name in files_of(copy):
        for_others = name.startswith("index") and name.endswith(".json") and name.count("/") in (1, 2, 3)
        file = copy / name
        good = file.read_bytes()
        for damaged in (good[: len(good) // 2], b"", None):
            if damaged is None:
                file.unlink()
            else:
                rewrite(file, damaged)
            report = verify(copy)
            assert not report.ok, name
            assert name in report.errors[0]
            if not for_others:
                with pytest.raises(StoreError, match=name):
                    BoldStore.open(copy, fallback=False)
            if name.startswith(("bold/c", "statistics/c")):
                assert report.bad_runs, "the runs of a shard that cannot be read are named"
        rewrite(file, good)
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
        BoldStore.open(copy, fallback=False)


def test_without_checking_damage_is_not_looked_for(copy):
    flip(copy / "bold/c/0/0", 0)
    BoldStore.open(copy, check=False).run(0)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_statistics_are_found_at_the_first_use_of_their_row(tmp_path, kind):
    path = write_store(tmp_path / "s", commits=(4,), kind=kind)
    flip(path / "statistics/c/0/0/0", 40)
    store = BoldStore.open(path)
    with pytest.raises(StoreError, match=r"run ds-d_sub-01: chunk 0 of statistics .*is damaged"):
        store.statistics(1)
    integers = kind == "int8"
    assert store.intact(store.runs.start, store.runs.length).tolist() == [not integers] * 4
    if integers:  # their scale stands there
        for read in (store.run, store.scale, lambda run: store.check(store.runs.start[:1], [1])):
            with pytest.raises(StoreError, match="chunk 0 of statistics"):
                read(0)
    else:
        store.run(0)
    BoldStore.open(path, check=False).statistics(1)


@pytest.fixture(scope="module")
def generations(tmp_path_factory):
    """A store of two generations, and what each of them holds."""
    folder = tmp_path_factory.mktemp("generations")
    first = read_all(write_store(folder / "first", commits=(4,)))
    path = write_store(folder / "s")
    return path, first, read_all(path)


@pytest.fixture
def two(generations, tmp_path):
    return shutil.copytree(generations[0], tmp_path / "its 'own' $place")


def open_warned(path):
    with pytest.warns(StoreWarning) as caught:
        store = BoldStore.open(path)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert str(caught[0].message) == store.damage
    return store


def follow_the_advice(damage):
    """Run the command at the end of a warning."""
    command = damage[damage.rindex("cp ") :]
    subprocess.run(shlex.split(command), check=True)


def begin_third_commit(path, original):
    """Leave what a writer leaves that is killed just before it renames the root's file."""
    with StoreWriter.append_to(path) as writer:
        writer.append(np.zeros((5, 4)), t_r=1.0, dataset="d", subject="new")
    shutil.copytree(original / "index/g00000000", path / "index/g00000000")
    shutil.copy(original / "zarr.json", path / "zarr.json")


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "zeros", "gone"])
def test_a_damaged_root_is_replaced_by_its_copy(two, generations, damage, killed):
    if killed:
        begin_third_commit(two, generations[0])
    root = two / "zarr.json"
    good = root.read_bytes()
    wrong = {
        "flip": good.replace(b'"networks"', b'"netwOrks"'),
        "truncate": good[: len(good) * 2 // 3],
        "empty": b"",
        "zeros": bytes(len(good)),
    }
    if damage == "gone":
        root.unlink()
    else:
        rewrite(root, wrong[damage])
    report = verify(two)
    assert not report.ok
    assert any("can be read" in note for note in report.notes)
    with pytest.raises(StoreError, match=r"zarr\.json"):
        BoldStore.open(two, fallback=False)
    store = open_warned(two)
    # Where nothing of the file is left, nothing says that the third commit did not happen; it is whole.
    assert store.generation == (2 if killed and damage in ("empty", "zeros", "gone") else 1)
    assert "zarr.json" in store.damage
    follow_the_advice(store.damage)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mended = read_all(two)
    if store.generation == 1:
        assert mended == generations[2]
        assert root.read_bytes() == good
    assert verify(two).ok


def test_a_damaged_index_or_a_lost_shard_of_the_last_commit_leaves_the_generation_before(two, generations):
    new_shard = f"bold/c/{root_of(generations[0])['attributes']['manifest']['rows'] // 64 - 1}/0"
    for name in ("index/g00000001/runs/start/c/0", "index/g00000001/labels/s/zarr.json", new_shard):
        good = (two / name).read_bytes()
        for damaged in (good[:-1], good[:5] + b"\xff" + good[6:] if "index" in name else b"", None):
            if damaged is None:
                (two / name).unlink()
            else:
                rewrite(two / name, damaged)
            store = open_warned(two)
            assert store.generation == 0
            assert name in store.damage
            assert "4 runs" in store.damage
            assert read_all_quietly(two) == generations[1]
            assert not verify(two).ok
            with pytest.raises(StoreError, match=name):
                BoldStore.open(two, fallback=False)
        rewrite(two / name, good)
    (two / "index/g00000001/runs/start/c/0").unlink()
    follow_the_advice(open_warned(two).damage)
    report = verify(two)
    assert report.ok, report.errors
    assert any("left over from a writer" in note for note in report.notes)
    with StoreWriter.append_to(two) as writer:
        writer.append(np.zeros((5, 4)), t_r=1.0, dataset="d", subject="new")
    assert verify(two).ok
    assert BoldStore.open(two).runs.subject.tolist() == ["00", "01", "02", "03", "new"]


def read_all_quietly(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StoreWarning)
        return read_all(path)


def test_what_both_generations_need_is_an_error(two):
    (two / "bold/c/0/0").unlink()
    with pytest.raises(StoreError, match="bold/c/0/0: this shard is missing"):
        BoldStore.open(two)


def test_a_newer_format_is_no_reason_to_read_an_older_generation(two):
    root = root_of(two)
    older = (two / "index/g00000000/manifest.json").read_bytes()
    root["attributes"]["format_version"] = 2
    seal(two, root)
    rewrite(two / "index/g00000000/manifest.json", older)
    for check in (True, False):
        with pytest.raises(StoreUnavailable, match="version 2"):
            BoldStore.open(two, check=check)


def test_a_disk_that_fails_is_a_reason_and_a_lack_of_permission_is_none(two, monkeypatch):
    column = (two / "index/g00000001/runs/start/c/0").stat().st_ino
    fstat, opened = os.fstat, os.open

    def failing(descriptor):
        if fstat(descriptor).st_ino == column:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return fstat(descriptor)

    def refusing(path, *args, dir_fd=None):
        if dir_fd is not None and path == "0":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return opened(path, *args, dir_fd=dir_fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", failing)
        assert open_warned(two).generation == 0
    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(StoreUnavailable, match=r"cannot be read \(Permission denied\)"):
        BoldStore.open(two)


def test_the_shape_of_an_array_is_that_of_a_generation(two, generations):
    file = two / "bold/zarr.json"
    good = file.read_bytes()
    store = BoldStore.open(two)
    grid, rows = store.layout.bold_grid, store.manifest.rows
    rewrite(file, store.layout.array_metadata(grid, rows + 64))
    for call in (lambda: BoldStore.open(two), lambda: store.bold):
        with pytest.raises(StoreError, match=r"bold/zarr\.json: damaged"):
            call()
    assert not verify(two).ok
    rewrite(file, good)
    # A commit that is under way, or whose writer was killed: its index stands there, and the shape has grown.
    begin_third_commit(two, generations[0])
    assert store.bold.shape[0] == rows + 64
    assert read_all(two) == generations[2]
    report = verify(two)
    assert report.ok, report.errors
    assert len(report.notes) > 5


def test_stores_of_older_versions_have_no_copies(two, generations):
    for copy in two.glob("index/*/manifest.json"):
        copy.unlink()
    root = root_of(two)
    del root["attributes"]["manifest"]["files"]["index/zarr.json"]
    seal(two, root)
    found = read_all(two)
    assert found["bold"] == generations[2]["bold"]
    assert verify(two).ok
    group, array = two / "index/zarr.json", two / "bold/zarr.json"
    store = BoldStore.open(two)
    good, rows = group.read_bytes(), store.manifest.rows
    flip(group, 3)
    assert ["index/zarr.json" in error for error in verify(two).errors] == [True]
    rewrite(group, good)
    whole = (two / "zarr.json").read_bytes()
    rewrite(
        two / "zarr.json", whole.replace(b"node_type", b"nodeXtype")
    )  # the digest is of the attributes only
    assert ["not as brainflow writes it" in error for error in verify(two).errors] == [True]
    rewrite(two / "zarr.json", whole)
    rewrite(
        array, store.layout.array_metadata(store.layout.bold_grid, rows + 64)
    )  # of a writer that was killed
    assert read_all(two) == found
    assert verify(two).ok
    rewrite(array, store.layout.array_metadata(store.layout.bold_grid, rows - 64))
    with pytest.raises(StoreError, match=r"bold/zarr\.json"):
        BoldStore.open(two)
    (two / "index/g00000001/runs/start/c/0").unlink()
    with pytest.raises(StoreError, match="runs/start/c/0"):  # nothing to fall back to
        BoldStore.open(two)


def test_files_that_are_not_of_the_store_are_notes(two):
    (two / "evil.bin").write_bytes(b"x")
    (two / "bold/c/99").mkdir()
    (two / "bold/c/99/0").write_bytes(b"x")
    (two / "link").symlink_to("/dev/zero")
    report = verify(two)
    assert report.ok
    assert [note.removeprefix(f"{two}/").split(":")[0] for note in report.notes] == [
        "bold/c/99/0",
        "evil.bin",
        "link",
    ]
