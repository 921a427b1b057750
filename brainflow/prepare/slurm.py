"""A SLURM array script: one job a participant, independent of the others."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

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
#SBATCH --time=12:00:00
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
    """Text of the script.

    Parameters
    ----------
    name : file name of the script, for the comment
    participants : labels
    participant, group : command lines of the two levels, without `--participant-label`
    gigabytes : memory of a task

    Raises
    ------
    ValueError : if there are no participants
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
    )


def write_script(path: Path, text: str) -> None:
    """Write the script and make it executable."""
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
