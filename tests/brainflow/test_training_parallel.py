"""Several processes train as one does: losses, checkpoints that change hands, accumulation, layouts."""

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp
from ranks import SLURM, assert_close, curve, on_ranks

from brainflow.config import DataConfig, PretrainConfig, TrainConfig
from brainflow.frameworks import build, model_config
from brainflow.models.transformer import FeedForward
from brainflow.storage import StoreWriter
from brainflow.training import checkpoint, parallel
from brainflow.training import step as step_module
from brainflow.training.loop import pretrain
from brainflow.training.metrics import read_metrics
from brainflow.training.parallel import Ranks, from_environment
from brainflow.training.setup import cut_into_parts
from brainflow.training.step import TrainingStep

FRAMEWORKS = ("csm", "seq-bert", "net-bert", "autoencoder")
NETWORKS = 12


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("parallel") / "store"
    rng = np.random.default_rng(0)
    with StoreWriter.create(path, networks=NETWORKS, dtype="float32", parcellation="none") as writer:
        for run in range(8):
            bold = rng.standard_normal((60, NETWORKS)).cumsum(0).astype(np.float32) / 4
            writer.append(bold, t_r=2.0, dataset="walk", subject=str(run), session="", task="rest", run="1")
    return str(path)


def tiny(store, out, framework="csm", *, model=None, batch=8, **train):
    return PretrainConfig(
        store=store,
        out=str(out),
        device="cpu",
        model=model_config(framework, width=16, layers=2, heads=2, **(model or {})),
        data=DataConfig(batch_size=batch, seq_min=6, seq_max=16, loader="host", validation_batches=1),
        train=TrainConfig(
            **{
                "steps": 4,
                "lr": 1e-3,
                "log_every": 1,
                "validate_every": 4,
                "checkpoint_every": 2,
                "keep": 9,
                "plot": False,
                **train,
            }
        ),
    )


@pytest.fixture(scope="module")
def alone(store, tmp_path_factory):
    """Return the metrics of a run in one process: trained once, however many tests compare with it."""

    @functools.cache
    def trained(framework, **settings):
        config = tiny(store, tmp_path_factory.mktemp("alone") / "run", framework, **settings)
        return curve(pretrain(config, quiet=True))

    return trained


def wait_for(path):
    for _ in range(3000):
        if path.exists():
            return
        time.sleep(0.01)
    raise AssertionError(f"{path} did not come")


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_have_the_losses_of_one_process(store, alone, tmp_path, framework, parallel):
    one = alone(framework, micro_batches=2)
    two = tiny(store, tmp_path / "two", framework, parallel=parallel)
    on_ranks(2, lambda: pretrain(two, quiet=True), tmp_path)
    assert_close(curve(tmp_path / "two"), one)
    assert json.loads((tmp_path / "two" / "train_config.json").read_text())["train"]["micro_batches"] == 2


def test_a_parameter_without_a_gradient_in_some_steps_does_not_stop_two_ranks(store, tmp_path):
    """The decoder of 2022 leaves the pooler out where it is teacher-forced: in the third step of these."""
    settings = {"model": {"chained_states": True}, "steps": 3}
    one = pretrain(tiny(store, tmp_path / "one", "autoencoder", micro_batches=2, **settings), quiet=True)
    two = tiny(store, tmp_path / "two", "autoencoder", **settings)
    on_ranks(2, lambda: pretrain(two, quiet=True), tmp_path)
    assert_close(curve(tmp_path / "two"), curve(one))


def test_ranks_that_gather_in_bf16_train_as_those_that_gather_in_float32(store, tmp_path):
    """As on GPUs: the blocks' sharded parameters are bf16 in the forward pass, and float32 where they lie."""

    def work(device):
        def step(self, *given, real=TrainingStep.__call__, **more):
            numbers = real(self, *given, **more)
            assert seen == {torch.bfloat16 if device == "cuda" else torch.float32}
            assert {p.dtype for p in self.module.parameters()} == {torch.float32}
            return numbers

        def feed(self, x, real=FeedForward.forward):
            seen.add(self.up.weight.dtype)
            return real(self, x)

        def norm(x, shape, weight, bias, eps, real=torch.nn.functional.layer_norm):
            return real(
                x.float(), shape, weight.float(), bias.float(), eps
            )  # as CUDA's autocast, not the CPU's

        torch.nn.functional.layer_norm = norm
        seen, policy = set(), parallel.gathering("bf16", torch.device(device))
        TrainingStep.__call__, FeedForward.forward = step, feed
        parallel.gathering = lambda precision, device: policy
        config = tiny(store, tmp_path / device, parallel="fsdp", precision="bf16", lr=1e-2)
        pretrain(config, quiet=True)

    for device in ("cuda", "cpu"):
        on_ranks(2, lambda device=device: work(device), tmp_path)
    half, wide = ([line["loss"] for line in curve(tmp_path / d) if "loss" in line] for d in ("cuda", "cpu"))
    assert half == pytest.approx(wide, rel=1e-2)
    assert half != wide


@pytest.mark.parametrize(
    ("framework", "parallel"),
    [("seq-bert", "hsdp"), ("net-bert", "fsdp")],  # DDP of four is that of two
)
def test_four_ranks_have_the_losses_of_one_process(store, tmp_path, framework, parallel):
    one = pretrain(tiny(store, tmp_path / "one", framework, micro_batches=4, ema=0.9), quiet=True)
    four = tiny(store, tmp_path / "four", framework, parallel=parallel, ema=0.9)
    on_ranks(4, lambda: pretrain(four, quiet=True), tmp_path)
    assert_close(curve(tmp_path / "four"), curve(one))


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_parts_of_a_batch_give_the_gradient_of_its_mean_over_all_predicted_values(
    store, tmp_path, framework, damaged, monkeypatch
):
    """The reference joins the parts' predictions and takes one mean; it knows nothing of shares."""
    seen, sizes = [], []
    if damaged:
        store = shutil.copytree(store, tmp_path / "store")
        with (store / "bold" / "c" / "0" / "0").open("r+b") as shard:
            shard.seek(3 * 60 * NETWORKS * 4)
            byte = shard.read(1)
            shard.seek(-1, os.SEEK_CUR)
            shard.write(bytes([byte[0] ^ 1]))
    real = TrainingStep.__call__

    def reference(self, parts):
        """Return the gradient of the step's loss, written down directly."""
        sums, counts, window_means, pair_losses, pairs = [], [], [], [], []
        for number, part in enumerate(parts):
            seed = self.mask_seed(number)
            if framework == "autoencoder":  # its training pass may be teacher-forced: take the loss itself
                sums.append(self.module(part, seed=seed).loss * part.tokens)
                counts.append(part.tokens)
                continue
            prediction, rows = self.module.reconstruct(part, seed=seed)
            error = (prediction - part.bold[rows]).abs()
            if framework == "csm":
                window_means += [x.mean() for x in error.split((part.lengths - 1).tolist())]
                continue
            counts.append((~prediction.isnan()).sum())
            sums.append(error[~prediction.isnan()].sum())
            # What is left of the loss without its reconstruction part is the is-next loss.
            pair_loss = self.module(part, seed=seed).loss - error[~prediction.isnan()].mean()
            pair_losses.append(pair_loss * part.windows)
            pairs.append(part.windows)
        loss = torch.stack(window_means).mean() if framework == "csm" else sum(sums) / sum(counts)
        if pair_losses:
            loss = loss + sum(pair_losses) / sum(pairs)
        loss.backward()
        gradient = {n: p.grad.clone() for n, p in self.module.named_parameters() if p.grad is not None}
        self.module.zero_grad(set_to_none=True)
        return gradient

    def one_step(self, batches, step, lr, **more):
        parts = [next(batches) for _ in self.parts]
        parts = [dataclasses.replace(part, bold=part.bold.clone(), step=step) for part in parts]
        sizes.append([part.windows for part in parts])
        self._pair_gradient.scale = None
        expected = reference(self, parts)
        monkeypatch.setattr(
            step_module,
            "guarded_step",
            lambda *_: seen.append({n: p.grad for n, p in self.module.named_parameters()}),
        )
        numbers = real(self, iter(parts), step, lr, **more)
        for name, value in expected.items():
            torch.testing.assert_close(seen[-1][name], value, rtol=1e-5, atol=1e-6)
        self.module.zero_grad(set_to_none=True)
        return numbers

    monkeypatch.setattr(TrainingStep, "__call__", one_step)
    settings = {"model": {"dropout": 0.0}, "micro_batches": 4, "steps": 2, "clip": 1e9, "batch": 24}
    config = tiny(str(store), tmp_path / "run", framework, **settings)
    if damaged:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, on_corrupt="skip"))
    pretrain(config, quiet=True)
    assert len(seen) == 2
    assert any(len(set(of_step)) > 1 for of_step in sizes) == damaged


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ((2, "fsdp"), (1, "ddp")),
        ((1, "ddp"), (2, "fsdp")),
        ((2, "ddp"), (2, "fsdp")),
        ((3, "fsdp"), (2, "ddp")),
        ((2, "fsdp"), (3, "fsdp")),
    ],
)
def test_a_checkpoint_changes_hands(store, alone, tmp_path, first, then):
    one = alone("net-bert", micro_batches=6, steps=6, batch=12)

    def begin(world, parallel):
        config = tiny(
            store, tmp_path / "run", "net-bert", micro_batches=6, steps=6, batch=12, parallel=parallel
        )

        def crash(self, batches, step, lr, real=TrainingStep.__call__, **more):
            if step == 4:
                wait_for(tmp_path / "run" / "checkpoints" / "step-00000004" / "COMPLETE")
                os._exit(0)
            return real(self, batches, step, lr, **more)

        def work():
            if (world, parallel) == first:
                TrainingStep.__call__ = crash
            pretrain(config, quiet=True)

        on_ranks(world, work, tmp_path)

    begin(*first)
    written = tmp_path / "run" / "checkpoints" / "step-00000004"
    assert (written / "COMPLETE").exists()
    sizes = [path.stat().st_size for path in written.glob("shard-*")]
    assert len(sizes) == first[0]  # nobody gathered: each rank wrote its part
    assert max(sizes) < 2 * min(sizes)
    begin(*then)
    assert_close(curve(tmp_path / "run"), one)


def test_ranks_that_slurm_started_train(store, tmp_path):
    on_ranks(2, lambda: pretrain(tiny(store, tmp_path / "run", steps=2), quiet=True), tmp_path, SLURM)
    state = checkpoint.read_state(checkpoint.latest(tmp_path / "run" / "checkpoints"))
    assert (state["step"], state["world"]) == (2, 2)


def test_two_ranks_killed_between_steps_continue_bit_for_bit(store, tmp_path):
    def config(name):
        return tiny(store, tmp_path / name, "seq-bert", steps=6)

    on_ranks(2, lambda: pretrain(config("whole"), quiet=True), tmp_path)

    def crash(self, batches, step, lr, real=TrainingStep.__call__, **more):
        if step == 3:
            os._exit(0)  # without a word, while the checkpoint of step 2 may still be in the writer's hands
        return real(self, batches, step, lr, **more)

    def dying():
        TrainingStep.__call__ = crash
        pretrain(config("run"), quiet=True)

    on_ranks(2, dying, tmp_path)
    on_ranks(2, lambda: pretrain(config("run"), quiet=True), tmp_path)
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


def test_nan_on_one_rank_skips_the_step_on_all(store, tmp_path):
    def work():
        def poisoned(config):
            module = build(config)

            def scale(head, given, output):
                bad = dist.is_initialized() and dist.get_rank() == 1 and module.training
                # The rehearsal before the first step counts, too.
                return output * float("nan") if bad and module.count == 3 else output

            module.count = 0

            def count(m, given):
                module.count += m.training

            module.register_forward_pre_hook(count)
            module.embedding.register_forward_hook(scale)
            return module

        step_module.build = poisoned
        pretrain(tiny(store, tmp_path / "run"), quiet=True)

    on_ranks(2, work, tmp_path)
    training = [line for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert [line["skipped"] for line in training] == [0, 1, 1, 1]
    assert training[-1]["loss"] is not None


def test_ranks_that_cannot_share_are_refused(store, tmp_path):
    with pytest.raises(ValueError, match=r"micro_batches: got 1 part for 3 ranks and data\.batch_size=8"):
        cut_into_parts(tiny(store, tmp_path / "run", micro_batches=1), tmp_path, 3, resume="auto")


def test_torchrun_and_slurm_say_who_is_who():
    assert from_environment({}) == Ranks()
    torchrun = {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
    }
    assert from_environment(torchrun) == Ranks(rank=5, world=8, local=1, local_world=4)
    slurm = {
        "SLURM_PROCID": "5",
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    }
    for missing, there in (("MASTER_ADDR", "MASTER_PORT"), ("MASTER_PORT", "MASTER_ADDR")):
        with pytest.raises(ValueError, match=missing):
            from_environment({**slurm, there: "1"})
    given = {**slurm, "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert from_environment(given) == Ranks(rank=5, world=8, local=1, local_world=4)


def test_a_thousand_ranks_can_be_laid_out(store):
    """The same calls as on a cluster, on a process group that answers at once."""
    script = """
import torch, torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from brainflow.config import ModelConfig
from brainflow.frameworks import build
from brainflow.training.checkpoint import owned
from brainflow.training.parallel import Ranks, spread
dist.init_process_group("fake", rank=1000, world_size=1024, store=FakeStore())
ranks = Ranks(rank=1000, world=1024, local=0, local_world=8)
for how, shards in (("fsdp", 1024), ("hsdp", 8)):
    module = build(ModelConfig(networks=1024, width=1024, layers=2, heads=8))
    sizes = {name: p.shape[0] for name, p in module.named_parameters()}
    spread(module, ranks, how, torch.device("cpu"), "fp32")
    for name, p in module.named_parameters():
        assert p.to_local().shape[0] in (sizes[name] // shards, -(-sizes[name] // shards), 0), (name, how)
    assert dict(module.named_parameters())["unembedding.weight"].device_mesh.size() == 1024
    # What this rank has to write of a checkpoint: its shard, and of equal shards its turn.
    here = sum(p.to_local().numel() for p in module.state_dict().values())
    mine = sum(p.to_local().numel() for p in owned(module.state_dict(), ranks).values())
    assert (mine == here) if how == "fsdp" else (mine < here / 4), (how, mine, here)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
