"""Turn fMRIPrep's derivatives into a store, as a BIDS App.

The participant level finds the runs of a BIDS dataset (or of fMRIPrep's output itself), averages them in the
parcels of one or more atlases, cleans the time series and writes one part a run. The group level gathers all
parts into one store an atlas, with a table of all runs and a quality report. Both can be run again at any
time: the participant level repeats only what failed or changed. A run that cannot be prepared does not stop
the others; it is listed with its reason, and the exit code is 1. Defaults are those of the published models.

Examples
--------
  brainflow prepare ds000030 out participant group --atlas difumo-1024
  brainflow prepare ds000030 out participant --task-id rest --atlas atlas.nii.gz
  brainflow prepare ds000030 out participant --atlas schaefer-400 --dry-run
  brainflow prepare ds000030 out participant --atlas schaefer-400 --slurm job.sh
  brainflow prepare ds000030 out participant group --atlas schaefer-400 --submit slurm
  brainflow prepare HCP1200 out participant group --atlas a.nii --confounds motion
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from brainflow.cli.ingest import print_rounded
from brainflow.cli.prepare_args import Args, filters_of, labels, query_of, settings_of, template_of, work_of
from brainflow.cli.prepare_cluster import submitted, write_slurm
from brainflow.cli.usage import WrongUsage
from brainflow.progress import ProgressLine, Remaining, progress_bar
from brainflow.storage.text import counted, printable

if TYPE_CHECKING:
    from brainflow.prepare import AtlasSpec
    from brainflow.prepare.run import Job

_OUTCOMES = {"done": "prepared", "excluded": "excluded", "failed": "failed"}


def run(args: Args) -> int:
    """Do what the levels ask for; 1 if a run could not be prepared."""
    if not args.analysis_level:
        raise WrongUsage("analysis_level: got none, expected participant, group or both")
    if args.nprocs < 1:
        raise WrongUsage(f"nprocs: got {args.nprocs}, expected at least 1")
    from brainflow.prepare import check_folders, find_atlas

    check_folders(args.bids_dir, args.derivatives)  # before an atlas is fetched
    if len(args.surfaces) not in (0, 2):
        raise WrongUsage(f"surfaces: got {len(args.surfaces)} files, expected left and right")
    template = template_of(args)
    atlases = [find_atlas(text, template, args.surfaces) for text in args.atlas]
    if args.slurm:
        return write_slurm(args, _jobs(args, atlases))
    records: list[dict[str, Any]] = []
    if "participant" in args.analysis_level:
        records = _participant(args, atlases)
    # After a dry run there is nothing new to gather.
    if "group" in args.analysis_level and not (args.dry_run and "participant" in args.analysis_level):
        records = _group(args, atlases)
    return int(_print_left_out(records))


def _participant(args: Args, atlases: list[AtlasSpec]) -> list[dict[str, Any]]:
    """Prepare what is not done yet and return the records of that."""
    from brainflow.prepare.atlas import save_atlas
    from brainflow.prepare.description import write_description
    from brainflow.prepare.pool import prepare_runs

    jobs = _jobs(args, atlases)
    todo = [job for job in jobs if not job.is_done()]
    processes = _processes(args, jobs)
    if args.dry_run:
        _print_plan(jobs, todo, processes)
        return []
    write_description(args.output_dir, _roots(args), (image for job in jobs for image in job.files.images))
    for atlas in atlases:
        save_atlas(atlas, work_of(args))
    records = []
    # How many jobs a cluster runs at a time is not known: all, for the estimate.
    with _Progress(len(todo), processes if args.submit == "no" else len(todo)) as progress:
        for record in prepare_runs(todo, processes) if args.submit == "no" else submitted(args, todo):
            records.append(record)
            progress.show(record)
    outcome = _counts(records) or "nothing was left to do"
    print(f"{counted(len(jobs), 'run')}: {len(jobs) - len(todo)} were ready, {outcome}")
    return records


def _roots(args: Args) -> list[Path]:
    return [args.bids_dir, *args.derivatives]


def _processes(args: Args, jobs: Sequence[Job]) -> int:
    """Return workers that fit into --mem-mb, at most those asked for."""
    from brainflow.prepare.pool import worker_bytes

    if args.mem_mb is None:
        return args.nprocs
    fitting = int(args.mem_mb * 1e6 // worker_bytes(jobs))
    if fitting < 1:
        raise ValueError(
            f"mem_mb: got {args.mem_mb}, expected at least {math.ceil(worker_bytes(jobs) / 1e6)}, which one "
            "worker may take"
        )
    return min(args.nprocs, fitting)


def _group(args: Args, atlases: list[AtlasSpec]) -> list[dict[str, Any]]:
    """Gather the stores, write table and report, and return the records of all runs."""
    from brainflow.prepare import gather
    from brainflow.prepare.atlas import saved_atlas
    from brainflow.prepare.description import makers_of, write_description
    from brainflow.storage import BoldStore

    records = gather.select_records(
        work_of(args),
        participants=labels(args.participant_label, "sub"),
        tasks=labels(args.task_id, "task"),
        sessions=labels(args.session_id, "ses"),
        filters=filters_of(args),
    )
    records = sorted([*records, *_unprepared(args, records)], key=lambda record: record["key"])
    if args.dry_run:
        print(f"{counted(len(records), 'run')}: {_counts(records)}; nothing was gathered")
        return records
    images = (Path(file) for record in records for file in record.get("inputs", []))
    write_description(args.output_dir, _roots(args), images)
    # Before gathering, so that it says why, even if nothing can be gathered.
    gather.write_table(records, args.output_dir / "runs.tsv", _roots(args))
    if not any(record["status"] == "done" for record in records):
        # What follows raises: reasons are to be seen first.
        _print_left_out(records)
    # The participant level has noted them: --atlas need not be given again.
    specs = atlases or [
        saved_atlas(label, work_of(args)) for label in gather.check_recipes(records)["atlases"]
    ]
    dataset = "-".join(sorted({record["dataset"] for record in records} - {""}))
    stores, failures = {}, dict[str, str]()
    for atlas in specs:
        path = gather.store_path(args.output_dir, dataset, atlas.label)
        with progress_bar(f"gather {atlas.label}") as progress:
            done = gather.gather(
                records, atlas, path, work=work_of(args), dtype=args.dtype, progress=progress
            )
        failures |= {key: f"atlas {atlas.label}: {reason}" for key, reason in done.failures.items()}
        print_rounded(done)
        stores[atlas.label] = BoldStore.open(path)
        print(
            f"{path}: {counted(len(done.runs), 'run')}, {counted(stores[atlas.label].networks, 'network')}, "
            f"atlas {atlas.label}"
        )
        if stores[atlas.label].attributes["network_coordinates"] is None:
            print(f"atlas {atlas.label}: its mesh is not known, so no coordinates are stored; see --surfaces")
    if failures:
        gather.demote(records, failures)
        gather.write_table(records, args.output_dir / "runs.tsv", _roots(args))
    if args.report:
        from brainflow.report.quality import write_quality_report

        report = write_quality_report(
            records,
            stores,
            args.output_dir / "report.html",
            dataset=dataset,
            atlases={atlas.label: atlas for atlas in specs},
            work=work_of(args),
            makers=makers_of(args.output_dir),
        )
        print(f"{report}: quality report")
    return records


def _unprepared(args: Args, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return records of runs of the dataset that were not prepared: a job on a cluster may just vanish."""
    from brainflow.prepare import find_runs
    from brainflow.prepare.gather import unprepared

    query = query_of(args)
    recipes = [record["recipe"] for record in records if "recipe" in record]
    if recipes:  # the options that chose the images need not be given again
        names = ("kind", "space", "description")
        query = dataclasses.replace(query, **{name: recipes[0][name] for name in names})
    return unprepared(records, find_runs(args.bids_dir, query, derivatives=args.derivatives))


def _jobs(args: Args, atlases: list[AtlasSpec]) -> list[Job]:
    from brainflow.prepare import find_runs
    from brainflow.prepare.atlas import check_space
    from brainflow.prepare.run import jobs_for

    query, template = query_of(args), template_of(args)
    for atlas in atlases:
        check_space(atlas, template)
    runs = find_runs(args.bids_dir, query, derivatives=args.derivatives)
    if not runs:
        raise ValueError(
            f"{args.bids_dir}: holds no {args.input} runs in {query.wanted_space} that fit the options; "
            "`--space`, `--input`, `--participant-label`, `--task-id` choose them"
        )
    absent = set(query.participants) - {run.entities.get("sub", "") for run in runs}
    if absent:
        raise ValueError(
            f"participant_label: no runs of {', '.join(sorted(absent))} were found in {args.bids_dir}"
        )
    return jobs_for(runs, kind=args.input, settings=settings_of(args), atlases=atlases, work=work_of(args))


def _print_plan(jobs: Sequence[Job], todo: Sequence[Job], processes: int) -> None:
    """Print each run with what would be done, and the memory that this takes."""
    from brainflow.prepare.pool import worker_bytes

    waiting = {job.files.key for job in todo}
    for job in jobs:
        files = job.files
        state = "prepare" if files.key in waiting else "ready"
        lacks = [
            name for name, there in (("confounds", files.confounds), ("sidecar", files.sidecars)) if not there
        ]
        note = f"  (no {', no '.join(lacks)})" if lacks else ""
        print(f"{state:8} {printable(files.key)}  {printable(files.images[0].name)}{note}")
    print(
        f"{len(todo)} of {counted(len(jobs), 'run')} to prepare, atlas {', '.join(jobs[0].atlas_labels)}; "
        f"{counted(processes, 'process', 'processes')} of at most {worker_bytes(jobs) / 1e9:.1f} "
        f"GB each; nothing was done"
    )


def _counts(records: Sequence[dict[str, Any]]) -> str:
    """Return how many runs were prepared, excluded and failed, in words."""
    totals = {
        name: sum(record["status"] == status for record in records) for status, name in _OUTCOMES.items()
    }
    return ", ".join(f"{total} {name}" for name, total in totals.items() if total)


def _print_left_out(records: Sequence[dict[str, Any]]) -> bool:
    """Print a table of the runs that were left out; True if one of them failed."""
    left_out = [record for record in records if record["status"] != "done"]
    if left_out:
        width = max(len(record["key"]) for record in left_out)
        print(f"\n{'status':8}  {'run':{width}}  reason")
        for record in sorted(left_out, key=lambda record: (record["status"], record["key"])):
            print(f"{record['status']:8}  {printable(record['key']):{width}}  {printable(record['reason'])}")
    # An excluded run is no failure: a rule that the user set left it out.
    return any(record["status"] == "failed" for record in left_out)


class _Progress:
    """A bar with the remaining time in a terminal, plain lines elsewhere; on stderr."""

    def __init__(self, total: int, processes: int) -> None:
        self._left = Remaining(total, at_once=processes)
        self._line = ProgressLine("prepare", self._left, quiet=not total, counts=True, keep=True)

    def __enter__(self) -> _Progress:
        self._line.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._line.__exit__(*error)

    def show(self, record: dict[str, Any]) -> None:
        """Count a run."""
        done, total, key = self._left.done + 1, self._left.total, printable(record["key"])
        self._left.advance(done)
        self._line.update(key)
        if self._line.live:
            return
        reason = f": {printable(record['reason'])}" if record["reason"] else ""
        sys.stderr.write(f"{done}/{total} ({self._left} left) {record['status']} {key}{reason}\n")
        sys.stderr.flush()
