"""The page holds everything itself, escapes what it is given, and shows its pictures in a real browser."""

import base64
import io
import json
import re

import nibabel
import numpy as np
import pytest
from browser import answer, assert_pictures_fit, assert_shown
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from brainflow.report import figures, quality_figures
from brainflow.report.brain import brain_section, glass_brain, make_masker, to_image
from brainflow.report.page import Page, Picture, Section, Table, render, write_page
from brainflow.report.run_page import run_page

HOSTILE = "<script>alert('x')</script> & \"quoted\" {{ 7919 * 7907 }}"


def _pictures() -> list[Picture]:
    rng = np.random.default_rng(0)
    mask = np.ones((6, 4), dtype=bool)
    mask[0, 0] = False
    drawn = {
        "loss": figures.loss_curve(([10, 20], [0.9, 0.8]), ([10, 20], [0.9, 0.85]), {"mean": 0.8}),
        "reconstruction": figures.reconstruction(rng.normal(size=(12, 9)), rng.normal(size=(12, 9)), t_r=2.5),
        "decoders": figures.decoders(["a", HOSTILE], [0.5, 0.7], [(0.4, 0.6), (0.6, 0.8)], chance=0.25),
        "confusion": figures.confusion(np.array([[3, 1], [0, 4]]), ["face", "house"]),
        "map": figures.slice_map(
            rng.normal(size=23),
            mask,
            rng.random((6, 4)),
            voxel_mm=(3.0, 3.5),
            right_first=True,
            label="explained variance",
        ),
    }
    return [Picture(name=name, png=png, alt=name, caption=HOSTILE) for name, png in drawn.items()]


@pytest.fixture(scope="module")
def page() -> Page:
    table = Table(header=["decoder", HOSTILE], rows=[["ridge", "0.5"], [HOSTILE, "0.6"]], strong=(1,))
    section = Section(title=HOSTILE, text=[HOSTILE], table=table, notes=[HOSTILE], pictures=_pictures())
    return Page(title=HOSTILE, lead=HOSTILE, facts=[("1 %", HOSTILE)], sections=[section], footer=[HOSTILE])


def test_page_fetches_nothing_and_runs_nothing(page):
    html = render(page)
    assert not re.search(r"https?://|//[a-z]+\.[a-z]+|url\(|@import", html.replace("data:image/png", ""))
    sources = re.findall(r'src="([^"]*)"', html)
    assert len(sources) == 5
    for source in sources:
        assert base64.b64decode(source.removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
    assert "<script" not in html


def _legend(monkeypatch, groups):
    """Draw a scatter and return the figure, its legend's texts, and whether the legend lies within it."""
    drawn = []
    monkeypatch.setattr(figures, "_png", lambda figure: drawn.append(figure) or b"")
    figures.scatter(np.random.default_rng(0).normal(size=(len(groups), 2)), groups, ("a", "b"))
    [figure], [legend] = drawn, drawn[0].legends
    FigureCanvasAgg(figure).draw()
    box = legend.get_window_extent()
    page = figure.bbox
    inside = box.x0 >= page.x0 and box.x1 <= page.x1 and box.y0 >= page.y0 and box.y1 <= page.y1
    return figure, [text.get_text() for text in legend.get_texts()], inside


def test_long_names_in_a_legend_are_whole_and_leave_the_picture_its_width(monkeypatch):
    groups = [f"sub-{i:02d}_ses-baseline_task-emotionregulation_acq-highres_run-{i}" for i in range(7)]
    figure, texts, inside = _legend(monkeypatch, groups * 2)
    assert texts == groups
    assert inside
    assert figure.axes[0].get_window_extent().width > 0.8 * figure.bbox.width
    _, texts, inside = _legend(monkeypatch, [f"{'x' * 300}{i}" for i in range(3)])
    assert inside
    assert [text[-2:] for text in texts] == ["x0", "x1", "x2"]  # what tells them apart stands at the end
    _, texts, _ = _legend(monkeypatch, ["rest", "task"])
    assert texts == ["rest", "task"]


@pytest.mark.parametrize("drawing", ["correlation", "confusion"])
def test_a_colour_bar_is_as_tall_as_its_matrix(monkeypatch, drawing):
    drawn = []
    module = figures if drawing == "confusion" else quality_figures
    monkeypatch.setattr(module, "_png", lambda figure: drawn.append(figure) or b"")
    if drawing == "confusion":
        figures.confusion(np.eye(5, dtype=int), [f"a long name of a condition {i}" for i in range(5)])
    else:
        bold = np.random.default_rng(0).normal(size=(50, 30))
        quality_figures.correlation([bold], [f"7Networks_LH_SomMot_{i}" for i in range(30)])
    [figure] = drawn
    FigureCanvasAgg(figure).draw()
    matrix, bar = figure.axes
    assert bar.get_window_extent().height == pytest.approx(matrix.get_window_extent().height, rel=0.01)
    assert matrix.get_window_extent().width == pytest.approx(matrix.get_window_extent().height, rel=0.01)
    assert matrix.get_tightbbox().x0 >= 0  # names of networks are whole


def test_names_are_escaped_and_not_rendered_as_templates(page):
    html = render(page)
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; &#34;quoted&#34; {{ 7919 * 7907 }}" in html
    assert "62615533" not in re.sub(r'src="[^"]*"', "", html)


def test_pictures_lie_beside_the_page_and_are_reproducible(page, tmp_path):
    path = write_page(page, tmp_path / "report")
    assert path.name == "index.html"
    for picture, again in zip(page.sections[0].pictures, _pictures(), strict=True):
        file = path.parent / f"{picture.name}.png"
        with Image.open(file) as image:
            assert image.size == picture.size
        assert picture.png == again.png


def test_map_shows_left_on_the_left():
    """The only bright voxel is the first along x, the participant's right: it must be drawn on the right."""
    mask = np.ones((8, 4), dtype=bool)
    values = np.zeros(mask.shape)
    values[0] = 1.0
    shapes = {"voxel_mm": (3.0, 3.0), "label": "v", "limit": 1.0}
    png = figures.slice_map(values[mask], mask, np.zeros(mask.shape), right_first=True, **shapes)
    flipped = figures.slice_map(values[mask], mask, np.zeros(mask.shape), right_first=False, **shapes)

    def red_at(data: bytes) -> float:
        pixels = _pixels(data)
        width = pixels.shape[1]
        pixels = pixels[:, width // 2 : int(width * 0.92)]  # the map, without mean image and colour bar
        red = (pixels[..., 0] > 80) & (pixels[..., 1] < 30) & (pixels[..., 2] < 60)
        return float(np.flatnonzero(red.any(axis=0)).mean() / pixels.shape[1])

    assert red_at(png) > 0.6
    assert red_at(flipped) < 0.4


def test_map_refuses_values_that_do_not_fit_the_mask():
    with pytest.raises(ValueError, match="expected one for each of 4 voxels"):
        figures.slice_map(
            np.zeros(3),
            np.ones((2, 2), dtype=bool),
            np.zeros((2, 2)),
            voxel_mm=(1, 1),
            right_first=False,
            label="",
        )


def test_page_renders_in_a_browser(page, tmp_path):
    path = write_page(page, tmp_path / "report")
    assert_shown(path, tmp_path)
    assert_pictures_fit(path, tmp_path, count=5)


def write_decoding(folder, *, value=0.7, low=0.6, **more):
    interval = {"value": value, "low": low, "high": 0.8}
    entry = {
        "name": "linear probe, pretrained",
        "accuracy": interval,
        "balanced_accuracy": interval,
        "macro_f1": interval,
        "chance": 0.5,
        "permutation_p": 0.01,
        "confusion": [[7, 3], [3, 7]],
        "per_group": {"d/1": 0.8, "d/2": 0.6},
        "calibration": {"error": 0.1, "confidence": [0.6], "accuracy": [0.7], "windows": [20]},
    }
    summary = {
        "target": "state",
        "split": "k-fold",
        "classes": ["face", HOSTILE],
        "tested": 20,
        "groups": {"kind": "subject", "count": 2},
        "store_snapshot": "s",
        "decoder": entry,
        "baselines": [{**entry, "name": "ridge", "calibration": None}],
        "gains": {"pretrained - best baseline": {"and": "ridge", "value": 0.02, "low": -0.1, "high": 0.14}},
        **more,
    }
    (folder / "scores.json").write_text(json.dumps(summary))


def test_page_of_a_decoding_renders_in_a_browser(tmp_path):
    write_decoding(tmp_path)
    page = run_page(tmp_path)
    assert page.facts[:3] == [
        ("70.0%", "named rightly [60.0%, 80.0%] (chance 50.0%)"),
        ("70.0%", "by the best without a model: ridge, no model"),
        ("+2.0%", "paired difference [-10.0%, 14.0%]"),
    ]
    assert page.sections[0].title.startswith("Decoding state")
    path = write_page(page, tmp_path / "report")
    assert "<script" not in path.read_text(encoding="utf-8")
    assert_shown(path, tmp_path)


def test_what_is_no_better_than_chance_is_drawn_without_colour(tmp_path):
    """And occlusion, which leaves a network out of the whole window, has no figure over time."""
    affine = np.diag([20.0, 20.0, 20.0, 1.0])
    affine[:3, 3] = (-30, -60, -20)
    nibabel.save(nibabel.Nifti1Image(np.ones((4, 4, 4), np.uint8), affine), tmp_path / "mask.nii.gz")
    masker = make_masker(mask=str(tmp_path / "mask.nii.gz"))
    values = np.linspace(-1, 1, 64)[None]
    one = {"network_mean": values, "network_error": values, "network_names": np.arange(64).astype(str)}
    np.savez(tmp_path / "attributions.npz", classes=["face"], mean=values[:, None], **one)
    write_decoding(tmp_path, command={"attribute": "integrated-gradients"})
    pictures = {section.title: section.pictures for section in run_page(tmp_path).sections}
    assert [picture.name for picture in pictures["What the decoder goes by"]] == ["attribution_time"]
    assert _colourful(glass_brain(to_image(values[0], masker), title="coloured"))
    write_decoding(tmp_path, low=0.4, command={"attribute": "occlusion"})
    sections = {section.title: section for section in run_page(tmp_path, masker=masker).sections}
    assert not sections["What the decoder goes by"].pictures
    assert any("not above chance" in note for note in sections["What the decoder goes by"].notes)
    assert len(sections["On the brain"].pictures) == 2
    assert not any(_colourful(picture.png) for picture in sections["On the brain"].pictures)


def _colourful(png: bytes) -> bool:
    return bool(np.ptp(_pixels(png), axis=2).max() > 40)


def test_people_are_named_with_ridge_beside_them(monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "_png", lambda figure: drawn.append(figure) or b"")
    figures.group_dots({"d/1": 0.8, "d/2": 0.6}, {"d/1": 0.5, "d/2": 0.7}, chance=0.5, kind="subject")
    (axes,) = drawn[0].axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["d/2", "d/1"]
    ridge, ours = axes.get_lines()[:2]
    assert list(ridge.get_ydata()) == [0.7, 0.5]
    assert list(ours.get_ydata()) == [0.6, 0.8]


def test_interactive_views_are_drawn_and_fetch_nothing(tmp_path):
    affine = np.diag([20.0, 20.0, 20.0, 1.0])
    affine[:3, 3] = (-30, -60, -20)
    nibabel.save(nibabel.Nifti1Image(np.ones((4, 4, 4), np.uint8), affine), tmp_path / "mask.nii.gz")
    masker = make_masker(mask=str(tmp_path / "mask.nii.gz"))
    values = np.linspace(-1, 1, 64)[None]
    section = brain_section(HOSTILE, [HOSTILE], values, masker, prefix="map")
    page = Page(title="t", lead="", facts=[], sections=[section], footer=[])
    path = write_page(page, tmp_path / "report")
    assert {file.suffix for file in path.parent.iterdir()} == {".html", ".png", ".gz"}
    html = path.read_text(encoding="utf-8")
    assert "script-src 'unsafe-inline'" in html
    assert "<script" not in html  # scripts stand, escaped, in the frame alone
    assert_shown(path, tmp_path, "--virtual-time-budget=5000")

    # The frame is sealed off, so its page alone says what it has drawn.
    script = """addEventListener("load", () => setTimeout(() => {
        const c = document.querySelector("canvas");
        const d = c.getContext("2d").getImageData(0, 0, c.width, c.height);
        const seen = new Set(new Uint32Array(d.data.buffer));
        document.documentElement.innerHTML = JSON.stringify([[c.width, seen.size]]); }, 1000));"""
    ((width, colors),) = answer(section.views[0].html, script, tmp_path, "--virtual-time-budget=5000")
    assert width > 100
    assert colors > 20


def _pixels(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGB")).astype(int)
