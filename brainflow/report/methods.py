"""What was done to prepared runs, as a paragraph for a paper, with the works that it cites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from brainflow.prepare.gather import normalised

_WORKS = {
    "fMRIPrep": "Esteban et al. 2019, Nature Methods 16:111, doi:10.1038/s41592-018-0235-4",
    "HCP": "Glasser et al. 2013, NeuroImage 80:105, doi:10.1016/j.neuroimage.2013.04.127",
    "nilearn": "Nilearn contributors, doi:10.5281/zenodo.8397156",
    "Schaefer": "Schaefer et al. 2018, Cerebral Cortex 28:3095, doi:10.1093/cercor/bhx179",
    "Tian": "Tian et al. 2020, Nature Neuroscience 23:1421, doi:10.1038/s41593-020-00711-6",
    "DiFuMo": "Dadi et al. 2020, NeuroImage 221:117126, doi:10.1016/j.neuroimage.2020.117126",
    "Glasser": "Glasser et al. 2016, Nature 536:171, doi:10.1038/nature18933",
    "AAL": "Tzourio-Mazoyer et al. 2002, NeuroImage 15:273, doi:10.1006/nimg.2001.0978",
    "displacement": "Power et al. 2012, NeuroImage 59:2142, doi:10.1016/j.neuroimage.2011.10.018",
    "regression": "Lindquist et al. 2019, Human Brain Mapping 40:2358, doi:10.1002/hbm.24528",
    "BIDS": "Gorgolewski et al. 2016, Scientific Data 3:160044, doi:10.1038/sdata.2016.44",
}
_NORMALISED = {
    "zscore": "Each parcel's time series was z-scored within the run.",
    "spatial": "Each parcel's time series was z-scored within the run; mean and standard deviation over "
    "parcels were removed at each volume, and parcels were z-scored again.",
    "gsr": "Each parcel's time series was z-scored within the run, the mean over parcels was regressed out, "
    "and parcels were z-scored again.",
}


def methods(
    done: Sequence[Mapping[str, Any]],
    networks: Mapping[str, int],
    makers: Sequence[Mapping[str, Any]],
    *,
    runs: int,
) -> tuple[str, list[str]]:
    """Paragraph and references.

    Parameters
    ----------
    done
        Records of the runs that were prepared, at least one.
    networks
        Number of networks of each atlas.
    makers
        `Name` and perhaps `Version` of what made the images, as `GeneratedBy` of their data sets says it.
    runs
        Number of runs that were found.
    """
    recipe, works = done[0]["recipe"], dict.fromkeys(["BIDS"])
    clean, rules = recipe["clean"], recipe["rules"]
    pipelines = [f"{one['Name']} {one.get('Version', '')}".strip() for one in makers if one.get("Name")]
    works |= dict.fromkeys(key for key in ("fMRIPrep", "HCP") for name in pipelines if key in name)
    by = f" by {' and '.join(pipelines)}" if pipelines else ""
    space = f" in {recipe['space']}" if recipe["space"] else ""
    atlases = " and ".join(f"{count} parcels of {label}" for label, count in networks.items())
    works |= dict.fromkeys(key for key in _WORKS for label in networks if key in label)
    ours = import_module("brainflow").__version__
    text = [
        f"BOLD {_IMAGES[recipe['kind']]}{space} that were preprocessed{by} were averaged in the {atlases} "
        f"with brainflow {ours} and nilearn {_version('nilearn')}."
    ]
    works |= dict.fromkeys(["nilearn"])
    if recipe["kind"] == "volume" and clean["smoothing_fwhm"]:
        text.append(f"Volumes were smoothed with a Gaussian kernel of {clean['smoothing_fwhm']:g} mm (FWHM).")
    text += _cleaning(clean, done[0]["confounds"])
    if done[0]["confounds"]:
        works |= dict.fromkeys(["regression"])
    text.append(_NORMALISED.get(normalised(clean), "Time series were not normalised."))
    if sum(record["censored"] for record in done):
        text.append("Censored volumes took no part in this and hold values interpolated in time.")
    limits = [f"fewer than {rules['min_volumes']} volumes that were not censored"]
    if rules["max_mean_fd"] is not None:
        limits.append(f"a mean framewise displacement above {rules['max_mean_fd']:g} mm")
        works |= dict.fromkeys(["displacement"])
    text.append(
        f"Runs with {' or '.join(limits)} were left out; {len(done)} of {runs} runs of "
        f"{len({record['entities'].get('sub') for record in done})} participants remained."
    )
    return " ".join(text), [_WORKS[key] for key in works]


_IMAGES = {"volume": "volumes", "cifti": "grayordinates", "gifti": "surfaces"}


def _cleaning(clean: Mapping[str, Any], confounds: Sequence[str]) -> list[str]:
    """Sentences on trends, filters and confounds, in the order in which nilearn deals with them."""
    done = ["linear trends were removed"] if clean["detrend"] else []
    cosines = any(name.startswith("cosine") for name in confounds)
    high_pass = None if cosines else clean["high_pass"]
    bounds = [
        f"{kind} at {value:g} Hz"
        for kind, value in (("high-pass", high_pass), ("low-pass", clean["low_pass"]))
        if value
    ]
    if bounds:
        done.append(f"series and confounds were filtered ({' and '.join(bounds)}, Butterworth)")
    if confounds:
        done.append(f"{len(confounds)} confounds were regressed out ({', '.join(confounds)})")
    sentence = "; ".join(done)
    dropped = clean["dummy_scans"]
    first = {0: [], -1: ["Volumes that were marked as non-steady were dropped."]}.get(
        dropped, [f"The first {dropped} volumes of each run were dropped."]
    )
    return [*first, *([f"{sentence[0].upper()}{sentence[1:]}."] if sentence else [])]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"
