"""The suites give rows under the names that other tools read, here at sizes at which nothing takes long."""

from functools import partial

import pytest

from brainflow.benchmarks import frameworks, kernels, kernels_attention, timing

KERNELS = {
    "masked_loss/time": {"naive"},
    "masked_loss/network": {"naive"},
    "masked_loss/position": {"naive"},
    "linear_masked_loss/time": {"project_all"},
    "linear_masked_loss/position": {"project_all"},
    "mask_tokens/time": {"naive"},
    "gather_windows": {"naive"},
    "varlen_attention": {"padded", "block_diagonal"},
}
FRAMEWORKS = {
    "csm": {"published", "single"},
    "csm-single": {"published"},
    "seq-bert": {"published"},
    "net-bert": {"published"},
    "autoencoder": {"published"},
}


@pytest.fixture
def once(monkeypatch):
    """Time one round of everything."""

    def interleave(functions, *, repeats=1, device="cpu", seconds=0.0, warmup=1, lockstep=False):
        return timing.interleave(functions, repeats=1, device=device, lockstep=True)

    for module in (kernels, kernels_attention, frameworks):
        monkeypatch.setattr(module, "interleave", interleave)


def _baselines(rows, metric):
    found = {}
    for row in rows:
        if row.metric == metric and row.ratio is not None:
            assert row.ratio > 0
            found.setdefault(row.case, set()).add(row.baseline)
    return found


def test_kernels(once, monkeypatch):
    for name, size in (("WINDOWS", 4), ("TIME", 6), ("TOKENS", 24), ("NETWORKS", 16), ("WIDTH", 8)):
        monkeypatch.setattr(kernels, name, size)
    monkeypatch.setattr(kernels_attention, "HEADS", 2)
    monkeypatch.setattr(kernels_attention, "HEAD_DIM", 8)
    rows = [row for measure in kernels.measurements(True, "cpu").values() for row in measure()]
    assert {row.suite for row in rows} == {"kernels"}
    found = _baselines(rows, "time")
    assert {case: found.get(case) for case in KERNELS} == KERNELS
    shares = {row.case for row in rows if row.metric == "bytes_per_s" and row.floor_share > 0}
    assert set(KERNELS) <= shares


def test_frameworks(once, monkeypatch):
    pytest.importorskip("transformers")
    tiny = frameworks.Sizes(networks=8, width=8, layers=1, heads=1, batch=3)
    monkeypatch.setattr(frameworks, "Sizes", partial(lambda: tiny))
    rows = [row for measure in frameworks.measurements(True, "cpu").values() for row in measure()]
    assert {row.suite for row in rows} == {"frameworks"}
    for metric in ("steps_per_s", "targets_per_s", "tokens_per_s", "peak_memory"):
        found = _baselines(rows, metric)
        assert {case: found.get(case) for case in FRAMEWORKS} == FRAMEWORKS, metric
