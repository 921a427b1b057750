"""What `publish` shows of a model: said first, no paths, no names of people, nothing of elsewhere."""

import inspect
import json
import re
import shutil
import types
from pathlib import Path

import pytest
import torch

from brainflow import sharing
from brainflow.cli.main import main
from brainflow.config import ModelConfig, PretrainConfig, TrainConfig, to_dict
from brainflow.decoding.finetune import Decoder
from brainflow.decoding.heads import make_head
from brainflow.decoding.persist import HEAD, load_decoder, save_decoder
from brainflow.decoding.readout import Readout
from brainflow.frameworks import build
from brainflow.pretrained import card as cards
from brainflow.pretrained.compatibility import differences
from brainflow.pretrained.format import load_pretrained
from brainflow.pretrained.privacy import hashed, published, seen

PEOPLE = ["lab/sub-ann", "lab/sub-bob", "lab/sub-eve"]
SCORE = {"value": 0.8, "low": 0.7, "high": 0.9}
HOSTILE = "<script>x</script>\x1b[31m\n---\nlicense: evil"


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    model = ModelConfig(networks=4, width=8, layers=1, heads=2, max_positions=64, max_seconds=30.0)
    run = PretrainConfig(
        store="/home/ann/lab/store",
        out="runs/ann",
        model=model,
        train=TrainConfig(init="google-bert/bert-base"),
    )
    facts = {
        "pretrain": {**to_dict(run), "store_snapshot": "s"},
        "step": 3,
        "base_model": "google-bert/bert-base",
        "data": {
            "parcellation": "/home/ann/atlases/four.nii.gz",
            "normalisation": "z-score, see /home/ann/notes.txt",
            "preprocessing": {"mask": "/home/ann/lab", HOSTILE: HOSTILE, "log": ["~/ann/log"]},
            "network_names": ["/vis/1", "a", "b", "c"],
            "t_r": [2.0],
            "datasets": {"ds000030": 3, HOSTILE: 1},
            "training_subjects": PEOPLE,
        },
        "decoding": {
            "split": "k-fold",
            "interval_over": "subjects",
            "subjects": PEOPLE[:2],
            "chance": 0.5,
            **dict.fromkeys(("accuracy", "balanced_accuracy", "macro_f1"), SCORE),
        },
        "estimator": {"checkpoint": "/home/ann/run", "t_r": 2.0},
    }
    decoder = Decoder(build(model), make_head("linear", width=8, classes=2), Readout(pooling="mean"))
    return save_decoder(
        decoder, tmp_path / "d", mode="linear", kind="linear", classes=("face", HOSTILE), facts=facts
    )


@pytest.fixture
def hub(monkeypatch):
    """A hub that keeps what it is sent, with the real client's signatures."""
    real = pytest.importorskip("huggingface_hub")
    theirs = real.HfApi
    there = types.SimpleNamespace(private={}, files={}, calls=[])

    def checked(name, *arguments, **options):
        inspect.signature(getattr(theirs, name)).bind(None, *arguments, **options)
        there.calls.append(name)

    class HfApi:
        def create_repo(self, name, **options):
            checked("create_repo", name, **options)
            there.private.setdefault(name, options["private"])

        def repo_info(self, name, **options):
            checked("repo_info", name, **options)
            return types.SimpleNamespace(private=there.private[name])

        def create_commit(self, name, **options):
            checked("create_commit", name, **options)
            for part in options["operations"]:
                what = part.path_or_fileobj
                there.files[part.path_in_repo] = what if isinstance(what, bytes) else Path(what).read_bytes()

    monkeypatch.setattr(real, "HfApi", HfApi)
    return there


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_neither_paths_nor_people_are_published(folder, hub):
    before, said = contents(folder), []
    names = sharing.push_to_hub(
        folder, "me/model", said=lambda upload: said.append((upload, list(hub.calls)))
    )
    assert names == ["config.json", "model.safetensors", "head.safetensors", "README.md"] == list(hub.files)
    upload, calls = said[0]
    assert calls == []  # told before anything is sent
    assert upload.people == 3
    assert {"pretrain.store", "pretrain.out", "estimator.checkpoint", "data.parcellation"} <= set(
        upload.paths
    )
    sent = (hub.files["config.json"] + hub.files["README.md"]).decode()
    for secret in ("/home", "~/", "ann", "sub-bob", "sub-eve", "runs/"):
        assert secret not in sent, secret
    assert "/vis/1" in sent  # a network's name is no path
    assert "four.nii.gz" in sent
    assert {name: contents(folder)[name] for name in before} == before  # nothing but a card was written
    assert (folder / "README.md").read_bytes() == hub.files["README.md"]


def test_what_is_published_still_loads_and_knows_whom_it_saw(folder, hub, tmp_path):
    sharing.push_to_hub(folder, "me/model")
    again = tmp_path / "again"
    again.mkdir()
    for name, data in hub.files.items():
        (again / name).write_bytes(data)
    decoder, config = load_decoder(again)
    own = load_pretrained(folder).state_dict()
    assert all(torch.equal(value, own[name]) for name, value in decoder.module.state_dict().items())
    assert seen(config["data"], ["lab/sub-ann", "lab/sub-zoe"]) == ["lab/sub-ann"]
    store = {"parcellation": "/elsewhere/four.nii.gz", "network_names": ["/vis/1", "a", "b", "c"]}
    assert differences(config["data"], store, [2.0]) == []
    assert differences(config["data"], {"parcellation": "five"}, [2.0]) != []
    # shared once more, by whoever adapted it: hashes stay, under the salt that they were made with
    once = sharing.prepare_upload(again)
    assert json.loads(once.texts["config.json"])["data"] == config["data"]


@pytest.mark.parametrize("subjects", ["keep", "hash", "drop"])
def test_names_of_people(folder, subjects):
    config = json.loads((folder / "config.json").read_text())
    only = {"model": config["model"], "data": None, "decoding": config["decoding"]}
    once = published(only, subjects)
    assert (once.people, published(once.config, subjects).people) == (2, 2)
    uploads = [sharing.prepare_upload(folder, subjects=subjects) for _ in range(2)]
    configs = [json.loads(upload.texts["config.json"]) for upload in uploads]
    shown = configs[0]["data"]["training_subjects"]
    card = uploads[0].texts["README.md"]
    assert "subjects (3)" in card
    assert ("sub-ann" in card) is (subjects == "keep")
    if subjects == "keep":
        assert shown == PEOPLE
    elif subjects == "drop":
        assert shown == configs[0]["decoding"]["subjects"] == []
        assert configs[0]["data"]["people"] == 3
    else:
        salts = [config["data"]["subjects_salt"] for config in configs]
        assert salts[0] != salts[1]  # two uploads cannot be joined by their hashes
        assert shown == sorted(hashed(name, salts[0]) for name in PEOPLE)
        assert set(configs[0]["decoding"]["subjects"]) < set(shown)


def test_a_dry_run_writes_nothing_and_prints_the_card(folder, hub, capsys):
    before = contents(folder)
    assert main(["publish", str(folder), "me/model", "--dry-run", "--license", "cc-by-4.0"]) == 0
    assert contents(folder) == before
    assert (hub.calls, hub.files) == ([], {})
    said = capsys.readouterr().out
    for words in (
        "people: 3, each name as a salted hash",
        "paths removed: ",
        "license: ",
        "would be uploaded",
    ):
        assert words in said
    assert re.search(r"model\.safetensors: [\d,]+ bytes", said)
    assert "\x1b" not in said
    assert main(["share", str(folder), "me/../model", "--dry-run"]) == 1


def test_a_card_that_was_written_by_hand_is_left_alone(folder, hub, capsys):
    (folder / "README.md").write_text("MY CARD\n")
    assert main(["share", str(folder), "me/model"]) == 0
    assert (folder / "README.md").read_text() == "MY CARD\n"
    assert hub.files["README.md"] == b"MY CARD\n"
    assert "written by hand" in capsys.readouterr().out
    cards.write_card(folder)
    assert (folder / "README.md").read_text() == "MY CARD\n"
    (folder / "README.md").write_text(cards.MARKER)
    cards.write_card(folder)
    assert "# A csm model" in (folder / "README.md").read_text()


def test_a_public_repository_is_refused_unless_asked_for(folder, hub):
    hub.private["me/model"] = False
    with pytest.raises(ValueError, match="me/model is there already and is public"):
        sharing.push_to_hub(folder, "me/model")
    assert hub.files == {}
    sharing.push_to_hub(folder, "me/model", private=False)
    assert hub.files


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "head.safetensors", "README.md"])
def test_a_file_of_elsewhere_is_not_uploaded(folder, hub, tmp_path, name):
    cards.write_card(folder)
    shutil.move(folder / name, tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    if name == "README.md":
        (tmp_path / "elsewhere").write_text("a private key")
    with pytest.raises(ValueError, match=f"{name}: is a link to"):
        sharing.push_to_hub(folder, "me/model")
    assert hub.files == {}


def test_a_folder_of_the_hubs_cache_is_read_and_never_written(folder, hub, tmp_path):
    cards.write_card(folder)
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/1"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(folder.iterdir())):
        shutil.copy(path, blobs / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    before = contents(blobs)
    load_decoder(snapshot)
    sharing.push_to_hub(snapshot, "me/model")
    assert contents(blobs) == before
    assert all(path.is_symlink() for path in snapshot.iterdir())


def test_a_head_that_does_not_load_is_not_shared(folder, hub):
    (folder / "head.safetensors").write_bytes(b"secret")
    with pytest.raises(ValueError, match=HEAD):
        sharing.push_to_hub(folder, "me/model")
    (folder / "head.safetensors").unlink()
    with pytest.raises(ValueError, match="no decoder"):
        sharing.push_to_hub(folder, "me/model")
    assert hub.files == {}


def test_the_card_has_the_validation_of_the_weights_that_were_released(folder):
    lines = [
        {"step": step, "val_loss": 1.0, "val_l1": l1, "val_explained_variance": 1 - l1}
        for step, l1 in ((3, 0.25), (6, 0.75))
    ]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    card = sharing.prepare_upload(folder).texts["README.md"]
    for words in ("Validation after 3 steps", "explained variance of masked values in held-out runs: 0.750"):
        assert words in card
    assert cards.last_validation(folder)["step"] == 6


def test_the_card_says_nothing_that_it_was_not_told(folder):
    card = sharing.prepare_upload(folder, license="cc-by-4.0", name="model").texts["README.md"]
    _, front, body = card.split("---\n", 2)
    lines = dict(line.split(": ", 1) for line in front.splitlines())
    assert json.loads(lines["license"]) == "cc-by-4.0"
    assert json.loads(lines["datasets"]) == ["ds000030"]
    assert json.loads(lines["base_model"]) == "google-bert/bert-base"
    assert json.loads(lines["metrics"]) == ["accuracy", "balanced_accuracy", "f1"]
    (index,) = json.loads(lines["model-index"])
    assert index["results"][0]["metrics"][0] == {"type": "accuracy", "name": "accuracy", "value": 0.8}
    assert "<script>" not in card
    assert "\x1b" not in card
    assert "\nlicense: evil" not in card
    assert "&lt;script&gt;" in body
    config = json.loads((folder / "config.json").read_text())
    plain = cards.model_card({"model": config["model"]})
    assert "license: unknown" in plain
    assert "base_model" not in plain
    assert "model-index" not in plain
