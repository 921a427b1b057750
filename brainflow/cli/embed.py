r"""Embed runs with a pretrained model: one row a window or run, in a table, a picture and a page.

Images (NIfTI, CIFTI, GIFTI) are cleaned as the model's data were and averaged in the parcels of its atlas;
tables of time series (.npy, .npz, .csv, .tsv, .mat, .h5, .parquet, .ptseries.nii) are normalised, stores are
taken as they are. Each may be a path or a URL (s3://, gs://, hf://, https://). What does not fit the model is
refused, and one bad file stops no other: it is listed with its reason, and the exit code is 1. Prepared time
series are kept beside the table, so that the same command again embeds at once.

Examples
--------
  brainflow embed sub-01_task-rest_bold.nii.gz --from run --atlas schaefer-400 --out emb.parquet
  brainflow embed *_desc-preproc_bold.nii.gz --from owner/name --atlas schaefer-400+tian-s3 \
    --nprocs 8 --per run --out emb.parquet
  brainflow embed s3://openneuro.org/ds000001/sub-01_bold.nii.gz --from run --atlas a.nii.gz --out emb.csv
  brainflow embed store --from run --window 30 --layer last --out emb.npz
  brainflow embed run.npy --t-r 1.5 --from story-small --out emb.csv
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from brainflow.cli.prepare_cluster import absolute
from brainflow.cli.usage import WrongUsage
from brainflow.progress import progress_bar

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from brainflow.prepare.run import Job


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `brainflow embed`."""

    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE…")]
    """Images, tables of time series, or stores; paths or URLs."""
    from_: Annotated[str, tyro.conf.arg(name="from", metavar="MODEL")]
    """Pretrained model: the directory of a `brainflow pretrain` run, `owner/name` on the hub, or
    `story-small`, which ships with the package."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """Table to write: .parquet, .csv, .tsv or .npz."""
    atlas: str | None = None
    """Parcellation of the model, for images: a name (`brainflow atlases`), a path, or several joined by +."""
    t_r: float | None = None
    """Seconds between the time points of tables that have no JSON sidecar."""
    confounds: Literal["auto", "published", "motion", "simple", "scrubbing", "compcor", "aroma", "none"] = (
        "auto"
    )
    """What is regressed out of images: `auto` as for the model's data, or nothing where no table of confounds
    lies beside the image; the table of embeddings says which."""
    window: float | None = None
    """Longest window in seconds: a run is cut into equal windows of at most so much; by default the longest
    that the model was trained on."""
    per: Literal["window", "run"] = "window"
    """One row a window, or a run: the mean over its windows."""
    layer: int | Literal["input", "both", "all", "last"] = "both"
    """States that are read: 0 the embedding, 1, 2, … after so many blocks, `last`, `both` 0 and last side by
    side, `input` the BOLD normalised over networks, `all` these and the input."""
    pooling: Literal["mean", "bins", "moments", "spread", "cls", "last", "first"] = "mean"
    """How one vector is made of a window: the `mean` over time; means of equal time `bins` side by side; mean
    and log-SD (`moments`) or the log-SD alone (`spread`); one state."""
    bins: int = 10
    """Number of time bins."""
    nprocs: Annotated[int, tyro.conf.arg(aliases=["--n-procs"])] = 1
    """Worker processes that prepare images, one thread each."""
    work_dir: Annotated[Path | None, tyro.conf.arg(aliases=["-w"])] = None
    """Where prepared time series are kept; by default OUT without its suffix, and `.work`."""
    parts_only: bool = False
    """Only prepare the images, into the work directory: what a job of a cluster does."""
    submit: Literal["no", "slurm", "local"] = "no"
    """Prepare each image in a job of its own through submitit; `local` starts them here."""
    allow_mismatch: bool = False
    """Go on where parcellation, template, network names, TR or normalisation are not the model's."""
    report: bool = True
    """Make a page with a picture: OUT without its suffix, and `-report/index.html`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is one."""
    json: bool = False
    """Print a summary as one JSON object on stdout; no progress on stderr."""


def run(args: Args) -> int:
    """Embed, write the table, and return 1 if a file could not be used."""
    if not args.images:
        raise WrongUsage("images: got none, expected at least one file or store")
    if args.nprocs < 1:
        raise WrongUsage(f"nprocs: got {args.nprocs}, expected at least 1")
    # torch costs seconds that --help and a wrong command line need not pay
    from brainflow.decoding.embed import embed, plan
    from brainflow.decoding.embeddings import check_output
    from brainflow.prepare.pool import prepare_runs
    from brainflow.storage.text import counted

    # Before the work: a suffix that is not known is told at once.
    check_output(args.out)
    work = (args.work_dir or args.out.with_suffix(".work")).absolute()
    if args.parts_only:
        failures: dict[str, str] = {}
        jobs = plan(
            args.images,
            args.from_,
            atlas=args.atlas,
            confounds=args.confounds,
            work=work,
            allow_mismatch=args.allow_mismatch,
            failures=failures,
        )
        records = prepare_runs([job for job in jobs.values() if not job.is_done()], args.nprocs)
        failures |= {one["key"]: one["reason"] for one in records if one["status"] != "done"}
        print(
            f"{work}: {counted(len(jobs), 'image')} prepared" + (f", {len(failures)} not" if failures else "")
        )
        return _left_out(failures)
    if args.report:
        from brainflow.report.embedding_page import write_embedding_page  # before the work, what it lacks
    with progress_bar("embed", quiet=args.json, at_once=args.nprocs) as progress:
        found = embed(
            args.images,
            args.from_,
            atlas=args.atlas,
            t_r=args.t_r,
            confounds=args.confounds,
            window=args.window,
            per=args.per,
            layer=args.layer,
            pooling=args.pooling,
            bins=args.bins,
            work=work,
            processes=args.nprocs,
            allow_mismatch=args.allow_mismatch,
            device=args.device,
            prepare=prepare_runs if args.submit == "no" else lambda jobs, _: _submitted(args, work, jobs),
            progress=progress,
        )
    found.save(args.out)
    page = None
    if args.report:
        page = write_embedding_page(found, args.out.with_name(f"{args.out.stem}-report"))
    _say(args, found, page)
    # JSON names them already.
    return _left_out({} if args.json else found.failures) or int(bool(found.failures))


def _say(args: Args, found: Any, page: Path | None) -> None:
    """Print what was done."""
    from brainflow.storage.text import counted, printable

    width, files = found.vectors.shape[1], len({row["path"] for row in found.rows})
    if args.json:
        facts = {"out": str(args.out), "page": page and str(page), "rows": len(found.rows), "width": width}
        print(
            json.dumps({**facts, "files": files, "failures": found.failures, "notes": found.notes}, indent=1)
        )
        return
    for note in found.notes:
        print(printable(f"brainflow embed: note: {note}"), file=sys.stderr)
    print(
        printable(
            f"{args.out}: {counted(len(found.rows), 'row')} of {counted(files, 'file')}, "
            f"{counted(width, 'number')} each"
        )
    )
    if page:
        print(printable(f"page: {page}"))


def _left_out(failures: dict[str, str]) -> int:
    """Print what could not be used; 1 if there is any."""
    from brainflow.storage.text import printable

    for name, reason in failures.items():
        print(printable(f"failed: {name}: {reason}"))
    return int(bool(failures))


def _submitted(args: Args, work: Path, jobs: Sequence[Job]) -> Iterator[dict[str, Any]]:
    """Prepare images in jobs of a cluster, one each, and give their records."""
    from brainflow.prepare.cluster import submit
    from brainflow.prepare.pool import worker_bytes
    from brainflow.prepare.records import read_record
    from brainflow.prepare.run import failed_record
    from brainflow.prepare.single import address

    assert args.submit != "no"
    if not jobs:
        return
    options = ["--from", absolute(args.from_), "--atlas", absolute(args.atlas), "--confounds", args.confounds]
    options += ["--out", str(args.out.absolute()), "--work-dir", str(work), "--parts-only"]
    options += ["--allow-mismatch"] if args.allow_mismatch else []
    by_image = {address(job): job for job in jobs}
    words = [sys.executable, "-m", "brainflow", "embed"]
    commands = {image: [*words, image, *options] for image in by_image}
    gigabytes = math.ceil(worker_bytes(jobs) / 1e9) + 1
    for image in submit(commands, work / "jobs", args.submit, gigabytes=gigabytes):
        job = by_image[image]
        record = read_record(work, job.files.key)
        # The record of an earlier command is no answer.
        if record is None or record["fingerprint"] != job.fingerprint():
            record = failed_record(job, f"its job ended without a record; its log is in {work / 'jobs'}")
        yield record
