"""Weights by name: the model that ships with the package, and the hub's own conventions."""

import inspect
import json

import numpy as np
import pytest
import torch
from torch import nn

import brainflow
from brainflow.cli.main import main
from brainflow.config import ModelConfig
from brainflow.demo import story
from brainflow.frameworks import build, model_config
from brainflow.pretrained.card import MARKER
from brainflow.pretrained.compatibility import check_checkpoint, people_seen
from brainflow.pretrained.format import SHIPPED, located, read_config, save_pretrained
from brainflow.pretrained.hub import DOWNLOAD, fetch, shipped
from brainflow.pretrained.warm_start import load_initial

NAME = "story-small"


def test_the_shipped_model_loads_by_name_and_a_local_path_wins(tmp_path, monkeypatch):
    assert shipped() == [NAME]
    monkeypatch.chdir(tmp_path)
    module = brainflow.load(NAME)
    assert fetch(NAME) == SHIPPED / NAME
    assert brainflow.from_pretrained(NAME).config == module.config
    begun = build(module.config)
    load_initial(begun, NAME)  # pretrain --init
    assert torch.equal(begun.unembedding.weight, module.unembedding.weight)
    with pytest.raises(FileNotFoundError, match=f"ships with the package \\({NAME}\\)"):
        fetch("story-large")
    (tmp_path / NAME).mkdir()
    with pytest.raises(FileNotFoundError, match=f"{NAME}: no config.json there"):
        brainflow.load(NAME)
    save_pretrained(build(ModelConfig(networks=4, width=8, layers=1, heads=2)), tmp_path / NAME)
    assert brainflow.load(NAME).config.networks == 4
    assert located("pretrained/shipped").parts == (
        "pretrained",
        "shipped",
    )  # no way out of the folder by a name


def test_whom_the_shipped_model_saw_is_known_and_refused(tmp_path):
    everybody = {f"pieman/{story.name(person)}" for person in story.PEOPLE}
    read, fitted, unknown = people_seen(NAME, everybody)
    tested = {f"pieman/{story.name(person)}" for person in story.TEST}
    assert (set(read), fitted, unknown) == (everybody - tested, [], "")
    assert all(name.startswith("sha256:") for name in read_config(NAME)["data"]["training_subjects"])
    later = ModelConfig(networks=4, width=8, layers=1, heads=2)
    save_pretrained(build(later), tmp_path / "m", {"pretrain": {"train": {"init": NAME}}})
    assert people_seen(tmp_path / "m", everybody)[0] == read  # of a model that began from it, too
    store = story.write_store(story.read(), [0, 1, 2, 15, 16], tmp_path / "store")
    check_checkpoint(NAME, story.split(store, [16]))
    with pytest.raises(ValueError, match="has seen pieman/16"):
        check_checkpoint(NAME, story.split(store, [15]))


def test_the_shipped_card_says_what_it_is():
    folder = SHIPPED / NAME
    assert sum(path.stat().st_size for path in folder.iterdir()) < 5e6
    card = (folder / "README.md").read_text()
    assert MARKER not in card  # `publish` leaves it as it is
    for words in (
        'license: "apache-2.0"',
        "People 17–24 were in no training",
        "subjects (16)",
        "95 % interval",
        "python -m brainflow.demo.shipped",
    ):
        assert words in card, words


def test_embeddings_of_a_table_from_the_shipped_model(tmp_path):
    np.save(tmp_path / "run.npy", story.read()[16])
    command = ["embed", tmp_path / "run.npy", "--from", NAME, "--t-r", "1.5", "--out", tmp_path / "emb.csv"]
    assert main([*map(str, command)]) == 0
    header, *rows = (tmp_path / "emb.csv").read_text().splitlines()
    assert len(rows) == 7  # 300 time points in windows of at most 49
    assert len(header.split(",")) > 2 * brainflow.load(NAME).config.width


def test_the_hubs_mixin_reads_what_is_saved_here(tmp_path):
    """`config.json` and `model.safetensors` are as `PyTorchModelHubMixin` has them, tensor names included."""
    hub = pytest.importorskip("huggingface_hub")
    ours = build(ModelConfig(networks=4, width=8, layers=1, heads=2))
    brainflow.save_pretrained(ours, tmp_path / "m", {"data": None})

    class Module(nn.Module, hub.PyTorchModelHubMixin):
        def __init__(self, model, **facts):
            super().__init__()
            for name, part in build(model_config(**model)).named_children():
                self.add_module(name, part)
            for name, value in ours.named_parameters(recurse=False):
                self.register_parameter(name, nn.Parameter(torch.zeros_like(value)))

    theirs = Module.from_pretrained(tmp_path / "m", strict=True).state_dict()
    assert theirs.keys() == ours.state_dict().keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize("of", [brainflow.from_pretrained, brainflow.MentalStateDecoder.from_pretrained])
def test_keywords_are_those_of_the_hubs_mixin(of, tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    asked, real = {}, inspect.signature(hub.snapshot_download)
    theirs = set(inspect.signature(hub.PyTorchModelHubMixin.from_pretrained).parameters)
    assert theirs >= {*DOWNLOAD, "revision"}

    def download(name, **options):
        real.bind(name, **options)
        asked.update(options)
        raise FileNotFoundError("offline")

    monkeypatch.setattr(hub, "snapshot_download", download)
    options = {"revision": "v1", "cache_dir": tmp_path, "token": "t", "local_files_only": True}
    with pytest.raises(FileNotFoundError, match="offline"):
        of("me/model", **options)
    assert options.items() <= asked.items()
    with pytest.raises(TypeError, match=r"proxies, expected some of revision, cache_dir"):
        of("me/model", proxies={})


def test_a_decoder_is_saved_and_read_under_the_hubs_names(tmp_path):
    X = np.random.default_rng(0).standard_normal((8, 10, 100)).astype(np.float32)
    decoder = brainflow.MentalStateDecoder(NAME, mode="linear", t_r=1.5, pooling="mean", layer=0)
    decoder.fit(X, ["a", "b"] * 4).save_pretrained(tmp_path / "d")
    again = brainflow.MentalStateDecoder.from_pretrained(tmp_path / "d")
    assert np.array_equal(again.predict_proba(X), decoder.predict_proba(X))
    assert json.loads((tmp_path / "d" / "config.json").read_text())["base_model"] == NAME
