"""Training over a damaged store: an error that names the run, or its windows left out and counted."""

import pytest

from brainflow.cli.main import main
from brainflow.data.splits import split_runs
from brainflow.data.synthetic import write_sines
from brainflow.storage import BoldStore

TINY = "--model.width 16 --model.heads 2 --model.layers 1 --data.batch-size 8 --train.steps 6 --device cpu"


@pytest.fixture
def store(tmp_path):
    write_sines(tmp_path / "s", runs=8, subjects=8, networks=16, time_points=60)
    shard = tmp_path / "s" / "bold" / "c" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[3 * 60 * 32 + 100] ^= 1
    shard.write_bytes(data)
    return tmp_path / "s"


def test_a_damaged_chunk_stops_the_training_or_its_windows_are_skipped(store, tmp_path, capsys, caplog):
    command = ["pretrain", str(store), "--out", str(tmp_path / "run"), *TINY.split()]
    assert main([*command, "--train.validate-every", "3"]) == 1
    assert "sub-0" in (error := capsys.readouterr().err)
    assert "is damaged" in error
    skipping = ["--data.on-corrupt", "skip", "--train.validate-every", "3"]
    assert main([*command[:3], str(tmp_path / "other"), *command[4:], *skipping]) == 0
    assert "windows on damaged chunks were left out" in caplog.text


def test_a_given_split_is_used_and_kept(store, tmp_path):
    opened = BoldStore.open(store)
    split = split_runs(opened.runs, sizes={"validation": 4}, by="subject", seed=7, snapshot=opened.snapshot)
    split.save(tmp_path / "given.json")
    options = [
        "--data.split",
        str(tmp_path / "given.json"),
        "--data.on-corrupt",
        "skip",
        "--data.onset",
        "grid",
    ]
    assert main(["pretrain", str(store), "--out", str(tmp_path / "run"), *TINY.split(), *options]) == 0
    assert (tmp_path / "run" / "split.json").read_text() == (tmp_path / "given.json").read_text()
