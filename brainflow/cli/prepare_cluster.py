"""`brainflow prepare` on a cluster: the command lines of its jobs, an array script, jobs through submitit."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from brainflow.storage.text import counted

if TYPE_CHECKING:
    from brainflow.cli.prepare_args import Args
    from brainflow.prepare.run import Job

_CHOSEN_ANEW = {
    "bids_dir",
    "output_dir",
    "analysis_level",
    "participant_label",
    "slurm",
    "submit",
    "dry_run",
    "report",
}
"""Fields that a job does not take over as they are."""


def write_slurm(args: Args, jobs: Sequence[Job]) -> int:
    """Write the array script and return the exit code."""
    from brainflow.prepare.cluster import array_script, write_script

    assert args.slurm is not None
    participants = sorted({job.files.entities.get("sub", "") for job in jobs})
    text = array_script(
        name=args.slurm.name,
        participants=participants,
        participant=command_line(args, "participant"),
        group=command_line(args, "group"),
        gigabytes=_gigabytes(jobs),
    )
    write_script(args.slurm, text)
    print(f"{args.slurm}: {counted(len(participants), 'participant')}; sbatch {args.slurm}")
    return 0


def submitted(args: Args, jobs: Sequence[Job]) -> Iterator[dict[str, Any]]:
    """Prepare runs in jobs of a cluster and give their records, participant by participant."""
    from brainflow.prepare.cluster import submit
    from brainflow.prepare.records import read_record
    from brainflow.prepare.run import failed_record

    assert args.submit != "no"
    if not jobs:
        return
    runs: dict[str, list[Job]] = {}
    for job in jobs:
        runs.setdefault(job.files.entities.get("sub", ""), []).append(job)
    # This Python: a job's PATH may begin with another.
    words = [sys.executable, "-m", *command_line(args, "participant"), "--participant-label"]
    commands = {participant: [*words, participant] for participant in runs}
    folder = jobs[0].work / "jobs"
    for participant in submit(commands, folder, args.submit, gigabytes=_gigabytes(jobs)):
        for job in runs[participant]:
            record = read_record(job.work, job.files.key)
            # The record of an earlier command is no answer.
            if record is None or record["fingerprint"] != job.fingerprint():
                record = failed_record(job, f"its job ended without a record; its log is in {folder}")
            yield record


def command_line(args: Args, level: str) -> list[str]:
    """Return the words of one level with this command line's options, but for those chosen anew by a job."""
    words = ["brainflow", "prepare", str(args.bids_dir.absolute()), str(args.output_dir.absolute()), level]
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if field.name in _CHOSEN_ANEW or value == field.default:
            continue
        flag = field.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{flag}")
        elif isinstance(value, tuple):
            words += [f"--{flag}", *map(absolute, value)]
        else:
            words += [f"--{flag}", absolute(value)]
    return words


def absolute(value: object) -> str:
    """Return a value as a word of a command line; paths from the root, since jobs start elsewhere."""
    label, equals, path = str(value).rpartition("=")
    joined = [path] if Path(path).exists() else path.split("+")  # atlases
    words = [str(Path(part).absolute()) if part and Path(part).exists() else part for part in joined]
    return f"{label}{equals}{'+'.join(words)}"


def _gigabytes(jobs: Sequence[Job]) -> int:
    from brainflow.prepare.pool import worker_bytes

    return math.ceil(worker_bytes(jobs) / 1e9) + 1
