"""Scores in a terminal: tables and lines of `brainflow adapt`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from brainflow.decoding.people_decoders import PeopleResult
    from brainflow.decoding.result import Result
    from brainflow.decoding.task import DecodingTask

PEOPLE = {"r2": "R²", "r": "r", "mae": "MAE", "auc": "AUC", "balanced_accuracy": "balanced"}


def shift_line(task: DecodingTask) -> str:
    """Return how far windows lie behind their events, in words."""
    moved = f"haemodynamic shift: {task.config.hrf_shift:g} s here"
    if task.hrf_shift is None:
        return f"{moved}; whether the store's segments were moved before is not recorded"
    return f"{moved} + {task.hrf_shift - task.config.hrf_shift:g} s in the store = {task.hrf_shift:g} s"


def narrow(groups: int) -> str:
    """Return a warning where too few groups are resampled for an interval to be trusted."""
    from brainflow.decoding.result import FEW_GROUPS  # scikit-learn, which --help need not load

    return "" if groups >= FEW_GROUPS else f"; below {FEW_GROUPS} they are too narrow"


def gain_line(name: str, gain: dict[str, Any]) -> str:
    """Return a paired difference in words."""
    ends = "" if gain["low"] is None else f" [{gain['low']:+.3f}, {gain['high']:+.3f}]"
    best = f" ({gain['and']})" if name.endswith("baseline") else ""
    return f"{name}{best}: {gain['value']:+.3f}{ends}"


def scores_table(results: list[Result], *, title: str) -> Table:
    """Return a table with one decoder a row."""
    # as narrow as a terminal of 80 columns, in which no name may be cut
    table = Table(
        title=title, title_justify="left", title_style="bold", show_edge=False, padding=(0, 1, 0, 0)
    )
    table.add_column("decoder", overflow="fold")
    # rich would take the bracket for markup.
    for name in ("accuracy [95 %]", "p", "balanced", "macro F1", "ECE"):
        table.add_column(name.replace("[", r"\["), justify="right", no_wrap=True)
    for result in results:
        s = result.scores
        table.add_row(
            result.name,
            str(s.accuracy).replace("[", r"\["),
            f"{s.permutation_p:.3f}",
            f"{s.balanced_accuracy.value:.3f}",
            f"{s.macro_f1.value:.3f}",
            f"{result.calibration.error:.3f}" if result.calibration else "",
        )
    return table


def people_table(results: list[PeopleResult], *, title: str) -> Table:
    """Return a table of decoders of people with one a row."""
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("decoder")
    first, *more = [PEOPLE[name] for name in results[0].scores.intervals]
    for name in (rf"{first} \[95 %]", "p", *more):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        main, *others = result.scores.intervals.values()
        values = [f"{interval.value:.3f}" for interval in others]
        table.add_row(
            result.name, str(main).replace("[", r"\["), f"{result.scores.permutation_p:.3f}", *values
        )
    return table


def curve_table(curve: dict[str, Any]) -> Table:
    """Return a learning curve with one point a row."""
    title = (
        f"Learning curve, intervals over {curve['tested']} {curve['interval_over']}{narrow(curve['tested'])}"
    )
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in ("decoder", f"training {curve['unit']}s", "accuracy", "95 %"):
        table.add_column(name, justify="left" if name == "decoder" else "right")
    for p in curve["points"]:
        ends = "" if p["low"] is None else rf"\[{p['low']:.3f}, {p['high']:.3f}]"
        table.add_row(p["decoder"], str(p["train"]), f"{p['value']:.3f}", ends)
    for train, found in curve["gains"].items():
        for name, gain in found.items():
            ends = "" if gain["low"] is None else rf"\[{gain['low']:+.3f}, {gain['high']:+.3f}]"
            best = f" ({gain['and']})" if name.endswith("baseline") else ""
            table.add_row(name + best, train, f"{gain['value']:+.3f}", ends)
    return table
