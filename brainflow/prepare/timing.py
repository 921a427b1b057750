"""The repetition time of a run: from the sidecar, then the image header, never a guess."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from brainflow.prepare.records import Unusable
from brainflow.storage.columns import shown

_SECONDS = {"sec": 1.0, "msec": 1e-3, "usec": 1e-6}
TOLERANCE = 1e-3
"""Relative difference between sidecar and header that is put down to rounding (headers are float32)."""


@dataclass(frozen=True, kw_only=True)
class RepetitionTime:
    """Repetition time in seconds, where it came from, and what contradicts it."""

    seconds: float
    source: str
    note: str = ""


def repetition_time(sidecars: Iterable[Path], header_seconds: float | None) -> RepetitionTime:
    """Find the repetition time.

    Parameters
    ----------
    sidecars
        JSON files, the most specific first.
    header_seconds
        Repetition time of the header, None where it has none.

    Raises
    ------
    Unusable
        If neither has one, or the sidecar's is not a positive number.
    """
    for path in sidecars:
        value = _read(path).get("RepetitionTime")
        if value is None:
            continue
        # True is an int in Python.
        if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-6 <= value <= 1e6:
            raise Unusable(
                f"{path.name}: RepetitionTime is {shown(value)}, expected a positive number of seconds"
            )
        note = ""
        if header_seconds is not None and abs(header_seconds - value) > TOLERANCE * value:
            note = (
                f"repetition time: sidecar says {value:g} s, header {header_seconds:g} s; took the sidecar's"
            )
        return RepetitionTime(seconds=round(float(value), 6), source="sidecar", note=note)
    if header_seconds is None:
        raise Unusable("no repetition time: neither a JSON sidecar nor the image header states it")
    # Headers are float32, in which 0.72 s are 0.72000003.
    return RepetitionTime(seconds=round(header_seconds, 6), source="header")


def nifti_repetition_time(header: Any) -> float | None:
    """Return the repetition time of a NIfTI header in seconds, or None if it has none or no unit of time."""
    zooms = header.get_zooms()
    scale = _SECONDS.get(header.get_xyzt_units()[1])
    if len(zooms) < 4 or scale is None or not 0 < zooms[3] < math.inf:
        return None
    return float(zooms[3]) * scale


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Unusable(f"{path.name}: cannot be read as JSON ({error})") from error
    return content if isinstance(content, dict) else {}
