"""Arguments of `brainflow prepare`, and what they mean for the modules that prepare runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from brainflow.storage.columns import shown
from brainflow.storage.ingest.limits import TEXT_BYTES, regular_size

if TYPE_CHECKING:
    from brainflow.prepare import Query, Settings


# Aliases are the names that fMRIPrep and MRIQC have for the same options.
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
    session_id: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--session-label"])] = ()
    """Sessions, with or without `ses-`."""
    task_id: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["-t"])] = ()
    """Tasks, with or without `task-`."""
    bids_filter_file: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """JSON as fMRIPrep takes it: `{"bold": {"acquisition": "mb", "run": [1, 2], "direction": null}}` takes
    these values; null is for no value, "*" for any."""
    derivatives: Annotated[tuple[Path, ...], tyro.conf.arg(aliases=["-d"])] = ()
    """Further directories with derivatives or event files."""
    dataset: str = ""
    """Name of the dataset in the keys of runs; by default the name of its folder."""
    input: Literal["volume", "cifti", "gifti"] = "volume"
    """Images to take: volumes, CIFTI .dtseries.nii, or pairs of GIFTI .func.gii."""
    space: str = ""
    """Their space, such as MNIPediatricAsym:cohort-3; by default MNI152NLin2009cAsym, fsLR or fsaverage5."""
    res: str = ""
    """Their resolution (`res-` or `den-`), where there are several; `native` for images without one."""
    atlas: tuple[str, ...] = ()
    """Parcellations: a name (`brainflow atlases` lists them), a path, or LABEL=PATH; `a+b` joins two into
    one; several are done in one pass."""
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
    normalise: Literal["zscore", "spatial", "gsr", "none"] = "zscore"
    """Z-score each parcel and run (`zscore`); then take away mean and SD over parcels at each volume, or
    regress out the mean over parcels, and z-score again (`spatial`, `gsr`)."""
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
    mem_mb: int | None = None
    """Most memory of all workers together in MB; fewer are started where it would not do."""
    work_dir: Annotated[Path | None, tyro.conf.arg(aliases=["-w"])] = None
    """Where parts lie until they are gathered; both levels need it. By default OUTPUT_DIR/work."""
    skip_bids_validator: bool = False
    """Taken for the sake of other BIDS Apps' command lines: no validator is run in any case."""
    report: bool = True
    """Write the quality report at the group level."""
    dry_run: bool = False
    """Print what would be done, and stop."""
    slurm: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write a SLURM array script with one job a participant, and stop."""
    submit: Literal["no", "slurm", "local"] = "no"
    """Submit one job a participant through submitit, and wait for them; `local` starts them here."""


def query_of(args: Args) -> Query:
    """Return which runs to look for.

    Raises
    ------
    ValueError
        If an image of the HCP is asked for in a folder that is not the HCP's.
    """
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
        participants=labels(args.participant_label, "sub"),
        tasks=labels(args.task_id, "task"),
        sessions=labels(args.session_id, "ses"),
        dataset=args.dataset,
        filters=filters_of(args),
    )


_LONG = dict(
    zip(
        ("subject", "session", "task", "acquisition", "ceagent", "reconstruction", "direction"),
        ("sub", "ses", "task", "acq", "ce", "rec", "dir"),
        strict=True,
    )
) | {name: name for name in ("run", "echo", "part")}


def filters_of(args: Args) -> dict[str, tuple[str | None, ...]]:
    """Return values of entities that `--bids-filter-file` asks for.

    Raises
    ------
    ValueError
        If the file is no JSON of that kind, or filters by something that a run's name does not say.
    """
    path = args.bids_filter_file
    if path is None:
        return {}
    try:
        regular_size(path, TEXT_BYTES)
        content = json.loads(path.read_text(encoding="utf-8"))
        bold = dict(content.get("bold", {}))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"bids_filter_file: {path}: is no JSON object of objects ({error})") from error
    # Filter files say these of every run, and only such runs are looked for.
    bold = {name: value for name, value in bold.items() if (name, value) not in _ALWAYS}
    filters: dict[str, tuple[str | None, ...]] = {}
    for name, value in bold.items():
        values = value if isinstance(value, list) else [value]
        if name not in _LONG or any(
            isinstance(one, bool) or not isinstance(one, str | int | None) for one in values
        ):
            raise ValueError(
                f"bids_filter_file: {path}: bold has {shown(name)}: {shown(value)}, expected one of "
                f"{', '.join(_LONG)} with a text, a whole number, null or a list of these"
            )
        filters[_LONG[name]] = tuple(one if one is None else str(one) for one in values)
    return filters


_ALWAYS = [("datatype", "func"), ("suffix", "bold")]


def template_of(args: Args) -> str:
    """Return the template that atlases have to be in; "" if any will do."""
    return "" if args.allow_space_mismatch else query_of(args).wanted_space


def settings_of(args: Args) -> Settings:
    """Return how runs are cleaned, left out and labelled."""
    from brainflow.prepare import CleanSettings, EventSettings, Rules, Settings, is_hcp

    clean = CleanSettings(
        confounds=args.confounds,
        detrend=args.detrend,
        high_pass=args.high_pass or None,
        low_pass=args.low_pass or None,
        normalise=args.normalise,
        # Surfaces are not smoothed here, and their recipe is not to say so.
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


def work_of(args: Args) -> Path:
    """Return where parts and records lie; absolute, since jobs of a cluster start elsewhere."""
    return (args.work_dir or args.output_dir / "work").absolute()


def labels(given: tuple[str, ...], prefix: str) -> tuple[str, ...]:
    """Return labels with or without their prefix, such as `sub-`, as labels without it."""
    return tuple(label.removeprefix(f"{prefix}-") for label in given)
