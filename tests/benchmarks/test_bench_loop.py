"""The training loop beside the bare step, for a moment."""

import pytest

from brainflow.benchmarks import loop
from brainflow.config import ModelConfig


@pytest.fixture
def tiny(monkeypatch):
    for name, size in (("NETWORKS", 8), ("RUNS", 3), ("LENGTH", 80)):
        monkeypatch.setattr(loop, name, size)
    monkeypatch.setattr(loop, "TINY", ModelConfig(width=8, layers=1, heads=1, networks=8))


def test_loop_overhead_is_over_the_bare_step(tiny):
    (row,) = loop._overhead(12, "cpu")
    assert (row.suite, row.case, row.baseline) == ("frameworks", "loop_overhead", "bare_step")
    assert row.ratio > 0
    assert row.p20 > 0
