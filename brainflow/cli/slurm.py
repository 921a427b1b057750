"""Runs as jobs of a SLURM cluster: handed in through submitit (extra `slurm`), put back when time runs out.

SLURM sends a signal some time before a job's time limit. `pretrain` then writes a checkpoint and this module
puts the job back into the queue; what SLURM starts again continues from the checkpoint. A job that is
preempted gets SIGTERM and is put back by SLURM itself where the partition is set up so; `scancel` sends the
same, so SIGTERM never puts a job back.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from brainflow.optional import need

TIME_IS_UP = ("SIGUSR1", "SIGUSR2")  # what people ask SLURM to send before the time limit
WARNING = 180  # seconds before the time limit


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """A job of a cluster, for `--submit`."""

    nodes: int = 1
    """Machines."""
    tasks: int = 1
    """Processes on each machine: as many as it has GPUs, or 1 without."""
    gpus: int = 0
    """GPUs of each machine."""
    cpus: int = 8
    """CPU cores of each process."""
    memory: int = 0
    """GiB of memory of each machine; 0: the cluster's default."""
    hours: float = 24.0
    """Time limit; three minutes before it a checkpoint is written and the job goes back into the queue."""
    partition: str = ""
    """Partition; empty: the cluster's default."""
    account: str = ""
    """Account; empty: the user's default."""
    cluster: Literal["slurm", "local"] = "slurm"
    """`local` starts the processes here, without SLURM, and waits for them."""

    def __post_init__(self) -> None:
        for name in ("nodes", "tasks", "cpus"):
            if getattr(self, name) < 1:
                raise ValueError(f"slurm.{name}: got {getattr(self, name)}, expected at least 1")
        for name in ("gpus", "memory"):
            if getattr(self, name) < 0:
                raise ValueError(f"slurm.{name}: got {getattr(self, name)}, expected 0 or more")
        # Six minutes: the warning comes three before the end, and some work is to be done until then.
        if not self.hours > 0.1:
            raise ValueError(f"slurm.hours: got {self.hours}, expected more than 0.1")
        if self.gpus and self.tasks != self.gpus:
            raise ValueError(
                f"slurm.tasks: got {self.tasks} with slurm.gpus={self.gpus}, expected a process for each "
                f"GPU: --slurm.tasks {self.gpus}"
            )
        if self.cluster == "local" and self.nodes > 1:
            raise ValueError(f"slurm.nodes: got {self.nodes} with slurm.cluster=local, expected 1")


@dataclass(frozen=True)
class Task:
    """What each process of the job runs."""

    words: tuple[str, ...]

    def __call__(self) -> int:
        """Tell torch who is who, and pretrain."""
        from submitit.helpers import TorchDistributedEnvironment

        from .main import main

        # A process sees all GPUs of the job and takes its own by its local rank.
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        return main(["pretrain", *self.words])


def submit(words: Sequence[str], folder: Path, config: SlurmConfig) -> Any:
    """Hand `brainflow pretrain WORDS` in as a job and return submitit's job.

    Parameters
    ----------
    words
        Arguments of `brainflow pretrain`.
    folder
        Where scripts and outputs of the job go.
    config
        The job.

    Raises
    ------
    ImportError
        If submitit is not installed.
    """
    submitit = need("submitit", "--submit", "slurm")
    executor = submitit.AutoExecutor(folder=folder, cluster=config.cluster)
    # Of an empty name or 0 the cluster's default is taken.
    named = {"slurm_partition": config.partition, "slurm_account": config.account, "mem_gb": config.memory}
    executor.update_parameters(
        name="brainflow-pretrain",
        nodes=config.nodes,
        tasks_per_node=config.tasks,
        gpus_per_node=config.gpus,
        cpus_per_task=config.cpus,
        timeout_min=round(60 * config.hours),
        slurm_signal_delay_s=WARNING,
        # SLURM puts back only jobs that were handed in so.
        slurm_additional_parameters={"requeue": True},
        **{name: value for name, value in named.items() if value},
    )
    return executor.submit(Task(tuple(words)))


def started_again(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether SLURM or torchrun has started this job before: then --no-resume has been obeyed already."""
    counts = (environ.get(name, "0") for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))
    return any(count not in ("", "0") for count in counts)


def requeue(signal_name: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Put this SLURM job back into the queue, if it stopped because its time is up.

    Returns
    -------
    bool
        Whether it was put back: False outside SLURM, after another signal, or where `scontrol` refuses.
    """
    job = environ.get("SLURM_JOB_ID")
    if job is None or signal_name not in TIME_IS_UP:
        return False
    # By its number alone a task may stand for the whole array.
    if "SLURM_ARRAY_JOB_ID" in environ:
        job = f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
