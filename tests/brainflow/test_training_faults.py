"""What a run does when something else breaks: ranks, stores, loaders, memory."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_training import ENV, FLAGS, at_step, curve, tiny, write_store

from brainflow.cli.main import main
from brainflow.data.loader import Gatherer
from brainflow.training import checkpoint, parallel
from brainflow.training.interrupt import Preempted
from brainflow.training.loop import pretrain
from brainflow.training.step import TrainingStep


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("faults") / "store")


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory):
    """The metrics of a run that nothing disturbed."""
    return curve(pretrain(tiny(store, tmp_path_factory.mktemp("faults") / "whole"), quiet=True))


class Gone(BaseException):
    pass


def raising(error):
    def act(*_, **__):
        raise error

    return act


def on_two_ranks(work, folder):
    """Fork two ranks; `work(rank)` returns what is written to folder/said-RANK. Return their exit codes."""
    port = str(20_000 + os.getpid() % 20_000)
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            try:
                os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2")
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
                torch.set_num_threads(1)
                work(rank)
            except BaseException as error:
                (folder / f"said-{rank}").write_text(f"{type(error).__name__}: {error}")
                os._exit(1)
            os._exit(0)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def test_a_dead_rank_is_a_clear_error_on_the_others_and_the_last_checkpoint_is_intact(store, tmp_path):
    def work(rank):
        if rank == 1:
            TrainingStep.__call__ = at_step(6, lambda step: os.kill(os.getpid(), signal.SIGKILL))
        pretrain(tiny(store, tmp_path / "run"), quiet=True)

    assert on_two_ranks(work, tmp_path) == [1, -signal.SIGKILL]
    said = (tmp_path / "said-0").read_text()
    assert said.startswith(
        "ConnectionError: rank 0: another rank died or does not answer; the last checkpoint"
    )
    assert "step-00000004, is intact, the same command continues" in said
    on_two_ranks(lambda rank: pretrain(tiny(store, tmp_path / "run"), quiet=True), tmp_path)
    on_two_ranks(lambda rank: pretrain(tiny(store, tmp_path / "whole"), quiet=True), tmp_path)
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


def test_a_rank_that_hangs_is_noticed_in_the_shortened_time(store, tmp_path):
    def hang(step):
        for _ in range(1200):
            if (tmp_path / "said-0").exists():
                os._exit(3)
            time.sleep(0.1)

    def work(rank):
        parallel.TIMEOUT = parallel.timedelta(seconds=6)
        if rank == 1:
            TrainingStep.__call__ = at_step(3, hang)
        pretrain(tiny(store, tmp_path / "run"), quiet=True)

    # Within the two minutes that rank 1 hangs: the 30 minutes of the first step hold no longer.
    assert on_two_ranks(work, tmp_path) == [1, 3]
    assert "another rank died or does not answer" in (tmp_path / "said-0").read_text()


def test_one_rank_is_told_to_stop_and_both_do_at_the_same_step(store, tmp_path):
    def work(rank):
        if rank == 1:
            TrainingStep.__call__ = at_step(5, lambda step: os.kill(os.getpid(), signal.SIGTERM))
        pretrain(tiny(store, tmp_path / "run"), quiet=True)

    assert on_two_ranks(work, tmp_path) == [1, 1]
    said = [(tmp_path / f"said-{rank}").read_text() for rank in range(2)]
    marker = json.loads((tmp_path / "run" / "PREEMPTED").read_text())
    assert marker["step"] in (6, 7)
    assert all(f"at step {marker['step']};" in text and text.startswith("Preempted") for text in said)
    assert checkpoint.latest(tmp_path / "run" / "checkpoints").name == f"step-{marker['step']:08d}"


def test_a_disk_that_is_full_for_one_rank_stops_both(store, tmp_path):
    real = checkpoint._write_shard

    def work(rank):
        def write(partial, tensors, number):
            if rank == 1 and "step-00000008" in partial.name:
                raise OSError(28, "No space left on device")
            real(partial, tensors, number)

        checkpoint._write_shard = write
        pretrain(tiny(store, tmp_path / "run"), quiet=True)

    assert on_two_ranks(work, tmp_path) == [1, 1]
    assert "No space left on device" in (tmp_path / "said-1").read_text()
    assert "step-00000004" in (tmp_path / "said-1").read_text()
    assert "rank-00001 could not write its part" in (tmp_path / "said-0").read_text()
    assert [p.name for p in checkpoint.complete(tmp_path / "run" / "checkpoints")] == ["step-00000004"]


def test_a_damaged_checkpoint_is_refused_by_name(store, whole, tmp_path, monkeypatch):
    config = tiny(store, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(TrainingStep, "__call__", at_step(10, raising(Gone())))
        with pytest.raises(Gone):
            pretrain(config, quiet=True)
    newest = checkpoint.latest(tmp_path / "run" / "checkpoints")
    file = next(newest.glob("shard-*"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{newest.name} is damaged .*shard-00001.*delete it to continue"):
        pretrain(config, quiet=True)
    shutil.rmtree(newest)
    assert curve(pretrain(config, quiet=True)) == whole


def test_a_corrupt_chunk_of_the_store_is_named_and_the_checkpoint_stays(whole, tmp_path, monkeypatch):
    store = write_store(tmp_path / "store")
    config = tiny(store, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(TrainingStep, "__call__", at_step(6, raising(Gone())))
        with pytest.raises(Gone):
            pretrain(config, quiet=True)
    shards = [p for p in Path(store).rglob("*") if p.is_file() and "/c/" in str(p)]
    shard = max(shards, key=lambda path: path.stat().st_size)
    sound = shard.read_bytes()
    shard.write_bytes(bytes(b ^ 0x40 for b in sound[:20_000]) + sound[20_000:])
    with pytest.raises(ValueError, match="damaged"):
        pretrain(config, quiet=True)
    assert checkpoint.latest(tmp_path / "run" / "checkpoints").name == "step-00000004"
    shard.write_bytes(sound)
    assert curve(pretrain(config, quiet=True)) == whole


def test_a_lost_store_is_named_and_a_restored_one_continues(whole, tmp_path, monkeypatch):
    store = write_store(tmp_path / "store")
    config = tiny(store, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(TrainingStep, "__call__", at_step(6, raising(Gone())))
        with pytest.raises(Gone):
            pretrain(config, quiet=True)
    Path(store).rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="no store here"):
        pretrain(config, quiet=True)
    assert checkpoint.latest(tmp_path / "run" / "checkpoints").name == "step-00000004"
    (tmp_path / "elsewhere").rename(store)
    assert curve(pretrain(config, quiet=True)) == whole


@pytest.mark.parametrize("loader", ["host", "dali"])
def test_a_loader_that_dies_is_an_error_and_not_a_wait(store, whole, tmp_path, monkeypatch, loader):
    if loader == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    config = tiny(store, tmp_path / "run", loader=loader)
    real = Gatherer._windows

    def dying(self, step):
        if step == 11:  # DALI reads some batches ahead: it meets this one after step 4
            raise OSError(5, "Input/output error")
        return real(self, step)

    with monkeypatch.context() as patch:
        patch.setattr("brainflow.data.pipeline._BLOCK", 4)
        patch.setattr("brainflow.training.validation.LINEAR_TOKENS", 1)  # it reads batches, too
        patch.setattr(Gatherer, "_windows", dying)
        with pytest.raises(Exception, match="Input/output error"):
            pretrain(config, quiet=True)
    assert checkpoint.latest(tmp_path / "run" / "checkpoints") is not None
    assert curve(pretrain(config, quiet=True)) == whole


def test_what_does_not_fit_into_memory_is_said_before_the_first_step(store, tmp_path, monkeypatch):
    def full(self, batch, number, weight):
        assert batch.tokens == 8 * 15  # the largest batch that can come
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TrainingStep, "_backward", full)
    with pytest.raises(ValueError, match=r"data\.batch_size: 8 windows of up to 15 .*train\.micro_batches"):
        pretrain(tiny(store, tmp_path / "run"), quiet=True)


@pytest.mark.parametrize("framework", ["csm", "seq-bert", "net-bert", "autoencoder"])
def test_the_rehearsal_leaves_no_trace(store, tmp_path, monkeypatch, framework):
    def config(name):
        return tiny(store, tmp_path / name, framework=framework, steps=3)

    whole = pretrain(config("with"), quiet=True)
    monkeypatch.setattr(TrainingStep, "rehearse", lambda self, batch: None)
    assert curve(pretrain(config("without"), quiet=True)) == curve(whole)


def process_of_rank(rank, run):
    """Return the id of the process that torchrun started as this rank of this run."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            environment = (path / "environ").read_bytes().split(b"\0")
            words = (path / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"RANK={rank}".encode() in environment and str(run).encode() in words:
            return int(path.name)
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.slow
def test_torchrun_restarts_after_one_of_two_ranks_was_killed_and_continues_exactly(store, tmp_path):
    run = tmp_path / "run"
    steps = shlex.split("--train.steps 60 --train.checkpoint-every 5 --train.validate-every 20")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"),
        *("--max-restarts", "2", "--monitor-interval", "0.2", "-m", "brainflow", "pretrain", store),
    ]
    output, summary = ((tmp_path / name).open("w") for name in ("output", "summary"))
    torchrun = subprocess.Popen(
        [*command, "--out", str(run), *FLAGS, *steps, "--json"], env=ENV, stdout=summary, stderr=output
    )
    deadline = time.monotonic() + 200
    while not checkpoint.complete(run / "checkpoints"):
        assert torchrun.poll() is None, (tmp_path / "output").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process_of_rank(1, run), signal.SIGKILL)
    assert torchrun.wait(timeout=250) == 0, (tmp_path / "output").read_text()
    assert json.loads((tmp_path / "summary").read_text())["step"] == 60  # one, by rank 0

    def whole(rank):
        assert main(["pretrain", store, "--out", str(tmp_path / "whole"), *FLAGS, *steps]) == 0

    assert on_two_ranks(whole, tmp_path) == [0, 0]
    assert curve(run) == curve(tmp_path / "whole")


def test_a_store_that_is_cut_short_under_a_run_ends_it_and_a_restored_one_continues(tmp_path):
    store = write_store(tmp_path / "store")
    run = tmp_path / "run"
    steps = shlex.split("--train.steps 200 --train.checkpoint-every 5 --train.validate-every 200")
    command = [sys.executable, "-m", "brainflow", "pretrain", store, *FLAGS, *steps]
    process = subprocess.Popen([*command, "--out", str(run)], env=ENV, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 100
    while not checkpoint.complete(run / "checkpoints"):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    shards = [p for p in Path(store).rglob("*") if p.is_file() and "/c/" in str(p)]
    sound = {path: path.read_bytes() for path in shards}
    for path in shards:
        os.truncate(path, 0)
    _, said = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGBUS
    assert "Bus error" in said
    assert checkpoint.latest(run / "checkpoints") is not None
    for path, data in sound.items():
        path.write_bytes(data)
    for name in ("run", "whole"):
        assert main(["pretrain", store, "--out", str(tmp_path / name), *FLAGS, *steps]) == 0
    assert curve(run) == curve(tmp_path / "whole")


def test_preempted_says_what_to_do(tmp_path):
    stopped = Preempted(signal.SIGTERM, 7, tmp_path)
    assert stopped.exit_code == 143
    assert "the same command continues" in str(stopped)
