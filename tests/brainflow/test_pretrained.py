import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import brainflow
from brainflow.config import ModelConfig
from brainflow.frameworks import build, framework_names
from brainflow.pretrained.format import load_pretrained, read_config, save_pretrained


def make_model(framework="csm", **changes):
    return build(ModelConfig(framework=framework, networks=4, width=8, layers=1, heads=2, **changes))


@pytest.mark.parametrize("framework", framework_names())
def test_round_trip(tmp_path, framework):
    module = make_model(framework)
    save_pretrained(module, tmp_path / "m", {"parcellation": "toy", "t_r": 2.0})
    again = brainflow.load(tmp_path / "m")
    assert again.config == module.config
    assert not again.training
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert read_config(tmp_path / "m")["parcellation"] == "toy"
    assert not list((tmp_path / "m").glob(".*"))


def test_what_is_renamed_into_place_is_on_disk(tmp_path, monkeypatch):
    real, flushed = os.fsync, set()
    monkeypatch.setattr(os, "fsync", lambda file: (flushed.add(os.fstat(file).st_ino), real(file))[1])
    folder = save_pretrained(make_model(), tmp_path / "m")
    assert {path.stat().st_ino for path in [folder, *folder.iterdir()]} <= flushed


def test_what_does_not_fit_is_named(tmp_path):
    folder = save_pretrained(make_model(), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["other"] = tensors.pop("mask_token")
    tensors["unembedding.bias"] = torch.zeros(9)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"missing mask_token; unknown other; unembedding.bias has shape \[9\]"
    ):
        load_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model.safetensors"):
        load_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "format": 99}))
    with pytest.raises(ValueError, match="got format 99"):
        load_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_pretrained(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="no 'model' section"):
        load_pretrained(folder)
    with pytest.raises(FileNotFoundError, match=r"no config.json"):
        load_pretrained(tmp_path / "nowhere")


def test_reserved_keys_and_unknown_frameworks_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'model'"):
        save_pretrained(make_model(), tmp_path, {"model": {}})
    config = make_model().config
    object.__setattr__(config, "framework", "gan")
    with pytest.raises(ValueError, match="got 'gan', expected one of csm, seq-bert"):
        build(config)
