"""Dropout on the CPU against what it is defined to be."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from brainflow.kernels.dropout import Dropout, kept


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (2, 7, 11), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values_are_dropped_or_scaled_and_gradients_alike(shape, dtype):
    x = torch.randn(shape).to(dtype).requires_grad_()
    out = Dropout(0.3)(x)
    upstream = torch.randn(shape).to(dtype)
    (gradient,) = torch.autograd.grad(out, x, upstream)
    assert out.dtype == gradient.dtype == dtype
    dropped = out == 0
    torch.testing.assert_close(out, torch.where(dropped, 0, x / kept(0.3)).to(dtype))
    torch.testing.assert_close(gradient, torch.where(dropped, 0, upstream / kept(0.3)).to(dtype))


@pytest.mark.parametrize("p", [0.0005, 0.1, 0.5, 0.9])
def test_as_many_as_asked_for_independently(p):
    torch.manual_seed(0)
    n = 400_000
    kept_first, kept_second = (Dropout(p)(torch.ones(n)) != 0 for _ in range(2))
    for rate, expected in (
        (kept_first.double().mean(), 1 - p),
        ((kept_first & kept_second).double().mean(), (1 - p) ** 2),
        ((kept_first[1:] & kept_first[:-1]).double().mean(), (1 - p) ** 2),
        ((kept_first[4:] & kept_first[:-4]).double().mean(), (1 - p) ** 2),
    ):
        assert abs(float(rate) - expected) < 5 * (expected * (1 - expected) / n) ** 0.5 + 1 / 65_536
    assert kept(p) == pytest.approx(1 - p, abs=1 / 131_072)


def test_the_seed_decides_and_evaluation_changes_nothing():
    x, dropout = torch.randn(50, 3), Dropout(0.5)
    torch.manual_seed(1)
    first = dropout(x)
    assert not torch.equal(dropout(x), first)
    torch.manual_seed(1)
    assert torch.equal(dropout(x), first)
    assert dropout.eval()(x) is x
    assert torch.equal(Dropout(1.0)(x), torch.zeros(50, 3))


def test_without_data():
    with FakeTensorMode():
        x = torch.empty(5, 3, requires_grad=True)
        out = Dropout(0.5)(x)
        out.sum().backward()
        assert out.shape == x.grad.shape == (5, 3)


def test_strided_input_and_compiled():
    x = torch.randn(8, 6).t().requires_grad_()
    out = Dropout(0.5)(x)
    torch.testing.assert_close(out, torch.where(out == 0, 0, x * 2))
    (gradient,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(gradient, torch.where(out == 0, 0.0, 2.0))
    compiled = torch.compile(Dropout(0.5), fullgraph=True, backend="aot_eager")
    out = compiled(x)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(gradient, torch.where(out == 0, 0.0, 2.0))
