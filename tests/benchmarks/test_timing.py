import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from brainflow.benchmarks import timing
from brainflow.benchmarks.timing import (
    Row,
    Timing,
    WrongResultError,
    interleave,
    merge,
    peak_bytes,
    require_close,
    speed_rows,
)


def test_functions_take_turns():
    calls: list[str] = []
    both = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    interleave(both, repeats=4, before={"a": lambda: calls.append("-"), "b": lambda: None})
    assert calls == ["-", "a", "b", "b", "-", "a"] * 2


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
    found = interleave({name: partial(call, name) for name in ("other", "steady")}, repeats=4)
    assert found["steady"].seconds == pytest.approx([0.01] * 4)


def test_more_rounds_until_the_time_is_spent(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def call():
        now[0] += 0.25

    assert len(interleave({"a": call}, repeats=2)["a"].seconds) == 2
    assert interleave({"a": call}, repeats=2, seconds=2.0)["a"].seconds == (0.25,) * 8


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
        *("floor_share", "p20", "p50", "p80", "range", "note", "env"),
    }


def _over_processes(*ratios, value=1.0):
    row = Row(suite="kernels", case="mask", metric="time", value=value, unit="s", baseline="naive")
    return merge([[replace(row, ratio=ratio)] for ratio in ratios])[0]


def test_rows_of_several_processes_become_one():
    row = _over_processes(3.0, 9.0, 5.0)
    assert (row.ratio, row.range, row.value, row.p50) == (5.0, (3.0, 9.0), 1.0, None)
    bare = Row(suite="kernels", case="mask", metric="memory", value=2.0, unit="MB")
    assert merge([[bare]]) == [bare], "one process has no range"
    assert merge([[bare], [replace(bare, value=4.0)], [replace(bare, value=3.0)]])[0].range == (2.0, 4.0)


@pytest.mark.parametrize(
    ("ratios", "wide"),
    [((2.0, 2.1, 1.9), False), ((2.0, 2.5, 2.0), True), ((1.5, 2.0, 2.0), True), ((2.0,), False)],
)
def test_a_row_is_wide_where_a_process_is_more_than_a_fifth_away(ratios, wide):
    assert _over_processes(*ratios).wide == wide


def test_what_differs_from_its_specification_is_wrong():
    one = torch.ones(3)
    require_close("mask", [one, one], [one, one * (1 + 1e-6)], [1e-9, 1e-5])
    for wrong in (one * 1.1, one * math.nan):
        with pytest.raises(WrongResultError, match=r"mask: error .* above 1e-05"):
            require_close("mask", [one, wrong], [one, one], [1e-5, 1e-5])


def test_peak_memory_is_what_is_held_at_once():
    first = torch.empty(1_000_000)

    def twice():
        a = first + 1
        return a + 1

    assert peak_bytes(twice, "cpu") == pytest.approx(8_000_000, rel=1e-4)
    assert peak_bytes(lambda: (first + 1) is None, "cpu") == pytest.approx(4_000_000, rel=1e-4)
    assert peak_bytes(lambda: first, "cpu") == 4_000_000, "what is returned counts, wherever it lies"


def test_the_example_of_the_page_measures():
    page = Path(timing.__file__).with_name("README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (example,) = (block for block in blocks if "def measurements" in block)
    names = {**vars(timing), "timing": timing, "Callable": Callable, "torch": torch}
    exec(example, names)
    (row,) = names["_double"](0.01, "cpu")
    assert (row.case, row.baseline) == ("double", "naive")
    assert list(names["measurements"](True, "cpu")) == ["double"]
