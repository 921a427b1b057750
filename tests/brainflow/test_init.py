"""`brainflow init`: a run.toml that says what would be, and changes nothing until a comment is taken away."""

import re
import tomllib

import pytest

from brainflow.cli.init import commented
from brainflow.cli.main import main
from brainflow.cli.pretrain import Args, arguments, defaults, settled
from brainflow.config import PretrainConfig, to_dict
from brainflow.frameworks import framework_names, model_config
from brainflow.frameworks.settings import pretrain_config
from brainflow.recipes import today


def parsed(*words):
    import tyro

    given = arguments(list(words))
    return settled(tyro.cli(Args, args=given, default=defaults(given)), given)


@pytest.mark.parametrize("framework", framework_names())
def test_every_setting_is_there_and_uncommented_is_what_pretrain_takes(framework):
    text = commented('a "store"', framework)
    assert tomllib.loads(text) == {
        "store": 'a "store"',
        "model": {"framework": framework},
        "data": {},
        "train": {},
    }
    values = tomllib.loads(re.sub(r"(?m)^# (\w+ = )", r"\1", text))
    expected = to_dict(PretrainConfig(store='a "store"', out="run", model=model_config(framework)))
    for section, settings in today(framework).items():
        expected[section] |= settings
    del expected["model"]["networks"], expected["out"], expected["device"]
    assert values == expected
    pretrain_config(values | {"out": "run"})
    assert all(len(line) <= 110 for line in text.splitlines())


def test_the_file_as_it_is_changes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init"]) == 0
    assert "brainflow pretrain --config run.toml" in capsys.readouterr().out
    ours, plain = parsed("--config", "run.toml", "--out", "run"), parsed("--out", "run")
    assert (ours.model, ours.data, ours.train) == (plain.model, plain.data, plain.train)
    chosen = {"model.width", "model.layers", "train.steps", "train.lr"}
    assert not chosen & set(ours.stated)  # so they are still chosen for the store


def test_a_file_is_not_lost_and_a_wrong_framework_is_usage(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text("mine\n")
    assert main(["init"]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "run.toml").read_text() == "mine\n"
    assert main(["init", "other.toml", "--framework", "seqbert"]) == 2
    assert "did you mean 'seq-bert'?" in capsys.readouterr().err
    assert not (tmp_path / "other.toml").exists()
