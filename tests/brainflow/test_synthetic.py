import numpy as np
import pytest
from sines import CLASS_PERIODS, PERIODS, sines, write_sines

from brainflow.storage import BoldStore, verify


def dominant_period(series, t_r):
    spectrum = np.abs(np.fft.rfft(series, axis=0))
    return len(series) * t_r / (spectrum[1:].argmax(axis=0) + 1)


def test_networks_have_the_published_periods():
    bold = sines(480, 9, 0.5, PERIODS, np.random.default_rng(0))
    assert np.allclose(dominant_period(bold, 0.5), np.resize(PERIODS, 9))


def test_phases_are_within_two_time_points():
    bold = sines(2, 3000, 1.0, (12.0,), np.random.default_rng(0))
    phase = np.arcsin(bold[0]) / (2 * np.pi / 12)
    assert phase.min() >= 0
    assert 1.9 < phase.max() <= 2.0


def test_store_of_sines(tmp_path):
    write_sines(tmp_path / "a", runs=6, subjects=3, time_points=40, networks=6, t_r=2.0)
    store = BoldStore.open(tmp_path / "a")
    assert verify(tmp_path / "a").ok
    assert (len(store.runs), store.networks, len(store.segments)) == (6, 6, 0)
    assert len(set(store.runs.subject)) == 3
    assert len(set(store.runs.key)) == 6
    assert not np.array_equal(store.run(0), store.run(1))
    write_sines(tmp_path / "b", runs=6, subjects=3, time_points=40, networks=6, t_r=2.0)
    assert np.array_equal(BoldStore.open(tmp_path / "b").run(3), store.run(3))


def test_decoding_variant_has_two_classes_that_differ_in_period(tmp_path):
    write_sines(
        tmp_path / "d",
        runs=4,
        time_points=240,
        networks=3,
        t_r=0.5,
        decoding=True,
        segment=60,
        dtype="float32",
    )
    store = BoldStore.open(tmp_path / "d")
    labels = store.segments.columns["mental_state"]
    assert sorted(set(labels)) == ["fast", "slow"]
    assert np.unique(labels, return_counts=True)[1].tolist() == [8, 8]
    run, onset = int(store.segments.run[5]), int(store.segments.onset[5])
    found = dominant_period(store.run(run)[onset : onset + 60], 0.5)
    # A block is 30 s, so 4 s and 8 s fall between two bins.
    assert np.allclose(found, CLASS_PERIODS[labels[5]], rtol=0.1)


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="subjects: got 9"):
        write_sines(tmp_path / "a", runs=3, subjects=9)
    with pytest.raises(ValueError, match="segment: got 500"):
        write_sines(tmp_path / "a", decoding=True, segment=500)
