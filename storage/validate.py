"""What must hold between the tables, the manifest and the layout of a store: no lie may reach an address.

Checksums find what changed by accident; a store from a stranger can have right checksums over wrong tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from .attributes import StoreAttributes
from .columns import RUN_NUMBERS, SEGMENT_NUMBERS
from .manifest import Manifest
from .tables import NO_CENSOR, RUN_STRINGS

Columns = Mapping[str, np.ndarray]

_VECTORS: dict[str, dict[str, str]] = {
    "runs": {**RUN_NUMBERS, "censor_bits": "|u1"},
    "segments": SEGMENT_NUMBERS,
    "checksums": {"bold": "<u4", "statistics": "<u4"},
}
_LABELS = ("<i8", "<f8")


def table_faults(layout: StoreAttributes, manifest: Manifest, groups: Mapping[str, Columns]) -> Iterator[str]:
    """Yield what is wrong with the tables, as "group/column: reason"; later ones rely on earlier ones.

    A few passes over each column: a million runs take some milliseconds.

    Parameters
    ----------
    layout, manifest
        Layout and manifest of the store, checked by themselves.
    groups
        {group: {column: array}} of `runs`, `segments`, `labels` and `checksums`.
    """
    yield from _column_faults(manifest, groups)
    yield from _checksum_faults(layout, manifest, groups["checksums"])
    yield from _run_faults(layout, manifest, groups["runs"])
    yield from _segment_faults(groups["runs"], groups["segments"])


def _column_faults(manifest: Manifest, groups: Mapping[str, Columns]) -> Iterator[str]:
    """Yield columns that are not there, of another type or of another length than the manifest says."""
    for group, expected in _VECTORS.items():
        for name, dtype in expected.items():
            column = groups[group].get(name)
            if column is None:
                yield f"{group}/{name}: this column is missing"
            elif column.dtype != dtype or column.ndim != 1:
                yield f"{group}/{name}: is {_kind(column)}, expected {np.dtype(dtype).name} [rows]"
    for name in RUN_STRINGS:
        column = groups["runs"].get(name)
        if column is None:
            yield f"runs/{name}: this column is missing"
        elif not _is_text(column):
            yield f"runs/{name}: is {_kind(column)}, expected uint8 [rows, bytes]"
    for name, column in groups["labels"].items():
        if not (_is_text(column) or (column.ndim == 1 and column.dtype in _LABELS)):
            yield f"labels/{name}: is {_kind(column)}, expected numbers [rows] or uint8 [rows, bytes]"
    for group, rows in (
        ("runs", manifest.runs),
        ("segments", manifest.segments),
        ("labels", manifest.segments),
    ):
        for name, column in groups[group].items():
            if len(column) != rows and name != "censor_bits":
                yield f"{group}/{name}: has {len(column)} rows, the manifest says {rows}"


def _checksum_faults(layout: StoreAttributes, manifest: Manifest, checksums: Columns) -> Iterator[str]:
    """Yield fewer or more checksums than chunks: this ties the number of rows to bytes that are there."""
    for grid, rows in ((layout.bold_grid, manifest.rows), (layout.statistics_grid, manifest.slots)):
        found = len(checksums[grid.name])
        if found * grid.chunk_rows != rows:
            yield f"checksums/{grid.name}: has {found} rows, expected {rows // grid.chunk_rows}, one a chunk"


def _run_faults(layout: StoreAttributes, manifest: Manifest, runs: Columns) -> Iterator[str]:
    """Yield runs that overlap, straddle shards or leave the arrays."""
    start, length, slot = runs["start"], runs["length"], runs["slot"]
    if not len(start):
        return
    if start.min() < 0 or start.max() >= manifest.rows:
        yield f"runs/start: leaves the {manifest.rows} rows of bold"
    if length.min() < 1:
        yield "runs/length: a run is empty"
    end = start + length
    if (start[1:] < end[:-1]).any():
        yield "runs/start: a run begins before the end of the one before"
    if (end > (start // layout.shard_rows + 1) * layout.shard_rows).any():
        yield "runs/length: a run straddles two shards"
    if slot[0] < 0 or slot[-1] >= manifest.slots or (slot[1:] <= slot[:-1]).any():
        yield f"runs/slot: is not ascending within the {manifest.slots} rows of statistics"
    # Not `<= 0`: NaN has to fail, too.
    if not (runs["t_r"] > 0).all() or np.isinf(runs["t_r"].max()):
        yield "runs/t_r: is not a positive number of seconds everywhere"
    censor, bits = runs["censor"], len(runs["censor_bits"])
    recorded = censor >= 0
    if (
        censor.min() < NO_CENSOR
        # Bounded before it is added to: no sum wraps.
        or censor.max() > bits
        or ((censor + (end - start + 7) // 8 > bits) & recorded).any()
    ):
        yield f"runs/censor: leaves the {bits} bytes of censor_bits"


def _segment_faults(runs: Columns, segments: Columns) -> Iterator[str]:
    """Yield segments of runs that are not there, or that leave their run."""
    run, onset, length = segments["run"], segments["onset"], segments["length"]
    if not len(run):
        return
    if run.min() < 0 or run.max() >= len(runs["length"]):
        yield f"segments/run: names a run that is not among the {len(runs['length'])}"
    # In int64: sums of a stranger's int32 could wrap.
    elif onset.min() < 0 or length.min() < 1 or (onset.astype(np.int64) + length > runs["length"][run]).any():
        yield "segments/onset: a segment does not lie inside its run"


def _is_text(column: np.ndarray) -> bool:
    return column.dtype == np.uint8 and column.ndim == 2 and column.shape[1] > 0


def _kind(column: np.ndarray) -> str:
    return f"{column.dtype.name} {list(column.shape)}"
