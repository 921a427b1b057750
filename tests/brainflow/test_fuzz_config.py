"""Mutated `config.json` of a model, mutated TOML of a training and of a sweep: refused by name, or safe."""

import json

import pytest
from mutate import mutated_bytes, mutated_json, rounds

from brainflow.cli.pretrain import arguments
from brainflow.config import PretrainConfig, to_dict
from brainflow.frameworks import CSMConfig, model_config
from brainflow.pretrained.card import model_card
from brainflow.pretrained.format import check_facts, read_config
from brainflow.pretrained.privacy import published
from brainflow.training.sweep import grid, read_space

MODEL = {
    "format": 1,
    "model": to_dict(CSMConfig(networks=4, width=8, heads=2)),
    "sha256": {"model.safetensors": "00" * 32},
    "step": 3,
    "pretrain": {**to_dict(PretrainConfig(store="/a/store", out="/a/run")), "store_snapshot": "s"},
    "data": {
        "store_snapshot": "s",
        "parcellation": "four",
        "normalisation": "z-score",
        "network_names": ["a", "b", "c", "d"],
        "network_coordinates": [[1.0, 2.0, 3.0]] * 4,
        "preprocessing": {"filter": {"low": 0.01}},
        "t_r": [0.72, 2.0],
        "datasets": {"hcp": 3},
        "training_subjects": ["hcp/1", "hcp/2"],
        "fingerprint": {"length": [10, 20], "variance": 1.0, "spectrum": 0.5, "correlation": 0.1},
    },
    "decoder": {"mode": "linear", "pooling": "mean", "classes": ["a", "b"], "examples": 0},
    "decoding": {
        "split": "k-fold",
        "interval_over": "subjects",
        "subjects": ["hcp/1"],
        "chance": 0.5,
        "accuracy": {"value": 0.8, "low": None, "high": None},
        "balanced_accuracy": {"value": 0.8, "low": 0.7, "high": 0.9},
        "macro_f1": {"value": 0.8, "low": 0.7, "high": 0.9},
    },
    "estimator": {"checkpoint": None, "t_r": 2.0, "hrf_shift": 0.0},
    "legacy": {"dtype": "float32", "names": ["a"], "missing": []},
}
TOML = """
store = "store"
out = "run"
[model]
framework = "seq-bert"
width = 256
heads = 4
coordinates = true
[data]
weights = "hcp=0.5"
seq_min = 10
[train]
lr = 5e-4
steps = 2000
freeze = "embedder"
"""
SPACE = """
[model]
layers = [2, 4]
norm = ["layer", "rms"]
[train]
lr = {low = 1e-5, high = 1e-3, log = true}
steps = {low = 10, high = 20, step = 5}
[[together]]
model = {width = 192, heads = 3}
[[together]]
model = {width = 384, heads = 6}
"""


def test_configurations_of_models(tmp_path):
    path, read, refusals = tmp_path / "config.json", 0, []
    check_facts(MODEL, "the config.json that is mutated")
    for number, rng in rounds(600):
        if number % 4:
            text = json.dumps(mutated_json(MODEL, rng)).encode("utf-8", "surrogatepass")
        else:
            text = mutated_bytes(json.dumps(MODEL).encode(), rng)
        path.write_bytes(text)
        try:
            config = read_config(tmp_path)
        except ValueError as error:
            refusals.append((number, str(error)))
            continue
        read += 1
        assert to_dict(model_config(**config["model"])) == config["model"]
        for subjects in ("keep", "hash", "drop"):  # what was accepted is safe to work with
            shown = published(config, subjects).config
            check_facts(shown, number)
            card = model_card(shown)
            assert not set(card) & set("\x1b\x00"), number
            assert "<script" not in card
    assert [one for one in refusals if "config.json" not in one[1]] == []
    assert read > 20


@pytest.mark.parametrize(
    ("text", "read"),
    [
        (TOML, lambda path: arguments(["--config", str(path)])),
        (SPACE, lambda path: grid(read_space(str(path)))),
    ],
    ids=["training", "sweep"],
)
def test_settings_of_a_training_and_a_sweep(tmp_path, text, read):
    path = tmp_path / "settings.toml"
    path.write_text(text)
    read(path)
    good, refusals = 0, []
    for number, rng in rounds(300):
        path.write_bytes(mutated_bytes(text.encode(), rng))
        try:
            read(path)
        except ValueError as error:
            refusals.append((number, str(error)))
            continue
        good += 1
    assert [one for one in refusals if "settings.toml" not in one[1]] == []
    assert good > 0
