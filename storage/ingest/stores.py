"""Copying the runs of a store into another one, normalised in another way, or beside those of a third."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from ..errors import StoreError
from ..normalise import APPLIED, Kind, kind_of
from ..store import BoldStore
from ..tables import MISSING_INTEGER, Label, Segment
from .session import IngestReport, IngestSession

_MEANING = ("parcellation", "network_names", "network_coordinates", "preprocessing")
_LAYOUT = (
    "dtype",
    "compression",
    "chunk_rows",
    "shard_rows",
)  # of a new store only
_ENTITIES = ("dataset", "subject", "session", "task", "run", "key")


def ingest_store(
    source: str | os.PathLike[str],
    store_path: str | os.PathLike[str],
    *,
    normalise: Kind = "none",
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> IngestReport:
    """Write the runs of a store to another one, with all that is known of them.

    Parameters
    ----------
    source
        Store, or its URL; it is not changed.
    store_path
        Runs are added if this store exists.
    normalise
        What is done to each run; censored time points take no part in it.
    overwrite
        Replace the store at `store_path`.
    progress
        Called with (runs done, runs in all).

    Returns
    -------
    IngestReport
        A run that cannot be read or normalised is in `failures`.

    Raises
    ------
    StoreError
        If there is no store at `source`, its runs cannot be normalised so any more, or the new store cannot
        be written.
    """
    opened = BoldStore.open(source)
    if os.path.realpath(source) == os.path.realpath(store_path):
        raise StoreError(f"{source}: is the store to read and the one to write; name another one to write")
    names = _MEANING if os.path.exists(store_path) and not overwrite else (*_MEANING, *_LAYOUT)
    create = {name: opened.attributes[name] for name in names}
    create["provenance"] = {**opened.attributes["provenance"], "copied_from": opened.snapshot}
    if normalise == "none":
        create["normalisation"] = opened.attributes["normalisation"]
    else:
        _check_possible(opened, normalise)
    with IngestSession(store_path, create, overwrite=overwrite, normalise=normalise) as session:
        entities = {name: getattr(opened.runs, name).tolist() for name in _ENTITIES}
        for i, key in enumerate(entities["key"]):
            session.add(key, _run(opened, i, {name: values[i] for name, values in entities.items()}))
            if progress is not None:
                progress(i + 1, len(opened.runs))
    return session.report


def _check_possible(store: BoldStore, normalise: str) -> None:
    """Refuse what was done already (a second regression takes something else), and what cannot be undone."""
    held = kind_of(store.attributes["normalisation"])
    if held == normalise:
        raise StoreError(f"{store.path}: is {APPLIED[normalise]} already; leave normalise out")
    if held in ("spatial", "gsr"):
        raise StoreError(
            f"{store.path}: {APPLIED[held]}, which cannot be undone; ingest or prepare the runs anew from "
            f"their files with normalise {normalise!r}"
        )


def _run(store: BoldStore, i: int, entities: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Yield one run, as keyword arguments of `StoreWriter.append`."""
    runs = store.runs
    mine = np.flatnonzero(store.segments.run == i)
    yield {
        "bold": store.run(i),
        "t_r": float(runs.t_r[i]),
        "censor": runs.censor(i),
        "segments": [
            Segment(
                onset=int(store.segments.onset[k]),
                length=int(store.segments.length[k]),
                labels=_labels(store.segments.columns, int(k)),
            )
            for k in mine
        ],
        **entities,
    }


def _labels(columns: Mapping[str, np.ndarray], k: int) -> dict[str, Label]:
    """Return labels of a segment, without those that it lacks."""
    values = {name: column[k].item() for name, column in columns.items()}
    return {
        name: value
        for name, value in values.items()
        if value not in ("", MISSING_INTEGER) and not (isinstance(value, float) and math.isnan(value))
    }
