"""Texts of strangers in terminal and tables; damaged files of a run and a sweep, named with a remedy."""

import csv
import json
import shutil

import numpy as np
import pytest
from tiny_training import tiny, write_store

from brainflow.cli.main import main
from brainflow.decoding.curve import write_curve
from brainflow.decoding.result import write_csv
from brainflow.storage import Segment, StoreWriter
from brainflow.training.loop import pretrain
from brainflow.training.metrics import read_metrics
from brainflow.training.sweep import read_space, sweep

MARKUP = "[/foo][link=file:///x][bold]\x1b[31mred\x1b]0;title\x07\x9b2J"
FORMULA = "=HYPERLINK(1)"


@pytest.fixture(scope="module")
def hostile_store(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "s"
    with StoreWriter.create(
        str(path), networks=3, parcellation=MARKUP, preprocessing={MARKUP: MARKUP}, network_names=[MARKUP] * 3
    ) as writer:
        labels = Segment(onset=0, length=5, labels={"state": FORMULA})
        writer.append(
            np.random.default_rng(0).standard_normal((20, 3)),
            t_r=2.0,
            dataset=MARKUP,
            subject=MARKUP,
            run="1",
            segments=[labels],
        )
    return path


def test_info_shows_texts_as_they_are(hostile_store, capsys):
    assert main(["info", str(hostile_store)]) == 0
    said = capsys.readouterr().out
    assert "[/foo]" in said
    assert not set(said) & set("\x1b\x07\x9b")
    assert main(["info", str(hostile_store), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parcellation"] == MARKUP


def test_verify_shows_no_control_characters(hostile_store, tmp_path, capsys):
    damaged = shutil.copytree(hostile_store, tmp_path / "s")
    with open(damaged / "bold/c/0/0", "r+b") as file:
        file.write(b"\xff\xff\xff")
    assert main(["verify", str(damaged)]) == 1
    said = capsys.readouterr().out
    assert "BAD" in said
    assert not set(said) & set("\x1b\x07\x9b")


def test_no_cell_is_a_formula(tmp_path):
    write_csv(tmp_path / "x.csv", ["class", FORMULA], [["@x", 1.5], ["-1.5", -2], ["+x", ""]])
    rows = list(csv.reader((tmp_path / "x.csv").open(newline="")))
    assert rows == [["class", "'" + FORMULA], ["'@x", "1.5"], ["-1.5", "-2"], ["'+x", ""]]
    point = {"decoder": FORMULA, "train": 1, "value": 0.5, "low": None, "high": None, "chance": 0.5}
    write_curve({"unit": "subject", "points": [point]}, tmp_path / "curve.csv")
    assert (tmp_path / "curve.csv").read_text().splitlines()[1] == "'=HYPERLINK(1),1,0.5,,,0.5"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that was stopped after its first checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    store = write_store(folder / "store")
    pretrain(tiny(store, folder / "run", steps=4, checkpoint_every=2, validate_every=4), quiet=True)
    newest = sorted((folder / "run/checkpoints").iterdir())[-1]
    shutil.rmtree(newest)
    return folder


DAMAGED = {
    "metrics.jsonl": [
        "x\n",
        "{}\n",
        "[1]\n",
        '{"step": "x"}\n',
        '{"step": 1, "loss": "x"}\n',
        "[" * 9999 + "\n",
    ],
    "train_history.csv": ["zzz\n", "1e400,1,1\n"],
    "train_config.json": [
        "{",
        "[]",
        '{"train": 3}',
        '{"train": {"micro_batches": "x"}}',
        "[" * 99_999,
        '{"a": 1}',
    ],
}


@pytest.mark.parametrize(
    ("name", "text"), [(name, text) for name, texts in DAMAGED.items() for text in texts]
)
def test_a_damaged_file_of_a_run_is_named_with_what_to_do(run, tmp_path, name, text):
    folder = shutil.copytree(run / "run", tmp_path / "run")
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=name) as caught:
        pretrain(tiny(run / "store", folder, steps=4, checkpoint_every=2, validate_every=4), quiet=True)
    assert any(words in str(caught.value) for words in ("delete", "restore", "put a copy"))
    assert (folder / name).read_text() == text
    if name == "metrics.jsonl":
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1"):
            read_metrics(folder)
        assert main(["report", str(folder)]) == 1
        assert main(["plot", str(folder), "--out", str(tmp_path / "x.png")]) == 1


@pytest.mark.parametrize("name", ["checkpoints", "best", "reconstructions"])
def test_a_folder_of_a_run_that_is_a_link_is_refused(run, tmp_path, name):
    folder = shutil.copytree(run / "run", tmp_path / "run")
    shutil.rmtree(folder / name, ignore_errors=True)
    (tmp_path / "victim").mkdir()
    (folder / name).symlink_to(tmp_path / "victim")
    for resume in ("auto", "never"):
        with pytest.raises(ValueError, match=f"{name} is a link"):
            pretrain(tiny(run / "store", folder, steps=4), resume=resume, quiet=True)
    assert list((tmp_path / "victim").iterdir()) == []
    assert (folder / "metrics.jsonl").read_text()  # --no-resume deleted nothing before it refused


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[train]\nlr = {low = "a", high = 1}', "train.lr.low: got 'a', expected a number"),
        ("[train]\nlr = {low = 1, high = 0}", "expected low <= high"),
        ("[train]\nlr = {low = 0, high = 1, log = true}", "low > 0"),
        ("[train]\nlr = {low = 0, high = 1, step = 0}", "a positive step"),
        ('[train]\nlr = {low = 0, high = 1, log = "x"}', "expected true or false"),
        ('[train]\nlr = ["x"]', "train.lr: got 'x', expected a finite number"),
        ("[model]\nnorm = {low = 0, high = 1}", "model.norm: got 0, expected one of layer, rms"),
        ('[[together]]\nout = "x"', "together: got out"),
        ("x = " + "[" * 9999, "nested too deeply"),
    ],
)
def test_a_space_that_is_none(tmp_path, text, said):
    (tmp_path / "space.toml").write_text(text)
    with pytest.raises(ValueError, match=r"space\.toml") as caught:
        read_space(str(tmp_path / "space.toml"))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "storage", "said"),
    [
        ("garbage{", "", "study.log is damaged"),
        ("[1]\n", "", "study.log is damaged"),
        ("", "evil://x", "storage: got 'evil://x'"),
        ("", "sqlite:////nowhere/x.db", "storage: got"),
    ],
)
def test_a_study_that_cannot_be_opened(tmp_path, damage, storage, said):
    pytest.importorskip("optuna")
    (tmp_path / "out").mkdir()
    if damage:
        (tmp_path / "out/study.log").write_text(damage)
    space = {"train": {"lr": [1e-3]}}
    with pytest.raises(ValueError, match=said):
        sweep(tiny("s", "r"), space, tmp_path / "out", trials=1, storage=storage, train=lambda config: None)
