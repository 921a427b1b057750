"""gather_windows on the CPU against its specification: every type of store, scales, masks, refusals."""

import numpy as np
import pytest
import torch
from kernel_checks import guarded, nan_memory, ulp_distance

from brainflow.kernels.gathering import STORES, cpu, gather_windows
from brainflow.kernels.masking import mask_tokens
from brainflow.kernels.masks import MaskSpec

STARTS, LENGTHS = [7, 0, 19], [5, 1, 9]
CU_SEQLENS = torch.tensor([0, 5, 6, 15], dtype=torch.int32)
MASKS = {
    "time points": MaskSpec.time_points(0.4, seed=2**40 + 3, offset=5),
    "networks": MaskSpec.networks(0.4, seed=2**63 + 1),
    "position": MaskSpec.position(seed=11),
    "entries": MaskSpec.entries(0.3, seed=3),
    "tubes": MaskSpec.tubes(0.3, 3, seed=4),
    "spans": MaskSpec.spans(0.4, 2, seed=4),
    "all": MaskSpec.all_valid(),
    "nothing": MaskSpec.time_points(0.0, seed=1),
}


def draw_store(dtype, networks=20, time=28):
    values = torch.randn(time, networks) * 30
    return values.round().to(dtype) if not dtype.is_floating_point else values.to(dtype)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", ["none", "networks", "windows"])
@pytest.mark.parametrize("dtype", STORES)
def test_matches_the_specification(dtype, scale, out_dtype):
    store, check = guarded(draw_store(dtype))
    before = store.clone()
    factor = {"none": None, "networks": torch.rand(20), "windows": torch.rand(3, 20)}[scale]
    with nan_memory():
        out = gather_windows(store, STARTS, LENGTHS, scale=factor, out_dtype=out_dtype)
    expected = gather_windows(store, STARTS, LENGTHS, scale=factor, out_dtype=torch.float64, impl="naive")
    assert out.dtype == out_dtype
    assert ulp_distance(out, expected) <= (0 if scale == "none" else 1)  # double rounding may cost one
    assert torch.equal(store, before)
    check()


@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masking_on_the_way_is_masking_the_result(mask, by_position):
    store = draw_store(torch.float16)
    token = torch.randn(9, 1) if by_position else torch.randn(20)
    fused_token, token = token.clone().requires_grad_(), token.requires_grad_()
    fused = gather_windows(store, STARTS, LENGTHS, mask=mask, mask_token=fused_token)
    packed = gather_windows(store, STARTS, LENGTHS, impl="cpu")
    expected = mask_tokens(packed, mask, token, cu_seqlens=CU_SEQLENS, impl="cpu")
    assert torch.equal(fused, expected)
    upstream = torch.randn(fused.shape)
    (grad,) = torch.autograd.grad(fused, fused_token, upstream)
    (expected_grad,) = torch.autograd.grad(expected, token, upstream)
    assert torch.equal(grad, expected_grad)


@pytest.mark.parametrize("networks", [1, 255, 1025])
def test_any_number_of_networks(networks):
    store = draw_store(torch.int16, networks)
    mask, token = MaskSpec.networks(0.4, seed=8), torch.randn(networks)
    out = gather_windows(store, STARTS, LENGTHS, mask=mask, mask_token=token)
    expected = gather_windows(store, STARTS, LENGTHS, mask=mask, mask_token=token, impl="naive")
    assert torch.equal(out, expected)


def test_a_store_with_longer_rows():
    wide = draw_store(torch.float32, 32)
    out = gather_windows(wide[:, 3:21], STARTS, LENGTHS)
    expected = gather_windows(wide[:, 3:21].contiguous(), STARTS, LENGTHS, impl="naive")
    assert torch.equal(out, expected)


def test_arrays_tensors_and_lists_are_the_same():
    store = draw_store(torch.float32)
    out = gather_windows(store, STARTS, LENGTHS)
    arrays = gather_windows(store, np.array(STARTS), np.array(LENGTHS, np.int32))
    tensors = gather_windows(store, torch.tensor(STARTS), torch.tensor(LENGTHS, dtype=torch.int32))
    assert torch.equal(out, arrays)
    assert torch.equal(out, tensors)


def refused(**changes):
    return {"store": draw_store(torch.float32), "starts": STARTS, "lengths": LENGTHS, **changes}


SPEC = MaskSpec.all_valid()
REFUSED = {
    "store: got dtype torch.float64": {"store": torch.zeros(28, 20, dtype=torch.float64)},
    "store: got shape [28], expected 2 dimensions": {"store": torch.zeros(28)},
    "store: got strides (1, 28)": {"store": torch.zeros(20, 28).t()},
    "store: got a tensor that requires grad": {"store": torch.zeros(28, 20, requires_grad=True)},
    "out_dtype: got torch.int8": {"out_dtype": torch.int8},
    "starts: got torch.float32, expected integers": {"starts": [1.5, 2.0, 3.0]},
    "lengths: got shape [2], expected starts' [3]": {"lengths": [1, 2]},
    "lengths: got start 0 and length 0 for window 1": {"lengths": [5, 0, 9]},
    "starts: got start -1 and length 5 for window 0": {"starts": [-1, 0, 19]},
    "starts: got start 20 and length 9 for window 2": {"starts": [7, 0, 20]},
    "scale: got shape [3, 19], expected [3, 20]": {"scale": torch.ones(3, 19)},
    "mask: got None, expected both": {"mask_token": torch.zeros(20)},
    "mask_token: got None, expected both": {"mask": SPEC},
    "mask_token: got shape [19], expected [20]": {"mask": SPEC, "mask_token": torch.zeros(19)},
    "mask_token: got shape [8, 1], expected [positions, 1] with at least 9": {
        "mask": SPEC,
        "mask_token": torch.zeros(8, 1),
    },
    "impl: got 'gpu'": {"impl": "gpu"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals_name_argument_got_and_expected(message):
    with pytest.raises((ValueError, TypeError)) as error:
        gather_windows(**refused(**REFUSED[message]))
    assert message in str(error.value)
    assert "expected" in str(error.value)


def test_opcheck_and_compile():
    token = torch.randn(20, requires_grad=True)
    code = MASKS["networks"].code()
    starts = torch.tensor(STARTS)
    arguments = (
        draw_store(torch.int16),
        starts,
        CU_SEQLENS,
        15,
        9,
        torch.rand(20),
        torch.float32,
        code,
        token,
    )
    torch.library.opcheck(torch.ops.brainflow.gather_windows_cpu.default, arguments)

    def run(token):
        return cpu.gather_windows(*arguments[:-1], token * 2).sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(token), run(token))
