import math
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from brainflow.benchmarks import timing
from brainflow.benchmarks.timing import Row, Timing, interleave, speed_rows


def test_functions_take_turns():
    calls: list[str] = []
    both = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    interleave(both, repeats=4, warmup=1, lockstep=True)
    assert calls == ["a", "b"] + ["a", "a", "b", "b", "b", "b", "a", "a"] * 2  # each turn's first: uncounted


def test_turns_of_a_fast_function_are_several_calls(monkeypatch):
    """On a clock on which `slow` takes 40 ms and `fast` 10: four calls a turn."""
    now, calls = [0.0], []

    def takes(name, seconds):
        def call():
            now[0] += seconds
            calls.append(name)

        return call

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    both = {"slow": takes("slow", 0.04), "fast": takes("fast", 0.01)}
    found = interleave(both, repeats=2, warmup=0)
    assert calls == ["slow", "fast", *["slow"] * 2, *["fast"] * 10, *["slow"] * 2]
    assert found["slow"].p50 == pytest.approx(0.04)
    assert found["fast"].p50 == pytest.approx(0.01)
    assert found["fast"].times_faster_than(found["slow"]) == pytest.approx(4)


def test_what_another_function_leaves_behind_is_not_counted(monkeypatch):
    """`steady` takes 10 ms, but 50 where `other` was called before it."""
    now, last = [0.0], [""]

    def call(name):
        now[0] += 0.05 if name == "steady" and last[0] == "other" else 0.01
        last[0] = name

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    found = interleave({name: partial(call, name) for name in ("other", "steady")}, repeats=4, lockstep=True)
    assert found["steady"].seconds == pytest.approx([0.01] * 4)


def test_more_rounds_until_the_time_is_spent():
    timing = interleave({"sleep": lambda: time.sleep(0.001)}, repeats=2, seconds=0.05)["sleep"]
    assert len(timing.seconds) > 5
    assert 0.001 <= timing.p20 <= timing.p50 <= timing.p80


def test_a_ratio_that_has_not_settled_gets_more_rounds():
    steady = [0.010, 0.030, 0.010, 0.009, 0.010, 0.020, 0.011]
    assert timing.settled({"a": steady, "b": [2 * value for value in steady]}), "both slow down together"
    assert timing.settled({"a": steady})
    assert not timing.settled({"a": steady, "b": [0.02, 0.01, 0.04, 0.02, 0.03, 0.01, 0.05]})


@pytest.mark.parametrize(("repeats", "rounds"), [(3, 3), (7, 21)])
def test_only_with_enough_repeats_and_never_without_end(monkeypatch, repeats, rounds):
    monkeypatch.setattr(timing, "settled", lambda samples: False)
    found = interleave({"a": lambda: None, "b": lambda: None}, repeats=repeats)
    assert len(found["a"].seconds) == len(found["b"].seconds) == rounds


def test_no_repeats_are_refused():
    with pytest.raises(ValueError, match="repeats: got 0"):
        interleave({"a": lambda: None}, repeats=0)


def test_a_ratio_is_paired_by_round():
    """The machine is ten times slower in the middle: unpaired medians would say 1, the rounds say 2."""
    ours, theirs = Timing(seconds=(1, 10, 10)), Timing(seconds=(2, 2, 20))
    assert ours.times_faster_than(theirs) == 2
    assert theirs.times_faster_than(ours) == 0.5


def test_rows_of_seconds():
    times = {"ours": Timing(seconds=(0.1, 0.1)), "naive": Timing(seconds=(0.3, 0.3))}
    (row,) = speed_rows("kernels", "mask", times, floor=0.05)
    assert (row.value, row.unit, row.baseline) == (100, "ms", "naive")
    assert math.isclose(row.ratio, 3)
    assert math.isclose(row.floor_share, 0.5)


def test_rows_of_work_done():
    """Ours takes twice the time for eight times the work: four times as fast."""
    times = {
        "ours": Timing(seconds=(2.0,)),
        "single": Timing(seconds=(1.0,)),
        "other": Timing(seconds=(4.0,)),
    }
    rows = speed_rows(
        "frameworks", "csm", times, metric="targets_per_s", unit="targets/s",
        work={"ours": 80, "single": 10, "other": 40},
    )  # fmt: skip
    assert [(r.baseline, r.value, r.ratio) for r in rows] == [("single", 40, 4), ("other", 40, 4)]


def test_a_row_without_a_baseline():
    (row,) = speed_rows("ceilings", "memcpy", {"ours": Timing(seconds=(0.5,))}, unit="GB/s", work=3)
    assert (row.value, row.baseline, row.ratio) == (6, "", None)


def test_a_row_carries_its_environment():
    row = Row(suite="kernels", case="masked_loss/time", metric="ratio", value=2.0, unit="x", ratio=2.0)
    entry = row.to_dict({"cpu": "here"})
    assert entry["env"] == {"cpu": "here"}
    assert set(entry) == {
        *("suite", "case", "metric", "value", "unit", "baseline", "ratio"),
        *("floor_share", "p20", "p50", "p80", "env"),
    }


def test_the_example_of_the_page_measures():
    page = Path(timing.__file__).with_name("README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (example,) = (block for block in blocks if "def measurements" in block)
    names = {**vars(timing), "Callable": Callable, "torch": torch}
    exec(example, names)
    (row,) = names["_double"](0.01, "cpu")
    assert (row.case, row.baseline) == ("double", "naive")
    assert list(names["measurements"](True, "cpu")) == ["double"]
