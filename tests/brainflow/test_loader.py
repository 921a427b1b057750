import gc
import importlib.abc
import itertools
import os
import signal
import sys
import threading
from collections import deque

import numpy as np
import pytest
import torch
from sines import write_sines

from brainflow.data import make_loader
from brainflow.data.loader import HostLoader
from brainflow.data.sampler import SegmentSampler, WindowSampler
from brainflow.storage import BoldStore, Segment, StoreError, StoreWriter

KINDS = ("host", "dali", "resident")
TENSORS = ("bold", "times", "cu_seqlens", "labels", "is_next")


@pytest.fixture(scope="module", params=["float16", "float32", "int8"])
def store(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("stores") / request.param
    rng = np.random.default_rng(0)
    with StoreWriter.create(path, networks=20, dtype=request.param, parcellation="none") as writer:
        for i, length in enumerate(rng.integers(30, 130, 12).tolist()):
            writer.append(
                rng.standard_normal((length, 20)),
                t_r=0.5 + i / 7,
                dataset="a" if i < 6 else "b",
                subject=str(i),
                task="rest",
                run="1",
                segments=[Segment(onset=o, length=9 + i % 2, labels={"y": o % 3}) for o in range(0, 20, 10)],
            )
    return BoldStore.open(path)


def samplers(store):
    ids = np.arange(len(store.segments))
    return {
        "windows": WindowSampler(store.runs, batch=8, seed=1),
        "pairs": WindowSampler(store.runs, batch=8, seed=1, pairs=True),
        "rank": WindowSampler(store.runs, batch=8, seed=1, rank=1, world=4),
        "segments": SegmentSampler(store, segments=ids, labels=ids % 3, batch=10, seed=1),
        "fixed order": SegmentSampler(store, segments=ids, labels=ids % 3, batch=10, shuffle=False),
    }


def equal(a, b):
    for name in TENSORS:
        x, y = getattr(a, name), getattr(b, name)
        if x is None or y is None:
            assert x is y, name
        else:
            assert x.dtype == y.dtype, name
            assert torch.equal(x, y), name
    assert np.array_equal(a.lengths, b.lengths)
    assert np.array_equal(a.runs, b.runs)
    assert (a.step, a.max_seqlen) == (b.step, b.max_seqlen)
    return True


@pytest.mark.parametrize("which", ["windows", "pairs", "rank", "segments", "fixed order"])
def test_all_loaders_give_identical_batches(store, which):
    sampler = samplers(store)[which]
    for options in ({}, {"dtype": torch.float32}):
        loaders = [make_loader(store, sampler, kind=kind, **options) for kind in KINDS]
        batches = 0
        for host, *others in itertools.islice(zip(*loaders, strict=True), 12):
            assert all(equal(host, other) for other in others)
            batches += 1
        assert batches == (3 if which == "fixed order" else 12)
        for loader in loaders:
            loader.close()


def test_a_batch_is_what_the_store_holds(store):
    batch = next(make_loader(store, samplers(store)["windows"], kind="host"))
    windows = samplers(store)["windows"].batch(0)
    for i, (start, length, run) in enumerate(zip(windows.starts, windows.lengths, windows.runs, strict=True)):
        begin, end = batch.cu_seqlens[i : i + 2].tolist()
        onset = start - store.runs.start[run]
        assert np.array_equal(batch.bold[begin:end].numpy(), store.run(run)[onset : onset + length])
        assert np.allclose(batch.times[begin:end].numpy(), np.arange(length) * store.runs.t_r[run])
    assert batch.max_seqlen == windows.lengths.max()


@pytest.mark.parametrize("kind", KINDS)
def test_resumes_bit_identically(store, kind):
    sampler = samplers(store)["windows"]
    whole = [b.bold.clone() for b in itertools.islice(make_loader(store, sampler, kind=kind), 12)]
    loader = make_loader(store, sampler, kind=kind)
    for _ in range(5):
        next(loader)
    state = loader.state_dict()
    assert state == {"step": 5}  # not what has been read ahead
    again = make_loader(store, samplers(store)["windows"], kind=kind, start_step=state["step"])
    assert all(torch.equal(next(again).bold, x) for x in whole[5:])
    for _ in range(3):
        next(loader)
    loader.load_state_dict({"step": 2})
    taken = [next(loader) for _ in range(3)]
    assert [b.step for b in taken] == [2, 3, 4]
    assert all(torch.equal(b.bold, x) for b, x in zip(taken, whole[2:], strict=False))


def test_how_long_a_batch_stays_valid(store):
    sampler = samplers(store)["windows"]
    reference = [b.bold.clone() for b in itertools.islice(make_loader(store, sampler, kind="host"), 10)]
    held = list(itertools.islice(make_loader(store, sampler, kind="resident"), 10))
    assert all(torch.equal(b.bold, x) for b, x in zip(held, reference, strict=True))
    with make_loader(store, sampler, kind="dali") as dali:
        last = list(itertools.islice(dali, 10))[-1]
    gc.collect()
    assert torch.equal(last.bold, reference[-1])  # the last batch outlives its pipeline
    loader = HostLoader(store, sampler, buffers=3)
    held = [next(loader) for _ in range(3)]
    assert all(torch.equal(b.bold, x) for b, x in zip(held, reference, strict=False))
    assert next(loader).bold.data_ptr() == held[0].bold.data_ptr()  # reused now


@pytest.mark.parametrize("kind", KINDS)
def test_describe_and_report(store, kind):
    with make_loader(store, samplers(store)["windows"], kind=kind) as loader:
        before = loader.describe()
        assert before["loader"] == kind
        assert before["store_bytes"] == store.runs.length.sum() * 20 * loader.stored_dtype.itemsize
        batch = next(loader)
        assert before["bytes_first_step"] == batch.bold.nbytes
        assert batch.bold.nbytes <= before["bytes_per_step_at_most"]
        assert before["memory_bytes"] > 0
        next(loader)
        report = loader.report()
        assert report["batches"] == 2
        assert 0 < report["wait_s"] == loader.wait_s
        assert report["limited_by"] in ("gather", "transfer", "consumer")


def test_large_batches_are_an_iteration_each(store):
    sampler = WindowSampler(store.runs, batch=80_000)
    dali, host = (make_loader(store, sampler, kind=kind) for kind in ("dali", "host"))
    assert (dali._block, make_loader(store, samplers(store)["windows"], kind="dali")._block) == (1, 16)
    assert all(equal(a, b) for a, b in itertools.islice(zip(dali, host, strict=True), 2))


def test_auto_takes_dali_on_the_cpu(store):
    assert make_loader(store, samplers(store)["windows"]).kind == "dali"


def test_auto_keeps_a_store_in_gpu_memory_if_there_is_room(store, monkeypatch):
    """No GPU here: what is free there is made up, and the loaders are stood in for."""
    rows = int((store.runs.start + store.runs.length).max())
    needed = rows * 20 * (2 if store.dtype == np.float16 else 4)
    made = []
    for module, name in (("loader", "ResidentLoader"), ("pipeline", "DaliLoader")):
        monkeypatch.setattr(f"brainflow.data.{module}.{name}", lambda *_, name=name, **__: made.append(name))
    for free in (2 * needed, 2 * needed - 2):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10 * free))
        make_loader(store, samplers(store)["windows"], device="cuda")
    make_loader(store, samplers(store)["windows"], device="cuda", kind="resident")
    make_loader(store, samplers(store)["windows"], device="cpu")
    assert made == ["ResidentLoader", "DaliLoader", "ResidentLoader", "DaliLoader"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "fast"}, "kind: got 'fast'"),
        ({"start_step": -1}, "start_step: got -1"),
        ({"dtype": torch.int8}, "dtype: got torch.int8"),
    ],
)
def test_bad_arguments(store, options, message):
    with pytest.raises(ValueError, match=message):
        make_loader(store, samplers(store)["windows"], **options)
    with pytest.raises(ValueError, match="what state_dict"):
        make_loader(store, samplers(store)["windows"], kind="host").load_state_dict({})


class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "nvidia" or name.startswith("nvidia."):
            raise ModuleNotFoundError(name)


def test_without_dali_the_error_names_the_extra_and_auto_falls_back(store, monkeypatch):
    for name in [n for n in sys.modules if n == "nvidia" or n.startswith("nvidia.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Hide(), *sys.meta_path])
    sampler = samplers(store)["windows"]
    with pytest.raises(ImportError, match=r"brainflow-fmri\[dali\]"):
        make_loader(store, sampler, kind="dali")
    assert make_loader(store, sampler).kind == "host"


class Failing:
    """A store whose windows cannot be read from a certain call on."""

    def __init__(self, store, at):
        self._store, self._at, self._calls = store, at, 0
        self.networks, self.dtype, self.runs = store.networks, store.dtype, store.runs

    def windows(self, starts, lengths, out=None):
        self._calls += 1
        if self._calls > self._at:
            raise StoreError("run sub-03: chunk 5 is damaged")
        return self._store.windows(starts, lengths, out=out)


@pytest.mark.parametrize("kind", ["host", "dali"])
@pytest.mark.parametrize("at", [0, 4])
def test_an_error_of_the_store_arrives_with_its_own_message(store, kind, at):
    loader = make_loader(Failing(store, at), samplers(store)["windows"], kind=kind)
    with pytest.raises(StoreError, match="run sub-03: chunk 5 is damaged"):
        list(itertools.islice(loader, 10))
    loader.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_byte_is_reported_with_its_run(tmp_path, kind):
    write_sines(tmp_path / "s", runs=3, subjects=3, networks=8)
    shard = max((p for p in (tmp_path / "s").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[40] ^= 1
    shard.write_bytes(data)
    store = BoldStore.open(tmp_path / "s")
    sampler = WindowSampler(store.runs, batch=32)
    with pytest.raises(StoreError, match=str(store.runs.key[0])):
        list(itertools.islice(make_loader(store, sampler, kind=kind), 20))


@pytest.mark.parametrize("kind", KINDS)
def test_windows_of_damaged_runs_are_left_out_and_counted(tmp_path, kind):
    rng = np.random.default_rng(0)
    with StoreWriter.create(tmp_path / "s", networks=8, chunk_rows=16, shard_rows=512) as writer:
        for i in range(6):
            segments = [Segment(onset=o, length=10, labels={"y": i}) for o in (0, 10)]
            writer.append(
                rng.standard_normal((64, 8)), t_r=1.0, dataset="d", subject=str(i), segments=segments
            )
    clean = BoldStore.open(tmp_path / "s")
    clean.check(clean.runs.start, clean.runs.length)
    reference = clean.windows(clean.runs.start, clean.runs.length).copy()
    shard = tmp_path / "s" / "bold" / "c" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[2 * 64 * 16 + 40] ^= 1  # run 2
    shard.write_bytes(data)
    store = BoldStore.open(tmp_path / "s")
    ids = np.arange(len(store.segments))
    for sampler in (
        WindowSampler(store.runs, batch=16, seed=1),
        WindowSampler(store.runs, batch=16, seed=1, pairs=True),
        SegmentSampler(store, segments=ids, labels=ids, batch=5, shuffle=False),
    ):
        with make_loader(store, sampler, kind=kind, on_corrupt="skip") as loader:
            skipped = 0
            for batch in itertools.islice(loader, 3):
                windows = sampler.batch(batch.step)
                bad = windows.runs == 2
                if windows.is_next is not None:
                    bad = bad.reshape(-1, 2).any(axis=1).repeat(2)
                    assert np.array_equal(batch.is_next, windows.is_next[~bad[::2]])
                if windows.labels is not None:
                    assert np.array_equal(batch.labels, windows.labels[~bad])
                skipped += bad.sum()
                assert np.array_equal(batch.runs, windows.runs[~bad])
                rows = [
                    reference[s : s + n]
                    for s, n in zip(windows.starts[~bad], windows.lengths[~bad], strict=True)
                ]
                assert np.array_equal(batch.bold, np.concatenate(rows))
            assert loader.report()["skipped_windows"] >= skipped > 0
            if kind != "dali":  # which has looked ahead
                assert loader.report()["skipped_windows"] == skipped
    only = WindowSampler(store.runs, runs=[2], batch=4)
    with pytest.raises(StoreError, match="batch 0: all of its 4 windows are damaged"):
        next(make_loader(store, only, kind=kind, on_corrupt="skip"))
    with pytest.raises(ValueError, match="on_corrupt: got 'ignore'"):
        make_loader(store, only, kind=kind, on_corrupt="ignore")


@pytest.mark.parametrize("kind", ["host", "dali"])
def test_worlds_and_changes_between_them_give_the_bytes_of_one_process(store, kind):
    def taken(rank, world, begin, end):
        sampler = WindowSampler(store.runs, batch=8, seed=3, rank=rank, world=world)
        with make_loader(store, sampler, kind=kind, start_step=begin) as loader:
            return [batch.bold.numpy().tobytes() for batch in itertools.islice(loader, end - begin)]

    def steps(begin, end, world):
        ranks = [taken(rank, world, begin, end) for rank in range(world)]
        return [b"".join(shares) for shares in zip(*ranks, strict=True)]

    alone = steps(0, 9, 1)
    assert steps(0, 9, 2) == alone
    assert steps(0, 9, 4) == alone
    assert steps(0, 3, 4) + steps(3, 4, 1) + steps(4, 7, 2) + steps(7, 9, 4) == alone


def test_the_report_tells_disk_from_memory(store):
    waiting = Failing(store, at=10**9)
    waiting.waits = 0
    with make_loader(waiting, samplers(store)["windows"], kind="host") as loader:
        list(itertools.islice(loader, 16))
        assert loader.report()["gather_s"] > 0
        before = loader.report()["disk_s"]
        for _ in range(3):
            next(loader)
            waiting.waits += 1
        report = loader.report()
        assert report["disk_s"] > before
        loader._disk_s = 1e6
        assert loader.report()["limited_by"] == "disk"


def test_a_store_that_cannot_be_mapped_as_a_whole_is_read_all_the_same(tmp_path):
    rng = np.random.default_rng(0)
    with StoreWriter.create(tmp_path / "s", networks=7, chunk_rows=3, shard_rows=63) as writer:
        for i in range(4):
            writer.append(rng.standard_normal((60, 7)), t_r=1.0, dataset="d", subject=str(i))
    store = BoldStore.open(tmp_path / "s")
    assert store.rows is None
    for seq_max in (3, 50):  # the first with a batch of two tokens
        sampler = WindowSampler(store.runs, batch=1 if seq_max == 3 else 8, seq_min=2, seq_max=seq_max)
        pair = zip(*(make_loader(store, sampler, kind=kind) for kind in ("host", "dali")), strict=True)
        assert all(equal(host, dali) for host, dali in itertools.islice(pair, 9))


class Advised(Failing):
    def __init__(self, store):
        super().__init__(store, at=10**9)
        self.advised = []

    def advise(self, starts, lengths):
        self.advised.append(starts.copy())


@pytest.mark.parametrize("kind", ["host", "dali"])
def test_pages_are_advised_one_batch_ahead(store, kind):
    ids = np.arange(len(store.segments))
    for sampler in (
        WindowSampler(store.runs, batch=4, seed=1),
        SegmentSampler(store, segments=ids, labels=ids, batch=10, shuffle=False),
    ):
        watched = Advised(store)
        loader = make_loader(watched, sampler, kind=kind, start_step=1)
        next(loader)
        read = watched._calls
        ahead = [w.tolist() for w in watched.advised]
        last = len(ahead) if sampler.steps is None else sampler.steps - 1
        assert ahead == [sampler.batch(1 + i).starts.tolist() for i in range(last)]
        assert len(ahead) == read + 1 or sampler.steps is not None


def test_ctrl_c_stops_the_loader_and_it_closes(store, request):
    # A shell that starts the tests in the background lets them ignore SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    sampler = samplers(store)["windows"]
    loader = make_loader(store, sampler, kind="dali")
    next(loader)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        deque(loader, maxlen=0)
    timer.join()
    loader.close()
    assert equal(
        next(make_loader(store, sampler, kind="dali")), next(make_loader(store, sampler, kind="host"))
    )
