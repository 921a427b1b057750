"""How far are data from what a model saw? TR, length, variance, spectrum, correlation structure."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainflow.pretrained.compatibility import (
    MUST_MATCH,
    TR_TOLERANCE,
    differences,
    fingerprint,
    how_to_normalise,
)
from brainflow.pretrained.format import read_config
from brainflow.storage import BoldStore, StoreError
from brainflow.storage.normalise import kind_of

SLOW_HZ = 0.1
LIMITS = {"variance": 0.3, "spectrum": 0.15, "correlation": 0.15}
"""Differences that are worth a look: of the variance as a share, of the others in their own unit (shares of
power below 0.1 Hz, median correlation). Rules of thumb, not tests."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table; `verdict` is fine, look, differs or unknown."""

    what: str
    model: str
    store: str
    verdict: str
    advice: str = ""


def examine(
    store: BoldStore, checkpoint: str | os.PathLike[str], *, windows: NDArray | None = None
) -> list[Row]:
    """Compare a store with the data of a model.

    What the model saw is its `config.json`; where that holds no statistics of the signal, they are computed
    from the training store, if it still lies where it was and is the same.

    Parameters
    ----------
    store
        New data.
    checkpoint
        Folder of a saved model.
    windows
        Lengths of the windows that will be decoded in time points; by default of all labelled segments.
    """
    saved = read_config(checkpoint)
    data, model = saved.get("data") or {}, saved["model"]
    networks = int(model["networks"])
    rows = [
        _row(
            "networks", networks, store.networks, networks == store.networks, "prepare with its parcellation"
        )
    ]
    t_r = np.unique(np.asarray(store.runs.t_r)).tolist()
    # Without TRs, which have a row of their own.
    found = differences(data, store.attributes, [])
    for name, what in MUST_MATCH.items():
        if data.get(name) or store.attributes.get(name):
            theirs, mine = data.get(name), store.attributes.get(name)
            same = not any(line.startswith(what) for line in found)
            known = bool(theirs and mine) or not same
            advice = f"prepare the data with the model's {what}"
            if name == "normalisation":
                advice = how_to_normalise(theirs, mine, str(store.path)) or advice
            rows.append(_row(what, _short(theirs), _short(mine), same, advice, known))
    seen = data.get("t_r") or []
    inside = bool(seen) and all(
        min(seen) * (1 - TR_TOLERANCE) <= v <= max(seen) * (1 + TR_TOLERANCE) for v in t_r
    )
    rows.append(
        _row(
            "TR (s)",
            _span(seen),
            _span(t_r),
            inside,
            "resample the runs, or fine-tune all weights",
            bool(seen),
        )
    )
    ours = fingerprint(store)
    saw: dict[str, Any] | None = data.get("fingerprint") or _from_training_store(saved)
    limit = int(model.get("max_positions", 512))
    drawn = (saved.get("pretrain") or {}).get("data") or {}
    shortest = int(drawn.get("seq_min", 2))
    rows.append(
        Row(
            what="run length (time points)",
            model=_span(saw["length"]) if saw else "unknown",
            store=_span(ours["length"]),
            verdict="fine" if ours["length"][0] >= shortest else "look",
            advice=f"windows may have {shortest} to {limit} time points",
        )
    )
    lengths = np.asarray(store.segments.length if windows is None else windows).tolist()
    if lengths and "seq_max" in drawn:
        # Lengths are drawn below `seq_max`, never at it.
        rows.append(_window_row(lengths, shortest, int(drawn["seq_max"]) - 1))
    units = {
        "variance": "z-score each network and run, as the model's data were",
        "spectrum": "check filter and TR: slow fluctuations carry another share of the power",
        "correlation": "check global signal regression and confounds",
    }
    for name, advice in units.items():
        mine = ours[name]
        if not saw:
            rows.append(Row(what=_LONG[name], model="unknown", store=f"{mine:.3f}", verdict="unknown"))
            continue
        gap = abs(mine - saw[name]) / (saw[name] if name == "variance" else 1.0)
        verdict = "fine" if gap <= LIMITS[name] else "look"
        rows.append(
            Row(
                what=_LONG[name],
                model=f"{saw[name]:.3f}",
                store=f"{mine:.3f}",
                verdict=verdict,
                advice="" if verdict == "fine" else advice,
            )
        )
    return rows


def _window_row(lengths: list[int], shortest: int, longest: int) -> Row:
    """Compare windows with those of pretraining, which had `shortest` to `longest` time points."""
    fine = max(lengths) <= longest
    advice = (
        f"such long windows were never seen: cut them, or pretrain with --data.seq-max {max(lengths) + 1}"
    )
    return Row(
        what="window length (time points)",
        model=_span([shortest, longest]),
        store=_span(lengths),
        verdict="fine" if fine else "look",
        advice="" if fine else advice,
    )


_LONG = {
    "variance": "variance (median of networks)",
    "spectrum": f"share of power below {SLOW_HZ:g} Hz",
    "correlation": "median |correlation| of networks",
}


def _from_training_store(saved: dict[str, Any]) -> dict[str, Any] | None:
    """Return the fingerprint of the training store, if it still lies where it was, unchanged."""
    path = (saved.get("pretrain") or {}).get("store")
    if not path or not Path(path).is_dir():
        return None
    try:
        store = BoldStore.open(path)
    except (StoreError, OSError):  # what became of it does not matter here
        return None
    return fingerprint(store) if store.snapshot == (saved.get("data") or {}).get("store_snapshot") else None


def _row(what: str, model: Any, store: Any, same: bool, advice: str, known: bool = True) -> Row:
    verdict = "unknown" if not known else "fine" if same else "differs"
    return Row(
        what=what,
        model=str(model) or "unknown",
        store=str(store) or "unknown",
        verdict=verdict,
        advice=advice if verdict == "differs" else "",
    )


def _span(values: Any) -> str:
    if not values:
        return "unknown"
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _short(value: Any) -> str:
    text = "unknown" if value in (None, "", []) else kind_of(value) or str(value)
    return text if len(text) < 40 else text[:37] + "…"
