"""mask_tokens and gather_windows as compiled: PTX is executed, of every configuration if --thorough."""

from itertools import product

import pytest
import torch
from kernel_checks import nan_memory

from brainflow.kernels import MaskSpec, gather_windows, mask_tokens
from brainflow.kernels.conformance import error_ratio

aot = pytest.importorskip("brainflow.kernels.aot", reason="needs triton")
from ptx_launch import executed, names_of  # noqa: E402

LENGTHS = [1, 14, 0, 17]
ROWS, NETWORKS, POSITIONS = sum(LENGTHS), 1040, 32  # two tiles; numbers that 16 divides, as in AOT_CONFIGS
BOUNDS = torch.tensor([0, *LENGTHS]).cumsum(0).int()
SEED = 2**40 + 5
MASKS = {
    "plain": None,
    "rows": MaskSpec.time_points(0.5, seed=SEED, offset=7),
    "position": MaskSpec.position(seed=SEED, offset=2),
    "columns": MaskSpec.networks(0.3, seed=SEED, offset=9),
    "networks": MaskSpec.networks(0.3, seed=SEED, offset=9),
    "entries": MaskSpec.entries(0.3, seed=SEED, offset=1),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int16": torch.int16,
          "int8": torch.int8}  # fmt: skip
TOKEN_CALLS = list(product(["rows", "columns", "position"], ["fp32", "bf16"], ["x", "token"]))
OUT_TYPES, GATHER_MASKS = ["fp32", "bf16"], ["plain", "rows", "networks", "entries"]
GATHER_CALLS = list(product(DTYPES, OUT_TYPES, GATHER_MASKS))


@pytest.fixture(scope="module")
def executing():
    with executed() as launches:
        yield launches


def token_kernels(mask, dtype, needed):
    names = {f"mask_tokens.replace.{mask}.{dtype}", f"mask_tokens.gradients.{mask}.{needed}.{dtype}"}
    return names | {"mask_tokens.sum_positions"} if mask == "columns" else names


@pytest.mark.parametrize(("mask", "dtype", "needed"), TOKEN_CALLS)
def test_mask_tokens(mask, dtype, needed, executing):
    """A mask of networks with a token for each position, the others with a token for each network."""
    executing.clear()
    generator = torch.Generator().manual_seed(3)
    x, upstream = torch.randn(2, ROWS, NETWORKS, generator=generator).to(DTYPES[dtype])
    token = torch.randn((POSITIONS, 1) if mask == "columns" else NETWORKS, generator=generator)
    results = []
    for impl, accurate in (("naive", torch.float64), ("triton", torch.float32)):
        with nan_memory():
            leaf, learned = x.clone().requires_grad_(needed == "x"), token.to(accurate).requires_grad_()
            given = leaf.to(accurate) if impl == "naive" else leaf
            out = mask_tokens(given, MASKS[mask], learned, cu_seqlens=BOUNDS, impl=impl)
            inputs = (learned, leaf) if needed == "x" else (learned,)
            results.append((out.detach(), *torch.autograd.grad(out, inputs, upstream.to(out.dtype))))
    (expected, expected_token, *expected_x), (out, grad_token, *grad_x) = results
    assert torch.equal(out, expected.to(out.dtype))
    assert all(map(torch.equal, grad_x, expected_x))
    assert error_ratio(grad_token, expected_token) <= 1e-6
    assert names_of(executing) == token_kernels(mask, dtype, needed)


def test_a_window_of_1200_beside_short_ones(executing):
    bounds = torch.tensor([0, 1, 1201, 1216], dtype=torch.int32)
    x, token, mask = torch.randn(1216, 16), torch.randn(16), MaskSpec.spans(0.4, 3, seed=2**64 - 1, offset=1)
    found, expected = (mask_tokens(x, mask, token, cu_seqlens=bounds, impl=i) for i in ("triton", "naive"))
    assert torch.equal(found, expected)


@pytest.mark.thorough
@pytest.mark.parametrize(("stored", "mask"), list(product(DTYPES, GATHER_MASKS)))
def test_gather_windows(stored, mask, executing, thorough):
    """Into both types with --thorough, else into one: every two of the three choices still come together."""
    place = list(DTYPES).index(stored) + GATHER_MASKS.index(mask)
    for out in OUT_TYPES if thorough else [OUT_TYPES[place % 2]]:
        check_gather_windows(stored, out, mask, executing)


def check_gather_windows(stored, out, mask, executing):
    executing.clear()
    generator = torch.Generator().manual_seed(4)
    store = (torch.randn(64, NETWORKS, generator=generator) * 30).to(DTYPES[stored])
    token = None if MASKS[mask] is None else torch.randn(NETWORKS, generator=generator)
    shape = {"int16": (NETWORKS,), "int8": (2, NETWORKS)}.get(stored)
    options = {
        "scale": None if shape is None else torch.rand(shape, generator=generator) + 0.5,
        "out_dtype": DTYPES[out],
        "mask": MASKS[mask],
        "mask_token": token,
    }
    starts, lengths = [63, 3], [1, 10]
    expected = gather_windows(store, starts, lengths, impl="naive", **options)
    with nan_memory():
        found = gather_windows(store, starts, lengths, impl="triton", **options)
    assert torch.equal(found, expected)
    assert names_of(executing) == {f"gather_windows.{stored}.{out}.{mask}"}


def test_no_configuration_is_left_out():
    expected = {f"gather_windows.{'.'.join(call)}" for call in GATHER_CALLS}
    expected = expected.union(*(token_kernels(*call) for call in TOKEN_CALLS))
    names = {config.name for config in aot.configs()}
    assert expected == {name for name in names if name.split(".")[0] in ("mask_tokens", "gather_windows")}
