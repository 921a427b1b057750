"""The Triton faces of the masked ops against the float64 specification, tiny shapes, inside guard zones."""

import pytest
import torch
import triton
import triton.language as tl

from brainflow.kernels import MaskSpec, linear_masked_loss, mask_tokens, masked_loss
from brainflow.kernels.random import MASK, philox
from brainflow.kernels.testing import error_ratio, guarded, nan_memory

CU_SEQLENS = torch.tensor([0, 3, 4, 4, 9], dtype=torch.int32)
LENGTHS = torch.tensor([3, 1, 0, 5], dtype=torch.int32)
BIG = 2**40 + 3
SCHEMES = {
    "time_points": MaskSpec.time_points(0.4, seed=BIG, offset=2**31 + 5),
    "spans": MaskSpec.spans(0.4, 3, seed=2**64 - 1, offset=1),
    "position": MaskSpec.position(seed=BIG, offset=3),
    "networks": MaskSpec.networks(0.3, seed=2**63 + 11, offset=9),
    "tubes": MaskSpec.tubes(0.3, 4, seed=5, offset=2),
    "entries": MaskSpec.entries(0.3, seed=BIG, offset=4),
    "all": MaskSpec.all_valid(),
    "nothing": MaskSpec.time_points(0.0, seed=1),
    "everything": MaskSpec.networks(1.0, seed=1),
}
LOSSES = ["l1", "mse", "huber"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NETWORKS = [70, 64, 1023, 1025, 200, 1024, 1, 400, 1000]


def case(scheme, loss):
    """Every scheme meets every loss; types, layouts and widths rotate so that each pair of them occurs."""
    i, j = list(SCHEMES).index(scheme), LOSSES.index(loss)
    return scheme, loss, DTYPES[(i + j) % 3], (i // 3 + j) % 2 == 0, NETWORKS[(i + 4 * j) % 9]


CASES = [case(scheme, loss) for scheme in SCHEMES for loss in LOSSES]
ULP = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def batch(networks, dtype, packed, *, width=None):
    shape = (9, width or networks) if packed else (4, 5, width or networks)
    return torch.randn(shape).to(dtype)


def bounds(packed):
    return {"cu_seqlens": CU_SEQLENS} if packed else {"lengths": LENGTHS}


@pytest.mark.parametrize(("scheme", "loss", "dtype", "packed", "networks"), CASES)
def test_masked_loss_matches_the_specification(scheme, loss, dtype, packed, networks):
    mask = SCHEMES[scheme]
    pred, check_pred = guarded(batch(networks, dtype, packed).requires_grad_())
    target, check_target = guarded(batch(networks, dtype, packed))
    results = []
    for impl in ("naive", "triton"):
        with nan_memory():
            value = masked_loss(pred, target, mask, loss=loss, impl=impl, **bounds(packed))
            (grad,) = torch.autograd.grad(value * 3, pred)
        results.append((value.detach(), grad))
    (expected, expected_grad), (value, grad) = results
    assert error_ratio(value, expected) <= 1e-5
    assert error_ratio(grad, expected_grad) <= ULP[dtype]
    assert torch.equal(grad != 0, expected_grad != 0)
    check_pred()
    check_target()


TOKEN_CASES = [
    ("time_points", torch.float32, 70, True, False),
    ("position", torch.bfloat16, 1023, True, False),
    ("networks", torch.float32, 70, True, True),
    ("tubes", torch.float16, 200, False, False),
    ("spans", torch.float32, 300, False, True),
    ("nothing", torch.float32, 64, True, False),
    ("everything", torch.float32, 1, False, True),
]


@pytest.mark.parametrize(("scheme", "dtype", "networks", "packed", "by_position"), TOKEN_CASES)
def test_mask_tokens_matches_the_specification(scheme, dtype, networks, packed, by_position):
    x, check_x = guarded(batch(networks, dtype, packed).requires_grad_())
    token, check_token = guarded(torch.randn((20, 1) if by_position else (networks,)).requires_grad_())
    upstream = torch.randn(x.shape).to(dtype)
    results = []
    for impl in ("naive", "triton"):
        with nan_memory():
            out = mask_tokens(x, SCHEMES[scheme], token, impl=impl, **bounds(packed))
            results.append((out.detach(), *torch.autograd.grad(out, (x, token), upstream)))
    for expected, actual in zip(*results, strict=True):
        assert error_ratio(actual, expected) <= ULP[dtype]
    check_x()
    check_token()


LINEAR_CASES = [*CASES[::4], *[case(scheme, "l1") for scheme in ("networks", "entries", "all")]]


@pytest.mark.parametrize(("scheme", "loss", "dtype", "packed", "networks"), dict.fromkeys(LINEAR_CASES))
def test_linear_masked_loss_matches_the_specification(scheme, loss, dtype, packed, networks):
    hidden = batch(networks, dtype, packed, width=24).requires_grad_()
    target, check_target = guarded(batch(networks, dtype, packed))
    weight, bias = torch.randn(networks, 24).to(dtype), torch.randn(networks).to(dtype)
    inputs = (hidden, weight.requires_grad_(), bias.requires_grad_())
    wide = [t.detach().double().requires_grad_() for t in inputs]
    results = []
    for impl, given in (("naive", wide), ("triton", inputs)):
        with nan_memory():
            value = linear_masked_loss(
                *given, target, SCHEMES[scheme], loss=loss, impl=impl, **bounds(packed)
            )
            results.append((value.detach(), *torch.autograd.grad(value * 3, given)))
    # the interpreter truncates 16-bit stores, where the compiled kernel rounds
    bound = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    (expected, *expected_grads), (value, *grads) = results
    assert error_ratio(value, expected) <= 1e-5
    for expected_grad, grad in zip(expected_grads, grads, strict=True):
        assert grad.dtype == dtype
        assert error_ratio(grad, expected_grad) <= bound
    check_target()


def test_a_window_of_1200_beside_windows_of_length_1():
    cu_seqlens = torch.tensor([0, 1, 1201, 1202], dtype=torch.int32)
    x, token = torch.randn(1202, 3), torch.randn(3)
    marked = mask_tokens(x, SCHEMES["spans"], token, cu_seqlens=cu_seqlens, impl="triton")
    assert torch.equal(marked, mask_tokens(x, SCHEMES["spans"], token, cu_seqlens=cu_seqlens, impl="naive"))


def test_weighted_rows_match_the_specification():
    mask = MaskSpec.time_points(0.6, seed=BIG)
    rows = mask.rows(CU_SEQLENS)
    weights = torch.rand(rows.numel())
    weights[0] = 0.0
    hidden, target = torch.randn(9, 24, requires_grad=True), torch.randn(9, 70)
    weight = torch.randn(70, 24, requires_grad=True)
    results = []
    for impl in ("naive", "triton"):
        value = linear_masked_loss(
            hidden, weight, None, target, None, rows=rows, row_weights=weights, impl=impl
        )
        results.append((value.detach(), *torch.autograd.grad(value, (hidden, weight))))
    for expected, actual in zip(*results, strict=True):
        assert error_ratio(actual, expected) <= 1e-5


@pytest.mark.parametrize("scheme", list(SCHEMES)[:6])
def test_masks_are_equal_bit_for_bit(scheme):
    """The masked input shows the mask that the kernels draw."""
    mask, networks = SCHEMES[scheme], 1100 if scheme == "networks" else 300
    x, token = torch.zeros(9, networks), torch.ones(networks)
    marked = mask_tokens(x, mask, token, cu_seqlens=CU_SEQLENS, impl="triton")
    assert torch.equal(marked.bool(), mask.dense(CU_SEQLENS, networks))


@triton.jit
def four(out, seed, high, offset, N: tl.constexpr):
    i = tl.arange(0, N)
    c = (i * 0).to(tl.uint32)
    words = tl.philox(seed, i.to(tl.uint32), (c + high).to(tl.uint32), c + 9, (c + offset).to(tl.uint32))
    for k in tl.static_range(4):
        tl.store(out + k * N + i, words[k].to(tl.int64))


def test_philox_equals_triton():
    for seed in (77, 2**40 + 9, -5):
        for offset in (0, 2**31 + 1):
            out = torch.empty(4, 16, dtype=torch.int64)
            four[(1,)](out, seed, 2**32 - 3, offset, N=16)
            expected = torch.stack(philox(seed, torch.arange(16), 2**32 - 3, 9, offset))
            assert torch.equal(out & MASK, expected)
