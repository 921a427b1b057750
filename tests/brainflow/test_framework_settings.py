"""Settings of one framework: whose they are, who is told so, what an older version saved of the others."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from tiny_training import FLAGS, curve, tiny, write_store

import brainflow
from brainflow.cli.main import main
from brainflow.cli.pretrain import arguments
from brainflow.config import ModelConfig, to_dict
from brainflow.frameworks import (
    AutoencoderConfig,
    CSMConfig,
    NetBERTConfig,
    SeqBERTConfig,
    build,
    framework_spec,
    own_config,
)
from brainflow.pretrained.format import read_config
from brainflow.training.loop import pretrain
from brainflow.training.run_dir import saved_config
from brainflow.training.sweep import grid, read_space, sweep

# What every config.json and train_config.json held before a framework had settings of its own.
OLD = {
    "masking": "dense",
    "mask_rate": 0.2,
    "mask_span": 0,
    "mask_fill": "token",
    "teacher_forcing": 0.5,
    "late_read": False,
    "chained_states": False,
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("settings") / "store")


@pytest.mark.parametrize("config", [CSMConfig, SeqBERTConfig, NetBERTConfig, AutoencoderConfig])
def test_a_plain_config_has_the_defaults_of_its_framework(config):
    sizes = {"networks": 4, "width": 8, "layers": 1, "heads": 2}
    plain = ModelConfig(framework=config().framework, **sizes)
    assert own_config(plain) == config(**sizes)
    assert framework_spec(plain.framework).config is config
    assert build(plain).config == build(config(**sizes)).config == config(**sizes)


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        (["--model.mask-rate", "0.5"], "model.mask_rate: is a setting of seq-bert and net-bert, not of csm"),
        (
            ["--framework", "seq-bert", "--model.masking=next"],
            "model.masking: is a setting of csm, not of seq-",
        ),
        (
            ["--framework", "csm", "--model.no-chained-states"],
            "model.chained_states: is a setting of autoenc",
        ),
        (
            ["--framework", "net-bert", "--model.mask_fill", "token"],
            "model.mask_fill: is a setting of seq-bert,",
        ),
    ],
)
def test_a_setting_of_another_framework_is_refused_on_the_command_line(words, refused, capsys):
    assert main(["pretrain", "store", "--out", "run", *words]) == 2
    assert refused in capsys.readouterr().err


def test_the_framework_that_is_chosen_last_says_which_settings_a_file_may_hold(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[model]\nmask_rate = 0.5\n")
    with pytest.raises(
        ValueError, match=r"run.toml: model.mask_rate: is a setting of seq-bert and net-bert, not"
    ):
        arguments(["--config", str(path)])
    for words in (["--framework", "seq-bert"], ["--model.framework=csm", "--model.framework", "net-bert"]):
        assert "--model.mask_rate" in arguments(["--config", str(path), *words])
    path.write_text('[model]\nframework = "seq-bert"\nmask_rate = 0.5\n')
    assert "--model.mask_rate" in arguments(["--config", str(path)])
    with pytest.raises(ValueError, match=r"not of autoencoder; leave it out"):
        arguments(["--config", str(path), "--framework", "autoencoder"])


def test_own_settings_reach_the_run_and_its_files(store, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[model]\nframework = "net-bert"\nmask_rate = 0.5\nmask_span = 2\n')
    run = tmp_path / "run"
    words = ["--config", str(path), "--model.mask-span", "4", "--train.steps", "2", *FLAGS]
    assert main(["pretrain", store, "--out", str(run), *words]) == 0
    module = brainflow.load(run)
    assert isinstance(module.config, NetBERTConfig)
    assert (module.config.mask_rate, module.config.mask_span) == (0.5, 4)
    for model in (read_config(run)["model"], saved_config(run)["model"]):
        assert model == to_dict(module.config)
        assert not {"masking", "mask_fill", "teacher_forcing", "chained_states"} & model.keys()


@pytest.mark.parametrize("framework", ["csm", "seq-bert", "net-bert", "autoencoder"])
def test_what_an_older_version_saved_is_read_and_continued(store, tmp_path, framework):
    whole = pretrain(tiny(store, tmp_path / "whole", framework=framework, steps=8), quiet=True)
    run = pretrain(tiny(store, tmp_path / "run", framework=framework, steps=8), quiet=True)
    weights = brainflow.load(run).state_dict()
    assert saved_config(run)["model"] == to_dict(brainflow.load(run).config)  # of a plain ModelConfig
    shutil.rmtree(run / "checkpoints" / "step-00000008")
    # Nobody was told that a setting belonged to another framework, so any value may stand there.
    odd = {**OLD, "mask_rate": 0.9, "teacher_forcing": -7, "mask_fill": None} | to_dict(
        brainflow.load(run).config
    )
    for name in ("config.json", "train_config.json"):
        values = json.loads((run / name).read_text())
        values["model"] = odd
        (run / name).write_text(json.dumps(values))
    loaded = brainflow.load(run)
    assert type(loaded.config) is framework_spec(framework).config
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in weights.items())
    assert pretrain(tiny(store, run, framework=framework, steps=8), quiet=True) == run
    assert curve(run) == curve(whole)
    other = tiny(store, run, framework="csm" if framework != "csm" else "net-bert", steps=8)
    with pytest.raises(ValueError, match=r"another configuration \(model.framework is [^;]*\); choose"):
        pretrain(other, quiet=True)


def test_an_own_setting_may_not_change_when_a_run_continues(store, tmp_path):
    config = tiny(store, tmp_path / "run", steps=4)
    pretrain(config, quiet=True)
    with pytest.raises(ValueError, match=r"\(model.masking is 'next', was 'dense'\)"):
        pretrain(replace(config, model=CSMConfig(**vars(config.model), masking="next")), quiet=True)


def test_a_sweep_may_vary_the_framework_and_what_is_its_own(tmp_path):
    pytest.importorskip("optuna", reason="optuna is not installed")
    path = tmp_path / "space.toml"
    path.write_text("[model]\nmask_rate = [0.1, 0.2]\n")
    with pytest.raises(
        ValueError, match=r"space.toml: model.mask_rate: is a setting of seq-bert and net-bert"
    ):
        read_space(str(path))
    assert grid(read_space(str(path), "seq-bert")) == [{"model.mask_rate": 0.1}, {"model.mask_rate": 0.2}]
    path.write_text(
        '[[together]]\nmodel = {framework = "csm", masking = "single"}\n'
        '[[together]]\nmodel = {framework = "net-bert", mask_rate = 0.4}\n'
    )
    base, found = tiny("s", "unused"), []
    base = replace(base, model=CSMConfig(**vars(base.model), masking="next"))

    def train(config):
        found.append(config.model)
        raise ValueError("seen")

    sweep(base, read_space(str(path)), tmp_path / "sweep", trials=0, train=train)
    sizes = {"width": 16, "layers": 1, "heads": 2}
    expected = [CSMConfig(masking="single", **sizes), NetBERTConfig(mask_rate=0.4, **sizes)]
    assert sorted(found, key=lambda one: one.framework) == expected
    path.write_text('[[together]]\nmodel = {framework = "csm", mask_rate = 0.4}\n')
    with pytest.raises(
        ValueError, match=r"model.mask_rate: is a setting of seq-bert and net-bert, not of csm"
    ):
        read_space(str(path), "net-bert")


def test_a_sweep_of_an_older_version_goes_on(tmp_path):
    pytest.importorskip("optuna", reason="optuna is not installed")
    base, space = tiny("s", "unused"), {"model": {"layers": [1, 2]}}

    def train(config):
        raise ValueError("seen")

    sweep(base, space, tmp_path, trials=1, train=train)
    record = json.loads((tmp_path / "sweep.json").read_text())
    record["base"]["model"] = {**OLD, **record["base"]["model"]}
    (tmp_path / "sweep.json").write_text(json.dumps(record))
    assert len(sweep(base, space, tmp_path, trials=2, train=train).trials) == 2
