"""The machine's ceilings: measured in processes of their own, one odd process does not decide."""

import pytest

from brainflow.benchmarks import ceilings
from brainflow.benchmarks.timing import Timing


@pytest.mark.parametrize("odd", [0.001, 1000.0])
def test_a_full_run_takes_the_middle_process_of_a_ceiling(monkeypatch, odd):
    seconds = iter([3.0, odd, 4.0, 2.0 if odd > 3 else 3.5, odd])
    monkeypatch.setattr(ceilings, "KNOWN", {})
    monkeypatch.setattr(ceilings, "in_a_fresh_process", lambda _: Timing(seconds=(next(seconds),)))
    (row,) = ceilings.measurements(quick=False, device="cpu")["memcpy"]()
    assert row.p50 == (4.0 if odd > 3 else 3.0)
    assert ceilings.bandwidth("cpu") == 2 * ceilings.COPY_BYTES / row.p50
    assert next(seconds, None) is None


def test_a_process_of_its_own_measures_a_ceiling(monkeypatch):
    monkeypatch.setattr(ceilings, "KNOWN", {})
    monkeypatch.setattr(ceilings, "PROCESSES", 2)
    (row,) = ceilings.measurements(quick=False, device="cpu")["memcpy"]()
    assert row.p50 > 0
    assert ("copy", "cpu") in ceilings.KNOWN
