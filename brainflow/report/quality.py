"""The quality report of a prepared dataset: one HTML file with tables and pictures.

It shows what went in, how much the participants moved, where the networks lie, what cleaning did, what the
conditions are, what was left out and why; and it says what was done, in a paragraph for a paper.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from brainflow.prepare.records import read_before
from brainflow.prepare.volumes import mean_and_labels
from brainflow.report.page import Page, Picture, Section, Table, render
from brainflow.report.quality_figures import (
    Line,
    carpet,
    correlation,
    framewise_displacement,
    outline,
    responses,
    run_overview,
)
from brainflow.storage.files import write_text
from brainflow.storage.text import counted

if TYPE_CHECKING:
    from brainflow.prepare import AtlasSpec
    from brainflow.storage import BoldStore
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

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
CARPETS = 6
"""Runs of which a carpet plot is shown: those with the most motion, and the median one."""
CORRELATION_RUNS = 100
"""Runs, evenly spaced, that the correlation matrix is averaged over at most."""
MOVED = 0.5
"""Framewise displacement in mm above which a volume counts as moved, as in fMRIPrep."""
UNLIKE = 1.5
"""Standardised DVARS above which a volume counts as unlike the one before it, as in fMRIPrep."""
CONDITIONS = 40
"""Conditions of which mean responses are shown: the most frequent ones."""


def methods(
    done: Sequence[Mapping[str, Any]],
    networks: Mapping[str, int],
    makers: Sequence[Mapping[str, Any]],
    *,
    runs: int,
) -> tuple[str, list[str]]:
    """Return paragraph and references.

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
    # All have the recipe of the first, else they would not have been gathered.
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
    people = counted(len({record["entities"].get("sub") for record in done}), "participant")
    text.append(
        f"Runs with {' or '.join(limits)} were left out; {len(done)} of {counted(runs, 'run')} of {people} "
        "remained."
    )
    return " ".join(text), [_WORKS[key] for key in works]


_IMAGES = {"volume": "volumes", "cifti": "grayordinates", "gifti": "surfaces"}


def _cleaning(clean: Mapping[str, Any], confounds: Sequence[str]) -> list[str]:
    """Return sentences on trends, filters and confounds, in the order in which nilearn deals with them."""
    done = ["linear trends were removed"] if clean["detrend"] else []
    # Cosine terms among the confounds take the filter's place.
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


def write_quality_report(
    records: Sequence[Mapping[str, Any]],
    stores: Mapping[str, BoldStore],
    path: Path,
    *,
    dataset: str,
    atlases: Mapping[str, AtlasSpec],
    work: Path,
    makers: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Write the report and return its path.

    Parameters
    ----------
    records
        One for each run, from `brainflow prepare`; also of runs that were left out.
    stores
        The gathered store of each atlas.
    path
        HTML file to write.
    dataset
        Name of the dataset, for the title.
    atlases
        By the same labels.
    work
        Where the time series before cleaning lie.
    makers
        What made the images, `Name` and `Version`.
    """
    done = [record for record in records if record["status"] == "done"]
    out = [record for record in records if record["status"] != "done"]
    hours = sum(record["volumes"] * record["t_r"] for record in done) / 3600
    page = Page(
        title=f"{dataset}: quality of the prepared runs",
        lead=f"{len(done)} of {counted(len(records), 'run')} are in the store, {len(out)} left out.",
        facts=[
            (str(len(done)), "runs"),
            (str(len({record["entities"].get("sub") for record in done})), "participants"),
            (f"{hours:.1f} h", "of BOLD"),
            (
                ", ".join(f"{t_r:g} s" for t_r in sorted({record["t_r"] for record in done})),
                "repetition times",
            ),
            (_middle(done, "mean_fd", "{:.2f} mm"), "median of the runs' mean motion"),
            (_middle(done, "tsnr", "{:.0f}"), "median temporal SNR"),
        ],
        sections=[
            _left_out(out),
            _tasks(done),
            _motion(done),
            # The first store alone: all have the same segments.
            *(_conditions(store) for store in list(stores.values())[:1]),
            *(_atlas(done, store, atlases[label], work) for label, store in stores.items()),
            _runs(done),
            *([_methods(records, done, stores, makers)] if done else []),
        ],
        footer=_recipe(done),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, render(page))
    return path


def _left_out(out: Sequence[Mapping[str, Any]]) -> Section:
    rows = [[record["key"], record["status"], record["reason"]] for record in out]
    text = ["Excluded by a rule, or failed because a file is missing, damaged or contradicts another."]
    if not rows:
        return Section(title="Left out", text=["No run was left out."])
    table = Table(header=["run", "status", "reason"], rows=rows, prose=(1, 2))
    return Section(title="Left out", text=text, table=table)


def _tasks(done: Sequence[Mapping[str, Any]]) -> Section:
    groups: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for record in done:
        groups.setdefault((record["entities"].get("task", ""), record["t_r"]), []).append(record)
    rows = []
    for (task, t_r), runs in sorted(groups.items()):
        lengths = sorted(record["volumes"] for record in runs)
        sessions = {(record["entities"].get("sub"), record["entities"].get("ses")) for record in runs}
        span = f"{lengths[0]}" if lengths[0] == lengths[-1] else f"{lengths[0]}–{lengths[-1]}"
        segments = sum(record["segments"] for record in runs)
        rows.append([task or "–", f"{t_r:g}", str(len(runs)), str(len(sessions)), span, str(segments)])
    header = ["task", "TR (s)", "runs", "sessions", "volumes", "labelled segments"]
    return Section(title="Tasks", table=Table(header=header, rows=rows))


def _motion(done: Sequence[Mapping[str, Any]]) -> Section:
    known = [record for record in done if record["mean_fd"] is not None]
    if not known:
        return Section(title="Motion", text=["No run has a framewise displacement among its confounds."])
    moved = sum(value > MOVED for record in known for value in record["fd"] if value is not None)
    volumes = sum(len(record["fd"]) for record in known)
    worst = max(known, key=lambda record: record["mean_fd"])
    text = [
        f"Framewise displacement is above {MOVED} mm in {100 * moved / volumes:.1f} % of the volumes; "
        f"{worst['key']} moved most ({worst['mean_fd']:.2f} mm on average)."
    ]
    dvars = [value for record in done for value in record.get("dvars") or () if value is not None]
    if dvars:
        unlike = np.mean(np.array(dvars) > UNLIKE)
        text.append(f"Standardised DVARS is above {UNLIKE} in {100 * unlike:.1f} % of the volumes.")
    return Section(
        title="Motion",
        text=text,
        pictures=[
            Picture(
                name="motion",
                png=framewise_displacement([record["mean_fd"] for record in known], limit=MOVED),
                alt="Histogram of the mean framewise displacement of each run",
                caption="Mean framewise displacement of each run.",
            ),
            Picture(
                name="overview",
                png=run_overview(
                    [record["mean_fd"] for record in known],
                    [record["tsnr"] or 0.0 for record in known],
                ),
                alt="Temporal SNR of each run against its mean framewise displacement",
                caption="Temporal SNR (median over networks, before cleaning) against motion, one dot a run.",
            ),
        ],
    )


def _conditions(store: BoldStore) -> Section:
    """Return counts of each condition, and the mean signal of each network under it."""
    segments, names = store.segments, _names(store)
    shift = store.attributes["preprocessing"].get("hrf_shift", 0)
    labels = segments.columns.get("mental_state", np.zeros(0, str)).tolist()
    counts = Counter(label for label in labels if label)
    if not counts:
        return Section(title="Conditions", text=["No run has labelled segments."])
    subjects, t_r = store.runs.subject, store.runs.t_r
    rows = []
    for label, count in counts.most_common():
        mine = np.flatnonzero(np.array(labels) == label)
        runs = np.unique(segments.run[mine])
        seconds = np.median(segments.length[mine] * t_r[segments.run[mine]])
        people = len(np.unique(subjects[runs]))
        rows.append([label, str(count), str(len(runs)), str(people), f"{seconds:.1f}"])
    shown = [label for label, _ in counts.most_common(CONDITIONS)]
    means, read = _mean_responses(store, labels, shown)
    header = ["condition", "segments", "runs", "participants", "median length (s)"]
    return Section(
        title="Conditions",
        text=[f"Segments are shifted by {shift:g} s for the haemodynamic lag."],
        table=Table(header=header, rows=rows),
        pictures=[
            Picture(
                name="responses",
                png=responses(means, shown, names),
                alt="Mean signal of each network under each condition",
                caption="Mean signal of each network within the segments of each condition, over "
                f"{counted(read, 'run')} with segments; {len(shown)} of {counted(len(counts), 'condition')}.",
            )
        ],
    )


def _mean_responses(
    store: BoldStore, labels: Sequence[str], conditions: Sequence[str]
) -> tuple[np.ndarray, int]:
    """Return means over uncensored volumes of each condition, [conditions, networks]; and the runs read."""
    segments = store.segments
    totals, volumes = np.zeros((len(conditions), store.networks)), np.zeros((len(conditions), 1))
    number = {label: i for i, label in enumerate(conditions)}
    labelled = np.unique(segments.run)
    # Rounded up, so that no more runs are read.
    chosen = labelled[:: -(-len(labelled) // CORRELATION_RUNS)]
    for run in chosen.tolist():
        bold, censor = np.asarray(store.run(run), np.float64), store.runs.censor(run)
        kept = np.ones(len(bold), bool) if censor is None else ~censor
        for k in np.flatnonzero(segments.run == run).tolist():
            if (i := number.get(labels[k])) is not None:
                onset = int(segments.onset[k])
                within = slice(onset, onset + int(segments.length[k]))
                totals[i] += bold[within][kept[within]].sum(axis=0)
                volumes[i] += kept[within].sum()
    return totals / np.maximum(volumes, 1), len(chosen)


def _names(store: BoldStore) -> list[str]:
    return list(store.attributes["network_names"] or map(str, range(1, store.networks + 1)))


def _outline(record: Mapping[str, Any], atlas: AtlasSpec) -> tuple[list[Picture], list[str]]:
    """Return the networks on the mean image of a run, or why they are not shown."""
    if record["recipe"]["kind"] != "volume" or not record.get("inputs"):
        return [], []
    try:
        mean, labels, affine = mean_and_labels(Path(record["inputs"][0]), atlas)
    except (OSError, ValueError) as error:
        return [], [f"The networks are not drawn on an image: {error}."]
    picture = Picture(
        name=f"outline-{atlas.label}",
        png=outline(mean, labels, affine),
        alt=f"Borders of the networks of {atlas.label} on the mean image of a run",
        caption=f"Borders of the networks on the mean of the first volumes of {record['key']}: they have to "
        "lie on the brain, and on its cortex where the atlas does.",
    )
    return [picture], []


def _atlas(done: Sequence[Mapping[str, Any]], store: BoldStore, atlas: AtlasSpec, work: Path) -> Section:
    label, names = atlas.label, _names(store)
    by_key = {record["key"]: record for record in done}
    keys = store.runs.key.tolist()
    ranked = sorted(range(len(keys)), key=lambda i: -(by_key[keys[i]]["mean_fd"] or 0.0))
    averaged = keys[:: -(-len(keys) // CORRELATION_RUNS)]
    # Of few runs the median one is among those that moved most.
    shown = dict.fromkeys([*ranked[: CARPETS - 1], ranked[len(ranked) // 2]])
    flat = Counter({key: record["flat_networks"].get(label, 0) for key, record in by_key.items()})
    # `+` drops what was counted 0.
    notes = [
        f"{key}: {counted(count, 'network is', 'networks are')} constant (outside the recorded field of "
        "view)."
        for key, count in (+flat).items()
    ]
    pictures, failures = _outline(by_key[keys[ranked[len(ranked) // 2]]], atlas)
    notes += failures
    pictures += [
        Picture(
            name=f"correlation-{label}",
            png=correlation([store.run(keys.index(key)) for key in averaged], names),
            alt=f"Matrix of correlations between the networks of {label}",
            caption=f"Correlation of networks, averaged over {len(averaged)} of {counted(len(keys), 'run')} "
            "(Fisher z).",
        )
    ]
    for i in shown:
        record = by_key[keys[i]]
        before = read_before(work, label, keys[i])
        stages = {} if before is None else {"before cleaning": before}
        stages["after cleaning"] = store.run(i)
        known = (("FD (mm)", record["fd"], MOVED), ("DVARS", record.get("dvars"), UNLIKE))
        lines = [Line(label=name, values=values, limit=limit) for name, values, limit in known if values]
        names_of = {
            "FD (mm)": f"framewise displacement with fMRIPrep's limit ({MOVED} mm)",
            "DVARS": f"standardised DVARS with fMRIPrep's limit ({UNLIKE})",
        }
        above = "".join(f"{names_of[line.label]}, " for line in lines)
        pictures.append(
            Picture(
                name=f"carpet-{label}-{i}",
                png=carpet(stages, lines, store.runs.censor(i), names, t_r=record["t_r"]),
                alt=f"Carpet plot of {keys[i]}: {above}networks by time",
                caption=f"{keys[i]}: {above}all networks over time, in standard deviations, "
                f"{' and '.join(stages)}; {len(shown)} of {counted(len(keys), 'run')} shown.",
            )
        )
    return Section(
        title=f"Atlas {label}: {counted(store.networks, 'network')}", notes=notes, pictures=pictures
    )


def _runs(done: Sequence[Mapping[str, Any]]) -> Section:
    rows = [
        [
            record["key"],
            f"{record['t_r']:g}",
            str(record["volumes"]),
            _number(record["mean_fd"], "{:.3f}"),
            _number(record["max_fd"], "{:.2f}"),
            str(record["censored"]),
            _number(record["tsnr"], "{:.0f}"),
            "; ".join(record["notes"]) or "–",
        ]
        for record in done
    ]
    header = ["run", "TR (s)", "volumes", "mean FD (mm)", "max FD (mm)", "censored", "tSNR", "notes"]
    return Section(title="Runs", table=Table(header=header, rows=rows, prose=(7,)))


def _methods(
    records: Sequence[Mapping[str, Any]],
    done: Sequence[Mapping[str, Any]],
    stores: Mapping[str, BoldStore],
    makers: Sequence[Mapping[str, Any]],
) -> Section:
    networks = {label: store.networks for label, store in stores.items()}
    paragraph, works = methods(done, networks, makers, runs=len(records))
    text = ["To be used in papers, in whole or in part.", paragraph]
    return Section(title="Methods", text=text, notes=works)


def _recipe(done: Sequence[Mapping[str, Any]]) -> list[str]:
    if not done:
        return []
    clean = done[0]["recipe"]["clean"]
    settings = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in clean.items())
    return [f"Prepared with: {settings}.", f"Regressed out: {', '.join(done[0]['confounds']) or 'nothing'}."]


def _middle(done: Sequence[Mapping[str, Any]], name: str, form: str) -> str:
    values = [record[name] for record in done if record[name] is not None]
    return form.format(median(values)) if values else "–"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)
