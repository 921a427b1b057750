"""masked_loss and linear_masked_loss as compiled: PTX is executed, of every configuration if --thorough."""

from itertools import product

import pytest
import torch
from kernel_checks import nan_memory, ulp_distance

from brainflow.kernels import MaskSpec, linear_masked_loss, masked_loss
from brainflow.kernels.conformance import error_ratio

aot = pytest.importorskip("brainflow.kernels.aot", reason="needs triton")
from ptx_launch import executed, names_of  # noqa: E402

LENGTHS = [1, 14, 0, 17]
ROWS, NETWORKS, WIDTH = (
    sum(LENGTHS),
    1040,
    16,
)  # two tiles of columns; numbers that 16 divides, as in AOT_CONFIGS
BOUNDS = torch.tensor([0, *LENGTHS]).cumsum(0).int()
SEED = 2**40 + 5
MASKS = {
    "all": MaskSpec.all_valid(),
    "position": MaskSpec.position(seed=SEED, offset=2),
    "rows": MaskSpec.time_points(0.5, seed=SEED, offset=7),
    "columns": MaskSpec.networks(0.3, seed=SEED, offset=9),
}
LOSSES = ["l1", "mse", "huber"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CALLS = list(product(MASKS, LOSSES, DTYPES))
LINEAR_MASKS = ["rows", "all", "columns"]
LINEAR_CALLS = list(product(LINEAR_MASKS, LOSSES, DTYPES))


@pytest.fixture(scope="module")
def executing():
    with executed() as launches:
        yield launches


def types_in_turn(mask, loss, thorough):
    """Return both types with --thorough, else one: every two of mask, loss and type still come together."""
    place = list(MASKS).index(mask) + LOSSES.index(loss)
    return list(DTYPES) if thorough else [list(DTYPES)[place % 2]]


def masked_loss_kernels(mask, loss, dtype):
    return {f"masked_loss.{kernel}.{mask}.{loss}.{dtype}" for kernel in ("sums", "gradient")}


@pytest.mark.thorough
@pytest.mark.parametrize(("mask", "loss"), list(product(MASKS, LOSSES)))
def test_masked_loss(mask, loss, executing, thorough):
    for dtype in types_in_turn(mask, loss, thorough):
        check_masked_loss(mask, loss, dtype, executing)


def check_masked_loss(mask, loss, dtype, executing):
    executing.clear()
    target, pred = torch.randn(2, ROWS, NETWORKS, generator=torch.Generator().manual_seed(1)).to(
        DTYPES[dtype]
    )
    results = []
    for impl, x in (("naive", pred.double()), ("triton", pred)):
        with nan_memory():
            leaf = x.requires_grad_()
            value = masked_loss(
                leaf, target.to(x.dtype), MASKS[mask], loss=loss, cu_seqlens=BOUNDS, impl=impl
            )
            results.append((value.detach(), *torch.autograd.grad(value, leaf)))
    (expected, expected_grad), (value, grad) = results
    assert error_ratio(value, expected) <= 1e-6
    assert torch.equal(grad == 0, expected_grad == 0)
    if dtype == "fp32":
        assert error_ratio(grad, expected_grad) <= 1e-6
    else:
        assert ulp_distance(grad, expected_grad) <= 1
    assert names_of(executing) == masked_loss_kernels(mask, loss, dtype) | {"masked_loss.finish"}


@pytest.mark.parametrize("p", [0.0, 1.0])
@pytest.mark.parametrize("scheme", [MaskSpec.time_points, MaskSpec.networks])
def test_a_mask_of_nothing_and_one_of_everything(scheme, p, executing):
    mask, pred = scheme(p, seed=SEED), torch.ones(ROWS, NETWORKS, requires_grad=True)
    value = masked_loss(pred, torch.zeros(ROWS, NETWORKS), mask, cu_seqlens=BOUNDS, impl="triton")
    (grad,) = torch.autograd.grad(value, pred)
    assert value.item() == p
    torch.testing.assert_close(grad, torch.full_like(grad, p / grad.numel()), rtol=1e-6, atol=0)


def linear_kernels(mask, loss, dtype):
    return {f"linear_masked_loss.compare.{mask}.{loss}.{dtype}"}


@pytest.mark.thorough
@pytest.mark.parametrize(("mask", "loss"), list(product(LINEAR_MASKS, LOSSES)))
def test_linear_masked_loss(mask, loss, executing, thorough):
    for dtype in types_in_turn(mask, loss, thorough):
        check_linear_masked_loss(mask, loss, dtype, executing)


def check_linear_masked_loss(mask, loss, dtype, executing):
    executing.clear()
    generator = torch.Generator().manual_seed(2)
    shapes = (ROWS, WIDTH), (NETWORKS, WIDTH), (NETWORKS,), (ROWS, NETWORKS)
    *inputs, target = (torch.randn(*shape, generator=generator).to(DTYPES[dtype]) for shape in shapes)
    options = {"loss": loss, "cu_seqlens": BOUNDS}
    if mask == "rows":
        options["rows"] = MASKS[mask].rows(BOUNDS)
        options["row_weights"] = torch.rand(len(options["rows"]), generator=generator)
        options["row_weights"][0] = 0.0
    results = []
    for impl, given in (("naive", [x.double() for x in inputs]), ("triton", inputs)):
        with nan_memory():
            leaves = [x.requires_grad_() for x in given]
            value = linear_masked_loss(*leaves, target.to(leaves[0].dtype), MASKS[mask], impl=impl, **options)
            results.append((value.detach(), *torch.autograd.grad(value, leaves)))
    (expected, *expected_grads), (value, *grads) = results
    assert error_ratio(value, expected) <= 1e-6
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert error_ratio(grad, expected_grad) <= (1e-6 if dtype == "fp32" else 2**-7)
    assert names_of(executing) >= linear_kernels(mask, loss, dtype)


def test_no_configuration_is_left_out():
    expected = {"masked_loss.finish"}.union(*(masked_loss_kernels(*call) for call in CALLS))
    expected = expected.union(*(linear_kernels(*call) for call in LINEAR_CALLS))
    names = {config.name for config in aot.configs()}
    assert expected == {name for name in names if name.split(".")[0] in ("masked_loss", "linear_masked_loss")}
