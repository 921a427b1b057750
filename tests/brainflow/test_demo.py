"""The demo on the data that ship with the package, with few steps; of the story people 1–16 alone."""

import json
import multiprocessing
import subprocess
import sys
import warnings
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest
import small_order
from rich.console import Console

from brainflow.cli import demo as command
from brainflow.cli.demo_page import OPPONENTS, demo_page, print_tables, story_gains, summary, verdicts
from brainflow.decoding.result import baseline
from brainflow.decoding.scores import Interval
from brainflow.decoding.task import load_task
from brainflow.demo import cohort, haxby, pipeline, story, worth
from brainflow.demo.pipeline import (
    HRF_SHIFT,
    SECONDS,
    DemoConfig,
    DemoResult,
    Stages,
    run_demo,
    run_story,
)
from brainflow.pretrained.compatibility import LeakWarning, check_unseen
from brainflow.report.page import write_page
from brainflow.simulate import Cohort

TRAINED, TESTED = range(4), range(4, 8)


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


def test_the_story_is_small_scaled_and_comes_with_its_licence():
    folder = files("brainflow") / "demo_data" / "pieman"
    assert {entry.name for entry in folder.iterdir()} == {"pieman24.npz", "LICENSE-DATA"}
    assert len((folder / "pieman24.npz").read_bytes()) < 1.5 * 1024**2
    note = (folder / "LICENSE-DATA").read_text()
    for words in ("MIT", "(c) 2016 Contextual Dynamics Laboratory", "7:12141", "ds002345", "120a885"):
        assert words in note
    bold = story.read()
    assert bold.shape == (24, 300, 100)
    np.testing.assert_allclose(bold.mean(axis=1), 0, atol=1e-5)
    np.testing.assert_allclose(bold.std(axis=1), 1, atol=1e-4)


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """Eight people of the story in a store, and its path."""
    path = tmp_path_factory.mktemp("story") / "store"
    return story.write_store(story.read(), range(8), path)


def test_whoever_tests_is_in_no_training(people, tmp_path):
    split = story.split(people, TESTED)
    assert {part: len(keys) for part, keys in split.parts.items()} == {"train": 2, "validation": 2, "test": 4}
    task = story.task(people, TESTED)
    (fold,) = task.folds
    assert set(task.subjects[fold.test]) == {f"pieman/{story.name(person)}" for person in TESTED}
    assert set(task.subjects[fold.train]) == {f"pieman/{story.name(person)}" for person in TRAINED}
    assert len(task.labels) == 8 * story.SEGMENTS
    clean = worth.pretrained_on(people, split, tmp_path / "clean", steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LeakWarning)
        assert check_unseen(clean, task) == []
    planted = worth.split_people(people, {"train": ["01", "02", "05"], "validation": ["03", "04"]})
    seen = worth.pretrained_on(people, planted, tmp_path / "planted", steps=1)
    with pytest.warns(LeakWarning, match="pieman/05"):
        assert check_unseen(seen, task) == ["pieman/05"]


def test_story_windows_begin_where_the_segments_do(people):
    task = story.task(people, TESTED)
    bold, lengths = task.read()
    assert (lengths == story.LENGTH).all()
    first = bold[: story.LENGTH]
    row = people.segments.onset[task.segments[0]]
    np.testing.assert_array_equal(first, people.run(0)[row : row + story.LENGTH])
    assert sorted(set(people.segments.onset.tolist())) == list(range(20, 280, 20))


def test_who_is_labelled_does_not_pretrain(tmp_path):
    store = cohort.write(tmp_path / "store", Cohort(kind="order", time_points=80), 30)
    split = cohort.split(store, 25)
    counts = {part: len(keys) for part, keys in split.parts.items()}
    assert counts == {"train": 23, "validation": 2, "not used": 25, "test": 20}
    assert len(cohort.split(store, 30).parts["validation"]) == 3
    task = cohort.task(store)
    tested = set(task.subjects[task.folds[0].test])
    assert len(tested) == cohort.TESTED
    assert len(set(task.subjects)) == cohort.TESTED + cohort.LABELLED
    assert set(split.parts["test"]) == set(task.runs[task.folds[0].test])
    assert not set(split.parts["train"] + split.parts["validation"]) & set(task.runs)


@pytest.fixture(scope="module")
def small_data():
    """The slice with every fourth of its voxels and every third of its folds, and few simulated people.

    Fitting the linear path takes the number of voxels cubed, and each fold fits two decoders.
    """
    whole = haxby.read()
    mask = np.zeros_like(whole.mask)
    mask.flat[np.flatnonzero(whole.mask)[::4]] = True
    few = replace(whole, mask=mask, runs=[np.ascontiguousarray(run[:, ::4]) for run in whole.runs])

    def few_folds(store, config):
        task = load_task(store, config)
        return replace(task, folds=task.folds[::3])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(haxby, "read", lambda: few)
        patch.setattr(pipeline, "load_task", few_folds)
        patch.setattr(pipeline, "run_order", small_order.run_order)
        yield few


@pytest.fixture(scope="module")
def result(tmp_path_factory, small_data):
    """The whole demo with a handful of steps."""
    config = DemoConfig(
        out=tmp_path_factory.mktemp("demo"),
        people=range(6),
        test_people=range(4, 6),
        counts=(1, 2),
        draws=2,
        story_steps=1,
        order_people=(4, 6),
        order_count=1,
        order_steps=1,
        slice_steps=2,
        adapt_steps=2,
    )
    lines, reports = [], []
    found = run_demo(config, Stages(lines.append, lambda *report: reports.append(report)))
    assert [line.partition(" ")[0] for line in lines] == ["story:"] * 3 + ["slice:"] * 3 + ["simulated"]
    assert reports == sorted(reports), "it goes on"
    assert len(set(reports)) > len(SECONDS) + 4, f"draws and folds are heard of: {len(set(reports))}"
    done, total = reports[-1]
    assert done / total == 1 - (SECONDS["simulated people"] + SECONDS["drawing"]) / sum(SECONDS.values())
    return found


@pytest.mark.slow
def test_demo_end_to_end(result, small_data, capsys, tmp_path):
    assert [point.groups for point in result.story.points] == [1, 2]
    for point in result.story.points:
        assert [one.name for one in point.results] == [
            "fine-tuned, pretrained",
            "fine-tuned, from scratch",
            "ridge",
            "ridge-spatial",
        ]
    assert list(result.order.pretrained) == [4, 6]
    reconstruction = result.slice.reconstruction
    assert reconstruction.truth.shape == reconstruction.prediction.shape == (49, small_data.networks)
    assert len(result.slice.held_out) == 2
    all_folds = load_task(result.slice.task.store, result.slice.task.config)
    assert [len(np.unique(all_folds.runs[fold.test])) for fold in all_folds.folds] == [2] * 6
    assert 0.55 < baseline(all_folds, "ridge").scores.accuracy.value < 0.80
    assert result.slice.decoders[0].name == "ridge"
    assert result.slice.decoders[0].scores.accuracy.value > 0.3  # 32 of its blocks; chance is 1/8
    print_tables(result, Console(width=200))
    printed = capsys.readouterr().out
    for words in (
        "Real fMRI",
        "SIMULATED",
        "the last value",
        "0.125",
        "ridge, no model",
        *OPPONENTS.values(),
    ):
        assert words in printed
    for gains in story_gains(result.story).values():
        assert set(gains) == set(OPPONENTS)
    first = result.story.points[0]
    ours, fresh = (one.scores.accuracy.value for one in first.results[:2])
    assert story_gains(result.story)[1]["scratch"].value == pytest.approx(ours - fresh)
    path = write_page(demo_page(result), tmp_path)
    html = path.read_text(encoding="utf-8")
    assert html.count("<img ") == 5
    names = {"story", "order", "loss", "reconstruction", "map"}
    assert {file.stem for file in tmp_path.glob("*.png")} == names
    for words in ("CC BY-SA 3.0", "Contextual Dynamics Laboratory", "SIMULATED", "Nobody here is real"):
        assert words in html


@pytest.mark.slow
def test_figures_are_ready_for_json_and_the_same_again(result, tmp_path):
    config = replace(result.config, out=tmp_path)
    silent = Stages(lambda line: None, lambda done, total: None)
    again = DemoResult(
        config=config,
        story=run_story(config, silent),
        order=small_order.run_order(config),  # here, not in a process of its own
        slice=result.slice,  # half a minute, and all that it does is repeated in other tests
    )
    assert json.dumps(summary(result)) == json.dumps(summary(again))


def test_it_says_whether_pretraining_helps():
    def found(low, high):
        one = Interval(value=(low + high) / 2, low=low, high=high)
        return dict.fromkeys(OPPONENTS, one)

    gains = {1: found(0.02, 0.2), 2: found(-0.1, 0.2), 4: found(0.01, 0.1), 8: found(-0.2, -0.02)}
    for line in verdicts(gains, "labelled people"):
        assert "above it with 1, 4 labelled people" in line
        assert "BELOW it with 8 labelled people" in line
        assert "no difference to be shown with 2 labelled people" in line


@pytest.mark.timeout(120)
def test_an_interrupt_ends_the_process_beside_it_too(monkeypatch, tmp_path):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run_story", stop)
    config = DemoConfig(out=tmp_path, order_people=(100_000,), order_steps=100_000)  # hours
    with pytest.raises(KeyboardInterrupt):
        run_demo(config, Stages(lambda line: None, lambda done, total: None))
    assert not multiprocessing.active_children()


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
