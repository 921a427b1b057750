"""The parts of the training loop, each alone: schedule, guarded step, meters, logs."""

import itertools
import json
import math
import resource

import pytest
import torch

from brainflow.config import TrainConfig
from brainflow.training.meters import Meters, Readback
from brainflow.training.metrics import RunLog, read_metrics
from brainflow.training.optimizer import (
    allocate_state,
    guarded_step,
    learning_rate,
    make_optimizer,
    optimizer_tensors,
)


def test_schedule_rises_then_falls_to_zero():
    config = TrainConfig(steps=1000, lr=2.0, warmup=0.01)
    rates = [learning_rate(step, config) for step in range(1000)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == 2.0
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(2.0 / 990)
    assert learning_rate(1000, config) == 0.0
    # linear: the decay is the same at every step
    assert rates[100] - rates[101] == pytest.approx(rates[900] - rates[901])


def test_schedule_without_warmup_starts_at_the_peak():
    assert learning_rate(0, TrainConfig(steps=10, lr=1.0, warmup=0.0)) == 1.0


def small():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 2))
    return module, make_optimizer(module, TrainConfig(lr=0.1))


def backward(module, scale=1.0):
    x = torch.linspace(-1, 1, 20).view(5, 4)
    loss = (module(x) * scale).abs().mean()
    loss.backward()
    return loss.detach(), torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)


def test_vectors_are_not_decayed():
    module, optimizer = small()
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {id(module[0].weight), id(module[2].weight)}


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing_and_the_next_one_is_as_if_it_had_not_been(scale):
    def train(scales):
        module, optimizer = small()
        meters = Meters(torch.device("cpu"))
        for step, s in enumerate(scales):
            loss, norm = backward(module, s)
            guarded_step(optimizer, 0.1, meters.update(loss, norm, step))
        return module.state_dict(), optimizer_tensors(module, optimizer), meters

    weights, moments, meters = train([1.0, scale, scale, 1.0])
    clean_weights, clean_moments, _ = train([1.0, 1.0])
    assert all(torch.equal(weights[k], clean_weights[k]) for k in clean_weights)
    assert all(torch.equal(moments[k], clean_moments[k]) for k in clean_moments)
    read = dict(zip(Meters.NAMES, meters.read().tolist(), strict=True))
    assert (read["good"], read["skipped"], read["bad_row"], read["worst"], read["bad_step"]) == (
        2,
        2,
        0,
        2,
        2,
    )
    assert math.isfinite(read["total"])


def test_a_row_of_bad_steps_is_counted_across_readings():
    meters = Meters(torch.device("cpu"))
    nan, one = torch.tensor(math.nan), torch.tensor(1.0)
    for step in range(6):
        meters.update(nan, one, step)
    meters.read()
    for step in range(6, 10):
        meters.update(one, nan, step)
    meters.update(one, one, 10)
    read = dict(zip(Meters.NAMES, meters.read().tolist(), strict=True))
    assert (read["worst"], read["bad_row"], read["bad_step"], read["good"]) == (10, 0, 9, 1)
    assert dict(zip(Meters.NAMES, meters.read().tolist(), strict=True))["worst"] == 0


def test_room_for_the_optimizer_state_is_made_by_name():
    module, optimizer = small()
    backward(module)
    guarded_step(optimizer, 0.1, torch.zeros(()))
    flat = {k: v.clone() for k, v in optimizer_tensors(module, optimizer).items()}
    other, fresh = small()
    allocate_state(other, fresh, flat)
    again = optimizer_tensors(other, fresh)
    assert flat.keys() == again.keys()
    assert len(flat) == 6 * 3
    assert all(flat[k].shape == again[k].shape and flat[k].dtype == again[k].dtype for k in flat)
    with pytest.raises(ValueError, match="nobody"):
        allocate_state(other, fresh, ["nobody|step"])


def test_readback_keeps_order_and_is_not_changed_by_later_steps():
    readback = Readback()
    values = torch.tensor([1.0, 2.0])
    readback.push(values, {"step": 1})
    values += 1
    readback.push(values, {"step": 2})
    assert list(readback.pop(wait=True)) == [([1.0, 2.0], {"step": 1}), ([2.0, 3.0], {"step": 2})]
    assert not list(readback.pop())


def training_line(step, **more):
    return {"step": step, "loss": 0.1 + step, "lr": 1e-3, **more}


def test_log_lines_and_published_files(tmp_path):
    log = RunLog(tmp_path, step=0)
    log.write(training_line(10))
    log.write({"step": 10, "val_loss": 0.5, "val_accuracy": 0.75})
    log.write(training_line(20, grad_norm=math.inf))
    assert [line["step"] for line in read_metrics(tmp_path)] == [10, 10, 20]
    assert read_metrics(tmp_path)[-1]["grad_norm"] is None
    assert (tmp_path / "train_history.csv").read_text() == "step,loss,lr\n10,10.1,0.001\n20,20.1,0.001\n"
    assert (tmp_path / "eval_history.csv").read_text() == "step,loss,accuracy\n10,0.5,0.75\n"


def test_resuming_drops_later_lines_and_a_torn_one(tmp_path):
    log = RunLog(tmp_path, step=0)
    for step in (10, 20, 30):
        log.write(training_line(step))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')
    with (tmp_path / "train_history.csv").open("a") as file:
        file.write("40,1")
    assert [line["step"] for line in read_metrics(tmp_path)] == [10, 20, 30]
    RunLog(tmp_path, step=20).write(training_line(21))
    assert [json.loads(x)["step"] for x in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        10,
        20,
        21,
    ]
    assert [x.split(",")[0] for x in (tmp_path / "train_history.csv").read_text().splitlines()] == [
        "step",
        "10",
        "20",
        "21",
    ]


def test_a_full_disk_is_named_and_leaves_whole_lines(tmp_path):
    log = RunLog(tmp_path, step=0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150, hard))  # the kernel now refuses longer files

    def write_until_full():
        for step in range(1, 100):
            log.write(training_line(step))

    try:
        with pytest.raises(OSError, match=r"metrics\.jsonl could not be written.*resume"):
            write_until_full()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    whole = [line["step"] for line in read_metrics(tmp_path)]
    assert whole == list(range(1, len(whole) + 1))
    RunLog(tmp_path, step=2).write(training_line(3))
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]


def test_metrics_of_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="brainflow pretrain"):
        read_metrics(tmp_path)
