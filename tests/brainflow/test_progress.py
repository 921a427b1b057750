"""The time that is left is right within 20 % after the first tenth; the clock is driven by the test."""

import contextlib
import io
import re
import sys
import types

import pytest

from brainflow import progress
from brainflow.progress import Pause, ProgressLine, Remaining, or_notebook, progress_bar


class FakeClock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def steps(seconds):
    """Work of so many seconds a unit, without pauses."""
    return [[("unit", s)] for s in seconds]


def training(count, step, *, warm=0.0, validate=0, validation=0.0, save=0, checkpoint=0.0):
    """A training: what happens in each step, in seconds."""
    found = []
    for number in range(1, count + 1):
        events = [("unit", step + (warm if number == 1 else 0.0))]
        end = number == count
        if validate and (number % validate == 0 or end):
            events.append(("validation", validation))
        if save and (number % save == 0 or end):
            events.append(("checkpoint", checkpoint))
        found.append(events)
    return found


def worst_error(work, *, pauses=None, at_once=1, done=0, after=0.1, moments=4):
    """Go through work and return the largest error of the time left, as a share of it, after a tenth.

    It is looked at after every unit and pause, and between them.
    """
    clock = FakeClock()
    end = clock.now + sum(seconds for events in work[done:] for _, seconds in events)
    left = Remaining(len(work), done=done, pauses=pauses, at_once=at_once, clock=clock)
    worst, first = 0.0, done + after * (len(work) - done)

    def look():
        nonlocal worst
        truth = end - clock.now
        if left.done >= first and truth > 1e-6 * end:
            worst = max(worst, abs(left.seconds() - truth) / truth)

    def spend(seconds):
        for _ in range(moments):
            clock.now += seconds / moments
            look()

    for number, events in enumerate(work[done:], done + 1):
        for kind, seconds in events:
            if kind == "unit":
                spend(seconds)
                left.advance(number)
            else:
                with left.pause(kind):
                    spend(seconds)
            look()
    assert left.seconds() == pytest.approx(0.0, abs=1e-6)
    return worst


@pytest.mark.parametrize("count", [20, 100, 1000])
def test_even_work(count):
    assert worst_error(steps([2.0] * count)) < 0.2


@pytest.mark.parametrize("count", [20, 100, 1000])
def test_a_slow_start_says_nothing_about_the_rest(count):
    assert worst_error(steps([60.0] + [1.0] * (count - 1))) < 0.2


def test_a_start_that_is_slow_for_several_steps():
    assert worst_error(steps([60.0, 20.0, 20.0] + [0.5] * 497)) < 0.2


@pytest.mark.parametrize("validation", [0.5, 10.0, 60.0])
@pytest.mark.parametrize("count", [200, 205])  # with a last validation out of turn
def test_validations_and_checkpoints_count(count, validation):
    work = training(
        count, 1.0, warm=30.0, validate=20, validation=validation, save=20, checkpoint=2.0
    )  # the first is over after a tenth
    pauses = {"validation": Pause(20), "checkpoint": Pause(20)}
    # until the first validation is over nobody knows what it takes
    assert worst_error(work, pauses=pauses, after=22 / count) < 0.2


def test_a_guess_of_the_first_validation_is_kept_until_it_is_over():
    work = training(100, 1.0, validate=50, validation=12.0)
    assert worst_error(work, pauses={"validation": Pause(50, guess=10.0)}) < 0.2
    assert worst_error(work, pauses={"validation": Pause(50)}) > 0.15


def test_a_run_that_continues_knows_only_its_own_steps():
    work = training(200, 1.0, validate=20, validation=10.0, save=50, checkpoint=5.0)
    pauses = {"validation": Pause(20, guess=10.0), "checkpoint": Pause(50, guess=5.0)}
    assert worst_error(work, pauses=pauses, done=110) < 0.2


def test_of_units_that_come_together_the_first_is_no_slow_start():
    """8 at once, all equally long: they come in bursts."""
    clock = FakeClock()
    left = Remaining(160, at_once=8, clock=clock)
    for burst in range(1, 20):
        clock.now += 60.0
        for number in range(8):
            left.advance(8 * (burst - 1) + number + 1)
        assert left.seconds() == pytest.approx(60.0 * (20 - burst))


def test_it_is_silent_before_the_first_unit_and_counts_down_between_units():
    clock = FakeClock()
    left = Remaining(10, clock=clock)
    assert left.seconds() is None
    assert str(left) == "-:--:--"
    for done in (1, 2):
        clock.now += 600.0
        left.advance(done)
    assert str(left) == "1:20:00"
    clock.now += 300.0
    assert str(left) == "1:15:00"
    clock.now += 10_000.0  # this unit takes long: there are still seven after it
    assert str(left) == "1:10:00"


def test_a_pause_that_fails_is_over():
    clock = FakeClock()
    left = Remaining(4, pauses={"validation": Pause(1)}, clock=clock)
    clock.now += 1.0
    left.advance(1)
    with contextlib.suppress(ValueError), left.pause("validation"):
        clock.now += 5.0
        raise ValueError
    assert left.seconds() == pytest.approx(3 * 1.0 + 3 * 5.0)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("text", ["", "loss 0.5 " * 20])
def test_a_terminal_gets_a_bar_of_at_most_80_columns(monkeypatch, text):
    out = Terminal()
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    left = Remaining(20)
    with ProgressLine("files", left, counts=True, keep=True) as line:
        for done in range(1, 21):
            left.advance(done)
            line.update(text)
        line.print("a line that [stays]")
    drawn = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "\n", out.getvalue()).replace("\r", "\n").splitlines()
    assert max(map(len, drawn)) <= 80
    assert "a line that [stays]" in drawn
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert all(part in shown for part in ("files", "20/20", "ETA 0:00:00", text[:12]))
    assert out.getvalue().count("\n") < 10  # the bar stays on its line


def test_elsewhere_there_are_ten_lines_with_the_time_left(monkeypatch):
    out, clock = io.StringIO(), FakeClock()
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setattr(progress, "QUIET_FOR", 1e9)
    monkeypatch.setattr(progress, "Remaining", lambda **more: Remaining(**more, clock=clock))
    with progress_bar("files") as report:
        for done in range(1, 201):
            clock.now += 1.0
            report(done, 200)
    lines = out.getvalue().splitlines()
    assert lines[0] == "files: 10 %, 0:03:00 left"
    assert lines[-1] == "files: 100 %"
    assert len(lines) == 10
    assert "\x1b" not in out.getvalue()


def test_a_slow_work_says_more_often_that_it_lives(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setattr(progress, "QUIET_FOR", 0.0)
    with progress_bar("files") as report:
        for done in range(1, 51):
            report(done, 1000)
    assert len(out.getvalue().splitlines()) == 50


def test_quiet_is_quiet(monkeypatch, capsys):
    monkeypatch.setattr(progress, "QUIET_FOR", 0.0)
    with progress_bar("files", quiet=True) as report:
        report(10, 10)
    assert capsys.readouterr() == ("", "")


class Notebook:
    """As much of IPython as is used, in the signatures that it documents."""

    def __init__(self):
        self.shown, self.updates = [], []
        self.display = types.SimpleNamespace(HTML=self.html, display=self.display_)

    def get_ipython(self):
        return types.SimpleNamespace(kernel=object())

    def html(self, data=None):
        return types.SimpleNamespace(_repr_html_=lambda: data)

    def display_(self, *objs, display_id=None):
        assert display_id is True  # else no handle is returned
        self.shown += objs
        return types.SimpleNamespace(update=self.updates.append)


@pytest.fixture
def notebook(monkeypatch):
    found = Notebook()
    monkeypatch.setitem(sys.modules, "IPython", found)
    monkeypatch.setitem(sys.modules, "IPython.display", found.display)
    monkeypatch.setattr(progress, "REDRAWN", 0.0)
    return found


def test_a_notebook_gets_one_line_that_changes(notebook, capsys):
    with progress_bar("<files>") as report:
        for done in range(1, 4):
            report(done, 3)
    assert len(notebook.shown) == 1
    texts = [update._repr_html_() for update in notebook.updates]
    assert [share in text for share, text in zip(("33 %", "66 %", "100 %"), texts, strict=False)] == [
        True
    ] * 3
    assert "&lt;files&gt;" in texts[0]
    assert "after 0:00:0" in texts[-1]
    assert capsys.readouterr() == ("", "")


def test_a_function_shows_its_progress_in_a_notebook_unless_it_is_given_one(notebook, monkeypatch):
    given = []
    or_notebook(lambda *numbers: given.append(numbers), "files")(1, 2)
    assert given == [(1, 2)]
    assert not notebook.shown
    report = or_notebook(None, "files")
    report(1, 2)
    report(2, 2)
    assert len(notebook.shown) == 1
    assert "100 % after" in notebook.updates[-1]._repr_html_()
    monkeypatch.delitem(sys.modules, "IPython")  # in a script
    or_notebook(None, "files")(1, 2)
    assert len(notebook.shown) == 1


def test_ipython_in_a_terminal_is_no_notebook(notebook, monkeypatch):
    monkeypatch.setattr(notebook, "get_ipython", types.SimpleNamespace)
    assert not progress.in_notebook()
