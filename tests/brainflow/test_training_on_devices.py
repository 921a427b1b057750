"""Trainings and loaders on every device that is here; `pytest -k cuda` runs the part for a GPU alone."""

import dataclasses
import itertools

import pytest
import torch
from tiny_training import curve, tiny, write_store

from brainflow.data import dali_installed, make_loader
from brainflow.data.sampler import WindowSampler
from brainflow.storage import BoldStore
from brainflow.training.loop import pretrain
from brainflow.training.step import TrainingStep

FRAMEWORKS = ("csm", "seq-bert", "net-bert", "autoencoder")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("devices") / "store")


def config_of(store, out, framework, device, *, model=None, loader="host", **train):
    config = tiny(
        store, out, framework=framework, loader=loader, **{"steps": 4, "validate_every": 4, **train}
    )
    sized = dataclasses.replace(config.model, width=32, dropout=0.0, **(model or {}))
    return dataclasses.replace(config, device=device, model=sized)


def losses(folder):
    return [line["loss"] for line in curve(folder) if "loss" in line]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_training_has_the_losses_of_one_on_the_cpu(device, store, tmp_path, framework):
    exact = {"precision": "fp32", "model": {"attention": "fallback"}}
    expected = pretrain(config_of(store, tmp_path / "cpu", framework, "cpu", **exact), quiet=True)
    found = pretrain(config_of(store, tmp_path / "fp32", framework, device, **exact), quiet=True)
    assert losses(found) == pytest.approx(losses(expected), rel=1e-4)
    default = pretrain(config_of(store, tmp_path / "default", framework, device), quiet=True)
    assert losses(default) == pytest.approx(losses(expected), rel=0.05)


@pytest.mark.parametrize("loader", ["host", "resident"])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_step_does_not_wait_for_the_gpu(cuda, store, tmp_path, framework, parts, loader, monkeypatch):
    def guarded(self, batches, step, lr, real=TrainingStep.__call__, **more):
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first step compiles
        try:
            return real(self, batches, step, lr, **more)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(TrainingStep, "__call__", guarded)
    settings = {"micro_batches": parts, "loader": loader, "ema": 0.9}
    pretrain(config_of(store, tmp_path / "run", framework, cuda, **settings), quiet=True)


@pytest.mark.parametrize("pairs", [False, True])
def test_all_loaders_give_the_batches_of_the_cpu(device, store, pairs):
    opened = BoldStore.open(store)
    sampler = WindowSampler(opened.runs, batch=6, seed=1, pairs=pairs)
    kinds = ["host", "resident", *(["dali"] if dali_installed() else [])]
    reference = make_loader(opened, sampler, kind="host")
    others = [make_loader(opened, sampler, kind=kind, device=device) for kind in kinds]
    for expected, *found in itertools.islice(zip(reference, *others, strict=True), 6):
        for batch in found:
            assert batch.bold.device.type == device
            for name in ("bold", "times", "cu_seqlens", "is_next"):
                one, other = getattr(batch, name), getattr(expected, name)
                assert (one is None) == (other is None)
                assert one is None or torch.equal(one.cpu(), other)
    for loader in (reference, *others):
        loader.close()
