"""List recipes for public data: where it is, what it takes, and the commands from download to pretraining.

A recipe prints what to type. Nothing is downloaded by this verb; `aws` and `hf` are the clients of Amazon S3
(`pip install awscli`) and of the Hugging Face hub (`pip install huggingface_hub`).

Examples
--------
  brainflow recipes
  brainflow recipes fbert-corpus
  brainflow recipes fbert-corpus --json
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from dataclasses import dataclass
from typing import Annotated

import tyro

from brainflow.cli.usage import WrongUsage

_BITS_A_SECOND = 100e6
_GB = 1e9
_PRETRAIN = "brainflow pretrain store --framework csm --out run"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One public source of data.

    Attributes
    ----------
    about
        What it is.
    source
        URL.
    licence
        Who may do what with it.
    layout
        What lies where after the download.
    commands
        To be typed one after the other in an empty directory.
    amount
        What `download`, `store` and `time` are for: all of it, or one participant.
    download, store
        Bytes.
    sizes
        How these were found.
    time
        Of one core, to ingest or prepare; measured on made-up data of the real shape.
    notes
        What a user has to know.
    """

    about: str
    source: str
    licence: str
    layout: str
    commands: tuple[str, ...]
    amount: str
    download: float
    store: float
    sizes: str
    time: str
    notes: tuple[str, ...] = ()


RECIPES: dict[str, Recipe] = {
    "fbert-corpus": Recipe(
        about="27,835 recordings of 9,578 people from 162 OpenNeuro data sets, 450 regions",
        source="https://huggingface.co/datasets/Marraffini-Giovanni/fbert-corpus",
        licence="that of each data set, in licenses.json; the store keeps them in its provenance",
        layout="fbert-corpus/{windows.npy,window_to_recording.npy,recordings.json,licenses.json}, "
        "sidecars/<dataset>/**/*_bold.json",
        commands=(
            "hf download Marraffini-Giovanni/fbert-corpus --repo-type dataset --exclude teachers.npy "
            "--local-dir fbert-corpus",
            "for ds in $(grep -o 'ds[0-9]*/' fbert-corpus/recordings.json | tr -d / | sort -u); do "
            "aws s3 sync --no-sign-request s3://openneuro.org/$ds sidecars/$ds --exclude '*' "
            "--include '*_bold.json'; done",
            "brainflow ingest fbert fbert-corpus store --sidecars sidecars",
            _PRETRAIN,
        ),
        amount="all",
        download=106_397 * 450 * 80 * 4,
        store=106_397 * 450 * 80 * 2,
        sizes="from the published shapes, without the 11 GB of teachers.npy",
        time="2 min",
        notes=(
            "The corpus does not say its repetition times (0.75 to 3 s), so the second command fetches the "
            "data sets' own sidecars. A recording without one, or with several repetition times, is reported "
            "and left out (exit code 1); a file sidecars/<dataset>/task-<task>_bold.json with "
            '{"RepetitionTime": 2.0} settles it, and --overwrite begins anew.',
            "Each window is a run: how far the windows of a recording lie apart is not published.",
            "Band-passed to 0.01 to 0.08 Hz: a model of it fits data that are prepared so, "
            "--high-pass 0.01 --low-pass 0.08.",
        ),
    ),
    "hcp-ya": Recipe(
        about="HCP Young Adult S1200: about 1,100 people at rest and in 7 tasks, TR 0.72 s, as CIFTI",
        source="https://www.humanconnectome.org/study/hcp-young-adult",
        licence="HCP open access data use terms: accept them, and take the AWS keys that come with them",
        layout="HCP1200/<subject>/MNINonLinear/Results/<run>/"
        "{<run>_Atlas_MSMAll.dtseries.nii,Movement_Regressors.txt,EVs/*.txt}",
        commands=(
            "aws s3 sync s3://hcp-openaccess/HCP_1200/100307/MNINonLinear/Results "
            "HCP1200/100307/MNINonLinear/Results --exclude '*' --include '?fMRI_*_Atlas_MSMAll.dtseries.nii' "
            "--include '*/Movement_Regressors.txt' --include '*/EVs/*.txt'",
            "brainflow prepare HCP1200 out participant group --input cifti --hcp-image Atlas_MSMAll "
            "--atlas schaefer-400+tian-s3 --confounds motion",
            "brainflow pretrain out/ds-HCP1200_atlas-Schaefer400TianS3.zarr --framework csm --out run",
        ),
        amount="one participant",
        download=(4 * 1200 + 2 * 1940) * 91_282 * 4,
        store=(4 * 1200 + 2 * 1940) * 450 * 2,
        sizes="from the numbers of volumes (1,200 in each of 4 resting runs; 1,940 in 7 tasks, twice) and of "
        "grayordinates; files at 3 T only",
        time="35 s",
        notes=(
            "Repeat the first command with other subjects, prepare them, and remove their images: the "
            "participant level keeps what is done, the group level gathers it.",
            "The 20 states of the tasks become labelled segments (--events-preset hcp is chosen by itself).",
        ),
    ),
    "openneuro-fmriprep": Recipe(
        about="fMRIPrep derivatives of OpenNeuro data sets; here ds000102, 26 people in a flanker task",
        source="https://github.com/OpenNeuroDerivatives",
        licence="CC0 for most data sets; dataset_description.json of each says it",
        layout="ds000102/sub-*/func/*_events.tsv, ds000102/derivatives/fmriprep/sub-*/func/"
        "*_space-MNI152NLin2009cAsym*_desc-preproc_bold.nii.gz and *_desc-confounds_timeseries.tsv",
        commands=(
            "aws s3 sync --no-sign-request s3://openneuro.org/ds000102 ds000102 --exclude '*' "
            "--include '*_events.tsv' --include '*_bold.json' --include dataset_description.json",
            "aws s3 sync --no-sign-request s3://openneuro-derivatives/fmriprep/ds000102-fmriprep "
            "ds000102/derivatives/fmriprep --exclude '*' --include dataset_description.json "
            "--include '*_space-MNI152NLin2009cAsym*_desc-preproc_bold.*' --include '*_desc-confounds_*'",
            "brainflow prepare ds000102 out participant group --atlas schaefer-400+tian-s3",
            "brainflow pretrain out/ds-ds000102_atlas-Schaefer400TianS3.zarr --framework csm --out run",
        ),
        amount="one participant of ds000102 (2 runs of 146 volumes)",
        download=2 * 146 * 97 * 115 * 97 * 4,
        store=2 * 146 * 450 * 2,
        sizes="at most: volumes of 97 × 115 × 97 voxels in float32 before compression",
        time="11 s",
        notes=(
            "For another data set write its number in place of ds000102, in all commands.",
            "fMRIPrep 20.2.0 resampled sheared images wrongly. `prepare` knows such a run by its raw image: "
            "for data of that version fetch these too, with --include '*_bold.nii.gz' in the first command.",
        ),
    ),
    "xcpd": Recipe(
        about="XCP-D's parcel time series: your own output, or a released one, such as those of ABCD and HBN",
        source="https://xcp-d.readthedocs.io",
        licence="that of the data set; ABCD needs a data use agreement",
        layout="xcp_d/sub-*/[ses-*/]func/*_atlas-4S456Parcels_*timeseries.{tsv,ptseries.nii}, "
        "their .json, *_outliers.tsv",
        commands=(
            "brainflow ingest xcpd xcp_d store --atlas 4S456Parcels --normalise zscore",
            _PRETRAIN,
        ),
        amount="1,000 volumes",
        download=1000 * 456 * 18,
        store=1000 * 456 * 2,
        sizes="a table has about 18 characters a number, a .ptseries.nii 4 bytes",
        time="under 1 s",
        notes=(
            "Outliers are censored; where XCP-D removed them from the series, they are put back, "
            "interpolated, so that time is even. Where there is no outliers.tsv nothing is known of them.",
            "Parcels that XCP-D left empty (n/a) become 0, and the output names them.",
        ),
    ),
    "learning-from-brains": Recipe(
        about="the tars of Thomas, Ré & Poldrack 2022: 11,980 runs of 34 data sets in DiFuMo-1024, and two "
        "decoding data sets, HCP and MDTB",
        source="https://github.com/athms/learning-from-brains",
        licence="that of the data sets; the HCP's has its own terms",
        layout="learning-from-brains/data/{upstream,downstream}/<dataset>/ds-*_sub-*_task-*.tar",
        commands=(
            "git clone --depth 1 https://github.com/athms/learning-from-brains",
            "brainflow ingest tar learning-from-brains/data/upstream/*/*.tar --store store --parcellation "
            "DiFuMo-1024",
            "brainflow ingest tar learning-from-brains/data/downstream/HCP/*.tar --store hcp --parcellation "
            "DiFuMo-1024 --split split.json --validation-subjects 10 --test-subjects 20",
            _PRETRAIN,
        ),
        amount="1,000 volumes",
        download=1000 * 1024 * 4,
        store=1000 * 1024 * 2,
        sizes="from the shapes; the whole was not downloaded by us",
        time="under 1 s",
        notes=(
            "Pickles are read by a restricted reader that runs no code.",
            "Runs are z-scored, detrended and cleaned as `brainflow prepare` does it by default.",
        ),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of `brainflow recipes`."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")] = ""
    """The recipe to describe; all are listed if none is given."""
    json: bool = False
    """Print JSON."""


def run(args: Args) -> int:
    """Print the list, or one recipe."""
    if args.name and args.name not in RECIPES:
        near = difflib.get_close_matches(args.name, RECIPES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise WrongUsage(f"name: got {args.name!r}, expected one of {', '.join(RECIPES)}{hint}")
    if args.json:
        chosen = [args.name] if args.name else list(RECIPES)
        print(json.dumps({name: dataclasses.asdict(RECIPES[name]) for name in chosen}, indent=1))
    elif args.name:
        print("\n".join(describe(RECIPES[args.name])))
    else:
        width = max(map(len, RECIPES)) + 2
        for name, recipe in RECIPES.items():
            print(f"{name:{width}}{recipe.about}")
    return 0


def describe(recipe: Recipe) -> list[str]:
    """Return lines that say what a recipe is, what it takes, and what to type."""
    seconds = 8 * recipe.download / _BITS_A_SECOND
    download = f"{seconds / 60:.0f} min" if seconds >= 60 else f"{seconds:.1g} s"
    lines = [
        recipe.about,
        f"source    {recipe.source}",
        f"licence   {recipe.licence}",
        f"takes     {recipe.amount}: {_size(recipe.download)} to download ({download} at 100 Mbit/s), "
        f"{_size(recipe.store)} as a store ({recipe.sizes}); {recipe.time} of one core to ingest or prepare",
        f"layout    {recipe.layout}",
        "",
        *(f"  {command}" for command in recipe.commands),
    ]
    return [*lines, *(f"\n{note}" for note in recipe.notes)]


def _size(size: float) -> str:
    return f"{size / _GB:.1f} GB" if size >= 0.95 * _GB else f"{size / 1e6:.1f} MB"
