"""Sweeps: spaces, grids, shared studies, runs that were killed."""

import dataclasses
import json
import threading
from pathlib import Path

import numpy as np
import pytest

from brainflow.cli.main import main
from brainflow.config import DataConfig, ModelConfig, PretrainConfig, TrainConfig
from brainflow.recipes import FEWEST_STEPS
from brainflow.storage import StoreWriter
from brainflow.training import sizing
from brainflow.training.loop import pretrain
from brainflow.training.run_dir import exclusive
from brainflow.training.step import TrainingStep
from brainflow.training.sweep import PUBLISHED, best, grid, read_space, sweep, varied

pytest.importorskip("optuna", reason="optuna is not installed")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("sweep") / "store"
    rng = np.random.default_rng(0)
    with StoreWriter.create(path, networks=6, dtype="float32", parcellation="none") as writer:
        for run in range(6):
            bold = rng.standard_normal((50, 6)).astype(np.float32)
            writer.append(bold, t_r=2.0, dataset="noise", subject=str(run), session="", task="rest", run="1")
    return str(path)


def base(store="s", **train):
    return PretrainConfig(
        store=store,
        out="unused",
        device="cpu",
        model=ModelConfig(width=16, layers=1, heads=2),
        data=DataConfig(batch_size=4, seq_min=6, seq_max=12, loader="host", validation_batches=1),
        train=TrainConfig(**{"steps": 2, "validate_every": 2, "plot": False, **train}),
    )


def recorder(found):
    """Return a stand-in for training that writes a loss made of the settings."""

    def train(config):
        folder = Path(config.out)
        loss = config.model.width / 100 + config.model.layers + config.train.lr
        with exclusive(folder):  # another may have been done with it until just before
            if (folder / "metrics.jsonl").exists():
                return
            (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "val_loss": loss}) + "\n")
            found.append(config)

    return train


def test_the_published_grid_is_nine_models_with_a_head_for_64_values(tmp_path):
    found = []
    study = sweep(base(), PUBLISHED, tmp_path, trials=0, train=recorder(found))
    sizes = {(c.model.layers, c.model.width, c.model.heads) for c in found}
    assert sizes == {(n, w, w // 64) for n in (4, 8, 12) for w in (192, 384, 768)}
    assert len(found) == len(grid(PUBLISHED)) == 9
    assert study.best_trial.params["model.layers"] == 4
    again = []
    sweep(base(), PUBLISHED, tmp_path, trials=0, train=recorder(again))
    assert not again


def test_ranges_are_kept_and_need_a_number_of_trials(tmp_path):
    space = {
        "train": {"lr": {"low": 1e-4, "high": 1e-2, "log": True}},
        "model": {"layers": {"low": 1, "high": 3}},
    }
    with pytest.raises(ValueError, match="trials: got 0"):
        sweep(base(), space, tmp_path, trials=0, train=recorder([]))
    found = []
    sweep(base(), space, tmp_path, trials=5, train=recorder(found))
    assert len(found) == 5
    assert all(1e-4 <= c.train.lr <= 1e-2 and c.model.layers in (1, 2, 3) for c in found)


def test_two_machines_share_a_study(tmp_path):
    found = []
    options = {"trials": 9, "train": recorder(found)}
    machines = [
        threading.Thread(target=sweep, args=(base(), PUBLISHED, tmp_path), kwargs=options) for _ in range(2)
    ]
    for machine in machines:
        machine.start()
    for machine in machines:
        machine.join()
    assert len({c.out for c in found}) == len(found) == 9


def test_an_impossible_combination_fails_alone(tmp_path):
    said, found = [], []
    study = sweep(
        base(), {"model": {"width": [16, 17]}}, tmp_path, trials=0, train=recorder(found), said=said.append
    )
    assert [c.model.width for c in found] == [16]
    assert study.best_trial.params == {"model.width": 16}
    assert any("model.width: got 17, which is not divisible" in line for line in said)


def test_another_sweep_in_the_same_folder_is_refused(tmp_path):
    sweep(base(), {"model": {"layers": [1]}}, tmp_path, trials=0, train=recorder([]))
    with pytest.raises(ValueError, match=r"another sweep \(different: space\.model\.layers\)"):
        sweep(base(), {"model": {"layers": [2]}}, tmp_path, trials=0, train=recorder([]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model]\nlayrs = [1]\n", r"model\.layrs'; did you mean 'model\.layers'"),
        ("[model]\nlayers = 3\n", r"model\.layers: got 3, expected choices"),
        ("[model]\nlayers = {low = 1}\n", r"model\.layers: got .* expected choices"),
        ("[models]\nlayers = [1]\n", "models: is no section"),
        ("[[together]]\nmodel = {widht = 3}\n", r"did you mean 'model\.width'"),
        ("", "space: is empty"),
    ],
)
def test_a_wrong_space_is_refused_by_name(tmp_path, text, message):
    path = tmp_path / "space.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_space(str(path))
    assert str(path) in str(caught.value)


def test_an_unknown_metric_names_those_there_are(tmp_path):
    recorder([])(dataclasses.replace(base(), out=str(tmp_path)))
    with pytest.raises(ValueError, match="expected one of val_loss"):
        best(tmp_path, "val_nothing")


def test_a_killed_trial_is_taken_up_and_continues_exactly(store, tmp_path, monkeypatch):
    class Gone(BaseException):
        pass

    def dying(self, batches, step, lr, real=TrainingStep.__call__, **more):
        if step == 5:
            raise Gone
        return real(self, batches, step, lr, **more)

    space = {"model": {"layers": [1, 2]}}
    config = base(store, steps=8, checkpoint_every=2, validate_every=8)
    with monkeypatch.context() as patch:
        patch.setattr(TrainingStep, "__call__", dying)
        with pytest.raises(Gone):
            sweep(config, space, tmp_path / "a", trials=0, train=lambda c: pretrain(c, quiet=True))
    started = []

    def train(c):
        started.append(sorted(p.name for p in Path(c.out).glob("checkpoints/*")))
        pretrain(c, quiet=True)

    study = sweep(config, space, tmp_path / "a", trials=0, train=train)
    assert started == [["step-00000002", "step-00000004"], []]
    whole = sweep(config, space, tmp_path / "b", trials=0, train=lambda c: pretrain(c, quiet=True))
    assert {t.params["model.layers"]: t.value for t in study.trials} == {
        t.params["model.layers"]: t.value for t in whole.trials
    }


def test_what_nobody_states_is_chosen_once_for_all_runs_and_machines(store, tmp_path, capsys, monkeypatch):
    found, out = [], str(tmp_path / "sweep")
    monkeypatch.setattr("brainflow.training.loop.pretrain", recorder(found))
    (tmp_path / "space.toml").write_text("[train]\nlr = [1e-3, 1e-2]\n")
    command = ["sweep", store, "--out", out, "--space", str(tmp_path / "space.toml"), "--device", "cpu"]
    assert main(command) == 0
    assert (
        f"chose preset tiny (3 layers of width 128, peak learning rate {1e-4:g})" in capsys.readouterr().err
    )
    assert [config.train.lr for config in found] == [1e-3, 1e-2]
    assert {config.train.steps for config in found} == {FEWEST_STEPS}
    assert {config.train.checkpoint_every for config in found} == {FEWEST_STEPS // 10}
    monkeypatch.setattr(sizing, "fitting_steps", lambda *_: 999)  # as on another machine, later
    assert main([*command, "--trials", "3"]) == 0
    assert {config.train.steps for config in found} == {FEWEST_STEPS}
    assert len(found) == 3
    assert main([*command, "--out", str(tmp_path / "b"), "--train.steps", "40", "--model.layers", "2"]) == 0
    assert {(c.train.steps, c.model.layers, c.model.width) for c in found[3:]} == {
        (40, 2, ModelConfig().width)
    }


def test_what_a_space_varies_is_not_chosen():
    assert varied(PUBLISHED) == {"model.layers", "model.width", "model.heads"}
    assert varied({"train": {"lr": {"low": 1, "high": 2}}}) == {"train.lr"}


def test_the_command_prints_the_best_as_json(store, tmp_path, capsys):
    (tmp_path / "space.toml").write_text("[model]\nlayers = [1, 2]\n")
    settings = [
        *("--device", "cpu", "--model.width", "16", "--model.heads", "2", "--data.batch-size", "4"),
        *("--data.seq-min", "6", "--data.seq-max", "12", "--data.loader", "host", "--train.no-plot"),
        *("--data.validation-batches", "1", "--train.steps", "2", "--metric", "val_l1", "--json"),
    ]
    out = str(tmp_path / "sweep")
    assert main(["sweep", store, "--out", out, "--space", str(tmp_path / "space.toml"), *settings]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["trials"]) == 2
    assert result["best"]["value"] == min(t["value"] for t in result["trials"])
    assert (Path(result["best"]["run"]) / "model.safetensors").exists()
