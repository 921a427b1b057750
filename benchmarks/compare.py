"""What changed between two runs beyond noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .history import Rows

LEAST = 0.05
"""A change of less than this share is never called one."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """One figure in both runs: the ratio where the row has one, else the value."""

    name: str
    before: float
    after: float
    unit: str
    better: float
    """How many times better than before, < 1 if worse."""
    noise: float
    """The share by which the figure must move to count."""

    @property
    def real(self) -> bool:
        """Whether it moved beyond noise."""
        return max(self.better, 1 / self.better) > 1 + self.noise


def changes(a: Rows, b: Rows) -> list[Change]:
    """Return the figures that both runs have, the largest change first.

    Ratios are always compared; values without a ratio only if CPU, GPU and threads are the same, since they
    belong to the machine. Noise is the wider of the two runs' distances from the 20th to the 80th percentile,
    as a share of the median, and at least 5 %; a figure without percentiles (memory) has the 5 %.
    """
    before, after = ({_key(row): row for row in rows} for rows in (a, b))
    found = []
    for key in before.keys() & after.keys():
        old, new = before[key], after[key]
        paired = old["ratio"] is not None and new["ratio"] is not None
        if not paired and _machine(old) != _machine(new):
            continue
        was, now = (row["ratio"] if paired else row["value"] for row in (old, new))
        if not (was > 0 and now > 0):
            continue
        larger_is_better = paired or old["unit"].endswith("/s")
        found.append(
            Change(
                name=" ".join(filter(None, key)),
                before=was,
                after=now,
                unit="×" if paired else old["unit"],
                better=now / was if larger_is_better else was / now,
                noise=max(LEAST, _spread(old), _spread(new)),
            )
        )
    return sorted(found, key=lambda change: -max(change.better, 1 / change.better))


def only_in_one(a: Rows, b: Rows) -> tuple[list[str], list[str]]:
    """Return the names of rows that only the first, and only the second, run has, in suites that both ran."""
    both = {row["suite"] for row in a} & {row["suite"] for row in b}
    first, second = (
        {" ".join(filter(None, _key(row))) for row in rows if row["suite"] in both} for rows in (a, b)
    )
    return sorted(first - second), sorted(second - first)


def _key(row: dict[str, Any]) -> tuple[str, str, str, str]:
    return row["suite"], row["case"], row["metric"], row["baseline"] and f"over {row['baseline']}"


def _machine(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row["env"].get(name) for name in ("device", "cpu", "gpu", "threads"))


def _spread(row: dict[str, Any]) -> float:
    return (row["p80"] - row["p20"]) / row["p50"] if row["p50"] else 0.0
