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
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from brainflow.storage.ingest.prepare import AtlasSpec, Query, Settings
    from brainflow.storage.ingest.prepare.run import Job


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `brainflow prepare`."""

    bids_dir: Annotated[Path, tyro.conf.Positional]
    """BIDS dataset with `derivatives/`, fMRIPrep's output, or subjects of the HCP's pipelines."""
    output_dir: Annotated[Path, tyro.conf.Positional]
    """Where stores, tables and the report go."""
    analysis_level: Annotated[
        tuple[Literal["participant", "group"], ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="{participant,group} [{participant,group}]"),
    ]
    """`participant` prepares runs, `group` gathers them; both words do both."""
    participant_label: tuple[str, ...] = ()
    """Participants, with or without `sub-`; all if not given."""
    session_id: tuple[str, ...] = ()
    """Sessions, with or without `ses-`."""
    task_id: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["-t"])] = ()
    """Tasks, with or without `task-`."""
    derivatives: Annotated[tuple[Path, ...], tyro.conf.arg(aliases=["-d"])] = ()
    """Further directories with derivatives or event files."""
    dataset: str = ""
    """Name of the dataset in the keys of runs; by default the name of its folder."""
    input: Literal["volume", "cifti", "gifti"] = "volume"
    """Images to take: volumes, CIFTI .dtseries.nii, or pairs of GIFTI .func.gii."""
    space: str = ""
    """Their space; by default MNI152NLin2009cAsym, fsLR or fsaverage5."""
    res: str = ""
    """Their resolution (`res-` or `den-`), where there are several."""
    atlas: tuple[str, ...] = ()
    """Parcellations: difumo-N, schaefer-N, a path, or LABEL=PATH; several are done in one pass."""
    allow_space_mismatch: bool = False
    """Take an atlas that is in another template than the images."""
    hcp_image: str = ""
    """HCP: what follows a run's name, such as hp2000_clean or Atlas_MSMAll; by default nothing, or Atlas."""
    confounds: Literal["published", "motion", "simple", "scrubbing", "compcor", "aroma", "none"] = "published"
    """What is regressed out: 6 motion + white matter + CSF + global signal, 6 motion (all that the HCP has),
    or a strategy of nilearn's."""
    smoothing_fwhm: float = 3.0
    """Smoothing of volumes in mm; 0 for none."""
    detrend: bool = True
    """Remove linear trends."""
    high_pass: float = 0.008
    """High-pass filter in Hz; 0 for none. Cosine terms among the confounds take its place."""
    low_pass: float = 0.0
    """Low-pass filter in Hz; 0 for none."""
    standardize: bool = True
    """Z-score each parcel and run."""
    dummy_scans: int = 0
    """Volumes to drop at the start of each run; -1 drops those that fMRIPrep marked as non-steady."""
    max_mean_fd: float | None = None
    """Leave out runs whose mean framewise displacement (mm) is larger."""
    min_volumes: int = 50
    """Leave out shorter runs."""
    allow_sheared: bool = False
    """Keep runs with a sheared affine (a fault of fMRIPrep 20.2.0)."""
    events_preset: Literal["auto", "bids", "hcp", "mdtb"] = "auto"
    """Which events become labelled segments: all, the HCP's 20 states, or blocks of the MDTB's 26 tasks; auto
    is hcp for the HCP's folders, else bids."""
    events_column: str = ""
    """Column of events.tsv with the label; by default trial_type (MDTB: taskName)."""
    hrf_shift: float | None = None
    """Seconds added to onsets for the haemodynamic lag; by default 3, HCP 2.88 (4 TRs), MDTB 3 (3 TRs)."""
    merge_events: bool = False
    """Merge successive events with one label into a block."""
    dtype: Literal["float16", "float32", "int16", "int8"] = "float16"
    """Element type of the stores."""
    nprocs: Annotated[int, tyro.conf.arg(aliases=["--n-procs", "--nthreads"])] = 1
    """Worker processes, one thread each."""
    work_dir: Annotated[Path | None, tyro.conf.arg(aliases=["-w"])] = None
    """Where parts lie until they are gathered; both levels need it. By default OUTPUT_DIR/work."""
    report: bool = True
    """Write the quality report at the group level."""
    dry_run: bool = False
    """Print what would be done, and stop."""
    slurm: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write a SLURM array script with one job a participant, and stop."""
    submit: Literal["no", "slurm", "local"] = "no"
    """Submit one job a participant through submitit, and wait for them; `local` starts them here."""


def run(args: Args) -> int:
    """Do what the levels ask for; 1 if a run could not be prepared."""
    if not args.analysis_level:
        raise ValueError("analysis_level: got none, expected participant, group or both")
    if args.nprocs < 1:
        raise ValueError(f"nprocs: got {args.nprocs}, expected at least 1")
    from brainflow.storage.ingest.prepare import find_atlas

    atlases = [find_atlas(text) for text in args.atlas]
    if args.slurm:
        return _write_slurm(args, atlases)
    records: list[dict[str, Any]] = []
    if "participant" in args.analysis_level:
        records = _participant(args, atlases)
    if "group" in args.analysis_level and not args.dry_run:
        records = _group(args, atlases)
    return int(_print_left_out(records))


def _participant(args: Args, atlases: list[AtlasSpec]) -> list[dict[str, Any]]:
    """Prepare what is not done yet and return the records of that."""
    from brainflow.storage.ingest.prepare.atlas import save_atlas
    from brainflow.storage.ingest.prepare.gather import write_description
    from brainflow.storage.ingest.prepare.pool import prepare_runs

    jobs = _jobs(args, atlases)
    todo = [job for job in jobs if not job.is_done()]
    if args.dry_run:
        _print_plan(args, jobs, todo)
        return []
    write_description(args.output_dir)
    for atlas in atlases:
        save_atlas(atlas, _work(args))
    records = []
    with _Progress(len(todo)) as progress:
        for record in prepare_runs(todo, args.nprocs) if args.submit == "no" else _submitted(args, todo):
            records.append(record)
            progress.show(record)
    outcome = _counts(records) or "nothing was left to do"
    print(f"{len(jobs)} runs: {len(jobs) - len(todo)} were ready, {outcome}")
    return records


def _submitted(args: Args, jobs: list[Job]) -> Iterator[dict[str, Any]]:
    """Prepare runs in jobs of a cluster and give their records, participant by participant."""
    from brainflow.storage.ingest.prepare.memory import worker_bytes
    from brainflow.storage.ingest.prepare.records import read_record
    from brainflow.storage.ingest.prepare.run import failed_record
    from brainflow.storage.ingest.prepare.submit import submit

    assert args.submit != "no"
    runs: dict[str, list[Job]] = {}
    for job in jobs:
        runs.setdefault(job.files.entities.get("sub", ""), []).append(job)
    words = [sys.executable, "-m", *_command(args, "participant"), "--participant-label"]
    commands = {participant: [*words, participant] for participant in runs}
    folder = _work(args) / "jobs"
    gigabytes = math.ceil(worker_bytes(jobs[0]) / 1e9) + 1 if jobs else 0
    for participant in submit(commands, folder, args.submit, gigabytes=gigabytes) if jobs else ():
        for job in runs[participant]:
            record = read_record(job.work, job.files.key)
            if record is None or record["fingerprint"] != job.fingerprint():
                record = failed_record(job, f"its job ended without a record; its log is in {folder}")
            yield record


def _group(args: Args, atlases: list[AtlasSpec]) -> list[dict[str, Any]]:
    """Gather the stores, write table and report, and return the records of all runs."""
    from brainflow.storage import BoldStore
    from brainflow.storage.ingest.prepare import gather
    from brainflow.storage.ingest.prepare.atlas import saved_atlas

    records = gather.select_records(
        _work(args),
        participants=_labels(args.participant_label, "sub"),
        tasks=_labels(args.task_id, "task"),
        sessions=_labels(args.session_id, "ses"),
    )
    gather.write_description(args.output_dir)
    gather.write_table(records, args.output_dir / "runs.tsv")
    specs = atlases or [saved_atlas(label, _work(args)) for label in gather.check_recipes(records)["atlases"]]
    dataset = "-".join(sorted({record["dataset"] for record in records}))
    stores = {}
    for atlas in specs:
        path = gather.store_path(args.output_dir, dataset, atlas.label)
        count = gather.gather(records, atlas, path, work=_work(args), dtype=args.dtype)
        stores[atlas.label] = BoldStore.open(path)
        print(f"{path}: {count} runs, {stores[atlas.label].networks} networks, atlas {atlas.label}")
    if args.report:
        from brainflow.report.quality import write_quality_report

        report = write_quality_report(records, stores, args.output_dir / "report.html", dataset=dataset)
        print(f"{report}: quality report")
    return records


def _jobs(args: Args, atlases: list[AtlasSpec]) -> list[Job]:
    from brainflow.storage.ingest.prepare import find_runs
    from brainflow.storage.ingest.prepare.atlas import check_space
    from brainflow.storage.ingest.prepare.run import jobs_for

    query = _query(args)
    if not args.allow_space_mismatch:
        for atlas in atlases:
            check_space(atlas, query.wanted_space)
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
    return jobs_for(runs, kind=args.input, settings=_settings(args), atlases=atlases, work=_work(args))


def _query(args: Args) -> Query:
    from brainflow.storage.ingest.prepare import Query, is_hcp
    from brainflow.storage.ingest.prepare.confounds import AROMA_IMAGE
    from brainflow.storage.ingest.prepare.hcp import SPACES

    hcp = is_hcp(args.bids_dir)
    if args.hcp_image and not hcp:
        raise ValueError(f"hcp_image: {args.bids_dir} holds no subjects of the HCP's pipelines")
    return Query(
        kind=args.input,
        space=args.space or (SPACES.get(args.input, "") if hcp else ""),
        resolution=args.res,
        description=args.hcp_image or (AROMA_IMAGE if args.confounds == "aroma" else "preproc"),
        participants=_labels(args.participant_label, "sub"),
        tasks=_labels(args.task_id, "task"),
        sessions=_labels(args.session_id, "ses"),
        dataset=args.dataset,
    )


def _settings(args: Args) -> Settings:
    from brainflow.storage.ingest.prepare import CleanSettings, EventSettings, Rules, Settings, is_hcp

    clean = CleanSettings(
        confounds=args.confounds,
        detrend=args.detrend,
        high_pass=args.high_pass or None,
        low_pass=args.low_pass or None,
        standardize=args.standardize,
        smoothing_fwhm=args.smoothing_fwhm or None if args.input == "volume" else None,
        dummy_scans=args.dummy_scans,
    )
    rules = Rules(
        max_mean_fd=args.max_mean_fd, min_volumes=args.min_volumes, allow_sheared=args.allow_sheared
    )
    preset = args.events_preset
    if preset == "auto":
        preset = "hcp" if is_hcp(args.bids_dir) else "bids"
    events = EventSettings(
        preset=preset, column=args.events_column, shift=args.hrf_shift, merge=args.merge_events
    )
    return Settings(clean=clean, rules=rules, events=events)


def _work(args: Args) -> Path:
    return (args.work_dir or args.output_dir / "work").absolute()


def _labels(given: tuple[str, ...], prefix: str) -> tuple[str, ...]:
    return tuple(label.removeprefix(f"{prefix}-") for label in given)


def _write_slurm(args: Args, atlases: list[AtlasSpec]) -> int:
    from brainflow.storage.ingest.prepare.memory import worker_bytes
    from brainflow.storage.ingest.prepare.slurm import array_script, write_script

    assert args.slurm is not None
    jobs = _jobs(args, atlases)
    participants = sorted({job.files.entities.get("sub", "") for job in jobs})
    text = array_script(
        name=args.slurm.name,
        participants=participants,
        participant=_command(args, "participant"),
        group=_command(args, "group"),
        gigabytes=math.ceil(worker_bytes(jobs[0]) / 1e9) + 1,
    )
    write_script(args.slurm, text)
    print(f"{args.slurm}: {len(participants)} participants; sbatch {args.slurm}")
    return 0


def _print_plan(args: Args, jobs: list[Job], todo: list[Job]) -> None:
    from brainflow.storage.ingest.prepare.memory import worker_bytes

    waiting = {job.files.key for job in todo}
    for job in jobs:
        files = job.files
        state = "prepare" if files.key in waiting else "ready"
        lacks = [
            name for name, there in (("confounds", files.confounds), ("sidecar", files.sidecars)) if not there
        ]
        note = f"  (no {', no '.join(lacks)})" if lacks else ""
        print(f"{state:8} {files.key}  {files.images[0].name}{note}")
    gigabytes = worker_bytes(jobs[0]) / 1e9
    print(
        f"{len(todo)} of {len(jobs)} runs to prepare, atlas {', '.join(jobs[0].atlas_labels)}; "
        f"{args.nprocs} processes of at most {gigabytes:.1f} GB each; nothing was done"
    )


def _counts(records: list[dict[str, Any]]) -> str:
    names = {"done": "prepared", "excluded": "excluded", "failed": "failed"}
    counts = {name: sum(record["status"] == status for record in records) for status, name in names.items()}
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count)


def _print_left_out(records: list[dict[str, Any]]) -> bool:
    """Print a table of the runs that were left out; True if one of them failed."""
    left_out = [record for record in records if record["status"] != "done"]
    width = max((len(record["key"]) for record in left_out), default=0)
    for record in sorted(left_out, key=lambda record: (record["status"], record["key"])):
        print(f"{record['status']:8}  {record['key']:{width}}  {record['reason']}")
    return any(record["status"] == "failed" for record in left_out)


class _Progress:
    """A bar with the remaining time in a terminal, plain lines elsewhere; on stderr."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._total, self._done = total, 0
        self._bar: Progress | None = None
        if sys.stderr.isatty() and total:
            columns = (
                TextColumn("prepare"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
            )
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> _Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def show(self, record: dict[str, Any]) -> None:
        """Count a run."""
        self._done += 1
        if self._bar:
            self._bar.update(self._task, completed=self._done, description=record["key"])
        else:
            reason = f": {record['reason']}" if record["reason"] else ""
            sys.stderr.write(f"{self._done}/{self._total} {record['status']} {record['key']}{reason}\n")
            sys.stderr.flush()


def _command(args: Args, level: str) -> list[str]:
    """The command line of one level with the options of this one, but for those that choose what to do."""
    words = ["brainflow", "prepare", str(args.bids_dir.absolute()), str(args.output_dir.absolute()), level]
    left_out = {
        "bids_dir",
        "output_dir",
        "analysis_level",
        "participant_label",
        "slurm",
        "submit",
        "dry_run",
        "report",
    }
    for field in dataclasses.fields(Args):
        value = getattr(args, field.name)
        if field.name in left_out or value == field.default:
            continue
        flag = field.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{flag}")
        elif isinstance(value, tuple):
            words += [f"--{flag}", *map(_absolute, value)]
        else:
            words += [f"--{flag}", _absolute(value)]
    return words


def _absolute(value: object) -> str:
    """A value as a word of a command line; paths from the root, since jobs start elsewhere."""
    label, equals, path = str(value).rpartition("=")
    return f"{label}{equals}{Path(path).absolute()}" if Path(path).exists() else str(value)
