"""The demo on the real data that ship with the package, with few steps."""

import json
import subprocess
import sys
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest
from rich.console import Console

from brainflow.cli import demo as command
from brainflow.cli.demo_page import decoding_notes, demo_page, print_tables, summary
from brainflow.decoding.baselines import BASELINES
from brainflow.decoding.scores import Interval
from brainflow.demo import haxby
from brainflow.demo.pipeline import HRF_SHIFT, DemoConfig, run_demo
from brainflow.report.page import write_page
from brainflow.storage import BoldStore


def test_data_are_small_readable_and_come_with_their_licence():
    folder = files("brainflow") / "demo_data" / "haxby2001"
    names = {entry.name for entry in folder.iterdir()}
    assert names == {"bold.nii.gz", "mask.nii.gz", "attributes_literal.txt", "LICENSE-DATA"}
    assert sum(len((folder / name).read_bytes()) for name in names) < 2 * 1024**2
    note = (folder / "LICENSE-DATA").read_text()
    for words in ("CC BY-SA 3.0", "Haxby", "Science 293", "PyMVPA 2.6.5", "Changes\n  None."):
        assert words in note


def test_runs_are_what_the_study_recorded():
    data = haxby.read()
    assert len(data.runs) == 12
    assert all(run.shape == (121, 530) for run in data.runs)
    assert data.mask.sum() == data.networks == 530
    for run, blocks in zip(data.runs, data.blocks, strict=True):
        np.testing.assert_allclose(run.mean(axis=0), 0, atol=1e-5)
        np.testing.assert_allclose(run.std(axis=0, ddof=1), 1, atol=1e-4)
        slope = np.polyfit(np.arange(121), run, deg=1)[0]
        np.testing.assert_allclose(slope, 0, atol=1e-4)
        assert sorted(block.condition for block in blocks) == [
            "bottle",
            "cat",
            "chair",
            "face",
            "house",
            "scissors",
            "scrambled",
            "shoe",
        ]
        assert {block.length for block in blocks} == {9}
        assert max(b.onset + b.length + round(HRF_SHIFT / haxby.T_R) for b in blocks) <= 121


def test_blocks_are_the_stretches_that_are_not_rest():
    labels = np.array(["face", "face", "rest", "cat", "house"])
    assert haxby.blocks_of(labels) == [
        haxby.Block(onset=0, length=2, condition="face"),
        haxby.Block(onset=3, length=1, condition="cat"),
        haxby.Block(onset=4, length=1, condition="house"),
    ]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """The whole demo with a handful of steps."""
    config = DemoConfig(out=tmp_path_factory.mktemp("demo"), pretrain_steps=4, adapt_steps=2, width=32)
    return run_demo(config, say=lambda line: None, quiet=True)


@pytest.mark.slow
def test_demo_end_to_end(result, capsys):
    store = BoldStore.open(str(result.config.out / "store"))
    assert len(store.runs) == 12
    assert len(store.segments) == 96
    assert [entry.name for entry in result.decoders] == [
        *BASELINES,
        "nearest neighbours, pretrained",
        "linear probe, from scratch",
        "linear probe, pretrained",
        "MLP probe, pretrained",
        "attentive probe, pretrained",
        "LoRA, pretrained",
        "fine-tuned, from scratch",
        "fine-tuned, pretrained",
    ]
    assert len(result.held_out) == 2
    assert result.reconstruction.truth.shape == result.reconstruction.prediction.shape == (49, 530)
    assert (
        0.55 < result.decoders[0].scores.accuracy.value < 0.80
    )  # ridge: 0.656 to 0.76 by the kind of window
    print_tables(result, Console(width=100))
    printed = capsys.readouterr().out
    for words in ("each network's mean", "the last value", "chance", "0.125", "ridge, no model"):
        assert words in printed
    saved = json.loads((result.config.out / "decoding" / "scores.json").read_text())
    assert saved["hrf_shift"] == HRF_SHIFT


@pytest.mark.slow
def test_figures_are_ready_for_json_and_the_same_again(result, tmp_path):
    again = run_demo(replace(result.config, out=tmp_path), say=lambda line: None, quiet=True)
    assert json.dumps(summary(result)) == json.dumps(summary(again))


def test_page_shows_every_picture(result, tmp_path):
    path = write_page(demo_page(result), tmp_path)
    html = path.read_text(encoding="utf-8")
    assert html.count("<img ") == 5
    assert {file.stem for file in tmp_path.glob("*.png")} == {
        "loss",
        "reconstruction",
        "map",
        "decoders",
        "confusion",
    }
    assert "CC BY-SA 3.0" in html


@pytest.mark.parametrize(
    ("gain", "says"),
    [
        (Interval(value=0.1, low=0.02, high=0.2), "Pretraining helps:"),
        (Interval(value=-0.1, low=-0.2, high=-0.02), "Pretraining harms:"),
        (
            Interval(value=0.1, low=-0.02, high=0.2),
            "Pretraining makes no difference that these data can show:",
        ),
    ],
)
def test_table_says_whether_pretraining_helps(result, gain, says):
    assert decoding_notes(replace(result, gain=gain))[0].startswith(says)


def test_interrupt_leaves_a_clear_message(monkeypatch, capsys, tmp_path):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("brainflow.demo.pipeline.run_demo", stop)
    assert command.run(command.Args(out=str(tmp_path))) == 130
    assert "interrupted" in capsys.readouterr().err


def test_missing_extra_is_named_with_its_remedy():
    code = (
        "import sys; sys.modules['nilearn'] = None\n"
        "from brainflow.cli.main import main\n"
        "sys.exit(main(['demo', '--out', 'never']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    assert "nilearn" in done.stderr
    assert "pip install 'brainflow-fmri[report]'" in done.stderr
    assert "Traceback" not in done.stderr
