import json
import subprocess
import sys

import pytest

from brainflow.benchmarks import command
from brainflow.benchmarks.timing import Row


@pytest.fixture
def suite(monkeypatch, tmp_path):
    """A kernels suite of one row whose ratio the test chooses, with a floor of 2."""
    rows: list[Row] = []
    floors = tmp_path / "floors.json"
    floor = {"suite": "kernels", "case": "mask", "metric": "time", "baseline": "naive", "ratio": 2.0}
    floors.write_text(json.dumps([floor]))
    monkeypatch.setattr(command, "FLOORS", floors)
    monkeypatch.setattr(command, "_suite", lambda name: _Suite(rows))

    def with_ratio(ratio: float) -> None:
        rows.append(
            Row(suite="kernels", case="mask", metric="time", value=1, unit="s", baseline="naive", ratio=ratio)
        )

    return with_ratio


class _Suite:
    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def run(self, quick: bool, device: str) -> list[Row]:
        return self.rows


@pytest.mark.parametrize(("ratio", "code"), [(2.5, 0), (1.9, 1)])
def test_gate(suite, ratio, code, capsys):
    suite(ratio)
    assert command.run(command.Args(suite="kernels", quick=True, device="cpu", gate=True)) == code
    assert ("gate: passed" in capsys.readouterr().err) == (code == 0)


def test_a_missing_row_trips_the_gate(suite, capsys):
    suite(3.0)
    command.FLOORS.write_text(
        json.dumps([{"suite": "kernels", "case": "x", "metric": "y", "baseline": "z", "ratio": 1.0}])
    )
    assert command.run(command.Args(suite="kernels", quick=True, device="cpu", gate=True)) == 1
    assert "no figure" in capsys.readouterr().err


def test_rows_are_written_with_the_environment(suite, tmp_path):
    suite(3.0)
    out = tmp_path / "rows.json"
    assert command.run(command.Args(suite="kernels", device="cpu", json=out)) == 0
    (row,) = json.loads(out.read_text())
    assert row["case"] == "mask"
    assert row["env"]["torch"]


def test_cuda_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="--device: got cuda"):
        command.run(command.Args(suite="kernels", device="cuda"))


def test_module_and_verb_are_one(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "brainflow", "bench", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "--quick" in done.stdout
