"""Participants as jobs of a cluster through submitit (an extra); the SLURM array script needs nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from brainflow.optional import need

Cluster = Literal["slurm", "local"]
MINUTES = 12 * 60


def submit(
    commands: Mapping[str, Sequence[str]], folder: Path, cluster: Cluster, *, gigabytes: int
) -> Iterator[str]:
    """Submit one job a participant, wait, and give each participant when its job has ended.

    Whether a job succeeded is not asked: its records say so, and a job without records failed.

    Parameters
    ----------
    commands : command line of each participant
    folder : where the jobs' scripts and logs go
    cluster : "slurm" submits one array; "local" starts processes here
    gigabytes : memory of a job

    Raises
    ------
    ImportError : saying which extra to install
    """
    submitit = need("submitit", "submitting jobs", "slurm")
    executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
    executor.update_parameters(
        name="brainflow-prepare", timeout_min=MINUTES, mem_gb=gigabytes, cpus_per_task=1
    )
    environment = {"OMP_NUM_THREADS": "1"}
    with executor.batch():
        jobs = {
            executor.submit(submitit.helpers.CommandFunction(list(words), env=environment)): participant
            for participant, words in commands.items()
        }
    for job in submitit.helpers.as_completed(list(jobs)):
        yield jobs[job]
