"""Trainings as jobs of SLURM: time limits, requeueing, submitting."""

import json
import os
import shlex
import signal
import stat
import subprocess
import sys

import pytest
from tiny_training import ENV, FLAGS, at_step, write_store

from brainflow.cli import slurm
from brainflow.cli.main import main
from brainflow.training import checkpoint
from brainflow.training.metrics import read_metrics
from brainflow.training.step import TrainingStep


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("jobs") / "store")


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
