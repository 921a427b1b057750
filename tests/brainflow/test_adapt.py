"""Adaptation on tiny stores: a planted signal is decoded, permuted labels are not, misfits are refused."""

import json
import subprocess
import sys
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch

from brainflow.cli.main import main
from brainflow.config import ModelConfig
from brainflow.decoding.adapt import adapt
from brainflow.decoding.baselines import BASELINES
from brainflow.decoding.finetune import frozen_features
from brainflow.decoding.fit import AdaptConfig, Mode
from brainflow.decoding.readout import Readout
from brainflow.decoding.result import baseline, difference, write_results
from brainflow.decoding.task import TaskConfig, load_task
from brainflow.decoding.windows import ArrayWindows
from brainflow.frameworks import build
from brainflow.pretrained.format import save_pretrained
from brainflow.storage import BoldStore, Segment, StoreWriter

NETWORKS, CLASSES, RUNS = 12, ("cat", "face", "house"), 5
SHORT = AdaptConfig(steps=20, batch_size=15, lr=5e-3)


def write_store(path, *, shift=0, shuffle=False, subjects=1, seed=0, runs=RUNS):
    """Runs of 30 time points with 6 labelled segments of 4; class patterns appear `shift` points late."""
    rng = np.random.default_rng(seed)
    patterns = 2.0 * rng.normal(size=(len(CLASSES), NETWORKS))
    with StoreWriter.create(str(path), networks=NETWORKS, parcellation="twelve") as writer:
        for run in range(runs):
            bold = rng.normal(size=(30, NETWORKS))
            order = rng.permutation(np.repeat(np.arange(len(CLASSES)), 2))
            told = rng.permutation(order) if shuffle else order
            segments = []
            for place, (true, named) in enumerate(zip(order, told, strict=True)):
                onset = 1 + place * 4
                bold[onset + shift : onset + shift + 4] += patterns[true]
                labels = {"state": CLASSES[named], "code": int(named) + 1}
                segments.append(Segment(onset=onset, length=4, labels=labels))
            segments.append(Segment(onset=26, length=3, labels={"code": 1}))
            writer.append(
                bold,
                t_r=2.0,
                dataset="toy",
                subject=str(run % subjects),
                task="t",
                run=str(run),
                segments=segments,
            )
    return BoldStore.open(str(path))


def save_model(folder, *, networks=NETWORKS, **extra):
    """An untrained tiny model in release form."""
    torch.manual_seed(0)
    config = ModelConfig(networks=networks, width=16, layers=1, heads=2, dropout=0.0)
    save_pretrained(build(config), folder, extra)
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("store") / "s", shift=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def task(store):
    return load_task(store, TaskConfig(target="state", hrf_shift=2.0))


def test_task_keeps_names_and_leaves_out_what_has_no_label(task):
    assert task.classes == CLASSES
    assert len(task.labels) == RUNS * 6
    assert task.group_kind == "run"
    assert len(task.folds) == RUNS


def test_windows_are_moved_by_the_haemodynamic_shift(task, store):
    bold, lengths = task.read()
    assert (lengths == 4).all()
    np.testing.assert_array_equal(bold[:4], store.run(0)[2:6])


def test_integer_labels_keep_their_values_as_names(store):
    assert load_task(store, TaskConfig(target="code")).classes == ("1", "2", "3")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (TaskConfig(target="stat"), r"got 'stat', expected one of the store.s label columns \(code, state\)"),
        (TaskConfig(target="state", classes=20), "got 20, but column 'state' holds 3: cat, face, house"),
        (TaskConfig(target="state", split="leave-one-subject-out"), "needs at least 2 subjects"),
    ],
)
def test_a_task_that_cannot_be_is_refused(store, config, says):
    with pytest.raises(ValueError, match=says):
        load_task(store, config)


@pytest.mark.parametrize("mode", get_args(Mode))
def test_a_planted_signal_is_decoded(task, model, mode):
    result = adapt(task, model, replace(SHORT, mode=mode), device="cpu")
    assert result.scores.accuracy.low > 1 / 3
    assert result.probabilities.shape == (len(task.labels), 3)
    np.testing.assert_allclose(result.probabilities.sum(axis=1), 1, atol=1e-5)


@pytest.fixture(scope="module")
def permuted(tmp_path_factory):
    """Labels permuted within each run: there is nothing to decode."""
    store = write_store(tmp_path_factory.mktemp("permuted") / "s", shuffle=True, runs=15)
    return load_task(store, TaskConfig(target="state", split="k-fold"))  # five folds: decoders are many


@pytest.mark.parametrize(
    "name", [*(("mode", m) for m in get_args(Mode)), *(("baseline", b) for b in BASELINES)]
)
def test_permuted_labels_give_chance(permuted, model, name):
    kind, which = name
    if kind == "mode":
        result = adapt(permuted, model, replace(SHORT, mode=which), device="cpu")
    else:
        result = baseline(permuted, which)
    assert abs(result.scores.accuracy.value - 1 / 3) < 0.15  # three standard errors of 90 windows
    assert result.scores.permutation_p > 0.01


def test_same_seed_same_predictions_and_another_seed_others(task, model):
    config = AdaptConfig(published=True, steps=3, batch_size=10, dropout=0.5)
    first, again = (adapt(task, model, config, device="cpu").probabilities for _ in range(2))
    np.testing.assert_array_equal(first, again)
    other = adapt(task, model, replace(config, seed=1), device="cpu")
    assert not np.array_equal(first, other.probabilities)


def test_test_labels_never_reach_a_fold(tmp_path, model):
    """Predictions of the first fold stay the same when the labels of its test run change."""
    store = write_store(tmp_path / "s")
    task = load_task(store, TaskConfig(target="state"))
    seen = adapt(task, model, AdaptConfig(steps=3), device="cpu").probabilities
    test = task.folds[0].test
    task.labels[test] = (task.labels[test] + 1) % 3
    changed = adapt(task, model, AdaptConfig(steps=3), device="cpu").probabilities
    np.testing.assert_array_equal(seen[test], changed[test])


def test_scratch_takes_the_architecture_but_not_the_weights(task, model):
    pretrained = adapt(task, model, AdaptConfig(mode="linear"), device="cpu")
    fresh = adapt(task, model, AdaptConfig(mode="linear", scratch=True, seed=3), device="cpu")
    assert not np.array_equal(pretrained.probabilities, fresh.probabilities)
    assert difference(task, pretrained, pretrained).value == 0


def test_checkpoint_of_other_networks_is_refused_naming_both(task, tmp_path):
    other = save_model(tmp_path / "m", networks=13)
    with pytest.raises(ValueError, match=r"trained on 13 networks, but the store .* has 12"):
        adapt(task, other, SHORT)


def test_checkpoint_of_another_parcellation_is_refused_naming_both(task, tmp_path):
    other = save_model(tmp_path / "m", data={"parcellation": "dozen"})
    with pytest.raises(ValueError, match=r"'dozen', the data have 'twelve'"):
        adapt(task, other, SHORT)


def test_intervals_are_over_subjects_where_there_are_several(tmp_path):
    store = write_store(tmp_path / "s", subjects=3)
    task = load_task(store, TaskConfig(target="state", split="leave-one-subject-out"))
    assert len(task.folds) == 3
    assert set(baseline(task, "ridge").scores.per_group) == {"toy/0", "toy/1", "toy/2"}


def test_frozen_features_do_not_depend_on_the_batch(task, model):
    from brainflow.pretrained.format import load_pretrained

    module = load_pretrained(model)
    readout = [Readout(pooling="mean")]
    (features,) = frozen_features(module, task, readout, device=torch.device("cpu"))
    assert features.shape == (len(task.labels), 16)
    source = ArrayWindows([task.store.run(0)[2:6]], t_r=2.0)
    (alone,) = frozen_features(module, source, readout, device=torch.device("cpu"))
    np.testing.assert_allclose(features[:1], alone, atol=1e-5)


def test_files_are_written_under_their_names(task, tmp_path):
    result = baseline(task, "nilearn")
    write_results(task, result, [], tmp_path / "a")
    assert not (tmp_path / "a" / "test_predictions.npy").exists()
    saved = json.loads((tmp_path / "a" / "scores.json").read_text())
    assert saved["classes"] == list(CLASSES)
    assert saved["decoder"]["accuracy"]["value"] == result.scores.accuracy.value
    assert np.load(tmp_path / "a" / "test_label_ids.npy").tolist() == task.labels.tolist()
    header, *rows = (tmp_path / "a" / "confusion_matrix.csv").read_text().splitlines()
    assert header == "true class,cat,face,house"
    assert len(rows) == 3


def test_command_line(store, model, tmp_path):
    command = [sys.executable, "-m", "brainflow", "adapt", store.path, "--from", model, "--target", "state"]
    options = ["--out", tmp_path / "out", "--hrf-shift", "2", "--steps", "5", "--device", "cpu", "--json"]
    options += ["--published"]
    done = subprocess.run([*map(str, command + options)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["target"] == "state"
    others = [entry["name"] for entry in printed["baselines"]]
    assert others == ["fine-tuned as published, from scratch", *BASELINES]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "scores.json",
        "scores.csv",
        "per_subject.csv",
        "test_metrics.csv",
        "test_predictions.npy",
        "test_label_ids.npy",
        "confusion_matrix.csv",
        "predictions.csv",
        "train_config.json",
        "train_history.csv",
    }
    header, *steps = (tmp_path / "out" / "train_history.csv").read_text().splitlines()
    assert header == "step,loss,lr,seed,fold"
    assert len(steps) == 5 * RUNS


def test_command_line_says_what_is_wrong_in_one_line(store, model, tmp_path, capsys):
    argv = ["adapt", store.path, "--from", model, "--target", "nothing", "--out", tmp_path / "out"]
    assert main([*map(str, argv)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("brainflow adapt: error: target: got 'nothing'")
    assert "Traceback" not in error
