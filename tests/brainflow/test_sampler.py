from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brainflow.data.counter_rng import key, permute, uniform
from brainflow.data.sampler import SegmentSampler, WindowSampler

COLUMNS = ("starts", "lengths", "runs", "t_r", "is_next", "labels")


@dataclass
class Runs:
    length: np.ndarray
    dataset: np.ndarray = field(default=None)
    t_r: np.ndarray = field(default=None)

    def __post_init__(self):
        self.length = np.asarray(self.length, np.int32)
        n = len(self.length)
        self.start = np.concatenate([[0], np.cumsum(self.length + 7)[:-1]]).astype(np.int64)
        self.dataset = np.array(["a"] * n) if self.dataset is None else np.asarray(self.dataset)
        self.t_r = np.linspace(0.7, 2.5, n) if self.t_r is None else self.t_r
        self.subject = np.array([str(i) for i in range(n)])
        self.key = np.array([f"run-{i}" for i in range(n)])

    def __len__(self):
        return len(self.length)


def joined(windows):
    """Columns of several batches laid end to end, as bytes."""
    present = [c for c in COLUMNS if getattr(windows[0], c) is not None]
    return {c: np.concatenate([getattr(w, c) for w in windows]).tobytes() for c in present}


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
@settings(max_examples=50, deadline=None)
def test_permute_is_a_bijection(size, seed):
    assert np.array_equal(np.sort(permute(np.arange(size), size, key(seed))), np.arange(size))


def test_permute_takes_a_size_and_a_key_per_element():
    keys = key(3, np.arange(5))
    single = [int(permute(i, 5 + i, keys[i : i + 1])[0]) for i in range(5)]
    assert permute(np.arange(5), 5 + np.arange(5), keys).tolist() == single


def test_permutations_are_even():
    # All 24 permutations of 4 come about, none much more often than another.
    drawn = [tuple(permute(np.arange(4), 4, key(s)).tolist()) for s in range(2400)]
    counts = np.array([drawn.count(p) for p in set(drawn)])
    assert len(counts) == 24
    assert ((counts - 100) ** 2 / 100).sum() < 60  # chi-square, 23 degrees of freedom: p < 1e-4
    # Where 0 goes in a larger set is uniform.
    first = np.array([int(permute(0, 100, key(s))[0]) for s in range(3000)])
    assert ((np.bincount(first, minlength=100) - 30) ** 2 / 30).sum() < 170  # 99 degrees of freedom


def test_uniform_is_uniform_and_streams_differ():
    u, v = (uniform(key(0, stream), np.arange(20_000)) for stream in (0, 1))
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(u, v)[0, 1]) < 0.03
    assert abs(np.corrcoef(u[1:], u[:-1])[0, 1]) < 0.03


@given(
    st.lists(st.integers(6, 300), min_size=2, max_size=30),
    st.integers(6, 20),
    st.integers(1, 40),
    st.booleans(),
    st.sampled_from(["any", "grid"]),
    st.integers(0, 10_000),
)
@settings(max_examples=60, deadline=None)
def test_windows_stay_inside_their_runs(lengths, low, spread, pairs, onset, step):
    runs = Runs(lengths)
    sampler = WindowSampler(
        runs, batch=12, seq_min=low, seq_max=low + spread, pairs=pairs, onset=onset, seed=step
    )
    w = sampler.batch(step)
    assert len(w) == sampler.windows_per_batch == (24 if pairs else 12)
    assert (w.starts >= runs.start[w.runs]).all()
    assert (w.starts + w.lengths <= runs.start[w.runs] + runs.length[w.runs]).all()
    assert (w.lengths >= 1).all()
    assert w.lengths.sum() <= sampler.max_tokens
    assert np.array_equal(w.t_r, runs.t_r[w.runs])
    assert (w.starts.dtype, w.lengths.dtype, w.runs.dtype, w.t_r.dtype) == (
        np.int64,
        np.int32,
        np.int32,
        np.float64,
    )
    if not pairs:
        assert (w.lengths >= np.minimum(low, runs.length[w.runs])).all()
        assert (w.lengths < low + spread).all()
        if onset == "grid":
            assert ((w.starts - runs.start[w.runs]) % w.lengths == 0).all()


@given(st.lists(st.integers(10, 400), min_size=1, max_size=40), st.integers(0, 100), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_an_epoch_has_every_slot_once(lengths, seed, epoch):
    sampler = WindowSampler(Runs(lengths), batch=1, seed=seed)
    n = sampler.epoch_windows
    slots = sampler._slots(np.arange(epoch * n, (epoch + 1) * n))
    assert np.array_equal(np.sort(slots), np.arange(n))
    runs = np.concatenate([sampler.batch(s).runs for s in range(epoch * n, (epoch + 1) * n)])
    assert np.array_equal(np.bincount(runs, minlength=len(lengths)), np.maximum(np.array(lengths) // 29, 1))


@pytest.mark.parametrize(
    "options", [{}, {"pairs": True}, {"weights": {"a": 0.5, "b": 2.0}}, {"onset": "grid"}]
)
@pytest.mark.parametrize("batch", [8, 60])
def test_union_over_ranks_is_the_single_process_order(options, batch):
    runs = Runs(np.random.default_rng(0).integers(40, 200, 30), ["a"] * 10 + ["b"] * 20)
    steps = range(2 * -(-WindowSampler(runs).epoch_windows // batch))
    alone = WindowSampler(runs, batch=batch, seed=5, **options)
    single = joined([alone.batch(s) for s in steps])
    for world in (2, 4):
        ranks = [
            WindowSampler(runs, batch=batch, seed=5, rank=r, world=world, **options) for r in range(world)
        ]
        assert joined([rank.batch(s) for s in steps for rank in ranks]) == single


def test_resume_and_change_of_world_size_continue_the_order():
    runs = Runs(np.random.default_rng(1).integers(40, 200, 30))
    single = joined([WindowSampler(runs, batch=8, seed=1).batch(s) for s in range(40)])
    parts = []
    for begin, end, world in ((0, 7, 4), (7, 8, 1), (8, 25, 2), (25, 40, 8)):
        ranks = [WindowSampler(runs, batch=8, seed=1, rank=r, world=world) for r in range(world)]
        parts += [rank.batch(s) for s in range(begin, end) for rank in ranks]
    assert joined(parts) == single


def test_any_step_in_any_order_gives_the_same_batch():
    sampler = WindowSampler(Runs([100] * 5), batch=8)
    forward = {s: sampler.batch(s) for s in (0, 1, 500, 10**9)}
    for s in (10**9, 1, 500, 0):
        assert joined([sampler.batch(s)]) == joined([forward[s]])


def test_seeds_give_different_orders():
    a, b = (WindowSampler(Runs([100] * 50), batch=64, seed=s).batch(0) for s in (0, 1))
    assert not np.array_equal(a.starts, b.starts)


def test_lengths_and_onsets_are_uniform():
    sampler = WindowSampler(Runs([200]), batch=1000, seed=2)
    drawn = [sampler.batch(s) for s in range(40)]
    lengths = np.concatenate([w.lengths for w in drawn])
    counts = np.bincount(lengths - 10, minlength=40)
    assert counts.shape == (40,)
    assert ((counts - 1000) ** 2 / 1000).sum() < 80  # 39 degrees of freedom
    place = np.concatenate([(w.starts + 0.5) / (200 - w.lengths + 1) for w in drawn])
    counts = np.histogram(place, bins=50, range=(0, 1))[0]
    assert ((counts - 800) ** 2 / 800).sum() < 105  # onsets are stratified: less than chance


def test_pairs_follow_after_a_short_gap_or_come_from_another_run():
    runs = Runs([300] * 6)
    sampler = WindowSampler(runs, batch=2000, pairs=True, seed=3)
    w = sampler.batch(0)
    first, second = (slice(0, None, 2), slice(1, None, 2))
    gap = w.starts[second] - (w.starts[first] + w.lengths[first])
    true = w.is_next == 1
    assert set(gap[true]) == {1, 2, 3, 4}
    assert (w.runs[first][true] == w.runs[second][true]).all()
    assert (w.runs[first][~true] != w.runs[second][~true]).all()
    assert 900 < true.sum() < 1100
    assert (abs(w.lengths[first] - w.lengths[second]) <= 1).all()
    others = np.bincount(w.runs[second][~true], minlength=6)
    assert others.min() > 120


def test_weights_set_how_often_a_slot_comes():
    runs = Runs([290] * 12, ["a"] * 4 + ["b"] * 4 + ["c"] * 4)
    sampler = WindowSampler(runs, batch=10, weights={"a": 2.0, "b": 0.5, "c": 0.0})
    assert sampler.epoch_windows == 80 + 20
    slots = sampler._slots(np.arange(200))
    counts = np.bincount(slots, minlength=80)
    assert (counts[:40] == 4).all()
    assert (counts[40:] == 1).all()
    runs_seen = np.concatenate([sampler.batch(s).runs for s in range(20)])
    assert runs_seen.max() == 7


def test_a_run_shorter_than_the_window_is_taken_whole():
    w = WindowSampler(Runs([5, 5]), batch=4).batch(0)
    assert w.lengths.tolist() == [5] * 4


def test_only_the_runs_asked_for():
    sampler = WindowSampler(Runs([100] * 10), runs=np.array([7, 2]), batch=100)
    assert set(sampler.batch(0).runs) == {2, 7}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runs": []}, "runs: got none"),
        ({"runs": [99]}, "expected ids in"),
        ({"batch": 6, "world": 4}, "multiple of world"),
        ({"batch": 0}, "batch: got 0"),
        ({"rank": 2, "world": 2}, "rank, world: got 2, 2"),
        ({"seq_min": 1}, "seq_min, seq_max: got 1, 50"),
        ({"seq_min": 5, "pairs": True}, "a pair needs"),
        ({"seq_max": 10}, "seq_min, seq_max: got 10, 10"),
        ({"runs": [0], "pairs": True}, "expected at least 2"),
        ({"onset": "coarse"}, "onset: got 'coarse'"),
        ({"weights": {"nowhere": 1.0}}, "no run of dataset 'nowhere'"),
        ({"weights": {"a": -1.0}}, "numbers of at least 0"),
        ({"weights": {"a": 0.0}}, "one of them above 0"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        WindowSampler(Runs([100] * 4), **options)


def test_a_run_that_is_too_short_is_named():
    with pytest.raises(ValueError, match=r"run run-2 has 1 time points, expected at least 2"):
        WindowSampler(Runs([100, 50, 1]))
    with pytest.raises(ValueError, match="step: got -1"):
        WindowSampler(Runs([100])).batch(-1)


def test_a_million_runs_take_little_memory():
    runs = Runs(np.full(1_000_000, 120))
    sampler = WindowSampler(runs, batch=64)
    table = sampler._columns.slot_runs._table
    assert sampler._columns.rows.nbytes + table.nbytes + 8 * len(runs) < 60e6
    w = sampler.batch(10**7)
    assert len(np.unique(w.runs)) > 60


@pytest.fixture
def segments():
    runs = Runs([60, 60, 30], t_r=np.array([2.0, 1.0, 2.0]))
    table = SimpleNamespace()
    run = np.repeat([0, 1, 2], [5, 5, 2]).astype(np.int32)
    onset = np.array([0, 10, 20, 30, 40] * 2 + [0, 20], np.int32)

    class Table:
        def __len__(self):
            return len(run)

    table = Table()
    table.run, table.onset, table.length = run, onset, np.full(12, 9, np.int32)
    return SimpleNamespace(runs=runs, segments=table)


def test_segments_in_fixed_order_come_once(segments):
    sampler = SegmentSampler(segments, segments=np.arange(12), labels=np.arange(12), batch=5, shuffle=False)
    assert sampler.steps == 3
    drawn = [sampler.batch(s) for s in range(3)]
    assert [len(w) for w in drawn] == [5, 5, 2]
    assert np.concatenate([w.labels for w in drawn]).tolist() == list(range(12))
    with pytest.raises(ValueError, match=r"step: got 3, expected a step in \[0, 3\)"):
        sampler.batch(3)


def test_segments_are_shuffled_anew_each_epoch(segments):
    sampler = SegmentSampler(segments, segments=np.arange(12), labels=np.arange(12), batch=4, seed=1)
    epochs = [np.concatenate([sampler.batch(3 * e + s).labels for s in range(3)]).tolist() for e in range(3)]
    assert all(sorted(e) == list(range(12)) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    common = {"segments": np.arange(12), "labels": np.arange(12), "batch": 4, "seed": 1, "world": 2}
    halves = [SegmentSampler(segments, rank=r, **common) for r in range(2)]
    assert [x for s in range(3) for h in halves for x in h.batch(s).labels.tolist()] == epochs[0]


def test_hrf_shift_is_in_seconds_and_clipped_to_the_run(segments):
    sampler = SegmentSampler(
        segments, segments=[0, 5, 11], labels=[0, 1, 2], batch=3, shuffle=False, hrf_shift=4.0
    )
    w = sampler.batch(0)
    onset = w.starts - segments.runs.start[w.runs]
    assert onset.tolist() == [2, 4, 22]  # 4 s are 2 TRs of 2 s and 4 TRs of 1 s
    assert w.lengths.tolist() == [9, 9, 8]  # the last one ends with its run
    with pytest.raises(ValueError, match=r"segment 11 of run run-2 has 1 time points .* lower hrf_shift"):
        SegmentSampler(segments, segments=[0, 11], labels=[0, 1], hrf_shift=18.0)
    for wrong in (float("nan"), float("-inf"), 1e300):
        with pytest.raises(ValueError, match="hrf_shift: got"):
            SegmentSampler(segments, segments=[0], labels=[0], hrf_shift=wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segments": [], "labels": []}, "segments: got none"),
        ({"segments": [12], "labels": [0]}, "expected ids in"),
        ({"segments": [0, 1], "labels": [0]}, "one label per segment"),
        ({"segments": [0], "labels": [0], "batch": 3, "world": 2}, "multiple of world"),
        (
            {"segments": range(9), "labels": range(9), "batch": 8, "world": 2, "shuffle": False},
            "another batch size",
        ),
    ],
)
def test_bad_segment_arguments_are_named(segments, options, message):
    with pytest.raises(ValueError, match=message):
        SegmentSampler(segments, **options)
