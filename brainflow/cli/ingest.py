"""Turn recorded runs into a store.

They come as released WebDataset tars, array files that a TOML file lists, XCP-D's time series, the F-BERT
corpus, or another store. `brainflow recipes` lists public data.

Nothing is scaled unless it is asked for, with --normalise (arrays: `normalise` in the TOML file): `zscore`
z-scores each network of a run, `spatial` also takes away mean and SD over networks at each volume, `gsr` also
regresses out the global signal. What was done, and how the runs were scaled before, is said.

Examples
--------
  brainflow ingest tar runs/*.tar store --parcellation DiFuMo-1024
  brainflow ingest tar hcp/*.tar store --split split.json --validation-subjects 5 --test-subjects 10
  brainflow ingest arrays runs.toml --store store
  brainflow ingest xcpd xcp_d store --atlas 4S456Parcels --normalise zscore
  brainflow ingest fbert fbert-corpus store --sidecars sidecars
  brainflow ingest store store spatial --normalise spatial
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from brainflow.cli.usage import WrongUsage
from brainflow.data.splits import split_runs
from brainflow.progress import progress_bar
from brainflow.storage import BoldStore
from brainflow.storage.ingest.arrays import ingest_arrays
from brainflow.storage.ingest.session import IngestReport
from brainflow.storage.ingest.stores import ingest_store
from brainflow.storage.ingest.webdataset import ingest_tar
from brainflow.storage.normalise import Kind
from brainflow.storage.text import counted, printable

_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class Tar:
    """Read WebDataset tars of pickled runs or trials; pickles are read without running code from them.

    A tar that cannot be read is reported with its reason, and the others are written.
    """

    # One argument for both: with --store the last word is a tar, too.
    paths: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SRC [SRC ...] STORE")]
    """Tar files, then the store; with --store, tar files only. Runs are added if the store exists."""
    store: str | None = None
    """The store, in place of the last positional argument."""
    parcellation: str = ""
    """Name of the parcellation, kept in a new store."""
    normalisation: str = ""
    """Normalisation already applied to the tars' runs, in words; kept in a new store."""
    normalise: Kind = "none"
    """What to do to each run."""
    dtype: Literal["float16", "float32", "int16", "int8"] = "float16"
    """Element type of a new store."""
    compression: Literal["zstd"] | None = None
    """Compress a new store; it is then read through Zarr, which is slower by far."""
    overwrite: bool = False
    """Replace the store."""
    split: str | None = None
    """Also split the store by subject, as the released system does, and write the split to this file."""
    validation_subjects: int = 0
    """Subjects of each dataset for validation, with --split."""
    test_subjects: int = 0
    """Subjects of each dataset for the test, with --split."""
    split_seed: int = 0
    """Seed of the draw of subjects."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True, kw_only=True)
class Arrays:
    """Read runs from .npy, .npz, .mat, .csv, .tsv, .h5 or .parquet files."""

    config: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG.toml")]
    """Which files are which runs; see docs/format.md."""
    store: str
    """The store. Runs are added if it exists."""
    overwrite: bool = False
    """Replace the store."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True, kw_only=True)
class Store:
    """Copy the runs of a store, with their labels and all else that is known of them, into another one."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """Store to read."""
    store: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")]
    """Store to write. Runs are added if it exists."""
    normalise: Kind = "none"
    """What to do to each run. What `spatial` and `gsr` took away cannot be put back."""
    overwrite: bool = False
    """Replace the store."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True, kw_only=True)
class Xcpd:
    """Read the parcel time series that XCP-D wrote, .tsv or .ptseries.nii, with its sidecars and outliers.

    Outliers are censored; where XCP-D removed them, they are put back, interpolated. Empty parcels become 0.
    """

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """XCP-D's output."""
    store: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")]
    """Store to write. Runs are added if it exists."""
    atlas: str = ""
    """Label of the parcellation, such as 4S456Parcels; needed if there are several."""
    space: str = ""
    """Space of the series, such as fsLR; needed if there are several."""
    dataset: str = ""
    """Name of the dataset in the keys of runs; by default the name of its folder."""
    normalise: Kind = "none"
    """What to do to each run."""
    dtype: Literal["float16", "float32", "int16", "int8"] = "float16"
    """Element type of a new store."""
    overwrite: bool = False
    """Replace the store."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True, kw_only=True)
class Fbert:
    """Read the F-BERT corpus: windows.npy, window_to_recording.npy, recordings.json and licenses.json.

    Each window becomes a run. The repetition times are not in the corpus, but in the data sets' own sidecars.
    """

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """The corpus, as downloaded."""
    store: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")]
    """Store to write. Runs are added if it exists."""
    sidecars: Path
    """Directory with one folder a data set (ds000030, …) and its _bold.json files anywhere below."""
    dtype: Literal["float16", "float32", "int16", "int8"] = "float16"
    """Element type of a new store."""
    overwrite: bool = False
    """Replace the store."""
    json: bool = False
    """Print one JSON object."""


Args = (
    # Else tyro would call options by their subcommand, --tar.store.
    Annotated[Tar, tyro.conf.subcommand("tar", prefix_name=False)]
    | Annotated[Arrays, tyro.conf.subcommand("arrays", prefix_name=False)]
    | Annotated[Store, tyro.conf.subcommand("store", prefix_name=False)]
    | Annotated[Xcpd, tyro.conf.subcommand("xcpd", prefix_name=False)]
    | Annotated[Fbert, tyro.conf.subcommand("fbert", prefix_name=False)]
)

_SOURCES = {Store: "run", Fbert: "recording"}


def run(args: Tar | Arrays | Store | Xcpd | Fbert) -> int:
    """Ingest, print what was written, and return 1 if a source was bad."""
    if isinstance(args, Arrays):
        store = args.store
        with progress_bar("files", quiet=args.json) as progress:
            report = ingest_arrays(args.config, store, overwrite=args.overwrite, progress=progress)
    elif isinstance(args, Store):
        store = args.store
        with progress_bar("runs", quiet=args.json) as progress:
            report = ingest_store(
                args.source, store, normalise=args.normalise, overwrite=args.overwrite, progress=progress
            )
    elif isinstance(args, Xcpd):
        store = args.store
        with progress_bar("runs", quiet=args.json) as progress:
            report = _xcpd(args, progress)
    elif isinstance(args, Fbert):
        store = args.store
        with progress_bar("recordings", quiet=args.json) as progress:
            report = _fbert(args, progress)
    else:
        *sources, store = args.paths if args.store is None else (*args.paths, args.store)
        if not sources:
            raise WrongUsage("ingest tar: expected one or more tars and then the store: SRC [SRC ...] STORE")
        if args.normalise != "none" and args.normalisation:
            raise WrongUsage(
                "--normalisation, --normalise: got both, expected one: the first says what was done to the "
                "tars' runs already, the second what is to be done"
            )
        sizes = _split_sizes(args)
        with progress_bar("tars", quiet=args.json) as progress:
            report = _tar(args, sources, store, progress)
        if args.split is not None and report.runs:
            opened = BoldStore.open(store)
            split_runs(
                opened.runs, sizes=sizes, by="subject", seed=args.split_seed, snapshot=opened.snapshot
            ).save(args.split)
    _show(report, store, args.json, _SOURCES.get(type(args), "file"))
    return 0 if report.ok else 1


def _tar(args: Tar, sources: list[str], store: str, progress: Callable[[int, int], None]) -> IngestReport:
    return ingest_tar(
        sources,
        store,
        overwrite=args.overwrite,
        progress=progress,
        dtype=args.dtype,
        parcellation=args.parcellation,
        normalisation=args.normalisation,
        normalise=args.normalise,
        compression=args.compression,
    )


def _xcpd(args: Xcpd, progress: Callable[[int, int], None]) -> IngestReport:
    from brainflow.prepare.xcpd import ingest_xcpd

    return ingest_xcpd(
        args.source,
        args.store,
        atlas=args.atlas,
        space=args.space,
        dataset=args.dataset,
        dtype=args.dtype,
        normalise=args.normalise,
        overwrite=args.overwrite,
        progress=progress,
    )


def _fbert(args: Fbert, progress: Callable[[int, int], None]) -> IngestReport:
    from brainflow.prepare.fbert import ingest_fbert

    return ingest_fbert(
        args.source,
        args.store,
        sidecars=args.sidecars,
        dtype=args.dtype,
        overwrite=args.overwrite,
        progress=progress,
    )


def _split_sizes(args: Tar) -> dict[str, int]:
    """Return subjects of each part of the split; checked before anything is read."""
    asked = {"validation": args.validation_subjects, "test": args.test_subjects}
    if args.split is None and any(asked.values()):
        raise WrongUsage(
            "--split: got none, but subjects for its parts; name the file to write, --split FILE"
        )
    if args.split is not None and (min(asked.values()) < 0 or not any(asked.values())):
        raise WrongUsage(
            f"--validation-subjects, --test-subjects: got {asked['validation']}, {asked['test']}, expected "
            "numbers of subjects, at least one of them above 0"
        )
    return {part: count for part, count in asked.items() if count}


def _show(report: IngestReport, store: str, as_json: bool, sources: str) -> None:
    if as_json:
        print(json.dumps({"store": store, "ok": report.ok, **dataclasses.asdict(report)}, indent=1))
        return
    for reason in report.failures.values():
        print(f"FAILED {printable(reason)}")
    for key, what in list(report.notes.items())[:_SHOWN]:
        print(f"NOTE {printable(key)}: {printable(what)}")
    if len(report.notes) > _SHOWN:
        print(f"… and so for {counted(len(report.notes) - _SHOWN, 'run')} more (--json names all)")
    print_rounded(report)
    _print_scale(report, store)
    print(
        f"{counted(len(report.runs), 'run')} written to {store} from {counted(report.sources, sources)}; "
        f"{len(report.failures)} bad"
    )
    if report.runs:
        print(f"the store now holds {counted(len(BoldStore.open(store).runs), 'run')}")


def _print_scale(report: IngestReport, store: str) -> None:
    """Print how the runs were scaled, and what was done to that; at most ten runs by name."""
    notes = report.scale.notes
    for key, what in list(notes.items())[:_SHOWN]:
        print(f"SCALE {printable(key)}: {what}")
    if len(notes) > _SHOWN:
        print(f"… and so for {counted(len(notes) - _SHOWN, 'run')} more (--json names all)")
    if report.runs:
        print(printable(report.scale.said(BoldStore.open(store).attributes["normalisation"])))


def print_rounded(report: IngestReport) -> None:
    """Print the runs that rounding to the element type of the store changed; at most ten by name."""
    for key, what in list(report.rounded.items())[:_SHOWN]:
        print(f"ROUNDED {printable(key)}: {what}")
    if report.rounded:
        print(
            f"{len(report.rounded)} of {counted(len(report.runs), 'run')} "
            f"lost more than 0.1 % of a standard deviation "
            "to rounding; z-score the runs (--normalise), or choose dtype float32"
        )
