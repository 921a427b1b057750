"""Baselines kept over calls are those that would be fitted, and nothing else is ever taken for them."""

import io
import json
import os
from dataclasses import replace

import numpy as np
import pytest
from sines import write_sines

from brainflow.cli.main import main
from brainflow.decoding import cache
from brainflow.decoding.curve import reduce_task
from brainflow.decoding.result import baselines
from brainflow.decoding.task import TaskConfig, load_task
from brainflow.storage import BoldStore


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("s")
    write_sines(folder / "s", runs=4, subjects=4, networks=6, time_points=48, decoding=True, segment=6)
    config = TaskConfig(target="mental_state", split="leave-one-subject-out")
    return load_task(BoldStore.open(folder / "s"), config)


@pytest.fixture(scope="module")
def fitted(task):
    return baselines(task)


@pytest.fixture
def full(task, tmp_path, fitted):
    """A folder that holds all baselines of the task."""
    for result in fitted:
        cache.keep(tmp_path, task, result.name, result.predictions, result.probabilities)
    return tmp_path


def same(one, other):
    assert [result.name for result in one] == [result.name for result in other]
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a.predictions, b.predictions)
        np.testing.assert_array_equal(a.probabilities, b.probabilities)
        assert a.scores.accuracy == b.scores.accuracy


def test_what_is_kept_is_what_was_fitted(task, fitted, full, monkeypatch):
    monkeypatch.setattr("brainflow.decoding.result.predict_folds", None)  # nothing is fitted
    same(baselines(task, cache=full), fitted)


def test_another_task_never_finds_it(task, full):
    fold = task.folds[0]
    others = {
        "labels": replace(task, labels=1 - task.labels),
        "fewer people": reduce_task(task, 2),
        "other draw": reduce_task(task, 2, draw=1),
        "fold": replace(task, folds=[replace(fold, test=fold.test[1:]), *task.folds[1:]]),
        "shift": replace(task, config=replace(task.config, hrf_shift=1.5)),
        "groups": replace(task, subjects=np.roll(task.subjects, 1)),
        "windows": replace(task, segments=task.segments[::-1]),
    }
    assert cache.recall(full, task, "ridge") is not None
    assert cache.recall(full, task, "ridge-spatial") is not None
    for what, other in others.items():
        assert cache.recall(full, other, "ridge") is None, what


def test_other_data_or_other_code_never_finds_it(task, full, tmp_path, monkeypatch):
    write_sines(
        tmp_path / "s", runs=4, subjects=4, networks=6, time_points=48, decoding=True, segment=6, seed=1
    )
    other = replace(task, store=BoldStore.open(tmp_path / "s"))
    assert cache.recall(full, other, "ridge") is None
    monkeypatch.setattr(cache, "_code", lambda: "another version")
    assert cache.recall(full, task, "ridge") is None


def test_a_damaged_file_is_fitted_again(task, fitted, full, tmp_path):
    path = next(path for path in full.iterdir() if path.samefile(cache._path(full, task, "means")))
    whole = path.read_bytes()
    evil = io.BytesIO()
    np.savez(evil, predictions=np.array([print], dtype=object), probabilities=np.zeros((0, 2), np.float32))
    short = io.BytesIO()
    np.savez(short, predictions=np.zeros(3, np.int64), probabilities=np.zeros((0, 2), np.float32))
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damaged in (b"", whole[:-40], bytes(flipped), evil.getvalue(), short.getvalue(), b"PK"):
        path.write_bytes(damaged)
        assert cache.recall(full, task, "means") is None
        same(baselines(task, cache=full), fitted)
        assert path.read_bytes() == whole  # and is whole again


def test_those_read_last_stay(task, full, monkeypatch):
    monkeypatch.setattr(cache, "MOST_FILES", 5)
    for age, path in enumerate(full.iterdir()):
        os.utime(path, (age, age))
    assert cache.recall(full, task, "means") is not None  # read just now
    cache.keep(full, task, "new", np.zeros(len(task.labels), np.int64), None)
    assert len(list(full.iterdir())) == 5
    assert cache.recall(full, task, "means") is not None
    assert cache.recall(full, task, "new") is not None


def test_a_folder_of_others_and_a_full_disk_are_done_without(task, tmp_path, monkeypatch):
    monkeypatch.setenv("BRAINFLOW_CACHE", "")
    assert cache.cache_folder() is None
    monkeypatch.setenv("BRAINFLOW_CACHE", str(tmp_path))
    (tmp_path / "baselines").mkdir()
    (tmp_path / "baselines").chmod(0o777)
    with pytest.warns(UserWarning, match="others may write it"):
        assert cache.cache_folder() is None
    cache.keep(tmp_path / "gone", task, "ridge", np.zeros(2, np.int64), None)
    assert cache.recall(tmp_path / "gone", task, "ridge") is None


def test_the_command_keeps_them_and_can_do_without(task, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BRAINFLOW_CACHE", str(tmp_path / "cache"))
    from brainflow.config import ModelConfig
    from brainflow.frameworks import build
    from brainflow.pretrained.format import save_pretrained

    model = save_pretrained(build(ModelConfig(networks=6, width=16, layers=1, heads=2)), tmp_path / "m", {})
    command = ["adapt", str(task.store.path), "--from", str(model), "--target", "mental_state", "--json"]
    command += ["--mode", "knn", "--device", "cpu", "--split", "leave-one-subject-out", "--out"]
    assert main([*command, str(tmp_path / "none"), "--no-cache"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "cache").exists()
    assert main([*command, str(tmp_path / "a")]) == 0
    assert json.loads(capsys.readouterr().out)["baselines"] == first["baselines"]
    assert len(list((tmp_path / "cache" / "baselines").iterdir())) == len(first["baselines"]) - 1
    monkeypatch.setattr("brainflow.decoding.result.predict_folds", None)
    assert main([*command, str(tmp_path / "b")]) == 0
    assert json.loads(capsys.readouterr().out)["baselines"] == first["baselines"]
