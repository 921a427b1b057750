"""What a run does when something else breaks: ranks, stores, loaders, time limits."""

import json
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from brainflow.cli import slurm
from brainflow.cli.main import main
from brainflow.config import DataConfig, ModelConfig, PretrainConfig, TrainConfig
from brainflow.data.host import Gatherer
from brainflow.storage import StoreWriter
from brainflow.training import checkpoint, parallel
from brainflow.training.interrupt import Preempted
from brainflow.training.loop import pretrain
from brainflow.training.metrics import TIMING, read_metrics
from brainflow.training.step import TrainingStep

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
FLAGS = shlex.split(
    "--device cpu --model.width 16 --model.layers 1 --model.heads 2 --data.batch-size 8 --data.seq-min 6 "
    "--data.seq-max 16 --data.loader host --data.validation-batches 1 --train.lr 1e-2 --train.no-plot "
    "--train.log-every 1 --train.micro-batches 2"
)


def write_store(path):
    rng = np.random.default_rng(0)
    with StoreWriter.create(path, networks=12, dtype="float32", parcellation="none") as writer:
        for run in range(8):
            bold = rng.standard_normal((60, 12)).astype(np.float32)
            writer.append(bold, t_r=2.0, dataset="noise", subject=str(run), session="", task="rest", run="1")
    return str(path)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("faults") / "store")


def tiny(store, out, *, loader="host", framework="csm", **train):
    return PretrainConfig(
        store=store,
        out=str(out),
        device="cpu",
        model=ModelConfig(framework=framework, width=16, layers=1, heads=2),
        data=DataConfig(batch_size=8, seq_min=6, seq_max=16, loader=loader, validation_batches=1),
        train=TrainConfig(
            **{
                "steps": 12,
                "lr": 1e-2,
                "log_every": 1,
                "validate_every": 12,
                "checkpoint_every": 4,
                "plot": False,
                **train,
            }
        ),
    )


def curve(folder):
    return [{k: v for k, v in line.items() if k not in TIMING} for line in read_metrics(folder)]


def at_step(number, what):
    """Return a step that first does `what` when it is step `number`."""

    def one_step(self, batches, step, lr, real=TrainingStep.__call__, **more):
        if step == number:
            what(self)
        return real(self, batches, step, lr, **more)

    return one_step


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


def test_a_damaged_checkpoint_is_refused_by_name(store, tmp_path, monkeypatch):
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
    whole = pretrain(tiny(store, tmp_path / "whole"), quiet=True)
    assert curve(pretrain(config, quiet=True)) == curve(whole)


def test_a_corrupt_chunk_of_the_store_is_named_and_the_checkpoint_stays(tmp_path, monkeypatch):
    store = write_store(tmp_path / "store")
    whole = pretrain(tiny(store, tmp_path / "whole"), quiet=True)
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
    assert curve(pretrain(config, quiet=True)) == curve(whole)


def test_a_lost_store_is_named_and_a_restored_one_continues(tmp_path, monkeypatch):
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
    whole = pretrain(tiny(store, tmp_path / "whole"), quiet=True)
    assert curve(pretrain(config, quiet=True)) == curve(whole)


@pytest.mark.parametrize("loader", ["host", "dali"])
def test_a_loader_that_dies_is_an_error_and_not_a_wait(store, tmp_path, monkeypatch, loader):
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
        patch.setattr(Gatherer, "_windows", dying)
        with pytest.raises(Exception, match="Input/output error"):
            pretrain(config, quiet=True)
    assert checkpoint.latest(tmp_path / "run" / "checkpoints") is not None
    whole = pretrain(tiny(store, tmp_path / "whole"), quiet=True)
    assert curve(pretrain(config, quiet=True)) == curve(whole)


def test_what_does_not_fit_into_memory_is_said_before_the_first_step(store, tmp_path, monkeypatch):
    def full(self, batch, seed, share, *, last):
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


def fake_program(folder, name, body):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_a_job_goes_back_into_the_queue_when_its_time_is_up_and_only_then(tmp_path, monkeypatch):
    fake_program(tmp_path, "scontrol", f'echo "$@" >> {tmp_path}/asked')
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    job = {"SLURM_JOB_ID": "17"}
    assert slurm.requeue("SIGUSR1", job)
    assert slurm.requeue("SIGUSR2", {**job, "SLURM_ARRAY_JOB_ID": "16", "SLURM_ARRAY_TASK_ID": "3"})
    assert not slurm.requeue("SIGTERM", job)
    assert not slurm.requeue("SIGUSR1", {})
    assert (tmp_path / "asked").read_text() == "requeue 17\nrequeue 16_3\n"
    fake_program(tmp_path, "scontrol", "exit 1")
    assert not slurm.requeue("SIGUSR1", job)


def test_sigusr1_writes_a_checkpoint_and_requeues(store, tmp_path, monkeypatch, capsys):
    fake_program(tmp_path, "scontrol", f'echo "$@" >> {tmp_path}/asked')
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setattr(
        TrainingStep, "__call__", at_step(5, lambda step: os.kill(os.getpid(), signal.SIGUSR1))
    )
    words = ["pretrain", store, "--out", str(tmp_path / "run"), *FLAGS, "--train.steps", "50"]
    assert main(words) == 128 + signal.SIGUSR1
    assert (tmp_path / "asked").read_text() == "requeue 17\n"
    assert "back in SLURM's queue" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "PREEMPTED").read_text()) == {"signal": "SIGUSR1", "step": 6}


@pytest.mark.parametrize("again", ["SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"])
def test_a_job_that_is_started_again_does_not_delete_what_it_did(store, tmp_path, monkeypatch, again):
    words = ["pretrain", store, "--out", str(tmp_path / "run"), *FLAGS, "--train.steps", "3", "--no-resume"]
    taken = []

    def counting(self, batches, step, lr, real=TrainingStep.__call__, **more):
        taken.append(step)
        return real(self, batches, step, lr, **more)

    monkeypatch.setattr(TrainingStep, "__call__", counting)
    for count, steps in (("0", [0, 1, 2]), ("1", []), ("0", [0, 1, 2])):
        taken.clear()
        monkeypatch.setenv(again, count)
        assert main(words) == 0
        assert taken == steps


def test_submitting_writes_a_script_that_slurm_can_run(store, tmp_path, monkeypatch, capsys):
    pytest.importorskip("submitit", reason="submitit is not installed")
    programs = tmp_path / "bin"
    programs.mkdir()
    fake_program(programs, "srun", "exit 0")
    fake_program(programs, "sbatch", f'cat "$1" > {tmp_path}/script; echo Submitted batch job 42')
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    resources = shlex.split("--slurm.nodes 2 --slurm.gpus 4 --slurm.tasks 4 --slurm.hours 2")
    resources += ["--slurm.partition", "fast"]
    words = ["pretrain", store, "--out", str(tmp_path / "run"), *FLAGS, "--submit", "--json", *resources]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["job"] == "42"
    script = (tmp_path / "script").read_text()
    for line in ("--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--time=120", "--partition=fast"):
        assert f"#SBATCH {line}" in script
    assert "#SBATCH --signal=USR2@180" in script
    assert "#SBATCH --requeue" in script


def test_a_job_of_two_local_processes_trains(store, tmp_path):
    pytest.importorskip("submitit", reason="submitit is not installed")
    words = [store, "--out", tmp_path / "run", *FLAGS, "--train.steps", "3", "--submit"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "brainflow",
            "pretrain",
            *words,
            "--slurm.cluster",
            "local",
            "--slurm.tasks",
            "2",
        ],
        capture_output=True,
        text=True,
        timeout=250,
        env=ENV,
    )
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in read_metrics(tmp_path / "run") if "loss" in line] == [1, 2, 3]
    latest = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert checkpoint.read_state(latest)["world"] == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpus": 8}, r"slurm\.tasks: got 1 with slurm\.gpus=8"),
        ({"nodes": 0}, r"slurm\.nodes"),
        ({"hours": 0.0}, r"slurm\.hours"),
        ({"cluster": "local", "nodes": 2}, r"slurm\.nodes: got 2"),
    ],
)
def test_an_impossible_job_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        slurm.SlurmConfig(**settings)


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
    steps = shlex.split("--train.steps 150 --train.checkpoint-every 10 --train.validate-every 50")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"),
        *("--max-restarts", "2", "--monitor-interval", "0.2", "-m", "brainflow", "pretrain", store),
    ]
    output = (tmp_path / "output").open("w")
    torchrun = subprocess.Popen(
        [*command, "--out", str(run), *FLAGS, *steps], env=ENV, stdout=output, stderr=output
    )
    deadline = time.monotonic() + 200
    while not checkpoint.complete(run / "checkpoints"):
        assert torchrun.poll() is None, (tmp_path / "output").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process_of_rank(1, run), signal.SIGKILL)
    assert torchrun.wait(timeout=250) == 0, (tmp_path / "output").read_text()

    def whole(rank):
        assert main(["pretrain", store, "--out", str(tmp_path / "whole"), *FLAGS, *steps]) == 0

    assert on_two_ranks(whole, tmp_path) == [0, 0]
    assert curve(run) == curve(tmp_path / "whole")


def test_a_store_that_is_cut_short_under_a_run_ends_it_and_a_restored_one_continues(tmp_path):
    store = write_store(tmp_path / "store")
    run = tmp_path / "run"
    steps = shlex.split("--train.steps 400 --train.checkpoint-every 5 --train.validate-every 400")
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
