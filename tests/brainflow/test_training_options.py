"""Settings of a run, each seen to do what its help says: schedules, averages, precision, stopping."""

import itertools
import json
import sqlite3
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import brainflow
from brainflow.benchmarks.training import random_batch
from brainflow.config import DataConfig, ModelConfig, PretrainConfig, TrainConfig
from brainflow.frameworks import CSMConfig, build
from brainflow.frameworks.csm import CSM
from brainflow.storage import StoreWriter
from brainflow.training import checkpoint
from brainflow.training.loop import pretrain
from brainflow.training.meters import matrix_weights, peak_flops
from brainflow.training.metrics import read_metrics
from brainflow.training.optimizer import (
    LossScale,
    MovingAverage,
    approach_one_by_one,
    approach_together,
    learning_rate,
)
from brainflow.training.progress import make_tracker
from brainflow.training.step import TrainingStep


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("options") / "store"
    rng = np.random.default_rng(0)
    with StoreWriter.create(path, networks=8, dtype="float32", parcellation="none") as writer:
        for run in range(6):
            bold = rng.standard_normal((50, 8)).astype(np.float32)
            writer.append(bold, t_r=2.0, dataset="noise", subject=str(run), session="", task="rest", run="1")
    return str(path)


def tiny(store, out, *, model=None, **train):
    return PretrainConfig(
        store=store,
        out=str(out),
        device="cpu",
        model=ModelConfig(**{"width": 16, "layers": 1, "heads": 2, **(model or {})}),
        data=DataConfig(batch_size=4, seq_min=6, seq_max=12, loader="host", validation_batches=1),
        train=TrainConfig(
            **{
                "steps": 6,
                "lr": 1e-2,
                "log_every": 1,
                "validate_every": 2,
                "checkpoint_every": 1,
                "plot": False,
                **train,
            }
        ),
    )


def test_windows_are_drawn_by_the_weights_of_their_datasets(tmp_path, monkeypatch):
    with StoreWriter.create(tmp_path / "store", networks=8, dtype="float32", parcellation="none") as writer:
        for run in range(9):
            bold = np.random.default_rng(run).standard_normal((50, 8)).astype(np.float32)
            writer.append(bold, t_r=2.0, dataset="abc"[run % 3], subject=str(run), task="rest", run="1")
    read = []
    call = TrainingStep.__call__

    def remembered(self, batches, *args, **more):
        batches, kept = itertools.tee(itertools.islice(batches, 1))
        read.extend(next(kept).runs.tolist())
        return call(self, batches, *args, **more)

    monkeypatch.setattr(TrainingStep, "__call__", remembered)
    config = tiny(str(tmp_path / "store"), tmp_path / "run", steps=40)
    pretrain(replace(config, data=replace(config.data, weights="a=0,b=3")), quiet=True)
    drawn = Counter("abc"[run % 3] for run in read)
    assert drawn["a"] == 0
    assert 2.5 < drawn["b"] / drawn["c"] < 3.5
    with pytest.raises(ValueError, match="weights: no run of dataset 'd' here"):
        pretrain(
            replace(config, out=str(tmp_path / "other"), data=replace(config.data, weights="d=2")), quiet=True
        )


def test_a_run_that_began_before_a_setting_existed_goes_on_with_its_default(store, tmp_path):
    config = tiny(store, tmp_path / "run")
    pretrain(config, quiet=True)
    path = tmp_path / "run" / "train_config.json"
    old = json.loads(path.read_text())
    del old["data"]["weights"]
    path.write_text(json.dumps(old))
    pretrain(config, quiet=True)
    with pytest.raises(ValueError, match=r"data\.weights is 'noise=2', was ''"):
        pretrain(replace(config, data=replace(config.data, weights="noise=2")), quiet=True)


def rates(schedule, steps=1000):
    config = TrainConfig(steps=steps, lr=2.0, warmup=0.1, schedule=schedule)
    return [learning_rate(step, config) for step in range(steps)]


def test_schedules_share_the_warm_up_and_end_as_they_should():
    for name in ("linear", "cosine", "constant", "wsd"):
        assert rates(name)[:101] == pytest.approx(rates("linear")[:101])
    assert set(rates("constant")[100:]) == {2.0}
    cosine = rates("cosine")
    assert cosine[550] == pytest.approx(1.0)
    assert all(a > b for a, b in itertools.pairwise(cosine[100:]))
    wsd = rates("wsd")
    assert set(wsd[100:901]) == {2.0}
    assert wsd[950] == pytest.approx(1.0)


def test_the_loss_scale_halves_after_an_overflow_and_grows_after_good_steps(monkeypatch):
    monkeypatch.setattr(LossScale, "GROW_EVERY", 3)
    scale = LossScale(torch.device("cpu"))
    begin = float(scale.values[0])
    scale.update(torch.tensor(1.0))
    assert float(scale.values[0]) == begin / 2
    for _ in range(3):
        scale.update(torch.tensor(0.0))
    assert scale.values.tolist() == [begin, 0.0]


def test_fp16_trains_and_resumes(store, tmp_path):
    run = pretrain(tiny(store, tmp_path / "run", precision="fp16"), quiet=True)
    training = [line for line in read_metrics(run) if "loss" in line]
    assert len(training) == 6
    assert training[-1]["skipped"] < 6
    tensors = checkpoint.load(checkpoint.latest(run / "checkpoints"))
    assert tensors["scale.values"].shape == (2,)


def test_the_average_moves_by_its_decay_and_not_in_a_skipped_step():
    module = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        module.weight.fill_(0.0)
    average = MovingAverage(module, 0.9)
    with torch.no_grad():
        module.weight.fill_(1.0)
    average.update(module, torch.tensor(0.0))
    average.update(module, torch.tensor(1.0))
    assert average.values["weight"].item() == pytest.approx(0.1)
    with average.swapped(module):
        assert module.weight.item() == pytest.approx(0.1)
    assert module.weight.item() == 1.0


def test_the_average_is_what_is_released(store, tmp_path):
    run = pretrain(tiny(store, tmp_path / "run", ema=0.5), quiet=True)
    tensors = checkpoint.load(checkpoint.latest(run / "checkpoints"))
    released = brainflow.load(str(run)).state_dict()
    averages = {k.removeprefix("ema."): v for k, v in tensors.items() if k.startswith("ema.")}
    assert averages
    assert all(torch.equal(released[k], averages[k]) for k in averages)
    assert not torch.equal(released["unembedding.weight"], tensors["model.unembedding.weight"])


def test_patience_stops_a_run_that_gets_no_better_and_the_best_weights_are_there(store, tmp_path):
    # This rate is so large that no later validation is better than the first.
    config = tiny(store, tmp_path / "run", steps=40, lr=5.0, patience=2, warmup=0.0)
    run = pretrain(config, quiet=True)
    scores = [(line["val_loss"], line["step"]) for line in read_metrics(run) if "val_loss" in line]
    best = min(scores)[1]
    assert scores[-1][1] == best + 4 < 40
    assert json.loads((run / "best" / "config.json").read_text())["step"] == best
    before = (run / "metrics.jsonl").read_bytes()
    pretrain(config, quiet=True)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_permanent_checkpoints_stay(store, tmp_path):
    run = pretrain(tiny(store, tmp_path / "run", keep=1, permanent_every=2), quiet=True)
    steps = [int(path.name.removeprefix("step-")) for path in checkpoint.complete(run / "checkpoints")]
    assert steps == [2, 4, 6]


def test_mlflow_gets_the_numbers_in_one_run_a_directory(store, tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="mlflow-skinny is not installed")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for step in (1, 2):
        make_tracker(tiny(store, tmp_path, tracker="mlflow"))({"step": step, "loss": 0.5, "text": "x"})
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        rows = database.execute("SELECT key, value, step, run_uuid FROM metrics ORDER BY step").fetchall()
    assert [row[:3] for row in rows] == [("loss", 0.5, 1), ("loss", 0.5, 2)]
    assert rows[0][3] == rows[1][3]


def test_a_picture_of_the_reconstruction_comes_with_each_validation(store, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    run = pretrain(tiny(store, tmp_path / "run", plot=True), quiet=True)
    drawn = sorted(path.name for path in (run / "reconstructions").iterdir())
    assert drawn == ["step-00000002.png", "step-00000004.png", "step-00000006.png"]


def test_without_matplotlib_a_run_goes_on_without_pictures(store, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run = pretrain(tiny(store, tmp_path / "run", plot=True), quiet=True)
    assert not (run / "reconstructions").exists()


@pytest.mark.parametrize("framework", ["csm", "seq-bert", "autoencoder"])
def test_rates_count_what_the_store_gives_and_what_the_model_runs(store, tmp_path, monkeypatch, framework):
    seen = []
    real = TrainingStep.__call__

    def one_step(self, batches, *args, **more):
        before = self.trs, self.tokens
        batch = next(batches)
        result = real(self, iter([batch]), *args, **more)
        trs = int(batch.lengths.sum())
        special = {"csm": trs, "seq-bert": batch.windows // 2 * 3, "autoencoder": 0}[framework]
        seen.append((self.trs - before[0], self.tokens - before[1]) == (trs, trs + special))
        return result

    monkeypatch.setattr(TrainingStep, "__call__", one_step)
    run = pretrain(tiny(store, tmp_path / "run", model={"framework": framework}, steps=3), quiet=True)
    assert seen == [True] * 3
    line = next(line for line in read_metrics(run) if "loss" in line)
    assert line["tokens_per_s"] >= line["trs_per_s"] > 0
    assert 0 < line["mfu"] < 2  # of a machine that other work shares, the peak is measured, too


def test_the_flops_of_a_step_are_those_that_torch_counts():
    config = CSMConfig(networks=24, width=32, layers=2, heads=2, dropout=0.0, masking="next")
    module, batch = build(config), random_batch(6, 24)
    with FlopCounterMode(display=False) as counter:
        module(batch, seed=0).loss.backward()
    attention = {"bmm", "baddbmm", "_scaled_dot_product"}
    by_operator = counter.get_flop_counts()["Global"]
    counted = sum(n for op, n in by_operator.items() if not any(part in str(op) for part in attention))
    # torch counts neither a gradient of the input, which nobody needs, nor rows that are not predicted.
    assert matrix_weights(module).flops(batch.tokens, batch.tokens) == pytest.approx(counted, rel=0.25)


def test_compiled_blocks_train_to_the_same_losses(store, tmp_path, monkeypatch):
    # Traced and differentiated ahead of time as on a GPU, but run by torch: compiling C++ takes a minute.
    real, compiled = torch.nn.Module.compile, []

    def by_torch(self, **options):
        compiled.append(options)
        real(self, backend="aot_eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", by_torch)
    runs = [
        pretrain(tiny(store, tmp_path / on, model={"dropout": 0.0}, steps=3, compile=on), quiet=True)
        for on in ("auto", "on")
    ]
    one, other = ([line["loss"] for line in read_metrics(run) if "loss" in line] for run in runs)
    assert one == pytest.approx(other, rel=1e-5)
    assert compiled == [{"dynamic": True}]


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_recomputing_activations_changes_no_number(store, tmp_path, precision):
    runs = [
        pretrain(tiny(store, tmp_path / str(on), model={"recompute": on}, precision=precision), quiet=True)
        for on in (False, True)
    ]
    one, other = ([line["loss"] for line in read_metrics(run) if "loss" in line] for run in runs)
    assert one == other


@pytest.mark.parametrize(("precision", "allowed"), [("fp32", False), ("bf16", False), ("tf32", True)])
def test_only_tf32_lets_products_round_their_inputs_those_of_cudnn_too(store, tmp_path, precision, allowed):
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = not allowed
        pretrain(tiny(store, tmp_path / "run", steps=1, precision=precision), quiet=True)
        assert torch.backends.cudnn.allow_tf32 == allowed
        assert torch.get_float32_matmul_precision() == ("high" if allowed else "highest")
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_validation_runs_in_the_precision_of_the_training(store, tmp_path, monkeypatch):
    seen = []
    real = CSM.score

    def score(self, batch, *, seed):
        seen.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
        return real(self, batch, seed=seed)

    monkeypatch.setattr(CSM, "score", score)
    for precision in ("fp32", "bf16"):
        pretrain(tiny(store, tmp_path / precision, steps=1, precision=precision), quiet=True)
    assert seen == [False, torch.bfloat16]


def test_averages_move_as_far_together_as_one_by_one():
    start, values = ([torch.randn(5, 3), torch.randn(7)] for _ in range(2))
    for weight in (torch.tensor(0.1), torch.tensor(0.0)):
        one, together = ([x.clone() for x in start] for _ in range(2))
        approach_one_by_one(one, values, weight)
        approach_together(together, values, weight)
        torch.testing.assert_close(one, together)
        assert (weight == 0) == torch.equal(together[0], start[0])


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA A100-PCIE-40GB", 312.0),
    ],
)
def test_the_peak_is_that_of_the_card(name, bf16, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), "bf16") == 1e12 * bf16
