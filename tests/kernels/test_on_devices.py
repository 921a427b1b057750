"""Every op on every device that is here against its float64 specification: what first shows that a GPU works.

`pytest -k cuda` runs the part for a GPU alone; compute-sanitizer takes that command, too.
"""

import pytest
import torch

from brainflow.kernels import (
    MaskSpec,
    attention,
    gather_windows,
    linear_masked_loss,
    mask_tokens,
    masked_loss,
    shifted_attention,
)
from brainflow.kernels.linear_loss.cpu import _scaled
from brainflow.kernels.testing import error_ratio
from brainflow.kernels.varlen_attention import backends

LENGTHS = [7, 1, 30, 12]
TOKENS, NETWORKS, WIDTH = sum(LENGTHS), 333, 24
BOUNDS = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
MASKS = [
    MaskSpec.time_points(0.3, seed=2**63 + 5, offset=2**31 + 1),
    MaskSpec.spans(0.3, 3, seed=1),
    MaskSpec.position(seed=2),
    MaskSpec.networks(0.3, seed=3),
    MaskSpec.tubes(0.3, 4, seed=4),
    MaskSpec.entries(0.3, seed=5),
    MaskSpec.all_valid(),
]
BOUND = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float64: 1e-12}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
masks = pytest.mark.parametrize("mask", MASKS, ids=lambda mask: mask.kind)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradients(function, *inputs, upstream=None):
    """Return the result and the gradients of the inputs, all on the CPU."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    seed = torch.ones_like(out) if upstream is None else upstream.to(out)
    return [x.cpu() for x in (out.detach(), *torch.autograd.grad(out, leaves, seed))]


def agree(found, expected, bound):
    for got, wanted in zip(found, expected, strict=True):
        assert error_ratio(got, wanted) <= bound


@masks
@dtypes
@pytest.mark.parametrize("loss", ["l1", "huber"])
def test_masked_loss(device, mask, dtype, loss):
    pred, target = draw(TOKENS, NETWORKS, dtype=dtype), draw(TOKENS, NETWORKS, dtype=dtype, seed=1)
    found = gradients(
        lambda p: masked_loss(p, target.to(device), mask, loss=loss, cu_seqlens=BOUNDS.to(device)),
        pred.to(device),
    )
    expected = gradients(
        lambda p: masked_loss(p, target.double(), mask, loss=loss, cu_seqlens=BOUNDS, impl="naive"),
        pred.double(),
    )
    agree(found, expected, BOUND[dtype])
    if loss == "l1":  # the slope of huber may be too small for float16
        assert torch.equal(found[1] == 0, expected[1] == 0)


@masks
@dtypes
def test_linear_masked_loss(device, mask, dtype):
    operands = [
        draw(*shape, dtype=dtype, seed=i)
        for i, shape in enumerate([(TOKENS, WIDTH), (NETWORKS, WIDTH), (NETWORKS,)])
    ]
    target = draw(TOKENS, NETWORKS, dtype=dtype, seed=9)
    rows = mask.rows(BOUNDS) if mask.by_rows else None

    def loss(h, w, b, on, **options):
        at = None if rows is None else rows.to(on)
        bounds, wanted = BOUNDS.to(on), target.to(on, h.dtype)
        return linear_masked_loss(h, w, b, wanted, mask, rows=at, cu_seqlens=bounds, loss="mse", **options)

    found = gradients(lambda *x: loss(*x, device), *(x.to(device) for x in operands))
    expected = gradients(lambda *x: loss(*x, "cpu", impl="naive"), *(x.double() for x in operands))
    agree(found, expected, BOUND[dtype])


def test_a_factor_of_32_bits_scales_gradients_of_16(device):
    """1e-7 has no normal float16; as a factor without dimension it would be rounded to one first."""
    grad = torch.full((4, 3), 3e4, dtype=torch.float16, device=device)
    found = _scaled(grad, torch.tensor(1.03e-7, device=device), torch.float16)
    torch.testing.assert_close(found.cpu(), torch.full((4, 3), 3e4 * 1.03e-7).half(), rtol=1e-3, atol=0)


@masks
@dtypes
@pytest.mark.parametrize("by_position", [False, True])
def test_mask_tokens(device, mask, dtype, by_position):
    x, token = draw(TOKENS, NETWORKS, dtype=dtype), draw(*((32, 1) if by_position else (NETWORKS,)), seed=2)
    upstream = draw(TOKENS, NETWORKS, dtype=dtype, seed=3)
    found = gradients(
        lambda a, t: mask_tokens(a, mask, t, cu_seqlens=BOUNDS.to(device)),
        x.to(device), token.to(device), upstream=upstream,
    )  # fmt: skip
    expected = gradients(
        lambda a, t: mask_tokens(a, mask, t, cu_seqlens=BOUNDS, impl="naive"),
        x.double(), token.to(dtype).double(), upstream=upstream,
    )  # fmt: skip
    assert torch.equal(found[0].double(), expected[0])
    assert torch.equal(found[1].double(), expected[1])
    agree(found[2:], expected[2:], BOUND[torch.float32])


@pytest.mark.parametrize("store", ["float32", "float16", "bfloat16", "int16", "int8"])
def test_gather_windows(device, store):
    kind = getattr(torch, store)
    values = (draw(200, NETWORKS) * 30).to(kind)
    scale = None if kind.is_floating_point else draw(NETWORKS, seed=4).abs()
    starts = [3, 199, 100, 150]
    expected = gather_windows(values, starts, LENGTHS, scale=scale, impl="naive")
    on = None if scale is None else scale.to(device)
    assert torch.equal(gather_windows(values.to(device), starts, LENGTHS, scale=on).cpu(), expected)


KERNELS = ["window", "fa4", "fa2", "torch", "fallback"]


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("longest", [49, 200])
@pytest.mark.parametrize("form", ["causal", "both directions", "second stream"])
def test_attention(device, backend, longest, form):
    lengths = torch.tensor([1, longest, 17, longest // 2])
    bounds = torch.cat((torch.zeros(1), lengths.cumsum(0))).int()
    dtype = torch.float32 if backend == "fallback" else torch.bfloat16
    count, shape = (5 if form == "second stream" else 3), (int(lengths.sum()), 2, 64)
    inputs = [draw(*shape, dtype=dtype, seed=i) for i in range(count)]
    asking = 2 * longest if form == "second stream" else longest
    if why := backends.why_not(backend, inputs[0].to(device), len(lengths), asking, 0.0):
        pytest.skip(f"{backend} does not run here: {why}")

    def attend(*x, on, impl):
        if form == "second stream":
            return shifted_attention(*x, bounds.to(on), longest, impl=impl)
        return attention(*x, bounds.to(on), longest, causal=form == "causal", impl=impl)

    upstream = draw(*shape, seed=9)
    found = gradients(
        lambda *x: attend(*x, on=device, impl=backend), *(x.to(device) for x in inputs), upstream=upstream
    )
    expected = gradients(
        lambda *x: attend(*x, on="cpu", impl="naive"), *(x.double() for x in inputs), upstream=upstream
    )
    agree(found, expected, 2e-2 if dtype == torch.bfloat16 else 1e-5)
