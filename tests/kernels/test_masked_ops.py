"""The CPU faces of the masked ops against the float64 specification, sampled over the whole matrix."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_checks import guarded, nan_memory, ulp_distance

from brainflow.kernels import MaskSpec, linear_masked_loss, mask_tokens, masked_loss
from brainflow.kernels.conformance import error_ratio

SCHEMES = {
    "time_points": lambda seed: MaskSpec.time_points(0.3, seed=seed, offset=5),
    "spans": lambda seed: MaskSpec.spans(0.3, 3, seed=seed),
    "position": lambda seed: MaskSpec.position(seed=seed),
    "networks": lambda seed: MaskSpec.networks(0.3, seed=seed),
    "tubes": lambda seed: MaskSpec.tubes(0.3, 4, seed=seed),
    "entries": lambda seed: MaskSpec.entries(0.3, seed=seed),
    "all": lambda seed: MaskSpec.all_valid(),
    "nothing": lambda seed: MaskSpec.time_points(0.0, seed=seed),
    "everything": lambda seed: MaskSpec.networks(1.0, seed=seed),
}
LENGTHS = [[1], [3, 1, 20], [10, 0, 49, 7], [64]]
NETWORKS = [1, 64, 200, 400, 1000, 1023, 1024, 1025]
matrix = given(
    scheme=st.sampled_from(sorted(SCHEMES)),
    loss=st.sampled_from(["l1", "mse", "huber"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    packed=st.booleans(),
    networks=st.sampled_from(NETWORKS),
    lengths=st.sampled_from(LENGTHS),
    seed=st.integers(0, 2**64 - 1),
)


def make(lengths, networks, packed, dtype):
    """Return (a function that makes a random batch, the keywords of its bounds)."""
    if packed:
        keywords = {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int()}
        return lambda n=networks: torch.randn(sum(lengths), n).to(dtype), keywords
    shape = (len(lengths), max(lengths))
    return lambda n=networks: torch.randn(*shape, n).to(dtype), {"lengths": torch.tensor(lengths)}


def close(actual, expected, *, ulps, ratio):
    """Float32 by relative error, others in units of the last place."""
    if actual.dtype == torch.float32:
        return error_ratio(actual, expected) <= ratio
    return ulp_distance(actual, expected) <= ulps


@settings(max_examples=20, deadline=None)
@example("time_points", "l1", torch.float32, True, 1024, [1200], 2**33)
@example("networks", "mse", torch.bfloat16, False, 1025, [1200], 2**33)
@example("everything", "huber", torch.float32, True, 1025, [1200], 1)
@matrix
def test_masked_loss(scheme, loss, dtype, packed, networks, lengths, seed):
    mask = SCHEMES[scheme](seed)
    new, bounds = make(lengths, networks, packed, dtype)
    pred, check_pred = guarded(new().requires_grad_())
    target, check_target = guarded(new())
    wide = pred.detach().double().requires_grad_()
    expected = masked_loss(wide, target.double(), mask, loss=loss, impl="naive", **bounds)
    (expected_grad,) = torch.autograd.grad(expected * 3, wide)
    with nan_memory():
        value = masked_loss(pred, target, mask, loss=loss, **bounds)
        (grad,) = torch.autograd.grad(value * 3, pred)
    assert error_ratio(value, expected) <= 1e-5
    if scheme == "nothing":
        assert value.item() == 0.0
    assert close(grad, expected_grad, ulps=1, ratio=2e-6)
    assert bool((grad[expected_grad == 0] == 0).all())
    (again,) = torch.autograd.grad(masked_loss(pred, target, mask, loss=loss, **bounds) * 3, pred)
    assert torch.equal(grad, again)
    check_pred()
    check_target()


@settings(max_examples=12, deadline=None)
@matrix
def test_mask_tokens(scheme, loss, dtype, packed, networks, lengths, seed):
    mask = SCHEMES[scheme](seed)
    new, bounds = make(lengths, networks, packed, dtype)
    token = torch.randn((max(lengths), 1) if loss == "l1" else (networks,), requires_grad=True)
    x, check_x = guarded(new().requires_grad_())
    upstream = new()
    with nan_memory():
        out = mask_tokens(x, mask, token, **bounds)
        grads = torch.autograd.grad(out, (x, token), upstream)
    expected = mask_tokens(x, mask, token, impl="naive", **bounds)
    assert torch.equal(out, expected)
    (grad_x,) = torch.autograd.grad(expected, x, upstream)
    assert torch.equal(grads[0], grad_x)
    wide, wide_token = x.detach().double(), token.detach().double().requires_grad_()
    expected = mask_tokens(wide, mask, wide_token, impl="naive", **bounds)
    (grad_token,) = torch.autograd.grad(expected, wide_token, upstream.double())
    assert error_ratio(grads[1], grad_token) <= 2e-6
    check_x()


@settings(max_examples=12, deadline=None)
@matrix
def test_linear_masked_loss(scheme, loss, dtype, packed, networks, lengths, seed):
    mask = SCHEMES[scheme](seed)
    new, bounds = make(lengths, networks, packed, torch.float32)
    hidden, target = new(16).requires_grad_(), new().to(dtype)
    weight, bias = torch.randn(networks, 16, requires_grad=True), torch.randn(networks, requires_grad=True)
    inputs = (hidden, weight, bias)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    expected = linear_masked_loss(*wide, target.double(), mask, loss=loss, impl="naive", **bounds)
    expected_grads = torch.autograd.grad(expected * 3, wide)
    with nan_memory():
        value = linear_masked_loss(*inputs, target, mask, loss=loss, **bounds)
        grads = torch.autograd.grad(value * 3, inputs)
    assert error_ratio(value, expected) <= 1e-5
    # a difference near 0 may fall on the other side of l1's kink, which is no rounding error
    bound = 3e-3 if loss == "l1" else 1e-5
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert error_ratio(grad, expected_grad) <= bound


@pytest.mark.parametrize("loss", ["l1", "mse", "huber"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", ["time_points", "networks"])
def test_linear_masked_loss_in_low_precision(dtype, scheme, loss):
    """Predictions are not rounded: the loss has float32's digits, gradients are off by one rounding."""
    mask, eps = SCHEMES[scheme](1), torch.finfo(dtype).eps
    inputs = [torch.randn(64, 32), torch.randn(200, 32) / 6, torch.randn(200)]
    inputs = [t.to(dtype).requires_grad_() for t in inputs]
    target = torch.randn(64, 200)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    expected = linear_masked_loss(*wide, target, mask, loss=loss, impl="naive")
    value = linear_masked_loss(*inputs, target, mask, loss=loss)
    assert error_ratio(value, expected) <= 1e-5
    grads = torch.autograd.grad(value * 2.0**12, inputs)
    expected_grads = torch.autograd.grad(expected * 2.0**12, wide)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert grad.dtype == dtype
        assert error_ratio(grad, expected_grad) <= eps


@pytest.mark.parametrize("loss", ["l1", "mse", "huber"])
@pytest.mark.parametrize("networks", [1024, 1025])
def test_equal_terms_do_not_drift(loss, networks):
    """A long float32 chain of equal terms is biased: 3e-4 here by a dot product of a block."""
    pred, target = torch.full((640, networks), 0.3, requires_grad=True), torch.zeros(640, networks)
    for mask in (MaskSpec.all_valid(), MaskSpec.networks(0.7, seed=5), MaskSpec.entries(0.7, seed=5)):
        expected = masked_loss(pred.double(), target, mask, loss=loss, impl="naive")
        assert error_ratio(masked_loss(pred, target, mask, loss=loss), expected) <= 1e-6


def test_rows_and_weights():
    mask, cu_seqlens = MaskSpec.time_points(0.4, seed=2), torch.tensor([0, 30, 64], dtype=torch.int32)
    rows = mask.rows(cu_seqlens)
    weights = torch.rand(rows.numel())
    weights[::3] = 0.0
    hidden, target = torch.randn(64, 16), torch.randn(64, 50)
    hidden[rows[0]] = float("nan")  # weight 0: is not looked at
    weight = torch.randn(50, 16, requires_grad=True)
    value = linear_masked_loss(hidden, weight, None, target, None, rows=rows, row_weights=weights)
    per_row = (hidden[rows] @ weight.T - target[rows]).abs().mean(1)
    expected = (weights * per_row)[weights > 0].sum() / weights.sum()
    torch.testing.assert_close(value, expected)
    by_mask = linear_masked_loss(hidden.nan_to_num(), weight, None, target, mask, cu_seqlens=cu_seqlens)
    by_rows = linear_masked_loss(hidden.nan_to_num(), weight, None, target, mask, rows=rows)
    assert torch.equal(by_mask, by_rows)
    zero = linear_masked_loss(hidden, weight, None, target, None, rows=rows[:0])
    assert zero.item() == 0.0
    assert float(torch.autograd.grad(zero, weight)[0].abs().sum()) == 0.0


def test_packed_and_padded_agree():
    lengths = [4, 1, 9]
    packed = torch.randn(14, 33)
    padded = torch.nn.utils.rnn.pad_sequence(
        packed.split(lengths), batch_first=True, padding_value=float("nan")
    )
    cu_seqlens = torch.tensor([0, 4, 5, 14], dtype=torch.int32)
    for build in SCHEMES.values():
        mask = build(2**50)
        a = masked_loss(packed, packed * 0, mask, cu_seqlens=cu_seqlens)
        b = masked_loss(padded, torch.zeros_like(padded), mask, lengths=torch.tensor(lengths))
        torch.testing.assert_close(a, b)


def test_nan_outside_the_mask_stays_there():
    for build in (SCHEMES["time_points"], SCHEMES["networks"], SCHEMES["entries"]):
        mask = build(3)
        pred = torch.randn(40, 70)
        pred[~mask.dense(torch.tensor([0, 40]), 70)] = float("nan")
        pred.requires_grad_()
        value = masked_loss(pred, torch.zeros(40, 70), mask, loss="huber")
        (grad,) = torch.autograd.grad(value, pred)
        assert bool(torch.isfinite(value))
        assert bool(torch.isfinite(grad).all())


def test_error_messages():
    x, token, mask = torch.randn(6, 4), torch.randn(4), MaskSpec.all_valid()
    cu = torch.tensor([0, 6], dtype=torch.int32)
    w, learned = torch.randn(4, 3), torch.ones(4, requires_grad=True)
    cases = [
        (ValueError, "target: got shape", lambda: masked_loss(x, x[:5], mask)),
        (TypeError, "pred: got dtype", lambda: masked_loss(x.int(), x, mask)),
        (ValueError, "pred: got strides", lambda: masked_loss(x.T, x.T, mask)),
        (ValueError, "pred: got layout", lambda: masked_loss(x.to_sparse(), x, mask)),
        (TypeError, "mask: got Tensor of shape", lambda: masked_loss(x, x, x > 0)),
        (ValueError, "loss: got 'l3'", lambda: masked_loss(x, x, mask, loss="l3")),
        (ValueError, "target: got a tensor that", lambda: masked_loss(x, x * learned, mask)),
        (ValueError, "target: got device meta", lambda: masked_loss(x, x.to("meta"), mask)),
        (ValueError, "lengths: got a tensor", lambda: masked_loss(x, x, mask, lengths=cu)),
        (ValueError, "cu_seqlens: got 5", lambda: masked_loss(x, x, mask, cu_seqlens=cu.clamp(max=5))),
        (ValueError, "ascend", lambda: masked_loss(x, x, mask, cu_seqlens=torch.tensor([0, 7, 6]))),
        (TypeError, "cu_seqlens: got dtype", lambda: masked_loss(x, x, mask, cu_seqlens=cu.float())),
        (ValueError, r"lengths: got values in \[9",
         lambda: masked_loss(x[None], x[None], mask, lengths=torch.tensor([9]))),
        (ValueError, "impl: got 'triton'", lambda: masked_loss(x, x, mask, impl="triton")),
        (ValueError, "impl: got 'gpu'", lambda: masked_loss(x, x, mask, impl="gpu")),
        (ValueError, "mask_token: got shape", lambda: mask_tokens(x, mask, token[:3])),
        (ValueError, "mask_token: got 5 positions", lambda: mask_tokens(x, mask, torch.randn(5, 1))),
        (ValueError, "weight: got shape", lambda: linear_masked_loss(x, w, None, x, mask)),
        (TypeError, "weight: got dtype",
         lambda: linear_masked_loss(x, torch.randn(4, 4).double(), None, x, mask)),
        (ValueError, "bias: got shape",
         lambda: linear_masked_loss(x, torch.randn(4, 4), torch.randn(3), x, mask)),
        (ValueError, "mask: got None", lambda: linear_masked_loss(x, torch.randn(4, 4), None, x, None)),
        (ValueError, "rows: got values", lambda: linear_masked_loss(
            x, torch.randn(4, 4), None, x, None, rows=torch.tensor([6]))),
        (ValueError, "rows: got a tensor with a mask of columns", lambda: linear_masked_loss(
            x, torch.randn(4, 4), None, x, MaskSpec.networks(0.1, seed=0), rows=torch.tensor([1]))),
        (ValueError, "row_weights: got", lambda: linear_masked_loss(
            x, torch.randn(4, 4), None, x, mask, row_weights=token)),
    ]  # fmt: skip
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
