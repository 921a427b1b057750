"""Checkpoints: atomic, never a half-written one, newest kept, no pickle."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from brainflow.training import checkpoint
from brainflow.training.checkpoint import Writer
from brainflow.training.parallel import Ranks


def write(root, step, keep=2, size=4):
    tensors = {"model.a.weight": torch.full((size,), float(step)), "meters.values": torch.ones(2).double()}
    return checkpoint.save(root, step, tensors, {"note": "x"}, keep=keep)


def test_what_is_saved_comes_back(tmp_path):
    path = write(tmp_path, 3)
    tensors = checkpoint.load(path)
    assert torch.equal(tensors["model.a.weight"], torch.full((4,), 3.0))
    assert tensors["meters.values"].dtype == torch.float64
    assert checkpoint.read_state(path) == {"step": 3, "world": 1, "note": "x"}


def test_the_newest_are_kept(tmp_path):
    for step in (1, 2, 10, 9):
        write(tmp_path, step, keep=2)
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step-00000009", "step-00000010"]
    assert checkpoint.latest(tmp_path).name == "step-00000010"
    assert len(list(tmp_path.iterdir())) == 2


SHARD = "shard-00001-model-00001-of-00001.safetensors"


def test_nothing_is_pickled_or_unpickled(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a pickle")

    for module, names in (
        (sys.modules["pickle"], ("dump", "dumps", "load", "loads")),
        (torch, ("save", "load")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, refuse)
    path = write(tmp_path, 1)
    assert sorted(p.name for p in path.iterdir()) == ["COMPLETE", SHARD, "state.json"]
    assert checkpoint.load(path).keys() == {"model.a.weight", "meters.values"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (0, 4)])
def test_every_kind_of_tensor_comes_back(tmp_path, dtype, shape):
    value = (torch.randn(shape) * 100).to(dtype)
    path = checkpoint.save(tmp_path, 1, {"x|y": value}, {}, keep=1)
    read = checkpoint.load(path)["x|y"]
    assert read.dtype == dtype
    assert torch.equal(read, value)


def test_a_tensor_of_another_shape_or_name_is_refused(tmp_path):
    path = write(tmp_path, 1)
    for name, size in (("model.a.weight", 5), ("model.b.weight", 4)):
        with pytest.raises(ValueError, match="does not fit this run"):
            checkpoint.read_into(path, {name: torch.zeros(size)})


def test_a_flipped_bit_is_noticed(tmp_path):
    path = write(tmp_path, 1)
    assert checkpoint.damaged(path) == []
    file = path / SHARD
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    assert checkpoint.damaged(path) == [SHARD]


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(0, 50), max_size=12), world=st.integers(1, 5))
def test_every_tensor_is_written_by_exactly_one_rank(sizes, world):
    tensors = {f"t{i}": torch.zeros(size) for i, size in enumerate(sizes)}
    written = [name for r in range(world) for name in checkpoint.owned(tensors, Ranks(rank=r, world=world))]
    assert sorted(written) == sorted(tensors)


def test_rank_0_waits_for_the_others_and_does_not_mix_attempts(tmp_path):
    def part(rank, attempt, value):
        tensors = {f"x{rank}": torch.full((3,), value)}
        ranks = Ranks(rank=rank, world=2)
        return checkpoint.save(tmp_path, 1, tensors, {}, keep=1, ranks=ranks, attempt=attempt)

    part(1, 7, 1.0)  # of a process that was killed before rank 0 came to it
    other = threading.Thread(target=lambda: (time.sleep(0.3), part(1, 8, 2.0)))
    other.start()
    path = part(0, 8, 2.0)
    other.join()
    assert {k: v.tolist() for k, v in checkpoint.load(path).items()} == {"x0": [2.0] * 3, "x1": [2.0] * 3}
    assert checkpoint.read_state(path)["world"] == 2
    checkpoint.remove_partial(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_a_rank_that_failed_is_not_waited_for(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    ranks = [Ranks(rank=r, world=2) for r in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write_shard", full)
        with pytest.raises(OSError, match="No space left"):
            checkpoint.save(tmp_path, 1, {}, {}, keep=1, ranks=ranks[1])
    with pytest.raises(OSError, match="rank-00001 could not write its part"):
        checkpoint.save(tmp_path, 1, {"x": torch.ones(1)}, {}, keep=1, ranks=ranks[0])
    with pytest.raises(OSError, match="no file came from rank 1"):
        checkpoint.save(tmp_path, 1, {}, {}, keep=1, ranks=ranks[0], patience=lambda: False)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_writer_comes_up_at_the_next_call(tmp_path, monkeypatch):
    writer, tensors = Writer(), {"w": torch.ones(3)}
    writer.save(tmp_path, 1, tensors, {}, keep=1)
    writer.wait()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write_shard", full)
        writer.save(tmp_path, 2, tensors, {}, keep=1)
        with pytest.raises(OSError, match=r"No space left.*step-00000001, is intact"):
            writer.save(tmp_path, 3, tensors, {}, keep=1)
    writer.save(tmp_path, 3, tensors, {}, keep=1)
    writer.wait()
    assert checkpoint.latest(tmp_path).name == "step-00000003"


@pytest.mark.parametrize(
    "damage", ["no marker", "truncated", "file gone", "temporary name", "marker not JSON"]
)
def test_a_checkpoint_that_is_not_whole_is_never_picked_up(tmp_path, damage):
    write(tmp_path, 1)
    bad = write(tmp_path, 2)
    file = bad / SHARD
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
    before = (path / SHARD).stat().st_mtime_ns
    assert write(tmp_path, 1) == path
    assert (path / SHARD).stat().st_mtime_ns == before


def test_no_checkpoint_where_there_is_no_folder(tmp_path):
    assert checkpoint.latest(tmp_path / "absent") is None


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from brainflow.training import checkpoint

root = Path(sys.argv[1])
save = lambda step, size: checkpoint.save(root, step, {"w": torch.ones(size)}, {}, keep=2)
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
    sizes = {name: size for name, (size, _) in json.loads((path / "COMPLETE").read_text()).items()}
    assert sizes == {p.name: p.stat().st_size for p in path.iterdir() if p.name != "COMPLETE"}
