"""The report page holds its charts and is seen in a real browser."""

import json
import re

import numpy as np
import pytest
from browser import assert_pictures_fit, assert_shown
from PIL import Image

from brainflow.benchmarks import charts, command
from brainflow.benchmarks.charts import CHARTS
from brainflow.benchmarks.timing import Row

HOSTILE = "<script>alert('x')</script>"
ENV = {"device": "cpu", "cpu": HOSTILE, "threads": 1, "date": "2026-01-02", "torch": "2"}


def _row(suite, case, metric, value, unit, baseline="", ratio=None, floor_share=None):
    return Row(
        suite=suite, case=case, metric=metric, value=value, unit=unit, baseline=baseline, ratio=ratio,
        floor_share=floor_share,
    ).to_dict(ENV)  # fmt: skip


ROWS = [
    _row("ceilings", "memcpy", "bytes_per_s", 10.0, "GB/s"),
    _row("ceilings", "matmul/fp32", "flops_per_s", 50.0, "GFLOP/s"),
    _row("kernels", "masked_loss/time", "time", 4.0, "ms", "naive", 8.0, 0.5),
    _row("kernels", "linear_masked_loss/time", "bytes_per_s", 1.0, "GB/s", floor_share=0.1),
    _row("kernels", "linear_masked_loss/time", "flops_per_s", 30.0, "GFLOP/s", floor_share=0.6),
    _row("loader", "reader", "windows_per_s", 50_000.0, "windows/s", "webdataset", 200.0),
    _row("loader", "reader", "windows_per_s", 50_000.0, "windows/s", "memmap", 0.97),
    _row("loader", "reader_cold", "windows_per_s", 5_000.0, "windows/s", "memmap", 5.0),
    _row("frameworks", "csm", "targets_per_s", 1000.0, "targets/s", "published", 20.0),
    _row("frameworks", "csm", "targets_per_s", 1000.0, "targets/s", "single", 10.0),
    _row("frameworks", "seq-bert", "targets_per_s", 300.0, "targets/s", "published", 2.0),
    *(_row("scaling", f"threads/{n}", "tokens_per_s", 100.0 * n, "tokens/s") for n in (1, 2)),
    *(_row("scaling", f"batch/{n}", "tokens_per_s", 100.0, "tokens/s") for n in (8, 16, 64)),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    rows = folder / "rows.json"
    rows.write_text(json.dumps(ROWS))
    assert command.run(command.Args(rows=rows, report=folder / "report")) == 0
    return folder / "report" / "index.html"


def test_every_chart_is_drawn_and_lies_beside_the_page(page):
    for name in CHARTS:
        with Image.open(page.parent / f"{name}.png") as image:
            assert np.asarray(image.convert("L")).std() > 10, name


def test_page_fetches_nothing_and_escapes_what_it_is_given(page):
    html = page.read_text(encoding="utf-8")
    assert not re.search(r"https?://|url\(|@import", html)
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert "8×" in html


@pytest.mark.parametrize("name", CHARTS)
def test_labels_hold_no_markup(monkeypatch, name):
    figures = []
    canvas = charts.FigureCanvasAgg
    monkeypatch.setattr(charts, "FigureCanvasAgg", lambda figure: figures.append(figure) or canvas(figure))
    assert CHARTS[name][0](ROWS) is not None
    axes = [axis for panel in figures[0].axes for axis in (panel.xaxis, panel.yaxis)]
    labels = [label.get_text() for axis in axes for label in axis.get_ticklabels(which="both")]
    assert any(labels)
    assert not any("$" in label or "\\" in label for label in labels)


@pytest.mark.parametrize("name", CHARTS)
def test_a_chart_without_its_rows_is_left_out(name):
    assert CHARTS[name][0]([]) is None


def test_no_rows_are_refused(tmp_path):
    (tmp_path / "rows.json").write_text("[]")
    with pytest.raises(ValueError, match="no rows"):
        command.run(command.Args(rows=tmp_path / "rows.json", report=tmp_path / "report"))


def test_page_renders_in_a_browser(page, tmp_path):
    assert_shown(page, tmp_path)
    assert_pictures_fit(page, tmp_path, count=len(CHARTS))
