"""The machine's ceilings: measured in processes of their own, the middle one counts."""

import pytest

from brainflow.benchmarks import ceilings
from brainflow.benchmarks.timing import Timing


@pytest.mark.parametrize(("odd", "middle"), [(0.001, 3.0), (1000.0, 4.0)])
def test_two_odd_processes_do_not_decide_the_ceiling_of_a_full_run(monkeypatch, odd, middle):
    seconds = iter([3.0, odd, 4.0, 3.5, odd])
    monkeypatch.setattr(ceilings, "KNOWN", {})
    monkeypatch.setattr(ceilings, "in_a_fresh_process", lambda _: Timing(seconds=(next(seconds),)))
    (row,) = ceilings.measurements(quick=False, device="cpu")["memcpy"]()
    assert row.p50 == middle
    assert ceilings.bandwidth("cpu") == 2 * ceilings.COPY_BYTES / row.p50
    assert next(seconds, None) is None


def test_a_process_of_its_own_measures_a_ceiling(monkeypatch):
    monkeypatch.setattr(ceilings, "KNOWN", {})
    monkeypatch.setattr(ceilings, "PROCESSES", 2)
    (row,) = ceilings.measurements(quick=False, device="cpu")["memcpy"]()
    assert row.p50 > 0
    assert ("copy", "cpu") in ceilings.KNOWN
