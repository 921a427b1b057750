import math
import time

import pytest

from brainflow.benchmarks.timing import Row, interleave


def test_functions_take_turns():
    calls: list[str] = []
    interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=4, warmup=1)
    assert calls == ["a", "b"] + ["a", "b", "b", "a"] * 2


def test_percentiles_are_ordered_and_positive():
    timing = interleave({"sleep": lambda: time.sleep(0.001)}, repeats=5)["sleep"]
    assert 0.001 <= timing.p20 <= timing.p50 <= timing.p80
    assert timing.repeats == 5


def test_no_repeats_are_refused():
    with pytest.raises(ValueError, match="repeats: got 0"):
        interleave({"a": lambda: None}, repeats=0)


def test_a_row_carries_its_environment():
    row = Row(suite="kernels", case="masked_loss/time", metric="ratio", value=2.0, unit="x", ratio=2.0)
    entry = row.to_dict({"cpu": "here"})
    assert entry["env"] == {"cpu": "here"}
    assert set(entry) == {
        *("suite", "case", "metric", "value", "unit", "baseline", "ratio"),
        *("floor_share", "p20", "p50", "p80", "env"),
    }
    assert math.isclose(entry["ratio"], 2.0)
