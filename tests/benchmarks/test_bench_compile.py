"""The compiled baselines compute the masked loss, and an operator that does not gets no speed."""

import shutil

import pytest
import torch

from brainflow.benchmarks import kernels_compile
from brainflow.benchmarks.kernels import naive_loss
from brainflow.benchmarks.timing import WrongResultError

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on the CPU")


@pytest.fixture
def small(monkeypatch):
    for name, size in (("TIME", 7), ("TOKENS", 21), ("NETWORKS", 5)):
        monkeypatch.setattr(kernels_compile, name, size)


def test_the_mask_as_a_factor_is_the_naive_loss():
    pred, target = torch.randn(2, 6, 5).unbind()
    mask = (torch.rand(6, 5) < 0.4).long()
    mask[0, 0] = 1
    torch.testing.assert_close(
        kernels_compile.weighted_loss(pred, target, mask), naive_loss(pred, target, mask)
    )


def test_ours_beside_both_and_a_wrong_operator_prints_no_speed(small, monkeypatch):
    rows = kernels_compile._compare("time", 0.01, "cpu")
    assert [(r.case, r.metric, r.baseline) for r in rows] == [
        ("masked_loss/time", "time", "compile"),
        ("masked_loss/time", "time", "compile_weighted"),
    ]
    monkeypatch.setattr(torch, "compile", lambda function: function)
    right = kernels_compile.masked_loss
    monkeypatch.setattr(kernels_compile, "masked_loss", lambda *a, **k: right(*a, **k) * 1.001)
    with pytest.raises(WrongResultError, match="differs from compile"):
        kernels_compile._compare("time", 0.01, "cpu")
