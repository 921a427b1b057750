import sys
import types

import pytest

from brainflow.config import PretrainConfig, TrainConfig
from brainflow.training.progress import make_tracker

LINE = {
    "step": 10,
    "loss": 0.5,
    "val_text": "x",
    "nan": float("nan"),
    "list": [1.0],
    "by": {"a": {"l1": 2.0}},
}


def config(tmp_path, tracker):
    return PretrainConfig(store="s", out=str(tmp_path), train=TrainConfig(tracker=tracker))


def test_without_a_tracker_nothing_is_written(tmp_path):
    make_tracker(config(tmp_path, "none"))(LINE)
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_reads_the_numbers_back(tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    make_tracker(config(tmp_path, "tensorboard"))(LINE)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["by.a.l1", "loss"]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(10, 0.5)]


def test_wandb_gets_finite_numbers_and_one_id_a_directory(tmp_path, monkeypatch):
    started, logged = [], []

    def init(*, project, dir, name, id, resume, config):  # W&B's own argument names
        started.append(id)
        return types.SimpleNamespace(log=lambda values, *, step: logged.append((step, values)))

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for _ in range(2):
        make_tracker(config(tmp_path, "wandb"))(LINE)
    assert logged == [(10, {"loss": 0.5, "by.a.l1": 2.0})] * 2
    assert started[0] == started[1]


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"brainflow-fmri\[tracking\]"):
        make_tracker(config(tmp_path, "wandb"))
