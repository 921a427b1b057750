"""One page with the charts that people look at and all rows; it needs no network."""

from __future__ import annotations

from pathlib import Path

from brainflow.report.page import Page, Picture, Section, Table, write_page

from .charts import CHARTS
from .history import Rows
from .show import HEADER, figures, number

FACTS = (
    ("loader", "reader", "windows_per_s", "webdataset", "windows/s over tars of pickles"),
    ("kernels", "masked_loss/time", "time", "naive", "masked loss over masked_select"),
    ("kernels", "linear_masked_loss/time", "time", "project_all", "projection + loss over projecting all"),
    ("frameworks", "csm", "targets_per_s", "published", "CSM targets/s over the recipe of 2022"),
)
"""Rows whose ratio stands in large figures: suite, case, metric, baseline, what it is."""


def write_report(rows: Rows, folder: Path) -> Path:
    """Write `index.html` and its pictures into a folder and return the page's path.

    Raises
    ------
    ValueError
        If there are no rows.
    ImportError
        If matplotlib or jinja2 (extra `report`) is missing.
    """
    if not rows:
        raise ValueError("--report: there are no rows to draw")
    ratios = {(r["suite"], r["case"], r["metric"], r["baseline"]): r["ratio"] for r in rows}
    facts = [
        (f"{number(ratio)}×", what)
        for suite, case, metric, baseline, what in FACTS
        if (ratio := ratios.get((suite, case, metric, baseline))) is not None
    ]
    env = rows[0]["env"]
    where = env.get("gpu") or env["cpu"]
    lead = (
        f"Measured on {where}, {env['threads']} thread{'s' if env['threads'] > 1 else ''}, on {env['date']}. "
        "Every comparison ran interleaved in one process: trust the ratios, larger is better. "
        "Absolute figures belong to this machine."
    )
    sections = [
        Section(title=title, pictures=[Picture(name=name, png=png, alt=title, caption=caption)])
        for name, (draw, title, caption) in CHARTS.items()
        if (png := draw(rows)) is not None
    ]
    for suite in dict.fromkeys(row["suite"] for row in rows):
        table = Table(header=HEADER, rows=[figures(row) for row in rows if row["suite"] == suite])
        sections.append(Section(title=f"All figures: {suite}", table=table))
    footer = [", ".join(f"{name} {value}" for name, value in env.items() if value is not None)]
    return write_page(
        Page(title="brainflow benchmarks", lead=lead, facts=facts, sections=sections, footer=footer), folder
    )
