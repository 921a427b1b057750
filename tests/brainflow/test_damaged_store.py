"""Training over a damaged store: an error that names the run, or its windows left out and counted."""

import pytest
from sines import write_sines

from brainflow.cli.main import main
from brainflow.config import DataConfig, ModelConfig, PretrainConfig
from brainflow.data.splits import Split, split_runs
from brainflow.report.run_page import run_page
from brainflow.storage import BoldStore
from brainflow.training.checkpoint import facts

TINY = "--model.width 16 --model.heads 2 --model.layers 1 --data.batch-size 8 --train.steps 6 --device cpu"


@pytest.fixture
def store(tmp_path):
    write_sines(tmp_path / "s", runs=8, subjects=8, networks=16, time_points=60)
    shard = tmp_path / "s" / "bold" / "c" / "0" / "0"
    damage(shard, 3 * 60 * 32 + 100)
    return tmp_path / "s"


def damage(shard, *places):
    data = bytearray(shard.read_bytes())
    for place in places:
        data[place] ^= 1
    shard.write_bytes(data)


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


def test_the_page_of_a_run_leaves_out_validation_runs_with_damage(tmp_path):
    write_sines(tmp_path / "s", runs=6, subjects=6, networks=16, time_points=128)
    assert main(["pretrain", str(tmp_path / "s"), "--out", str(tmp_path / "run"), *TINY.split()]) == 0
    store = BoldStore.open(tmp_path / "s")
    first, second = Split.load(tmp_path / "run" / "split.json").part("validation", store.runs)
    shard = tmp_path / "s" / "bold" / "c" / "0" / "0"
    for run, said in ((first, "of 1 validation runs"), (second, "no validation run that is free of damage")):
        damage(shard, int(store.runs.start[run]) * 32)
        notes = [note for section in run_page(tmp_path / "run").sections for note in section.notes]
        assert any(said in note for note in notes), notes


def test_a_model_can_be_released_where_every_training_run_has_damage(tmp_path):
    write_sines(tmp_path / "s", runs=6, subjects=6, networks=16, time_points=128)
    damage(tmp_path / "s" / "bold" / "c" / "0" / "0", *range(0, 6 * 128 * 32, 128 * 32))
    store = BoldStore.open(tmp_path / "s")
    split = split_runs(store.runs, sizes={"validation": 2}, snapshot=store.snapshot)
    config = PretrainConfig(
        store=str(tmp_path / "s"), out="", model=ModelConfig(networks=16), data=DataConfig(on_corrupt="skip")
    )
    assert facts(config, store, split, 1)["data"]["fingerprint"] is None
