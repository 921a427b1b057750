"""Checkpoints: atomic, never a half-written one, newest kept, no pickle."""

import json
import os
import subprocess
import sys

import pytest
import torch

from brainflow.training import checkpoint


def write(root, step, keep=2, size=4):
    tensors = {
        "model": {"a.weight": torch.full((size,), float(step))},
        "meters": {"values": torch.ones(2).double()},
    }
    return checkpoint.save(root, step, tensors, {"note": "x"}, keep=keep)


def test_what_is_saved_comes_back(tmp_path):
    path = write(tmp_path, 3)
    tensors, state = checkpoint.load(path)
    assert torch.equal(tensors["model"]["a.weight"], torch.full((4,), 3.0))
    assert tensors["meters"]["values"].dtype == torch.float64
    assert state == {"step": 3, "note": "x"}


def test_the_newest_are_kept(tmp_path):
    for step in (1, 2, 10, 9):
        write(tmp_path, step, keep=2)
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step-00000009", "step-00000010"]
    assert checkpoint.latest(tmp_path).name == "step-00000010"
    assert len(list(tmp_path.iterdir())) == 2


def test_no_file_is_a_pickle(tmp_path):
    path = write(tmp_path, 1)
    assert sorted(p.name for p in path.iterdir()) == [
        "COMPLETE",
        "meters.safetensors",
        "model.safetensors",
        "state.json",
    ]


@pytest.mark.parametrize(
    "damage", ["no marker", "truncated", "file gone", "temporary name", "marker not JSON"]
)
def test_a_checkpoint_that_is_not_whole_is_never_picked_up(tmp_path, damage):
    write(tmp_path, 1)
    bad = write(tmp_path, 2)
    file = bad / "model.safetensors"
    if damage == "no marker":
        (bad / "COMPLETE").unlink()
    elif damage == "truncated":
        os.truncate(file, file.stat().st_size - 1)
    elif damage == "file gone":
        file.unlink()
    elif damage == "temporary name":
        bad = bad.rename(bad.with_name(bad.name + ".tmp"))
    else:
        (bad / "COMPLETE").write_text("{")
    assert checkpoint.latest(tmp_path).name == "step-00000001"
    with pytest.raises(ValueError, match="not complete"):
        checkpoint.load(bad)
    again = write(tmp_path, 2)  # and it does not stand in the way of the step's own checkpoint
    assert checkpoint.latest(tmp_path) == again


def test_the_same_step_is_written_once(tmp_path):
    path = write(tmp_path, 1)
    before = (path / "model.safetensors").stat().st_mtime_ns
    assert write(tmp_path, 1) == path
    assert (path / "model.safetensors").stat().st_mtime_ns == before


def test_no_checkpoint_where_there_is_no_folder(tmp_path):
    assert checkpoint.latest(tmp_path / "absent") is None


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from brainflow.training import checkpoint

root = Path(sys.argv[1])
save = lambda step, size: checkpoint.save(root, step, {"model": {"w": torch.ones(size)}}, {}, keep=2)
save(1, 10)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # the kernel now refuses a larger file
try:
    save(2, 100_000)
except OSError as error:
    print(error)
"""


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "could not be written" in done.stdout
    assert "the last checkpoint, step-00000001, is intact" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoint.latest(tmp_path) is not None


def test_the_marker_lists_every_file_with_its_size(tmp_path):
    path = write(tmp_path, 1)
    sizes = json.loads((path / "COMPLETE").read_text())
    assert sizes == {p.name: p.stat().st_size for p in path.iterdir() if p.name != "COMPLETE"}
