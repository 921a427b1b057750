"""A deliberately slowed kernel and a slowed loader trip the gate with the committed floors."""

import json
import time

import pytest

from brainflow.benchmarks import command, kernels
from brainflow.storage import BoldStore


@pytest.fixture
def bench(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))

    def run(suite: str, only: str) -> tuple[int, dict]:
        out = tmp_path / "rows.json"
        code = command.run(
            command.Args(suite=suite, quick=True, device="cpu", only=only, json=out, gate=True)
        )
        return code, {
            (r["case"], r["metric"], r["baseline"]): r["ratio"] for r in json.loads(out.read_text())
        }

    return run


def _slowed(function, seconds):
    def slow(*args, **kwargs):
        time.sleep(seconds)
        return function(*args, **kwargs)

    return slow


def test_a_slow_kernel_trips_the_gate(bench, monkeypatch, capsys):
    name = ("masked_loss/position", "time", "naive")
    _, before = bench("kernels", "masked_loss/position")
    monkeypatch.setattr(kernels, "masked_loss", _slowed(kernels.masked_loss, 0.1))
    capsys.readouterr()
    code, after = bench("kernels", "masked_loss/position")
    assert code == 1
    assert "gate: kernels masked_loss/position time over naive: ratio" in capsys.readouterr().err
    assert after[name] < before[name], "it was the sleep that cost the ratio"


@pytest.mark.slow
def test_a_slow_loader_trips_the_gate(bench, monkeypatch, capsys):
    monkeypatch.setattr(BoldStore, "windows", _slowed(BoldStore.windows, 0.005))
    code, ratios = bench("loader", "store")
    assert code == 1
    assert "gate: loader reader windows_per_s over memmap: ratio" in capsys.readouterr().err
    assert ratios["reader", "windows_per_s", "memmap"] < 0.1
