"""What is written is what is read: element types, entities, labels, other Zarr clients, equal bytes."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from brainflow.storage import BoldStore, Segment, StoreError, StoreWriter, verify

SMALL = {"chunk_rows": 4, "shard_rows": 32}


def write(path, runs, **options):
    options = {"networks": 3, **SMALL, **options}
    with StoreWriter.create(path, **options) as writer:
        for i, bold in enumerate(runs):
            writer.append(bold, t_r=2.0, dataset="d", subject=f"{i:02d}", task="rest")
    return BoldStore.open(path)


def noise(*lengths, networks=3, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((n, networks)) for n in lengths]


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 32), min_size=1, max_size=12), data=st.data())
def test_windows_equal_slices_of_the_runs(tmp_path_factory, lengths, data):
    runs = [bold.astype(np.float32) for bold in noise(*lengths)]
    store = write(tmp_path_factory.mktemp("p") / "s", runs, dtype="float32")
    rows = store.runs.start // 32
    assert np.array_equal(rows, (store.runs.start + store.runs.length - 1) // 32), (
        "a run straddles two shards"
    )
    picks = []
    for _ in range(data.draw(st.integers(0, 6))):
        run = data.draw(st.integers(0, len(runs) - 1))
        onset = data.draw(st.integers(0, lengths[run] - 1))
        picks.append((run, onset, data.draw(st.integers(1, lengths[run] - onset))))
    starts = np.array([store.runs.start[run] + onset for run, onset, _ in picks], np.int64)
    out = np.empty((400, 3), np.float32)
    got = store.windows(starts, [n for _, _, n in picks], out=out)
    expected = [runs[run][onset : onset + n] for run, onset, n in picks]
    assert np.array_equal(got, np.concatenate([np.zeros((0, 3), np.float32), *expected]))
    assert got.base is out or len(got) == 0
    assert verify(store.path).ok


@settings(max_examples=60, deadline=None)
@given(starts=st.lists(st.integers(-5, 80), min_size=1, max_size=5), data=st.data())
def test_windows_refuses_exactly_what_leaves_its_run(shared_store, starts, data):
    lengths = [data.draw(st.integers(-2, 20)) for _ in starts]
    begin, end = shared_store.runs.start, shared_store.runs.start + shared_store.runs.length
    inside = [
        n > 0 and any(b <= s and s + n <= e for b, e in zip(begin, end, strict=True))
        for s, n in zip(starts, lengths, strict=True)
    ]
    if all(inside):
        assert len(shared_store.windows(starts, lengths)) == sum(lengths)
    else:
        with pytest.raises(ValueError, match=f"window {inside.index(False)} "):
            shared_store.windows(starts, lengths)


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory):
    return write(tmp_path_factory.mktemp("shared") / "s", noise(10, 20, 7, 25))


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize(
    ("dtype", "bound"), [("float32", 6e-8), ("float16", 5e-4), ("int16", 0.51 / 32767), ("int8", 0.51 / 127)]
)
def test_error_of_each_dtype_is_bounded(tmp_path, dtype, bound, compression):
    runs = noise(20, 32, 5)
    runs[1][:, 1] = 0
    store = write(tmp_path / "s", runs, dtype=dtype, compression=compression)
    for i, bold in enumerate(runs):
        got = store.run(i)
        assert got.dtype == (np.float16 if dtype == "float16" else np.float32)
        scale = np.abs(bold).max(axis=0) if dtype.startswith("int") else np.maximum(np.abs(bold), 1e-3)
        assert (np.abs(got.astype(np.float64) - bold) <= bound * scale + 1e-12).all()
        assert np.allclose(store.statistics(i)["mean"], bold.mean(axis=0), atol=1e-6)
        assert np.allclose(store.statistics(i)["std"], bold.std(axis=0), atol=1e-6)
    assert verify(store.path).ok


def test_plain_zarr_reads_the_same_values(tmp_path):
    runs = noise(10, 30, 31)
    store = write(tmp_path / "s", runs)
    group = zarr.open_group(tmp_path / "s", mode="r")
    array = group["bold"]
    start = np.asarray(group[f"index/g{store.generation:08d}/runs/start"])
    assert np.array_equal(start, store.runs.start)
    for i, bold in enumerate(runs):
        assert np.array_equal(array[start[i] : start[i] + len(bold)], bold.astype(np.float16))
    assert not np.asarray(array[10 + 30 - 40 + 10 :][:22]).any() or start[1] == 10  # gaps are zeros
    assert group.attrs["format"] == "brainflow"
    assert group["statistics"].attrs["statistics"] == ["mean", "std"]
    assert {name for name, _ in group.members()} == {"bold", "statistics", "index"}


def test_entities_labels_and_censor_bits_are_kept(tmp_path):
    path = tmp_path / "s"
    censor = np.arange(12) % 5 == 0
    with StoreWriter.create(
        path, networks=3, parcellation="p", preprocessing={"smoothing_mm": 3}, **SMALL
    ) as writer:
        writer.append(
            noise(12)[0],
            t_r=0.72,
            dataset="hcp",
            subject="é1",
            session="a",
            task="motor",
            run="LR",
            censor=censor,
            segments=[Segment(onset=2, length=3, labels={"state": "hand", "label": 4, "score": 0.5})],
        )
    with StoreWriter.append_to(path) as writer:
        segments = [Segment(onset=0, length=1, labels={"label": np.int64(7), "other one": 1.25})]
        writer.append(noise(5)[0], t_r=2, dataset="hcp", subject="2", key="mine", segments=segments)
    store = BoldStore.open(path)
    assert store.generation == 1
    assert store.runs.key.tolist() == ["ds-hcp_sub-é1_ses-a_task-motor_run-LR", "mine"]
    assert store.runs.key_of(0) == store.runs.key[0]
    assert store.runs.subject.tolist() == ["é1", "2"]
    assert store.runs.session.tolist() == ["a", ""]
    assert store.runs.t_r.tolist() == [0.72, 2.0]
    assert np.array_equal(store.runs.censor(0), censor)
    assert store.runs.censor(1) is None
    columns = store.segments.columns
    assert columns["state"].tolist() == ["hand", ""]
    assert columns["label"].tolist() == [4, 7]
    assert columns["score"][0] == 0.5
    assert np.isnan(columns["score"][1])
    assert columns["other one"][1] == 1.25
    assert store.segments.run.tolist() == [0, 1]
    assert store.attributes["preprocessing"] == {"smoothing_mm": 3}


def digest(path):
    files = sorted(file for file in Path(path).rglob("*") if file.is_file())
    return hashlib.sha256(
        b"".join(str(f.relative_to(path)).encode() + f.read_bytes() for f in files)
    ).hexdigest()


def test_same_inputs_give_the_same_bytes(tmp_path):
    runs = noise(10, 20, 30)
    for name in ("a", "b"):
        write(tmp_path / name, runs, dtype="int8", provenance={"source": "test"})
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert BoldStore.open(tmp_path / "a").snapshot == BoldStore.open(tmp_path / "b").snapshot
    write(tmp_path / "b", runs[:2], dtype="int8", overwrite=True)
    assert digest(tmp_path / "a") != digest(tmp_path / "b")


def test_a_reader_keeps_its_generation_while_runs_are_appended_and_the_store_is_replaced(tmp_path):
    runs = noise(10, 20, 30)
    store = write(tmp_path / "s", runs[:1])
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "s" / "bold" / "c").rglob("*") if f.is_file()}
    for bold, subject in zip(runs[1:], "xy", strict=True):
        with StoreWriter.append_to(tmp_path / "s") as writer:
            writer.append(bold, t_r=2.0, dataset="d", subject=subject)
    assert {f: f.stat().st_mtime_ns for f in before} == before, "a committed shard was rewritten"
    assert len(store.runs) == 1
    newer = BoldStore.open(tmp_path / "s")
    assert len(newer.runs) == 3
    assert newer.generation == 2
    assert np.array_equal(newer.run(2), runs[2].astype(np.float16))
    newer.run(0)
    write(tmp_path / "s", noise(4, seed=9), overwrite=True)
    assert np.array_equal(newer.run(0), runs[0].astype(np.float16))
    assert len(BoldStore.open(tmp_path / "s").runs) == 1


def test_what_cannot_be_stored_is_refused_by_name(tmp_path):
    path = tmp_path / "s"
    with StoreWriter.create(path, networks=3, network_names=["a", "b", "c"], **SMALL) as writer:
        common = {"t_r": 2.0, "dataset": "d", "subject": "1"}
        for value in (np.nan, np.inf, 1e5):
            bold = np.zeros((4, 3))
            bold[2, 1] = value
            with pytest.raises(ValueError, match=r"run ds-d_sub-1: network 1 \(b\), time point 2"):
                writer.append(bold, **common)
        for bold in (np.zeros((4, 2)), np.zeros((0, 3)), np.zeros((33, 3)), np.zeros(3)):
            with pytest.raises(ValueError, match="run ds-d_sub-1"):
                writer.append(bold, **common)
        with pytest.raises(TypeError, match="real numbers"):
            writer.append(np.zeros((4, 3), complex), **common)
        with pytest.raises(ValueError, match="t_r"):
            writer.append(np.zeros((4, 3)), **{**common, "t_r": 0})
        with pytest.raises(ValueError, match="segment 0"):
            writer.append(np.zeros((4, 3)), **common, segments=[Segment(onset=3, length=2)])
        writer.append(np.zeros((4, 3)), **common)
        with pytest.raises(StoreError, match="in the store already"):
            writer.append(np.zeros((4, 3)), **common)
    assert len(BoldStore.open(path).runs) == 1
    with pytest.raises(StoreError, match="already exists"):
        StoreWriter.create(path, networks=3)
    with StoreWriter.append_to(path) as writer, pytest.raises(StoreError, match="another process"):
        StoreWriter.append_to(path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreError, match="not a brainflow store"):
        StoreWriter.create(tmp_path / "folder", networks=3, overwrite=True)
    for wrong in ({"networks": 0}, {"dtype": "float64"}, {"compression": "lz4"}, {"network_names": ["a"]}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            StoreWriter.create(tmp_path / "t", **{"networks": 3, **wrong})


def test_an_error_in_the_block_leaves_the_store_as_it_was(tmp_path):
    path = tmp_path / "s"
    with pytest.raises(RuntimeError):
        write_and_fail(StoreWriter.create(path, networks=3, **SMALL))
    assert os.listdir(tmp_path) == []
    write(path, noise(9))
    before = digest(path)
    with pytest.raises(RuntimeError):
        write_and_fail(StoreWriter.append_to(path))
    assert digest(path) == before


def write_and_fail(writer):
    with writer:
        writer.append(noise(31)[0], t_r=1.0, dataset="d", subject="new")
        raise RuntimeError


def test_out_must_fit(shared_store):
    for out in (np.empty((3, 3), np.float16), np.empty((9, 3), np.float32), np.empty((9, 4), np.float16)):
        with pytest.raises(ValueError, match="out"):
            shared_store.windows([0], [5], out=out)
    with pytest.raises(IndexError, match="run 4"):
        shared_store.run(4)
    assert np.array_equal(shared_store.run(-1), shared_store.run(3))


def test_hints_fall_silent_once_everything_is_in_memory(shared_store):
    starts, lengths = shared_store.runs.start, shared_store.runs.length
    shared_store.windows(starts, lengths)
    for _ in range(80):
        shared_store.advise(starts, lengths)
    assert shared_store._hints.quiet


def test_hints_go_on_where_the_kernel_does_not_tell_what_is_in_memory(shared_store, monkeypatch):
    """mincore calls every page of another one's read-only file resident."""
    monkeypatch.setattr(os, "geteuid", lambda: -1)
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    store = BoldStore.open(shared_store.path)
    for _ in range(80):
        store.advise(store.runs.start, store.runs.length)
    assert not store._hints.quiet


def test_windows_of_damaged_runs_can_be_left_out(tmp_path):
    store = write(tmp_path / "s", noise(10, 20, 7, 25))
    path = tmp_path / "s" / "bold" / "c" / "0" / "0"
    data = bytearray(path.read_bytes())
    data[12 * 6] ^= 1  # row 12, run 1
    path.write_bytes(data)
    starts, lengths = store.runs.start[[1, 0, 3, 1]] + 1, np.array([3, 4, 5, 19])
    for _ in range(2):
        assert store.intact(starts, lengths).tolist() == [False, True, True, False]
    with pytest.raises(StoreError, match="sub-01"):
        store.windows(starts, lengths)
    good = store.intact(starts, lengths)
    assert len(store.windows(starts[good], lengths[good])) == 9
    with pytest.raises(ValueError, match="window 0 "):
        store.intact([0], [11])


def test_a_label_is_a_text_or_a_number_throughout(tmp_path):
    def segment(value):
        return [Segment(onset=0, length=1, labels={"state name": value})]

    common = {"t_r": 1.0, "dataset": "d"}
    with StoreWriter.create(tmp_path / "s", networks=3) as writer:
        writer.append(noise(2)[0], subject="1", segments=segment(1), **common)
        with pytest.raises(ValueError, match="run ds-d_sub-2: label 'state name'"):
            writer.append(noise(2)[0], subject="2", segments=segment("a"), **common)
    with StoreWriter.append_to(tmp_path / "s") as writer:
        with pytest.raises(ValueError, match="holds numbers elsewhere"):
            writer.append(noise(2)[0], subject="2", segments=segment("a"), **common)
        writer.append(noise(2)[0], subject="3", segments=segment(0.5), **common)
    assert BoldStore.open(tmp_path / "s").segments.columns["state name"].tolist() == [1.0, 0.5]


def test_windows_of_shards_that_are_whole_pages(tmp_path):
    """Such shards lie side by side in the address space, and are gathered in another way."""
    runs = [bold.astype(np.float32) for bold in noise(*[20, 12, 30, 31, 3, 8] * 3, networks=32)]
    for options in ({"dtype": "float32"}, {"dtype": "float32", "shard_rows": 33, "chunk_rows": 3}):
        store = write(tmp_path / "s", runs, networks=32, overwrite=True, **options)
        assert (store._reader._flat is not None) == (options.get("shard_rows") is None)
        rng = np.random.default_rng(0)
        for check in (True, False):
            store = BoldStore.open(tmp_path / "s", check=check)
            for out in (None, np.empty((999, 32), np.float32), np.empty((999, 64), np.float32)[:, ::2]):
                picks = rng.integers(0, len(runs), 40)
                onsets = np.array([int(rng.integers(0, len(runs[i]))) for i in picks])
                lengths = np.array(
                    [int(rng.integers(1, len(runs[i]) - t + 1)) for i, t in zip(picks, onsets, strict=True)]
                )
                got = store.windows(store.runs.start[picks] + onsets, lengths.astype(np.int32), out=out)
                places = zip(picks, onsets, lengths, strict=True)
                assert np.array_equal(got, np.concatenate([runs[i][t : t + n] for i, t, n in places]))
    assert store.windows([], []).shape == (0, 32)


def test_a_store_unmaps_its_files_when_it_is_dropped(tmp_path):
    store = write(tmp_path / "s", noise(20, networks=64), networks=64)
    store.run(0)
    place = str(tmp_path / "s")
    assert place in Path("/proc/self/maps").read_text()
    del store
    assert place not in Path("/proc/self/maps").read_text()


def test_rows_lie_on_the_disk_and_equal_windows(tmp_path):
    store = write(tmp_path / "s", noise(20, 12, 30, networks=64), networks=64)
    starts, lengths = store.runs.start + 1, np.array([19, 4, 29])
    store.check(starts, lengths)
    views = [store.rows[start:][:length] for start, length in zip(starts, lengths, strict=True)]
    assert np.array_equal(np.concatenate(views), store.windows(starts, lengths))
    assert not any(view.flags.writeable or view.flags.owndata for view in views)
    with pytest.raises(ValueError, match="window 1 "):
        store.check(starts[:2], [3, 20])
    for options in ({"dtype": "int8"}, {"compression": "zstd"}, {"shard_rows": 33, "chunk_rows": 3}):
        assert write(tmp_path / "s", noise(9), overwrite=True, **options).rows is None
    damaged = tmp_path / "s" / "bold" / "c" / "0" / "0"
    damaged.write_bytes(b"\1" + damaged.read_bytes()[1:])
    with pytest.raises(StoreError, match="sub-00"):
        BoldStore.open(tmp_path / "s").check([0], [3])


def test_a_window_before_the_first_row_is_refused(shared_store):
    for start in (-2, -3):
        for length in (1, 2, 3):
            with pytest.raises(ValueError, match="window 0 "):
                shared_store.windows([start], [length])


def test_buffers_begin_on_a_cache_line_but_not_on_a_page(shared_store):
    buffer = shared_store.buffer(7)
    assert buffer.ctypes.data % 4096 == 512
    assert (buffer.shape, buffer.dtype) == ((7, 3), shared_store.dtype)
    assert shared_store.windows([0], [7], out=buffer).ctypes.data == buffer.ctypes.data
    assert shared_store.buffer(0).shape == (0, 3)


def test_runs_that_are_still_to_be_checked_are_announced_as_a_whole(tmp_path, monkeypatch):
    """Their checksums read all of their chunks, however short the window is."""
    store = write(tmp_path / "s", noise(10, 20, 7, networks=64), networks=64)
    seen = []
    monkeypatch.setattr(store._hints, "advise", lambda *windows: seen.append([w.tolist() for w in windows]))
    starts = store.runs.start[[1, 2, 1]] + [5, 1, 7]
    store.advise(starts, [2, 3, 4])
    assert seen == [[[8, 32], [24, 8]]]  # whole chunks of 4 rows around rows 10 to 29 and 32 to 38
    store.check(starts[:1], [2])
    store.advise(starts, [2, 3, 4])
    assert seen[-1] == [[starts[0], starts[2], 32], [2, 4, 8]]
