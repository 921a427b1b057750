"""The loop on a tiny store: what it writes, exact resume, refusals, steps that are not finite."""

import dataclasses
import functools
import gc
import json
import math
import os
import resource
import signal
import sys

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import brainflow
from brainflow.config import DataConfig, ModelConfig, PretrainConfig, TrainConfig
from brainflow.frameworks import build
from brainflow.storage import BoldStore, StoreWriter
from brainflow.training import checkpoint, loop
from brainflow.training import step as step_module
from brainflow.training.interrupt import Preempted
from brainflow.training.loop import NotFinite, pretrain
from brainflow.training.metrics import TIMING, read_metrics
from brainflow.training.run_dir import exclusive
from brainflow.training.setup import collecting_rarely
from brainflow.training.step import TrainingStep

NETWORKS = 12


def write_store(path, seed=0, runs=8):
    rng = np.random.default_rng(seed)
    phase = rng.uniform(0, 6, NETWORKS)
    with StoreWriter.create(path, networks=NETWORKS, dtype="float32", parcellation="none") as writer:
        for run in range(runs):
            t = np.arange(60)[:, None]
            bold = np.sin(t / 2 + phase) + 0.2 * rng.standard_normal((60, NETWORKS))
            writer.append(
                bold.astype(np.float32),
                t_r=2.0,
                dataset="sines",
                subject=str(run),
                session="",
                task="rest",
                run="1",
            )
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return str(write_store(tmp_path_factory.mktemp("loop") / "store"))


def tiny(store, out, *, model=None, data=None, **train):
    return PretrainConfig(
        store=store,
        out=str(out),
        device="cpu",
        model=ModelConfig(**{"width": 16, "layers": 1, "heads": 2, **(model or {})}),
        data=DataConfig(
            **{
                "batch_size": 8,
                "seq_min": 6,
                "seq_max": 16,
                "loader": "host",
                "validation_batches": 2,
                **(data or {}),
            }
        ),
        train=TrainConfig(
            **{
                "steps": 12,
                "lr": 1e-2,
                "log_every": 3,
                "validate_every": 6,
                "checkpoint_every": 4,
                "plot": False,
                **train,
            }
        ),
    )


def curve(folder):
    return [{k: v for k, v in line.items() if k not in TIMING} for line in read_metrics(folder)]


@pytest.fixture(scope="module")
def undisturbed(store, tmp_path_factory):
    return pretrain(tiny(store, tmp_path_factory.mktemp("loop") / "whole"), quiet=True)


class Crash(BaseException):
    """Stands for a process that is gone: nothing in the loop may catch it."""


def crash_at(monkeypatch, at):
    real = TrainingStep.__call__

    def one_step(self, batches, step, lr, **more):
        if step == at:
            raise Crash
        return real(self, batches, step, lr, **more)

    monkeypatch.setattr(TrainingStep, "__call__", one_step)


def test_what_a_run_leaves(store, undisturbed):
    names = {path.name for path in undisturbed.iterdir()}
    assert names >= {
        "train_config.json",
        "split.json",
        "metrics.jsonl",
        "train_history.csv",
        "eval_history.csv",
        "checkpoints",
        "model.safetensors",
        "config.json",
    }
    assert [p.name for p in checkpoint.complete(undisturbed / "checkpoints")] == [
        "step-00000008",
        "step-00000012",
    ]
    lines = read_metrics(undisturbed)
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == [3, 6, 9, 12]
    assert all(line["tokens_per_s"] > 0 and 0 <= line["data_wait"] <= 1 for line in training)
    validation = [line for line in lines if "val_loss" in line]
    assert [line["step"] for line in validation] == [6, 12]
    assert validation[0]["val_mean_l1"] == validation[1]["val_mean_l1"]  # the same windows every time
    saved = json.loads((undisturbed / "train_config.json").read_text())
    assert saved["model"]["networks"] == NETWORKS
    assert saved["store_snapshot"] == BoldStore.open(store).snapshot


def test_the_weights_say_what_they_were_trained_on(store, undisturbed):
    said = json.loads((undisturbed / "config.json").read_text())
    assert said["step"] == said["pretrain"]["train"]["steps"] == 12
    assert said["data"]["t_r"] == [2.0]
    assert said["data"]["parcellation"] == "none"
    held_out = json.loads((undisturbed / "split.json").read_text())["parts"]["validation"]
    assert said["data"]["datasets"] == {"sines": 8 - len(held_out)}
    assert len(said["data"]["training_subjects"]) == 8  # validation chooses weights


def test_the_result_loads_and_is_the_trained_model(undisturbed):
    module = brainflow.load(str(undisturbed))
    tensors = checkpoint.load(checkpoint.latest(undisturbed / "checkpoints"))
    weights = module.state_dict()
    assert {f"model.{k}" for k in weights} == {k for k in tensors if k.startswith("model.")}
    assert all(torch.equal(weights[k], tensors[f"model.{k}"]) for k in weights)


def test_it_learns(store, tmp_path):
    lines = read_metrics(pretrain(tiny(store, tmp_path / "run", steps=120, validate_every=120), quiet=True))
    last = lines[-1]
    assert last["val_l1"] < 0.8 * last["val_mean_l1"]
    assert last["val_explained_variance"] > 0.3


@pytest.mark.parametrize("step", [0, 2, 4, 5, 7, 11])
def test_a_run_that_died_at_any_step_continues_bit_for_bit(store, undisturbed, tmp_path, monkeypatch, step):
    config = tiny(store, tmp_path / "run")
    with monkeypatch.context() as patch:
        crash_at(patch, step)
        with pytest.raises(Crash):
            pretrain(config, quiet=True)
    folder = pretrain(config, quiet=True)
    assert curve(folder) == curve(undisturbed)
    assert (folder / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
    for name in ("train_history.csv", "eval_history.csv"):
        assert (folder / name).read_text() == (undisturbed / name).read_text()


@pytest.mark.parametrize(("call", "left"), [(1, 4), (2, 4), (3, 4), (4, 4), (5, 8)])
def test_a_run_that_died_while_writing_a_checkpoint_continues_from_the_one_before(
    store, undisturbed, tmp_path, monkeypatch, call, left
):
    real, calls = checkpoint._fsync, []

    def fsync(path):
        calls.append(path)
        # 5 calls a checkpoint: the rank's note, state.json, COMPLETE, their folder; renamed, the one above
        if len(calls) == 5 + call:
            raise Crash
        real(path)

    config = tiny(store, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_fsync", fsync)
        with pytest.raises(Crash):
            pretrain(config, quiet=True)
    assert checkpoint.latest(tmp_path / "run" / "checkpoints").name == f"step-{left:08d}"
    assert curve(pretrain(config, quiet=True)) == curve(undisturbed)
    assert not list((tmp_path / "run" / "checkpoints").glob("*.tmp"))


@pytest.mark.parametrize("loader", ["dali", "resident"])
def test_every_loader_gives_the_same_losses_and_resumes(store, undisturbed, tmp_path, monkeypatch, loader):
    if loader == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    config = tiny(store, tmp_path / "run", data={"loader": loader})
    with monkeypatch.context() as patch:
        crash_at(patch, 6)
        with pytest.raises(Crash):
            pretrain(config, quiet=True)
    assert curve(pretrain(config, quiet=True)) == curve(undisturbed)


def test_a_finished_run_is_left_as_it_is(store, tmp_path, undisturbed):
    config = tiny(store, tmp_path / "run")
    pretrain(config, quiet=True)
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    pretrain(config, quiet=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics


def test_another_configuration_is_refused_by_the_names_of_its_fields(store, undisturbed):
    other = tiny(store, undisturbed, model={"width": 24}, lr=3e-2)
    with pytest.raises(
        ValueError, match=r"model\.width is 24, was 16; train\.lr is 0\.03, was 0\.01"
    ) as caught:
        pretrain(other, quiet=True)
    assert "--no-resume" in str(caught.value)


def test_a_run_that_never_began_may_be_put_right(store, tmp_path):
    with pytest.raises(ValueError, match="sizes"):
        pretrain(tiny(store, tmp_path / "run", data={"validation_fraction": 0.99}), quiet=True)
    told = []
    pretrain(tiny(store, tmp_path / "run", steps=2), quiet=True, progress=lambda *steps: told.append(steps))
    assert told == [(1, 2), (2, 2)]


def test_another_store_is_refused_but_a_moved_one_is_not(store, tmp_path):
    moved = write_store(tmp_path / "moved")
    config = tiny(store, tmp_path / "run", steps=2)
    pretrain(config, quiet=True)
    pretrain(dataclasses.replace(config, store=str(moved)), quiet=True)
    other = write_store(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="store_snapshot"):
        pretrain(dataclasses.replace(config, store=str(other)), quiet=True)


def test_checkpoints_may_come_more_often_on_resume(store, undisturbed, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        crash_at(patch, 6)
        with pytest.raises(Crash):
            pretrain(tiny(store, tmp_path / "run"), quiet=True)
    assert curve(pretrain(tiny(store, tmp_path / "run", checkpoint_every=1, keep=3), quiet=True)) == curve(
        undisturbed
    )


def test_no_resume_starts_over(store, undisturbed, tmp_path):
    pretrain(tiny(store, tmp_path / "run", seed=5), quiet=True)
    assert curve(tmp_path / "run") != curve(undisturbed)
    assert curve(pretrain(tiny(store, tmp_path / "run"), resume="never", quiet=True)) == curve(undisturbed)


def test_networks_come_from_the_store(store, tmp_path):
    with pytest.raises(ValueError, match=r"model\.networks: got 7, but the store has 12"):
        pretrain(tiny(store, tmp_path / "run", model={"networks": 7}), quiet=True)


def test_a_second_process_is_refused(store, tmp_path):
    with exclusive(tmp_path / "run"), pytest.raises(ValueError, match="another process"):
        pretrain(tiny(store, tmp_path / "run"), quiet=True)


def test_no_store(tmp_path):
    with pytest.raises((ValueError, OSError), match="absent"):
        pretrain(tiny(str(tmp_path / "absent"), tmp_path / "run"), quiet=True)


def poison(monkeypatch, bad):
    """Make the loss NaN at the steps in `bad`."""

    def poisoned(config):
        module = build(config)
        forward = module.forward

        def with_nan(batch, *, seed):
            out = forward(batch, seed=seed)
            if module.training and batch.step in bad:
                return dataclasses.replace(out, loss=out.loss * math.nan)
            return out

        module.forward = with_nan
        return module

    monkeypatch.setattr(step_module, "build", poisoned)


def test_steps_that_are_not_finite_are_skipped_and_counted(store, tmp_path, monkeypatch):
    poison(monkeypatch, {2, 3, 7})
    folder = pretrain(tiny(store, tmp_path / "run"), quiet=True)
    training = [line for line in read_metrics(folder) if "loss" in line]
    assert [line["skipped"] for line in training] == [1, 2, 3, 3]
    assert all(line["loss"] is not None for line in training)
    tensors = checkpoint.load(checkpoint.latest(folder / "checkpoints"))
    assert all(torch.isfinite(value).all() for value in tensors.values())


def test_many_bad_steps_in_a_row_stop_the_run_and_name_the_runs(store, tmp_path, monkeypatch):
    poison(monkeypatch, set(range(5, 100)))
    with pytest.raises(NotFinite, match="10 steps in a row") as caught:
        pretrain(tiny(store, tmp_path / "run", steps=60, log_every=15), quiet=True)
    keys = set(BoldStore.open(store).runs.key.tolist())
    assert any(key in str(caught.value) for key in keys)
    assert checkpoint.latest(tmp_path / "run" / "checkpoints") is not None


def test_a_full_disk_is_a_clear_error_and_the_last_checkpoint_stays(
    store, tmp_path, undisturbed, monkeypatch
):
    config = tiny(store, tmp_path / "run")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    real = loop._Run._save

    def save(self):
        if self.step == 8:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, hard))
        real(self)

    monkeypatch.setattr(loop._Run, "_save", save)
    try:
        with pytest.raises(OSError, match="step-00000004, is intact"):
            pretrain(config, quiet=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    monkeypatch.undo()
    assert curve(pretrain(config, quiet=True)) == curve(undisturbed)


@pytest.fixture(scope="module")
def losses(store, tmp_path_factory):
    """Return the losses of four steps: trained once for both halves of a precision."""

    @functools.cache
    def trained(framework, precision):
        model, out = {"framework": framework, "dropout": 0.0}, tmp_path_factory.mktemp("precision") / "run"
        config = tiny(store, out, model=model, steps=4, log_every=1, precision=precision)
        return [line["loss"] for line in read_metrics(pretrain(config, quiet=True)) if "loss" in line]

    return trained


@pytest.mark.parametrize("framework", ["csm", "seq-bert", "net-bert", "autoencoder"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_to_about_the_same_losses(losses, framework, precision):
    half, single = losses(framework, precision), losses(framework, "fp32")
    assert half == pytest.approx(single, rel=0.03)
    assert half != single


def from_a_cpu_face():
    frame = sys._getframe(2)
    while frame is not None and "test_training_loop" not in frame.f_code.co_filename:
        if frame.f_code.co_filename.endswith("/cpu.py") and "kernels" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


class Syncs(TorchDispatchMode):
    """Counts operators, and those that make the host wait for the device."""

    def __init__(self):
        super().__init__()
        self.operators, self.syncs = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators += 1
        name = func.overloadpacket.__name__
        # Integers that are read are the batch sizes of a packed LSTM, which live on the host; what a CPU face
        # of a kernel reads lies there, too.
        reads = name == "_local_scalar_dense" and args[0].dtype != torch.int64 and not from_a_cpu_face()
        if reads or name in ("nonzero", "masked_select", "equal"):
            self.syncs.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("framework", ["csm", "seq-bert", "net-bert", "autoencoder"])
def test_no_step_waits_for_the_device_whatever_is_switched_on(store, tmp_path, monkeypatch, framework):
    counted = []
    real = TrainingStep.__call__

    def one_step(self, *args, **more):
        with Syncs() as mode:
            result = real(self, *args, **more)
        counted.append(mode)
        return result

    monkeypatch.setattr(TrainingStep, "__call__", one_step)
    settings = {"micro_batches": 4, "ema": 0.9, "precision": "fp16", "log_every": 1, "steps": 2}
    pretrain(tiny(store, tmp_path / "run", model={"framework": framework}, **settings), quiet=True)
    assert [mode.syncs for mode in counted] == [[], []]
    assert all(mode.operators > 100 for mode in counted)


@pytest.mark.parametrize("framework", ["csm", "seq-bert", "net-bert", "autoencoder"])
def test_the_step_does_not_wait_for_the_device_and_resumes_in_every_framework(
    store, tmp_path, monkeypatch, framework
):
    counted = []
    real = TrainingStep.__call__

    def one_step(self, batches, step, lr, **more):
        with Syncs() as mode:
            result = real(self, batches, step, lr, **more)
        counted.append(mode)
        return result

    def config(name, **train):
        return tiny(
            store, tmp_path / name, model={"framework": framework, "width": 16}, steps=3, log_every=1, **train
        )

    with monkeypatch.context() as patch:
        patch.setattr(TrainingStep, "__call__", one_step)
        whole = pretrain(config("whole"), quiet=True)
    assert [mode.syncs for mode in counted] == [[], [], []]
    last = read_metrics(whole)[-1]
    assert all(math.isfinite(last[f"val_{name}"]) for name in ("loss", "l1", "mean_l1", "last_l1"))
    with monkeypatch.context() as patch:
        crash_at(patch, 2)
        with pytest.raises(Crash):
            pretrain(config("run", checkpoint_every=1), quiet=True)
    assert curve(pretrain(config("run"), quiet=True)) == curve(whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_asks_for_a_checkpoint_and_leaves_a_marker(
    store, undisturbed, tmp_path, monkeypatch, number
):
    real = TrainingStep.__call__

    def one_step(self, batches, step, lr, **more):
        if step == 4:
            os.kill(os.getpid(), number)
        return real(self, batches, step, lr, **more)

    config = tiny(store, tmp_path / "run")
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(TrainingStep, "__call__", one_step)
        with pytest.raises(Preempted) as caught:
            pretrain(config, quiet=True)
    assert signal.getsignal(number) == before
    assert (caught.value.exit_code, caught.value.step) == (128 + number, 5)
    marker = tmp_path / "run" / "PREEMPTED"
    assert json.loads(marker.read_text()) == {"signal": signal.Signals(number).name, "step": 5}
    assert curve(pretrain(config, quiet=True)) == curve(undisturbed)
    assert not marker.exists()


def test_what_others_have_frozen_stays_frozen_and_nothing_else():
    gc.freeze()
    frozen = gc.get_freeze_count()
    try:
        with collecting_rarely():
            assert not gc.isenabled()
            assert gc.get_freeze_count() == frozen > 0
        assert gc.get_freeze_count() == frozen
        gc.unfreeze()
        with collecting_rarely():
            assert gc.get_freeze_count() > 0
        assert gc.get_freeze_count() == 0
        assert gc.isenabled()
    finally:
        gc.freeze()  # as conftest.py does for all tests
