"""Writers killed with SIGKILL at random instants lose nothing committed and leave nothing half done.

With --thorough 52 instants: one writer in 26 of them, two at once in the other 26 (and a gathering process
after each).
"""

import os
import signal
import time

import numpy as np
import pytest

from brainflow.storage import BoldStore, StoreError, StoreWriter, gather, verify, write_part
from brainflow.storage.parts import read_part

NETWORKS = 4


def bold_of(number):
    rng = np.random.default_rng(number)
    return rng.standard_normal((int(rng.integers(3, 30)), NETWORKS)).astype(np.float32)


def in_child(work):
    """Run `work` in a fork that never returns into the test."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid


def kill_after(pids, seconds):
    time.sleep(seconds)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def append_forever(path, first):
    number = first
    while True:
        with StoreWriter.append_to(path) as writer:
            for _ in range(3):
                writer.append(bold_of(number), t_r=2.0, dataset="d", subject=f"{number:06d}")
                number += 1


def parts_forever(directory, first):
    number = first
    while True:
        write_part(directory, bold_of(number), t_r=2.0, dataset="d", subject=f"{number:06d}")
        number += 2


def check(path, at_least):
    store = BoldStore.open(path)
    assert len(store.runs) >= at_least
    assert len(store.runs) % 3 == 0, "a part of a commit is visible"
    for i in range(len(store.runs)):
        number = int(store.runs.subject[i])
        assert number == i
        assert np.array_equal(store.run(i), bold_of(number).astype(np.float16))
    return len(store.runs)


@pytest.mark.thorough
def test_killed_writers_lose_and_tear_nothing(tmp_path, thorough):
    path, rng, committed, survivors = tmp_path / "s", np.random.default_rng(0), 0, 0
    with StoreWriter.create(path, networks=NETWORKS, chunk_rows=4, shard_rows=32):
        pass
    longest = 0.05  # seconds until the kill; found by trial, as machines differ
    for _ in range(26 if thorough else 12):
        pid = in_child(lambda first=committed: append_forever(path, first))
        kill_after([pid], rng.uniform(0, longest))
        now = check(path, committed)
        survivors += now > committed
        longest = min(0.5, longest * (0.8 if now > committed + 3 else 1.3))
        committed = now
        assert verify(path).ok
        if committed > 90:
            with StoreWriter.create(path, networks=NETWORKS, chunk_rows=4, shard_rows=32, overwrite=True):
                pass
            committed = 0
    assert survivors, "no writer lived long enough to commit"


@pytest.mark.thorough
def test_pairs_of_killed_part_writers_leave_whole_parts(tmp_path, thorough):
    rng = np.random.default_rng(1)
    for trial in range(26 if thorough else 8):
        parts = tmp_path / f"parts{trial}"
        parts.mkdir()
        pids = [in_child(lambda i=i, parts=parts: parts_forever(parts, i)) for i in range(2)]
        kill_after(pids, rng.uniform(0.002, 0.03))
        whole = sorted(int(read_part(file)["subject"]) for file in parts.glob("[!.]*.npz"))
        path = tmp_path / f"s{trial}"
        if not whole:
            continue
        pid = in_child(lambda path=path, parts=parts: gather(parts, path, chunk_rows=4, shard_rows=32))
        kill_after([pid], rng.uniform(0.0, 0.03))
        if path.exists():
            assert verify(path).ok
            assert BoldStore.open(path).runs.subject.tolist() == [f"{n:06d}" for n in whole]
        gather(parts, path, **({} if path.exists() else {"chunk_rows": 4, "shard_rows": 32}))
        store = BoldStore.open(path)
        assert store.runs.subject.tolist() == [f"{n:06d}" for n in whole]
        assert all(np.array_equal(store.run(i), bold_of(n).astype(np.float16)) for i, n in enumerate(whole))
        assert verify(path).ok


def test_a_creator_killed_before_its_commit_leaves_no_store_and_no_hindrance(tmp_path):
    path = tmp_path / "s"

    def work():
        writer = StoreWriter.create(path, networks=NETWORKS)
        writer.append(bold_of(1), t_r=1.0, dataset="d", subject="1")
        (tmp_path / "ready").touch()
        time.sleep(60)

    pid = in_child(work)
    while not (tmp_path / "ready").exists():
        time.sleep(0.005)
    with pytest.raises(StoreError, match="another process"):
        StoreWriter.create(path, networks=NETWORKS)
    kill_after([pid], 0)
    assert not path.exists()
    with StoreWriter.create(path, networks=NETWORKS) as writer:
        writer.append(bold_of(2), t_r=1.0, dataset="d", subject="2")
    assert BoldStore.open(path).runs.subject.tolist() == ["2"]
    assert sorted(os.listdir(tmp_path)) == ["ready", "s"]


def test_files_are_flushed_before_the_manifest_is_renamed(tmp_path, monkeypatch):
    events = []
    replace = os.replace

    def note_flush(descriptor):
        events.append(("flush", os.readlink(f"/proc/self/fd/{descriptor}")))

    def note_replace(source, target):
        events.append(("rename", str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_flush)
    monkeypatch.setattr(os, "replace", note_replace)
    with StoreWriter.create(tmp_path / "s", networks=NETWORKS) as writer:
        writer.append(bold_of(1), t_r=1.0, dataset="d", subject="1")
    renamed = [
        i for i, (kind, name) in enumerate(events) if kind == "rename" and name.endswith("partial/zarr.json")
    ]
    assert len(renamed) == 1
    flushed = {name.partition(".partial/")[2] for kind, name in events[: renamed[0]] if kind == "flush"}
    for file in (tmp_path / "s").rglob("c/*/0"):
        assert file.relative_to(tmp_path / "s").as_posix() in flushed


def test_parts_are_idempotent_and_gathered_in_order_of_their_keys(tmp_path):
    common = {"t_r": 2.0, "dataset": "d"}
    assert write_part(
        tmp_path / "p", bold_of(2), subject="2", **common, censor=np.zeros(len(bold_of(2)), bool)
    )
    assert write_part(tmp_path / "p", bold_of(1), subject="1", **common)
    assert not write_part(tmp_path / "p", bold_of(3), subject="1", **common)
    assert write_part(tmp_path / "p", bold_of(4), subject="x", key="../..//" + "ü" * 100, **common)
    path = tmp_path / "s"
    assert gather(tmp_path / "p", path) == 3
    assert gather(tmp_path / "p", path) == 0
    store = BoldStore.open(path)
    assert store.runs.subject.tolist() == ["x", "1", "2"]
    assert store.runs.censor(2) is not None
    assert gather(tmp_path / "p", path, overwrite=True, dtype="int8") == 3
    assert BoldStore.open(path).dtype == np.int8
    assert BoldStore.open(path).generation == 0
    write_part(tmp_path / "q", bold_of(3), subject="1", **common)
    with pytest.raises(StoreError, match="another run under the key ds-d_sub-1"):
        gather(tmp_path / "q", path)
    next((tmp_path / "q").glob("*.npz")).write_bytes(b"PK\x03\x04broken")
    with pytest.raises(StoreError, match="damaged"):
        gather(tmp_path / "q", path)
    with pytest.raises(StoreError, match="holds no parts"):
        gather(tmp_path / "none", path)
