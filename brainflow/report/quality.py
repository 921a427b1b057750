"""The quality report of a prepared dataset: one HTML file with tables, motion, carpet plots and correlations.

It shows what went in, how much the participants moved, how clean the signal is, and what was left out and
why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from brainflow.report.page import Page, Picture, Section, Table, render
from brainflow.report.quality_figures import carpet, correlation, framewise_displacement, run_overview
from brainflow.storage.files import write_text

if TYPE_CHECKING:
    from brainflow.storage import BoldStore

CARPETS = 6
"""Runs of which a carpet plot is shown: those with the most motion, and the median one."""
CORRELATION_RUNS = 100
"""Runs, evenly spaced, that the correlation matrix is averaged over at most."""
MOVED = 0.5
"""Framewise displacement in mm above which a volume counts as moved."""


def write_quality_report(
    records: Sequence[Mapping[str, Any]], stores: Mapping[str, BoldStore], path: Path, *, dataset: str
) -> Path:
    """Write the report and return its path.

    Parameters
    ----------
    records
        One for each run, from `brainflow prepare`; also of runs that were left out.
    stores
        The gathered store of each atlas.
    """
    done = [record for record in records if record["status"] == "done"]
    out = [record for record in records if record["status"] != "done"]
    hours = sum(record["volumes"] * record["t_r"] for record in done) / 3600
    page = Page(
        title=f"{dataset}: quality of the prepared runs",
        lead=f"{len(done)} of {len(records)} runs are in the store, {len(out)} left out.",
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
            *(_atlas(done, label, store) for label, store in stores.items()),
            _runs(done),
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
    return Section(
        title="Motion",
        text=[
            f"Framewise displacement is above {MOVED} mm in {100 * moved / volumes:.1f} % of the volumes; "
            f"{worst['key']} moved most ({worst['mean_fd']:.2f} mm on average)."
        ],
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


def _atlas(done: Sequence[Mapping[str, Any]], label: str, store: BoldStore) -> Section:
    by_key = {record["key"]: record for record in done}
    keys = store.runs.key.tolist()
    ranked = sorted(range(len(keys)), key=lambda i: -(by_key[keys[i]]["mean_fd"] or 0.0))
    averaged = keys[:: -(-len(keys) // CORRELATION_RUNS)]
    shown = dict.fromkeys([*ranked[: CARPETS - 1], ranked[len(ranked) // 2]])
    flat = Counter({key: record["flat_networks"].get(label, 0) for key, record in by_key.items()})
    notes = [
        f"{key}: {count} networks are constant (outside the recorded field of view)."
        for key, count in (+flat).items()
    ]
    pictures = [
        Picture(
            name=f"correlation-{label}",
            png=correlation([store.run(keys.index(key)) for key in averaged]),
            alt=f"Matrix of correlations between the networks of {label}",
            caption=f"Correlation of networks, averaged over {len(averaged)} of {len(keys)} runs (Fisher z).",
        )
    ]
    for i in shown:
        record = by_key[keys[i]]
        pictures.append(
            Picture(
                name=f"carpet-{label}-{i}",
                png=carpet(store.run(i), record["fd"], store.runs.censor(i), t_r=record["t_r"]),
                alt=f"Carpet plot of {keys[i]}: framewise displacement above, networks by time below",
                caption=f"{keys[i]}: motion and all networks over time; {len(shown)} of {len(keys)} runs "
                f"shown.",
            )
        )
    return Section(title=f"Atlas {label}: {store.networks} networks", notes=notes, pictures=pictures)


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
