"""One job a participant on a cluster: a SLURM array script, which needs nothing, or submitit (an extra)."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from brainflow.optional import need

Cluster = Literal["slurm", "local"]
_HOURS = 12
# afterany, not afterok: one bad run makes its task exit with 1, and the others are gathered all the same.
# `exec` lets signals of SLURM reach Python, not a shell that waits for it.
_SCRIPT = """\
#!/bin/bash
# Prepare one participant in each array task; then gather:
#   job=$(sbatch --parsable {name})
#   sbatch --dependency=afterany:$job --wrap={gather}
# Running it again repeats only what failed. Change the lines below to what your cluster wants.
#SBATCH --job-name=brainflow-prepare
#SBATCH --array=0-{last}
#SBATCH --cpus-per-task=1
#SBATCH --mem={gigabytes}G
#SBATCH --time={hours}:00:00
#SBATCH --output=%x-%A_%a.log

set -eu
participants=({participants})
export OMP_NUM_THREADS=1

exec {command} --participant-label "${{participants[$SLURM_ARRAY_TASK_ID]}}"
"""


def array_script(
    *,
    name: str,
    participants: Sequence[str],
    participant: Sequence[str],
    group: Sequence[str],
    gigabytes: int,
) -> str:
    """Return the text of the script.

    Parameters
    ----------
    name
        File name of the script, for the comment.
    participants
        Labels.
    participant, group
        Command lines of the two levels, without `--participant-label`.
    gigabytes
        Memory of a task.

    Raises
    ------
    ValueError
        If there are no participants.
    """
    if not participants:
        raise ValueError("slurm: no participants were found")
    return _SCRIPT.format(
        name=shlex.quote(name),
        last=len(participants) - 1,
        participants=" ".join(map(shlex.quote, participants)),
        command=shlex.join(participant),
        gather=shlex.quote(shlex.join(group)),
        gigabytes=gigabytes,
        hours=_HOURS,
    )


def write_script(path: Path, text: str) -> None:
    """Write the script and make it executable."""
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


def submit(
    commands: Mapping[str, Sequence[str]], folder: Path, cluster: Cluster, *, gigabytes: int
) -> Iterator[str]:
    """Submit one job a participant, wait, and give each participant when its job has ended.

    Whether a job succeeded is not asked: its records say so, and a job without records failed.

    Parameters
    ----------
    commands
        Command line of each participant.
    folder
        Where the jobs' scripts and logs go.
    cluster
        "slurm" submits one array; "local" starts processes here.
    gigabytes
        Memory of a job.

    Raises
    ------
    ImportError
        Saying which extra to install.
    """
    submitit = need("submitit", "submitting jobs", "slurm")
    executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
    executor.update_parameters(
        name="brainflow-prepare", timeout_min=60 * _HOURS, mem_gb=gigabytes, cpus_per_task=1
    )
    # A job has one core.
    environment = {"OMP_NUM_THREADS": "1"}
    # Within it submitit hands in one array instead of a job at a time.
    with executor.batch():
        jobs = {
            executor.submit(submitit.helpers.CommandFunction(list(words), env=environment)): participant
            for participant, words in commands.items()
        }
    for job in submitit.helpers.as_completed(list(jobs)):
        yield jobs[job]
