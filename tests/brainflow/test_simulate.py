"""A simulated cohort: each kind of state is told by the part of the signal that it says, and by no other."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import RidgeClassifier

from brainflow import simulate
from brainflow.simulate import Cohort, write_cohort
from brainflow.storage import BoldStore

FEATURES = {
    "flat": lambda windows: windows.reshape(len(windows), -1),
    "means": lambda windows: windows.mean(1),
    "variances": lambda windows: np.log(windows.var(1)),
}


def accuracies(kind, names):
    people = Cohort(kind=kind, states=4).people(0, 24)
    windows = [np.stack([bold[s.onset : s.onset + s.length] for s in segments]) for bold, segments in people]
    labels = [np.array([s.labels["state"] for s in segments]) for _, segments in people]
    found = {}
    for name in names:
        feature = FEATURES[name]
        train = np.concatenate([feature(w) for w in windows[:16]])
        mean, std = train.mean(0), train.std(0)
        ridge = RidgeClassifier(300.0).fit((train - mean) / std, np.concatenate(labels[:16]))
        test = np.concatenate([feature(w) for w in windows[16:]])
        found[name] = ridge.score((test - mean) / std, np.concatenate(labels[16:]))
    return found


@pytest.mark.parametrize(
    ("kind", "tells", "blind"),
    [
        ("order", "flat", ("means", "variances")),
        ("drive", "means", ("variances",)),
        ("regime", "variances", ("means",)),
    ],
)
def test_what_tells_the_states_apart(kind, tells, blind):
    found = accuracies(kind, (tells, *blind))
    assert found[tells] > 0.6, found
    assert all(found[name] < 0.4 for name in blind), found


def test_a_person_is_the_same_in_any_company_and_differs_from_others():
    for kind in ("order", "drive", "regime"):
        cohort = Cohort(kind=kind, time_points=80, networks=12)
        many, alone = cohort.people(0, 4), cohort.people(2, 1)[0]
        assert np.allclose(many[2][0], alone[0], atol=1e-5)
        assert many[2][1] == alone[1]
        assert not np.allclose(many[1][0], many[2][0], atol=0.1)
        other = Cohort(kind=kind, time_points=80, networks=12, seed=1).people(2, 1)[0]
        assert not np.allclose(other[0], alone[0], atol=0.1)


def test_mirrored_regions_go_together():
    bold, _ = Cohort(kind="drive", networks=20).people(0, 1)[0]
    together = np.corrcoef(bold.T)
    mirrored = together[np.arange(10), np.arange(10) + 10].mean()
    assert mirrored > together[~np.eye(20, dtype=bool)].mean() + 0.03


def test_the_store_holds_unlabelled_and_labelled_people(tmp_path):
    cohort = Cohort(time_points=80, networks=12, states=3)
    write_cohort(tmp_path / "s", cohort, people=3, labelled=2)
    store = BoldStore.open(tmp_path / "s")
    assert store.runs.task.tolist() == ["unlabelled"] * 3 + ["states"] * 2
    assert set(store.segments.run.tolist()) == {3, 4}
    assert set(store.segments.columns["state"]) <= {"order-0", "order-1", "order-2"}
    longer = replace(cohort, time_points=160)
    assert np.array_equal(store.run(2), cohort.people(2, 1)[0][0].astype(np.float16))
    assert np.array_equal(store.run(4), longer.people(4, 1)[0][0].astype(np.float16))
    assert store.attributes["provenance"]["simulated"]["kind"] == "order"


@pytest.mark.parametrize(
    ("argument", "value"),
    [("kind", "dream"), ("networks", 13), ("states", 1), ("time_points", 10), ("t_r", 0.0)],
)
def test_what_cannot_be_simulated_is_named(argument, value):
    with pytest.raises(ValueError, match=f"^{argument}: got"):
        Cohort(**{argument: value})


def test_the_command(tmp_path):
    command = [
        sys.executable,
        "-m",
        "brainflow",
        "simulate",
        str(tmp_path / "s"),
        "--kind",
        "regime",
        "--people",
        "2",
    ]
    command += ["--labelled", "1", "--time-points", "70", "--networks", "12", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kind"] == "regime"
    assert len(BoldStore.open(tmp_path / "s").runs) == 3
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1
    assert "already exists" in again.stderr


def test_progress_counts_those_with_longer_runs_twice_and_comes_when_they_are_all_written(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(simulate, "_TOGETHER", 2)
    told = []
    cohort = Cohort(networks=12, time_points=120, states=2)
    write_cohort(tmp_path / "store", cohort, people=3, labelled=2, progress=lambda *step: told.append(step))
    assert told == [(2, 7), (3, 7), (7, 7)]
    assert len(BoldStore.open(tmp_path / "store").runs) == 5
