"""A kernel or a loader that is slower than the committed floors allow trips the gate.

No clock is read: what `interleave` measured is put in its place, so that the verdict is the same everywhere.
"""

import json

import pytest

from brainflow.benchmarks import command, loader, timing
from brainflow.benchmarks.timing import Timing


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Run one measurement in this process, in which a call of each way is said to take so many seconds."""
    monkeypatch.setattr(loader, "NETWORKS", 8)
    monkeypatch.setattr(loader, "QUICK_RUNS", 3)

    def run(suite: str, only: str, seconds: dict[str, float]) -> tuple[int, dict]:
        def measured(functions, *, before=None, **options):
            for name, function in functions.items():  # what is timed must still run
                if before is not None:
                    before[name]()
                function()
            return {name: Timing(seconds=(seconds.get(name, 1.0),) * 3) for name in functions}

        monkeypatch.setattr(timing, "interleave", measured)
        out = tmp_path / "rows.json"
        code = command.run(
            command.Args(suite=suite, quick=True, device="cpu", only=only, json=out, gate=True)
        )
        return code, {
            (r["case"], r["metric"], r["baseline"]): r["ratio"] for r in json.loads(out.read_text())
        }

    return run


def test_a_slow_kernel_trips_the_gate(bench, capsys):
    code, ratios = bench("kernels", "masked_loss/position", {"ours": 0.001})
    assert code == 0, capsys.readouterr().err
    assert ratios["masked_loss/position", "time", "naive"] == pytest.approx(1000)
    code, ratios = bench("kernels", "masked_loss/position", {"ours": 2.0})
    assert code == 1
    assert "gate: kernels masked_loss/position time over naive: ratio 0.5" in capsys.readouterr().err


def test_a_slow_loader_trips_the_gate(bench, capsys):
    fast = {"reader": 0.001, "host": 0.001, "dali": 0.001, "memmap": 0.001, "webdataset": 10.0}
    code, _ = bench("loader", "store", fast)
    assert code == 0, capsys.readouterr().err
    code, ratios = bench("loader", "store", fast | {"reader": 0.1})
    assert code == 1
    assert "gate: loader reader windows_per_s over memmap: ratio 0.01" in capsys.readouterr().err
    assert ratios["reader", "windows_per_s", "memmap"] == pytest.approx(0.01)
