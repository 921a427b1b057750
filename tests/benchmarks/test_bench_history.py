"""Rows on disk, what changed between two runs, and the Markdown table."""

import json

import pytest

from brainflow.benchmarks import command, history, show
from brainflow.benchmarks.compare import changes, only_in_one
from brainflow.benchmarks.timing import Row

ENV = {"device": "cpu", "cpu": "here", "threads": 1, "date": "2026-01-02"}


def _row(case="mask", *, suite="kernels", ratio=None, spread=0.02, env=ENV, **changes):
    known = {"metric": "time", "value": 1.0, "unit": "ms", "baseline": "naive" if ratio else ""}
    percentiles = {"p20": 1 - spread / 2, "p50": 1.0, "p80": 1 + spread / 2}
    return Row(suite=suite, case=case, ratio=ratio, **(known | percentiles | changes)).to_dict(env)


def test_history_gets_a_line_a_run_and_gives_it_back(tmp_path, capsys):
    path = tmp_path / "deep" / "history.jsonl"
    first, second = [_row(ratio=2.0)], [_row(ratio=3.0), _row("other", value=5.0)]
    history.append(path, first, "kernels")
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"torn": \n')
    history.append(path, second, "kernels --quick")
    assert len(path.read_text().splitlines()) == 3
    assert history.read("1", path) == second
    assert history.read("2", path) == first
    assert "line 2 is damaged" in capsys.readouterr().err
    with pytest.raises(ValueError, match="has 2 runs"):
        history.read("3", path)


def test_a_file_of_rows_is_read_and_anything_else_refused(tmp_path):
    path = tmp_path / "rows.json"
    history.write_json(path, [_row(ratio=2.0)])
    assert history.read(str(path), tmp_path / "none") == [_row(ratio=2.0)]
    for text in ("{", '{"a": 1}', "[1]"):
        path.write_text(text)
        with pytest.raises(ValueError, match="json: is not"):
            history.read(str(path), tmp_path / "none")
    with pytest.raises(ValueError, match="expected a file"):
        history.read("nowhere.json", tmp_path / "none")


@pytest.mark.parametrize(
    ("before", "after", "better"),
    [
        ({"ratio": 4.0}, {"ratio": 2.0}, 0.5),
        ({"value": 4.0}, {"value": 2.0}, 2.0),  # milliseconds: less is better
        ({"value": 4.0, "unit": "windows/s"}, {"value": 2.0, "unit": "windows/s"}, 0.5),
    ],
)
def test_the_direction_of_a_change(before, after, better):
    (change,) = changes([_row(**before)], [_row(**after)])
    assert change.better == better
    assert change.real


def test_a_change_within_the_noise_is_none():
    (change,) = changes([_row(ratio=2.0, spread=0.3)], [_row(ratio=2.5)])
    assert not change.real
    (change,) = changes([_row(ratio=2.0, spread=0.2)], [_row(ratio=2.5)])
    assert change.real
    (change,) = changes([_row(ratio=2.0, spread=0)], [_row(ratio=2.08, spread=0)])
    assert not change.real, "5 % is the least"


def test_absolute_values_are_compared_on_one_machine_only():
    elsewhere = {**ENV, "cpu": "elsewhere"}
    before = [_row(value=1.0), _row("ratio", ratio=2.0)]
    after = [_row(value=9.0, env=elsewhere), _row("ratio", ratio=4.0, env=elsewhere)]
    assert [change.name for change in changes(before, after)] == ["kernels ratio time over naive"]


def test_rows_that_came_and_went():
    loader = _row("reader", suite="loader")
    assert only_in_one([_row("a"), loader], [_row("b")]) == (["kernels a time"], ["kernels b time"])


def test_compare_prints_what_changed(tmp_path, capsys):
    path = tmp_path / "history.jsonl"
    history.append(path, [_row(ratio=4.0), _row("same", ratio=2.0)], "")
    history.append(path, [_row(ratio=2.0), _row("same", ratio=2.01)], "")
    assert command.run(command.Args(compare=("2", "1"), history=path)) == 0
    out = capsys.readouterr().out
    assert "1 of 2 figures changed beyond noise" in out
    assert "2.00× worse" in out
    assert "same" not in out


def test_a_table_replaces_what_stands_between_the_marks(tmp_path, capsys):
    page, rows = tmp_path / "README.md", tmp_path / "rows.json"
    page.write_text(f"# Head\n\n{show.BEGIN}\nold figures\n{show.END}\n\ntail\n")
    rows.write_text(json.dumps([_row(ratio=2.0, floor_share=0.5)]))
    args = command.Args(rows=rows, table=page, history=tmp_path / "none")
    assert command.run(args) == 0
    text = page.read_text()
    assert "| mask | time | 1 ms | 990–1,010 | naive | 2× | 50% |" in text
    assert "on a CPU only" in text
    assert "old figures" not in text
    assert text.startswith("# Head")
    assert text.endswith("\n\ntail\n")
    assert command.run(args) == 0
    assert page.read_text() == text
    assert not args.history.exists(), "rows of a file are no run"
    page.write_text("no marks")
    with pytest.raises(ValueError, match="has no lines"):
        command.run(args)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123456, "0.0123"), (4.5678, "4.57"), (99.94, "99.9"), (789.2, "789"), (1234567, "1,230,000")],
)
def test_numbers_have_three_digits(value, text):
    assert show.number(value) == text


def test_small_numbers_have_no_exponent():
    assert show.number(0.0000123) == "0.000012"
    assert show.number(0) == "0"
