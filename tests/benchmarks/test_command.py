"""The command: the gate, wrong results, processes, what is written, and `python -m benchmarks`."""

import json
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch

from brainflow.benchmarks import command, race, roofline, show
from brainflow.benchmarks.timing import Row, WrongResultError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def suite(monkeypatch, tmp_path):
    """A kernels suite of what the test gives it, with a floor of 2 for the case `mask`."""
    found = {}
    floors = tmp_path / "floors.json"
    floor = {"suite": "kernels", "case": "mask", "metric": "time", "baseline": "naive", "ratio": 2.0}
    floors.write_text(json.dumps([floor]))
    monkeypatch.setattr(show, "FLOORS", floors)
    monkeypatch.setattr(command, "load", lambda suite, quick, device: found if suite == "kernels" else {})
    return found


def _row(ratio: float, case: str = "mask", **changes):
    row = Row(
        suite="kernels", case=case, metric="time", value=1, unit="s", baseline="naive", ratio=ratio, **changes
    )
    return lambda: [row]


def _wrong():
    raise WrongResultError("error 1e+00 above 1e-05")


def _run(**changes):
    return command.run(command.Args(**{"suite": "kernels", "quick": True, "device": "cpu"} | changes))


@pytest.mark.parametrize(("ratio", "code"), [(2.5, 0), (1.9, 1), (float("nan"), 1)])
def test_gate(suite, ratio, code, capsys):
    suite["mask"] = _row(ratio)
    assert _run(gate=True) == code
    assert ("gate: passed" in capsys.readouterr().err) == (code == 0)


def test_a_missing_row_trips_the_gate(suite, capsys):
    suite["x"] = _row(3.0, case="x")
    assert _run(gate=True) == 1
    assert "no figure" in capsys.readouterr().err
    assert _run(gate=True, only="x") == 0
    with pytest.raises(ValueError, match="--only: got 'mistyped'"):
        _run(gate=True, only="mistyped")


def test_a_wrong_result_prints_no_speed(suite, capsys, tmp_path):
    suite |= {"mask": _wrong, "other": _row(3.0, case="other")}
    out = tmp_path / "rows.json"
    assert _run(json=out) == 1
    seen = capsys.readouterr()
    assert "mask: wrong result, so no speed" in seen.err
    assert [row["case"] for row in json.loads(out.read_text())] == ["other"]
    assert "mask" not in seen.out


def test_a_row_without_a_finite_value_is_left_out(suite, tmp_path):
    suite["x"] = lambda: [Row(suite="kernels", case="x", metric="time", value=float("inf"), unit="s")]
    out = tmp_path / "rows.json"
    assert _run(json=out) == 0
    assert json.loads(out.read_text()) == []


def test_rows_are_written_with_the_environment(suite, tmp_path):
    suite["mask"] = _row(3.0)
    out = tmp_path / "rows.json"
    assert _run(json=out) == 0
    (row,) = json.loads(out.read_text())
    assert set(row) == {
        *("suite", "case", "metric", "value", "unit", "baseline", "ratio"),
        *("floor_share", "p20", "p50", "p80", "range", "note", "env"),
    }
    assert (row["case"], row["ratio"]) == ("mask", 3.0)
    assert row["env"]["torch"]
    assert row["env"]["threads"] == torch.get_num_threads()


def test_a_full_run_has_the_median_of_three_processes_and_shows_a_wide_range(monkeypatch, capsys, tmp_path):
    """What fails in one process alone has no row."""
    ratios, order = {"mask": iter([3.0, 9.0, 5.0]), "same": iter([2.0, 2.1, 1.9])}, []

    def process(suite, device, only, failures):
        order.append(suite)
        if suite == "ceilings":
            return {}
        found = {name: _row(next(values), case=name)() for name, values in ratios.items()}
        if order.count(suite) == 2:
            failures.append("worse: wrong result, so no speed: late")
        else:
            found["worse"] = _row(1.0, case="worse")()
        return found

    monkeypatch.setattr(command, "_in_a_process", process)
    out = tmp_path / "rows.json"
    assert _run(quick=False, json=out) == 1
    assert order == ["ceilings", "kernels"] * 3
    rows = {row["case"]: row for row in json.loads(out.read_text())}
    assert {case: (row["ratio"], row["range"]) for case, row in rows.items()} == {
        "mask": (5.0, [3.0, 9.0]),
        "same": (2.0, [1.9, 2.1]),
    }
    seen = capsys.readouterr()
    assert "3–9×" in seen.out
    assert "2×" in seen.out
    assert "worse: wrong result" in seen.err


def test_a_suite_of_a_full_run_has_a_process_of_its_own(monkeypatch):
    """What is put in the place of a function here is not there."""
    failures = []
    monkeypatch.setattr(roofline, "_copy_rows", lambda *_: [])
    found = command._in_a_process("ceilings", "cpu", "memcpy", failures)
    assert failures == []
    assert [(name, row.metric) for name, rows in found.items() for row in rows] == [("memcpy", "bytes_per_s")]


def test_a_process_that_dies_takes_no_figure_of_the_others_with_it(monkeypatch, tmp_path, capsys):
    class Pool:
        def __init__(self, *_, **__): ...
        def __enter__(self):
            return self

        def __exit__(self, *_): ...
        def submit(self, function, suite, *_):
            made.append(suite)
            return self

        def result(self):
            if len(made) == 2:
                raise BrokenProcessPool("killed")
            return {"mask": _row(float(len(made)))()} if made[-1] == "kernels" else {}, []

    made = []
    monkeypatch.setattr(command, "ProcessPoolExecutor", Pool)
    out = tmp_path / "rows.json"
    assert _run(quick=False, json=out) == 1
    (row,) = json.loads(out.read_text())
    assert (row["ratio"], row["range"]) == (5.0, [4.0, 6.0])
    assert "kernels: its process ended" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_killed_run_leaves_nothing_that_computes_on():
    code = (
        "import ctypes; from brainflow.devices import begin_worker; begin_worker(1); "
        "number = ctypes.c_int(); ctypes.CDLL(None).prctl(2, ctypes.byref(number)); print(number.value)"
    )
    assert subprocess.check_output([sys.executable, "-c", code]).split() == [b"9"]


def test_compare_prints_what_moved(suite, tmp_path, capsys):
    before = tmp_path / "before.json"
    suite |= {"mask": _row(4.0), "same": _row(2.0, case="same")}
    assert _run(json=before) == 0
    suite |= {"mask": _row(2.0), "same": _row(2.1, case="same")}
    capsys.readouterr()
    assert _run(compare=before) == 0
    out = capsys.readouterr().out.partition("of 2 ratios those that moved by more than 20%")[2]
    assert "kernels mask time over naive" in out
    assert "0.5" in out
    assert "same" not in out


@pytest.mark.parametrize("text", ["{", '{"a": 1}', "[1]", '[{"suite": "kernels"}]'])
def test_what_is_no_file_of_rows_is_refused(suite, tmp_path, text):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"rows\.json: is not"):
        _run(compare=path)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123456, "0.0123"), (99.94, "99.9"), (1234567, "1,230,000"), (0.0000123, "0.000012"), (0, "0")],
)
def test_numbers_have_three_digits_and_no_exponent(value, text):
    assert show.number(value) == text


def test_what_does_not_go_together_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="device: got cuda"):
        _run(device="cuda")
    with pytest.raises(ValueError, match="--threads: got -1"):
        _run(threads=-1)
    with pytest.raises(ValueError, match="--store: got the suite kernels"):
        _run(store="store")


def test_a_race_on_a_store_of_ones_own(monkeypatch, tmp_path):
    raced = []
    monkeypatch.setattr(
        race, "race", lambda *given: raced.append(given) or {"single": [(9, 2.0)], "dense": [(1, 3.0)]}
    )
    out = tmp_path / "rows.json"
    assert _run(suite="frameworks", store="rest.store", json=out) == 0
    assert raced == [(240, "cpu", "rest.store")]
    assert json.loads(out.read_text()) == [], "dense never got there: no row"


def test_the_module_is_the_verb(tmp_path):
    """It measures: rows come out, and their figures are those of this run."""
    out = tmp_path / "rows.json"
    words = ["kernels", "--quick", "--device", "cpu", "--only", "gather_windows/int8", "--json", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())
    assert {row["case"] for row in rows} == {"gather_windows/int8"}
    assert all(row["p20"] <= row["p50"] <= row["p80"] for row in rows)
