"""What `bench learning` runs, and the rows that its parts return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from brainflow.decoding.baselines import BASELINES, BaselineName
from brainflow.decoding.curve import Point
from brainflow.decoding.scores import Interval
from brainflow.demo import story
from brainflow.demo.worth import gains, opponents

FRAMEWORKS = ("csm", "seq-bert", "net-bert", "autoencoder")
COUNTS = (1, 2, 4, 8, 16)
FIXED = 4
"""Labelled people where something else varies: the people or steps of pretraining."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes of a run.

    Attributes
    ----------
    quick
        Small sizes, for minutes instead of hours.
    frameworks
        Which are measured; the first one decodes in every part.
    seeds
        Pretraining runs, with seeds 0, 1, …; what they decode is pooled.
    draws
        Draws of the labelled people.
    people, test_people
        People of the story, and those of them who test. For development: the tested ones of the default are
        looked at once.
    story_steps, steps
        Optimizer steps of pretraining on the story and on simulated people; None: as `pretrain` chooses.
    order_people
        Numbers of simulated people who pretrain, ascending.
    regime_people
        The same for states as drive or regime.
    """

    quick: bool
    frameworks: tuple[str, ...]
    seeds: int
    draws: int
    people: range = story.PEOPLE
    test_people: range = story.TEST
    story_steps: int | None
    steps: int | None
    order_people: tuple[int, ...]
    regime_people: int

    @property
    def without(self) -> tuple[BaselineName, ...] | None:
        """Decoders without a model, None for all; `quick` has no nilearn, as slow as all others together."""
        return tuple(name for name in BASELINES if name != "nilearn") if self.quick else None

    def facts(self) -> dict[str, Any]:
        """Return the sizes, ready for JSON; people are counted from 1."""
        shown = {name: value for name, value in asdict(self).items() if not isinstance(value, range)}
        tested = self.test_people
        return shown | {"test_people": f"{tested.start + 1}–{tested.stop}"}


def make_plan(
    *,
    quick: bool,
    frameworks: tuple[str, ...] = FRAMEWORKS,
    seeds: int | None = None,
    draws: int | None = None,
    **sizes: Any,
) -> Plan:
    """Return the sizes of a quick or a full run; what is named is taken."""
    defaults: dict[str, Any]
    if quick:
        defaults = {"story_steps": None, "steps": 300, "order_people": (10, 50, 300), "regime_people": 300}
    else:
        defaults = {
            "story_steps": None,
            "steps": None,
            "order_people": (10, 50, 300, 1_000, 3_000),
            "regime_people": 1_000,
        }
    return Plan(
        quick=quick,
        frameworks=frameworks,
        seeds=seeds or (1 if quick else 3),
        draws=draws or (3 if quick else 10),
        **(defaults | sizes),
    )


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure of record with its 95 % interval, over people and where they vary over draws of people.

    The names of its fields, cases and metrics are stable: other tools read them.
    """

    case: str
    metric: str
    value: float
    low: float | None = None
    high: float | None = None
    note: str = ""
    suite: str = "learning"

    def to_dict(self, env: Mapping[str, Any]) -> dict[str, Any]:
        """Return the row as a JSON-ready dict with what it was measured on."""
        return {**asdict(self), "env": dict(env)}


def row(case: str, metric: str, interval: Interval, note: str = "") -> Row:
    """Return a row of an interval."""
    return Row(case=case, metric=metric, note=note, **interval.to_dict())  # type: ignore[arg-type]


def curve_rows(case: str, points: Sequence[Point]) -> list[Row]:
    """Return the rows of a learning curve: accuracies, paired differences and the low ends of these."""
    rows = []
    for point in points:
        name = f"{case}/{point.groups}"
        pretrained, scratch, *without = point.results
        accuracies = {"pretrained": pretrained, "scratch": scratch} | {one.name: one for one in without}
        rows += [row(name, metric, one.scores.accuracy) for metric, one in accuracies.items()]
        against = opponents(point)
        rows.append(row(name, "best_baseline", against["best"].scores.accuracy, against["best"].name))
        for which, found in gains(point).items():
            rows.append(row(name, f"pretrained_minus_{which}", found, against[which].name))
            low = found.to_dict()["low"]
            if low is not None:
                rows.append(Row(case=name, metric=f"pretrained_minus_{which}_low", value=low))
    return rows
