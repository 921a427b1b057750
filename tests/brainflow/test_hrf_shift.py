"""The haemodynamic shift of a store's segments travels with them, and is not applied twice unawares."""

import json

import numpy as np
import pytest
import torch

from brainflow.cli.main import main
from brainflow.config import ModelConfig
from brainflow.decoding.estimator import MentalStateDecoder
from brainflow.decoding.task import TaskConfig, load_task, stored_shift
from brainflow.frameworks import build
from brainflow.pretrained.format import save_pretrained
from brainflow.storage import BoldStore, Segment, StoreWriter

NETWORKS = 4


def add(writer, people):
    for person in people:
        bold = np.random.default_rng(person).normal(size=(40, NETWORKS))
        segments = []
        for place in range(4):
            bold[place * 8 : place * 8 + 6] += [3, 0, 0, 0] if place % 2 else [0, 3, 0, 0]
            segments.append(Segment(onset=place * 8, length=6, labels={"state": "ab"[place % 2]}))
        writer.append(bold, t_r=1.0, dataset="toy", subject=str(person), segments=segments)


def write(path, preprocessing):
    with StoreWriter.create(path, networks=NETWORKS, preprocessing=preprocessing) as writer:
        add(writer, range(3))
    return BoldStore.open(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    config = ModelConfig(networks=NETWORKS, width=16, layers=1, heads=2)
    return save_pretrained(build(config), tmp_path_factory.mktemp("model"), {})


def test_segments_that_were_moved_are_not_moved_again(tmp_path, model, capsys):
    store = write(tmp_path / "s", {"hrf_shift": 3.0})
    command = ["adapt", str(store.path), "--from", str(model), "--target", "state", "--mode", "linear"]
    command += ["--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main([*command, "--hrf-shift", "5"]) == 1
    error = capsys.readouterr().err
    assert "hrf_shift: got 5 s, but the segments of" in error
    assert "were moved by 3 s already (preprocessing.hrf_shift), 8 s in all; leave --hrf-shift out" in error
    assert not (tmp_path / "out" / "scores.json").exists()
    assert main([*command, "--save"]) == 0
    assert "haemodynamic shift: 0 s here + 3 s in the store = 3 s" in capsys.readouterr().out
    saved = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert (saved["hrf_shift"], saved["hrf_shift_total"]) == (0.0, 3.0)
    # what cuts windows at events, of which no store has moved any, moves them by all of it
    assert MentalStateDecoder.load(tmp_path / "out" / "decoder").hrf_shift == 3.0
    task = load_task(store, TaskConfig(target="state", hrf_shift=2.0), allow_mismatch=True)
    assert task.hrf_shift == 5.0
    np.testing.assert_array_equal(task.read()[0][:6], store.run(0)[2:8])


@pytest.mark.parametrize("told", [None, "3", True, [3.0]])
def test_a_store_that_does_not_say_is_moved_as_before(tmp_path, told):
    store = write(tmp_path / "s", {} if told is None else {"hrf_shift": told})
    task = load_task(store, TaskConfig(target="state", hrf_shift=5.0))
    assert task.hrf_shift is None
    np.testing.assert_array_equal(task.read()[0][:6], store.run(0)[5:11])


def test_a_store_that_was_not_moved_is_moved(tmp_path):
    task = load_task(write(tmp_path / "s", {"hrf_shift": 0}), TaskConfig(target="state", hrf_shift=5.0))
    assert task.hrf_shift == 5.0


def test_the_shift_travels_through_ingest_and_append(tmp_path, capsys):
    for person in ("1", "2"):
        np.save(tmp_path / f"sub-{person}.npy", np.random.default_rng(0).normal(size=(20, NETWORKS)))
    (tmp_path / "events.csv").write_text("onset,length,state\n0,4,a\n6,4,b\n")
    files = '[defaults]\ndataset = "toy"\nt_r = 1.0\ntask = "t"\nsegments = "events.csv"\n[[files]]\nglob = '
    config = tmp_path / "runs.toml"
    config.write_text(f'[store]\npreprocessing = {{hrf_shift = 4.5}}\n{files}"sub-1.npy"\n')
    command = ["ingest", "arrays", str(config), "--store", str(tmp_path / "s")]
    assert main(command) == 0
    config.write_text(f'{files}"sub-2.npy"\n')
    assert main(command) == 0
    store = BoldStore.open(tmp_path / "s")
    assert len(store.runs) == 2
    assert stored_shift(store.attributes) == 4.5
    config.write_text(f'[store]\npreprocessing = {{hrf_shift = 0.0}}\n{files}"sub-2.npy"\n')
    assert main(command) == 1  # segments of another shift do not get in
    assert "preprocessing" in capsys.readouterr().err
