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
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from brainflow.cli.prepare_cluster import submitted, write_slurm
from brainflow.cli.prepare_output import Progress, counts, print_left_out, print_plan, print_rounded
from brainflow.cli.progress import progress_bar
from brainflow.cli.usage import WrongUsage

if TYPE_CHECKING:
    from brainflow.prepare import AtlasSpec, Query, Settings
    from brainflow.prepare.run import Job


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
    """Take an atlas in another template than the images, as the published models did: nilearn has DiFuMo and
    Schaefer in MNI152NLin6Asym, TemplateFlow also in fMRIPrep's MNI152NLin2009cAsym."""
    surfaces: tuple[Path, ...] = ()
    """Meshes LEFT RIGHT (.surf.gii) for the coordinates of an atlas on a surface; by default fsLR 32k from
    TemplateFlow's folder, or nilearn's fsaverage5."""
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
        raise WrongUsage("analysis_level: got none, expected participant, group or both")
    if args.nprocs < 1:
        raise WrongUsage(f"nprocs: got {args.nprocs}, expected at least 1")
    from brainflow.prepare import check_folders, find_atlas

    check_folders(args.bids_dir, args.derivatives)  # before an atlas is fetched
    if len(args.surfaces) not in (0, 2):
        raise WrongUsage(f"surfaces: got {len(args.surfaces)} files, expected left and right")
    template = _template(args)
    atlases = [find_atlas(text, template, args.surfaces) for text in args.atlas]
    if args.slurm:
        return write_slurm(args, _jobs(args, atlases))
    records: list[dict[str, Any]] = []
    if "participant" in args.analysis_level:
        records = _participant(args, atlases)
    if "group" in args.analysis_level and not (args.dry_run and "participant" in args.analysis_level):
        records = _group(args, atlases)
    return int(print_left_out(records))


def _participant(args: Args, atlases: list[AtlasSpec]) -> list[dict[str, Any]]:
    """Prepare what is not done yet and return the records of that."""
    from brainflow.prepare.atlas import save_atlas
    from brainflow.prepare.gather import write_description
    from brainflow.prepare.pool import prepare_runs

    jobs = _jobs(args, atlases)
    todo = [job for job in jobs if not job.is_done()]
    if args.dry_run:
        print_plan(jobs, todo, args.nprocs)
        return []
    write_description(args.output_dir)
    for atlas in atlases:
        save_atlas(atlas, _work(args))
    records = []
    with Progress(len(todo)) as progress:
        for record in prepare_runs(todo, args.nprocs) if args.submit == "no" else submitted(args, todo):
            records.append(record)
            progress.show(record)
    outcome = counts(records) or "nothing was left to do"
    print(f"{len(jobs)} runs: {len(jobs) - len(todo)} were ready, {outcome}")
    return records


def _group(args: Args, atlases: list[AtlasSpec]) -> list[dict[str, Any]]:
    """Gather the stores, write table and report, and return the records of all runs."""
    from brainflow.prepare import gather
    from brainflow.prepare.atlas import saved_atlas
    from brainflow.storage import BoldStore

    records = gather.select_records(
        _work(args),
        participants=_labels(args.participant_label, "sub"),
        tasks=_labels(args.task_id, "task"),
        sessions=_labels(args.session_id, "ses"),
    )
    records = sorted([*records, *_unprepared(args, records)], key=lambda record: record["key"])
    if args.dry_run:
        print(f"{len(records)} runs: {counts(records)}; nothing was gathered")
        return records
    gather.write_description(args.output_dir)
    gather.write_table(records, args.output_dir / "runs.tsv")
    if not any(record["status"] == "done" for record in records):
        print_left_out(records)
    specs = atlases or [saved_atlas(label, _work(args)) for label in gather.check_recipes(records)["atlases"]]
    dataset = "-".join(sorted({record["dataset"] for record in records} - {""}))
    stores, failures = {}, dict[str, str]()
    for atlas in specs:
        path = gather.store_path(args.output_dir, dataset, atlas.label)
        with progress_bar(f"gather {atlas.label}") as progress:
            done = gather.gather(records, atlas, path, work=_work(args), dtype=args.dtype, progress=progress)
        failures |= {key: f"atlas {atlas.label}: {reason}" for key, reason in done.failures.items()}
        print_rounded(done)
        stores[atlas.label] = BoldStore.open(path)
        print(f"{path}: {len(done.runs)} runs, {stores[atlas.label].networks} networks, atlas {atlas.label}")
        if stores[atlas.label].attributes["network_coordinates"] is None:
            print(f"atlas {atlas.label}: its mesh is not known, so no coordinates are stored; see --surfaces")
    if failures:
        gather.demote(records, failures)
        gather.write_table(records, args.output_dir / "runs.tsv")
    if args.report:
        from brainflow.report.quality import write_quality_report

        report = write_quality_report(records, stores, args.output_dir / "report.html", dataset=dataset)
        print(f"{report}: quality report")
    return records


def _unprepared(args: Args, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records of runs that are in the dataset, but were not prepared: a job on a cluster may just vanish."""
    from brainflow.prepare import find_runs
    from brainflow.prepare.gather import unprepared

    query = _query(args)
    recipes = [record["recipe"] for record in records if "recipe" in record]
    if recipes:  # the options that chose the images need not be given again
        names = ("kind", "space", "description")
        query = dataclasses.replace(query, **{name: recipes[0][name] for name in names})
    return unprepared(records, find_runs(args.bids_dir, query, derivatives=args.derivatives))


def _jobs(args: Args, atlases: list[AtlasSpec]) -> list[Job]:
    from brainflow.prepare import find_runs
    from brainflow.prepare.atlas import check_space
    from brainflow.prepare.run import jobs_for

    query, template = _query(args), _template(args)
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
    return jobs_for(runs, kind=args.input, settings=_settings(args), atlases=atlases, work=_work(args))


def _query(args: Args) -> Query:
    from brainflow.prepare import Query, is_hcp
    from brainflow.prepare.confounds import AROMA_IMAGE
    from brainflow.prepare.hcp import SPACES

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


def _template(args: Args) -> str:
    """The template that atlases have to be in; "" if any will do."""
    return "" if args.allow_space_mismatch else _query(args).wanted_space


def _settings(args: Args) -> Settings:
    from brainflow.prepare import CleanSettings, EventSettings, Rules, Settings, is_hcp

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
