import json
import subprocess
import sys

import pytest
import torch

from brainflow.benchmarks import ceilings, command, fresh, gate, kernels_attention, registry
from brainflow.benchmarks.timing import Row, Timing, WrongResultError, medians


@pytest.fixture
def suite(monkeypatch, tmp_path):
    """A kernels suite of what the test gives it, with a floor of 2 for the case `mask`."""
    found = {}
    floors = tmp_path / "floors.json"
    floor = {"suite": "kernels", "case": "mask", "metric": "time", "baseline": "naive", "ratio": 2.0}
    floors.write_text(json.dumps([floor]))
    monkeypatch.setattr(gate, "FLOORS", floors)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr(registry, "load", lambda module, quick, device: found if module == "kernels" else {})
    return found


def _row(ratio: float, case: str = "mask"):
    row = Row(suite="kernels", case=case, metric="time", value=1, unit="s", baseline="naive", ratio=ratio)
    return lambda: [row]


def _wrong():
    raise WrongResultError("mask: error 1e+00 above 1e-05")


@pytest.mark.parametrize(("ratio", "code"), [(2.5, 0), (1.9, 1), (float("nan"), 1)])
def test_gate(suite, ratio, code, capsys):
    suite["mask"] = _row(ratio)
    assert command.run(command.Args(suite="kernels", quick=True, device="cpu", gate=True)) == code
    assert ("gate: passed" in capsys.readouterr().err) == (code == 0)


def test_a_missing_row_trips_the_gate(suite, capsys):
    suite["x"] = _row(3.0, case="x")
    assert command.run(command.Args(suite="kernels", quick=True, device="cpu", gate=True)) == 1
    assert "no figure" in capsys.readouterr().err
    assert command.run(command.Args(suite="kernels", quick=True, device="cpu", gate=True, only="x")) == 0
    with pytest.raises(ValueError, match="--only: got 'mistyped'"):
        command.run(command.Args(suite="kernels", quick=True, device="cpu", gate=True, only="mistyped"))


def test_a_wrong_result_prints_no_speed(suite, capsys, tmp_path):
    suite |= {"mask": _wrong, "other": _row(3.0, case="other")}
    out = tmp_path / "rows.json"
    assert command.run(command.Args(suite="kernels", quick=True, device="cpu", json=out)) == 1
    seen = capsys.readouterr()
    assert "kernels: mask: wrong result, so no speed" in seen.err
    assert [row["case"] for row in json.loads(out.read_text())] == ["other"]
    assert "mask" not in seen.out


def test_a_row_without_a_finite_value_is_left_out(suite, tmp_path):
    suite["x"] = lambda: [
        Row(suite="kernels", case="x", metric="time", value=float("inf"), unit="s", ratio=0.0)
    ]
    out = tmp_path / "rows.json"
    assert command.run(command.Args(suite="kernels", quick=True, device="cpu", json=out)) == 0
    assert json.loads(out.read_text()) == []


def test_rows_are_written_with_the_environment(suite, tmp_path):
    suite["mask"] = _row(3.0)
    out = tmp_path / "rows.json"
    assert command.run(command.Args(suite="kernels", quick=True, device="cpu", json=out)) == 0
    (row,) = json.loads(out.read_text())
    assert row["case"] == "mask"
    assert row["env"]["torch"]
    assert row["env"]["threads"] == torch.get_num_threads()
    (line,) = (tmp_path / "data" / "brainflow" / "bench-history.jsonl").read_text().splitlines()
    assert json.loads(line)["rows"][0]["ratio"] == 3.0


def test_a_full_run_measures_in_processes_of_their_own(monkeypatch, tmp_path):
    """What is put in the place of a kernel here is not there; the ceiling that was measured here is."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr(kernels_attention, "gather_windows", lambda *_, **__: None)
    monkeypatch.setitem(ceilings.KNOWN, ("copy", "cpu"), Timing(seconds=(1e6,)))
    monkeypatch.setattr(registry, "PASSES", {"kernels: gather*": 2})
    plan, failures = {"kernels": ["kernels"]}, []
    rows = registry.measure(plan, False, "cpu", "gather_windows/int8", failures)["kernels"]
    assert not failures
    ours = next(row for row in rows if row.baseline == "naive")
    assert ours.ratio > 0
    assert ours.floor_share > 1e6
    assert registry.measure(plan, True, "cpu", "gather_windows/int8", failures) == {"kernels": []}
    assert "gather_windows/int8: failed, so no speed" in failures[0]


def test_a_full_run_goes_over_what_differs_from_process_to_process_again(monkeypatch):
    """Pass after pass, not measurement after measurement; what fails in any pass has no speed."""
    order, ratios = [], iter([3.0, 9.0, 5.0])

    def mask():
        return _row(next(ratios))()

    def worse():
        if order.count("worse") == 2:
            raise WrongResultError("late")
        return _row(1.0, case="worse")()

    suite = {"mask": mask, "worse": worse, "compile": _row(2.0, case="compile")}
    modules = {"kernels": ("mask", "worse"), "kernels_compile": ("compile",)}
    monkeypatch.setattr(registry, "PASSES", {"kernels: mask": 3, "kernels: *": 2})
    monkeypatch.setattr(registry, "load", lambda module, *_: dict.fromkeys(modules[module]))
    monkeypatch.setattr(
        fresh, "in_a_fresh_process", lambda _f, _module, name, *_: order.append(name) or suite[name]()
    )
    failures = []
    found = registry.measure({"kernels": tuple(modules)}, False, "cpu", None, failures)
    assert order == ["mask", "worse", "compile", "mask", "worse", "mask"]
    assert [(row.case, row.ratio) for row in found["kernels"]] == [("mask", 5.0), ("compile", 2.0)]
    assert failures == ["kernels: worse: wrong result, so no speed: late"]


def test_the_turns_of_a_measurement_lie_evenly_over_a_full_run(monkeypatch):
    """What is measured once fills the time between them; the ceilings, which others need, come first."""
    monkeypatch.setattr(registry, "PASSES", {"kernels: *": 3})
    keys = [("kernels", "kernels: mask"), *[("scaling", f"scaling: {i}") for i in range(8)]]
    order = [name for _, name in registry.spread([*keys, ("ceilings", "ceilings: memcpy")])]
    assert order[0] == "ceilings: memcpy"
    assert [i for i, name in enumerate(order) if name == "kernels: mask"] == [2, 6, 10]
    assert sorted(set(order)) == sorted(name for _, name in [*keys, ("", "ceilings: memcpy")])


def test_medians_over_processes():
    runs = [[_row(ratio)()[0], _row(4.0, case="once")()[0]] for ratio in (3.0, 9.0, 5.0)]
    alone = Row(suite="kernels", case="mask", metric="bytes", value=7.0, unit="bytes")
    runs[1].append(alone)
    mask, once, last = medians(runs)
    assert (mask.ratio, mask.value, mask.p50) == (5.0, 1, None)
    assert once.ratio == 4.0
    assert last == alone


def test_cuda_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="--device: got cuda"):
        command.run(command.Args(suite="kernels", device="cuda"))


def test_module_and_verb_are_one():
    done = subprocess.run(
        [sys.executable, "-m", "brainflow", "bench", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "--quick" in done.stdout
