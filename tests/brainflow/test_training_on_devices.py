"""Trainings and loaders on every device that is here; `pytest -k cuda` runs the part for a GPU alone."""

import dataclasses
import itertools
import json
import subprocess
import sys

import pytest
import torch
from tiny_training import ENV, at_step, curve, tiny, write_store

from brainflow.config import to_dict
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


class Killed(Exception):
    pass


def killed(step):
    raise Killed


@pytest.fixture
def repeatable():
    """Sums on a GPU whose order is always the same."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.mark.parametrize("framework", ["csm", "autoencoder"])
def test_a_killed_training_continues_bit_for_bit(device, store, tmp_path, framework, repeatable, monkeypatch):
    def config(name):
        return config_of(store, tmp_path / name, framework, device, steps=6, checkpoint_every=2, ema=0.9)

    whole = pretrain(config("whole"), quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr(TrainingStep, "__call__", at_step(5, killed))
        with pytest.raises(Killed):
            pretrain(config("run"), quiet=True)
    assert curve(pretrain(config("run"), quiet=True)) == curve(whole)


ON_A_RANK = """
import json, sys
from brainflow.frameworks.settings import pretrain_config
from brainflow.training.loop import pretrain
pretrain(pretrain_config(json.loads(sys.argv[1])), quiet=True)
"""


def train_on_ranks(world, config, folder):
    """Train in `world` processes: none may be forked once a GPU was used."""
    script = folder / "on_a_rank.py"
    script.write_text(ON_A_RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    done = subprocess.run(
        [*command, str(script), json.dumps(to_dict(config))], capture_output=True, text=True, env=ENV
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_two_gpus_have_the_losses_of_one(two_gpus, store, tmp_path, framework, parallel):
    settings = {"precision": "fp32", "micro_batches": 2}
    one = pretrain(config_of(store, tmp_path / "one", framework, "cuda", **settings), quiet=True)
    two = config_of(store, tmp_path / "two", framework, "cuda", parallel=parallel, **settings)
    train_on_ranks(2, two, tmp_path)
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=1e-4)


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
