"""The group level: prepared runs → one store an atlas; their order does not change a byte."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from brainflow.prepare.atlas import AtlasSpec
from brainflow.prepare.description import bids_uri
from brainflow.prepare.events import EventSettings
from brainflow.prepare.files import RunFiles, passes
from brainflow.prepare.parcels import coordinates, networks_of
from brainflow.prepare.records import DONE, FAILED, parts_of, read_records
from brainflow.storage.files import replace_durably
from brainflow.storage.ingest.session import IngestReport
from brainflow.storage.normalise import APPLIED
from brainflow.storage.parts import part_path, read_part
from brainflow.storage.quantise import rounding
from brainflow.storage.text import counted, csv_cell, printable
from brainflow.storage.writer import StoreWriter


def select_records(
    work: Path,
    *,
    participants: Collection[str] = (),
    tasks: Collection[str] = (),
    sessions: Collection[str] = (),
    filters: Mapping[str, Collection[str | None]] | None = None,
) -> list[dict[str, Any]]:
    """Return records of the runs asked for, sorted by key; `filters` as in `Query`.

    Parameters
    ----------
    work
        Where the records lie.
    participants, tasks, sessions
        Labels; all where there are none.
    filters
        Values of other entities, see `passes`.

    Raises
    ------
    FileNotFoundError
        If there are none at all.
    """
    chosen = (("sub", participants), ("task", tasks), ("ses", sessions))
    return [
        record
        for record in read_records(work)
        if all(not wanted or record["entities"].get(name) in wanted for name, wanted in chosen)
        and passes(record["entities"], filters or {})
    ]


def unprepared(records: Sequence[dict[str, Any]], runs: Sequence[RunFiles]) -> list[dict[str, Any]]:
    """Return records for runs of the dataset that have none: their job never began, or died before."""
    # By entities: keys begin with the data set's name, which an option may change.
    known = {tuple(sorted(record["entities"].items())) for record in records}
    return [
        {
            "key": run.key,
            "dataset": run.dataset,
            "entities": run.entities,
            "status": FAILED,
            "reason": "was not prepared; run the participant level for it, or leave it out at both levels",
        }
        for run in runs
        if tuple(sorted(run.entities.items())) not in known
    ]


def check_recipes(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the recipe that all prepared runs have in common.

    Raises
    ------
    ValueError
        If they were prepared with different settings, naming two runs and what differs; or if none is there.
    """
    done = [record for record in records if record["status"] == DONE]
    if not done:
        raise ValueError("no run was prepared, so there is nothing to gather; see the reasons in runs.tsv")
    first = done[0]
    for record in done[1:]:
        if record["recipe"] != first["recipe"]:
            # `get`: records of an older version may lack a setting.
            differing = [
                name for name in first["recipe"] if first["recipe"][name] != record["recipe"].get(name)
            ]
            raise ValueError(
                f"{first['key']} and {record['key']} were prepared with different {', '.join(differing)}; "
                "run the participant level again with one set of options (runs that fit are not repeated)"
            )
    return dict(first["recipe"])


def store_path(output: Path, dataset: str, atlas: str) -> Path:
    """Return where the store of an atlas lies."""
    return output / f"ds-{dataset}_atlas-{atlas}.zarr"


def gather(
    records: Sequence[dict[str, Any]],
    atlas: AtlasSpec,
    path: Path,
    *,
    work: Path,
    dtype: str = "float16",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> IngestReport:
    """Write the store of one atlas in one step, replacing an older one.

    Parameters
    ----------
    records
        One for each run; those that are not done are passed over.
    atlas
        The atlas that the runs were prepared with.
    path
        The store.
    work
        Where parts lie.
    dtype
        Element type of the store.
    progress
        Called with (runs done, runs in all).

    Returns
    -------
    IngestReport
        Runs whose part is missing or cannot go in are in `failures`, by their keys.

    Raises
    ------
    ValueError
        If runs were prepared with different settings or atlases, or none can go in.
    """
    recipe = check_recipes(records)
    if recipe["atlases"].get(atlas.label) != atlas.digest:
        raise ValueError(
            f"atlas {atlas.label}: the runs were prepared with another file of this label; run the "
            "participant level again, or give the file that it used"
        )
    done = [record for record in records if record["status"] == DONE]
    names = networks_of(atlas)
    report = IngestReport()
    with StoreWriter.create(
        path,
        networks=len(names),
        dtype=dtype,
        parcellation=atlas.label,
        network_names=names,
        network_coordinates=coordinates(atlas),
        preprocessing={
            **recipe,
            "confound_columns": done[0]["confounds"],
            "hrf_shift": EventSettings(**recipe["events"]).seconds,
        },
        normalisation=APPLIED.get(normalised(recipe["clean"]), ""),
        provenance={"atlas_sha256": atlas.digest, "made_by": "brainflow prepare"},
        overwrite=path.exists(),
    ) as writer:
        for count, record in enumerate(done, 1):
            _add(writer, record["key"], part_path(parts_of(work, atlas.label), record["key"]), report)
            progress(count, len(done))
        # Inside: without a commit an older store stays.
        if not report.runs:
            reason = next(iter(report.failures.values()))
            raise ValueError(
                f"atlas {atlas.label}: none of {counted(len(done), 'run')} can be gathered; "
                f"the first: {reason}"
            )
    return report


def normalised(clean: Mapping[str, Any]) -> str:
    """Return what was done to runs that this version, or one whose setting was `standardize`, prepared."""
    return str(clean.get("normalise", "zscore" if clean.get("standardize") else "none"))


def _add(writer: StoreWriter, key: str, path: Path, report: IngestReport) -> None:
    """Write one part to a store, or note why not; the others go on."""
    try:
        part = read_part(path)
        run = writer.prepare(**part)
    except Exception as error:  # a damaged part fails in any way
        report.failures[key] = " ".join(f"cannot be gathered: {error or type(error).__name__}".split())
        return
    if change := rounding(part["bold"], run.values, run.statistics[0, 1]):
        report.rounded[key] = str(change)
    writer.write(run)
    report.runs.append(key)


def demote(records: Sequence[dict[str, Any]], failures: Mapping[str, str]) -> None:
    """Note in the records of runs that they could not be gathered."""
    for record in records:
        if record["key"] in failures:
            record |= {"status": FAILED, "reason": failures[record["key"]]}


def write_table(records: Sequence[dict[str, Any]], path: Path, roots: Sequence[Path] = ()) -> None:
    """Write one line a run, also for those left out: status, reason, repetition time, motion, tSNR, sources.

    Parameters
    ----------
    records, path
        One for each run, and the table to write.
    roots
        Data sets that the sources, BIDS URIs of the files that were read, are relative to.
    """
    columns = (
        "key",
        "status",
        "reason",
        "volumes",
        "t_r",
        "mean_fd",
        "max_fd",
        "censored",
        "tsnr",
        "segments",
        "notes",
        "sources",
    )
    lines = ["\t".join(columns)]
    for record in records:
        sources = [bids_uri(Path(file), roots) for file in record.get("inputs", [])]
        cells = [{**record, "sources": sources}.get(name) for name in columns]
        lines.append("\t".join(_cell(value) for value in cells))
    replace_durably(path, ("\n".join(lines) + "\n").encode())


def _cell(value: Any) -> str:
    if value is None or value == []:
        return "n/a"
    if isinstance(value, list):
        value = "; ".join(map(str, value))
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    # A tab or a line break in a reason would begin another cell or row.
    return csv_cell(printable(" ".join(text.split()))) or "n/a"
