"""The interpreter of PTX: faults that it must find, and instructions that no masked op has."""

import re

import pytest
import torch
from kernel_checks import nan_memory

from brainflow.kernels import MaskSpec, gather_windows, linear_masked_loss, mask_tokens, masked_loss
from brainflow.kernels.conformance import error_ratio

triton = pytest.importorskip("triton", reason="needs triton")
import triton.language as tl  # noqa: E402
from ptx_launch import executed  # noqa: E402
from ptx_memory import Race, Trap  # noqa: E402

BOUNDS = torch.tensor([0, 9, 9, 26, 30], dtype=torch.int32)
ROWS, NETWORKS = 30, 250
TIME_POINTS = MaskSpec.time_points(0.3, seed=2**40 + 5, offset=7)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def summed(edit):
    """Return the relative error of masked_loss with the PTX of its first kernel edited."""
    edited = []

    def first_kernel(ptx):
        if ".entry partial_sums" not in ptx:
            return ptx
        edited.append(edit(ptx))
        assert edited[-1] != ptx
        return edited[-1]

    pred, target = draw(ROWS, NETWORKS), draw(ROWS, NETWORKS, seed=1)
    with executed(edit=first_kernel):
        value = masked_loss(pred, target, TIME_POINTS, cu_seqlens=BOUNDS, impl="triton")
    assert edited
    return error_ratio(
        value, masked_loss(pred.double(), target, TIME_POINTS, cu_seqlens=BOUNDS, impl="naive")
    )


def test_each_barrier_that_is_removed_is_a_race():
    found = 0
    while True:
        parts = []

        def remove(ptx, number=found, parts=parts):
            parts += re.split(r"bar\.sync\s+0;", ptx)
            return "bar.sync 0;".join(parts[: number + 1]) + "bar.sync 0;".join(parts[number + 1 :])

        with pytest.raises(Race, match=r"partial_sums: .*\.shared\."):
            summed(remove)
        found += 1
        if found == len(parts) - 1:
            break
    assert found > 10


def test_a_barrier_for_some_threads_only_is_a_trap():
    with pytest.raises(Trap, match="only some threads of a block are here: @%p"):
        summed(
            lambda ptx: re.sub(
                r"(@%p\d+ )(st\.shared\.b32 .*\n(?:.*\n)*?\s*)(bar\.sync)", r"\1\2\1\3", ptx, count=1
            )
        )


def test_a_load_without_its_predicate_is_a_trap():
    with pytest.raises(Trap, match=r"outside of every tensor: ld\.global"):
        summed(lambda ptx: re.sub(r"@%p\d+ (ld\.global\.)", r"\1", ptx))


def test_a_misaligned_load_is_a_trap():
    with pytest.raises(Trap, match=r"misaligned access of 4 bytes: ld\.global"):
        summed(lambda ptx: re.sub(r"(ld\.global\.b32 .*) \+ 0 \]", r"\1 + 2 ]", ptx, count=1))


def test_shared_memory_that_nothing_was_written_to_is_a_trap():
    with pytest.raises(Trap, match=r"nothing was written to: ld\.shared"):
        summed(lambda ptx: re.sub(r"(@%p\d+ )?st\.shared.*", "", ptx))


@triton.jit
def same_place(out):
    tl.store(out, tl.program_id(0))


def test_blocks_that_write_one_place_race():
    out = torch.zeros(1, dtype=torch.int32)
    with executed(), torch.cuda.device_of(out):
        same_place[(1,)](out)
        with pytest.raises(Race, match=r"writes of different values race: .*st\.global"):
            same_place[(2,)](out)


def test_a_wrong_shuffle_is_a_wrong_sum():
    pattern = r"(shfl\.sync\.bfly\.b32\s+%r\d+, %r\d+, )16,"
    assert summed(lambda ptx: re.sub(pattern, r"\g<1>8,", ptx, count=1)) > 1e-3


def test_a_wrong_clamp_is_a_wrong_sum():
    assert summed(lambda ptx: ptx.replace("min.s32", "max.s32", 1)) > 1e-3


def test_without_a_fault_the_sum_is_right():
    assert summed(lambda ptx: ptx + "\n") <= 1e-6


MASKS = {
    "spans": MaskSpec.spans(0.4, 3, seed=2**64 - 1, offset=2**31 + 5),
    "tubes": MaskSpec.tubes(0.3, 4, seed=5, offset=2),
    "entries": MaskSpec.entries(0.3, seed=2**63 + 11, offset=4),
}
LAYOUTS = {"packed": {"cu_seqlens": BOUNDS}, "padded": {"lengths": torch.tensor([10, 7, 0])}}
OTHERS = [
    ("spans", "packed", torch.float16, 80),
    ("tubes", "padded", torch.float32, 80),
    ("entries", "padded", torch.float64, 80),
]


@pytest.mark.parametrize(("mask", "layout", "dtype", "arch"), OTHERS)
def test_other_sizes_layouts_and_types(mask, layout, dtype, arch):
    """No number here is a multiple of 16: Triton compiles other kernels than for the AOT configurations."""
    mask, bounds, eps = MASKS[mask], LAYOUTS[layout], torch.finfo(dtype).eps
    shape = (ROWS, NETWORKS) if layout == "packed" else (3, 10, NETWORKS)
    x, target = draw(*shape).to(dtype), draw(*shape, seed=1).to(dtype)
    token, head = draw(17, 1, seed=2), [draw(NETWORKS, 8, seed=3), draw(NETWORKS, seed=4)]
    hidden = draw(*shape[:-1], 8, seed=5).to(dtype)
    store = draw(64, NETWORKS + 5, seed=6).to(torch.float16)[
        :, 3:-2
    ]  # rows longer than what is taken of them
    scale = draw(NETWORKS, seed=7).abs()
    results = []
    for impl, wide in (("naive", torch.float64), ("triton", dtype)):
        with executed(arch), nan_memory():
            x_, token_, hidden_, *head_ = leaves = [
                t.to(wide).requires_grad_() for t in (x, token, hidden, *(h.to(dtype) for h in head))
            ]
            out = mask_tokens(x_, mask, token_, impl=impl, **bounds)
            loss = masked_loss(x_, target.to(wide), mask, loss="huber", impl=impl, **bounds)
            linear = linear_masked_loss(hidden_, *head_, target.to(wide), mask, impl=impl, **bounds)
            gathered = gather_windows(
                store, [63, 5], [1, 9], scale=scale, mask=mask, mask_token=token, impl=impl
            )
            grads = torch.autograd.grad(out.double().square().mean() + loss + linear, leaves)
            results.append([out, loss, linear, gathered, *grads])
    for expected, found in zip(*results, strict=True):
        assert error_ratio(found, expected) <= max(2 * eps, 1e-6 if dtype == torch.float32 else 0)


@triton.jit
def chained(a, b, c, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """Write s c and sᵀ c with s = log2(exp2(a bᵀ / 8) + 1): operands in registers and in memory."""
    if tl.program_id(0) > 0:
        return
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x, y = tl.load(a + m[:, None] * K + k[None, :]), tl.load(b + m[:, None] * K + k[None, :])
    z = tl.load(c + m[:, None] * N + n[None, :])
    s = tl.log2(tl.exp2(tl.dot(x, tl.trans(y)) / 8) + 1).to(z.dtype)
    at = out + m[:, None] * N + n[None, :]
    tl.store(at, tl.dot(s, z))
    tl.store(at + M * N, tl.dot(tl.trans(s), z))


CHAINS = [
    (torch.bfloat16, 16, 32, 16, 80, "mma.sync.aligned.m16n8k16"),
    (torch.float16, 32, 16, 64, 90, "mma.sync.aligned.m16n8k16"),
    (torch.float32, 32, 32, 16, 90, "mma.sync.aligned.m16n8k8"),
    (torch.bfloat16, 64, 64, 64, 90, "wgmma.mma_async.sync.aligned.m64n64k16"),
    (torch.float16, 64, 32, 16, 90, "wgmma.mma_async.sync.aligned.m64n32k16"),
    (torch.bfloat16, 64, 16, 32, 90, "wgmma.mma_async.sync.aligned.m64n16k16"),
    (torch.float32, 64, 64, 32, 90, "wgmma.mma_async.sync.aligned.m64n64k8"),
]


def chain(dtype, m, n, k, arch, edit=None):
    """Return the relative error of `chained`, and the PTX."""
    a, b, c = draw(m, k).to(dtype), draw(m, k, seed=1).to(dtype), draw(m, n, seed=2).to(dtype)
    out, listings = torch.empty(2, m, n), []

    def listing(ptx):
        listings.append(edit(ptx) if edit else ptx)
        return listings[-1]

    with executed(arch, edit=listing), torch.cuda.device_of(a):
        chained[(2,)](a, b, c, out, M=m, N=n, K=k, num_warps=4)
    s = (torch.exp2(a.double() @ b.double().T / 8) + 1).log2()
    return error_ratio(out, torch.stack([s @ c.double(), s.T @ c.double()])), listings[0]


@pytest.mark.parametrize(("dtype", "m", "n", "k", "arch", "instruction"), CHAINS)
def test_products_of_matrices(dtype, m, n, k, arch, instruction):
    error, ptx = chain(dtype, m, n, k, arch)
    assert instruction in ptx
    assert error <= (4e-3 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize(
    ("pattern", "error"),
    [
        (r"bar\.sync\s+0;", "a .* races with a"),
        (r"fence\.proxy\.async\.shared::cta;", "without fence.proxy.async: wgmma"),
        (r"wgmma\.wait_group\S*\s+0;", "asynchronous work that nobody waits for"),
    ],
)
def test_products_of_matrices_with_a_fault(pattern, error):
    with pytest.raises(Trap, match=error):
        chain(torch.bfloat16, 64, 64, 64, 90, edit=lambda ptx: re.sub(pattern, "", ptx))


@triton.jit
def pipelined(a, b, out, count, K, M: tl.constexpr, BLOCK: tl.constexpr):
    """Add a bᵀ [M, M], next blocks being loaded; each program takes one block less, and counts them."""
    K_here = K - tl.program_id(0) * BLOCK
    m, k = tl.arange(0, M), tl.arange(0, BLOCK)
    total = tl.zeros([M, M], tl.float32)
    for start in tl.range(0, K_here, BLOCK, num_stages=3):
        x = tl.load(a + m[:, None] * K + start + k[None, :])
        y = tl.load(b + m[:, None] * K + start + k[None, :])
        total += tl.dot(x, tl.trans(y))
        tl.atomic_add(count, 1)
    tl.atomic_add(out + m[:, None] * M + m[None, :], total)


@pytest.mark.parametrize("arch", [80, 90])
def test_asynchronous_copies_and_atomics(arch):
    a, b = draw(32, 256).bfloat16(), draw(32, 256, seed=1).bfloat16()
    out, count, listings = torch.zeros(32, 32), torch.zeros(1, dtype=torch.int32), []
    with executed(arch, edit=lambda ptx: listings.append(ptx) or ptx), torch.cuda.device_of(a):
        pipelined[(3,)](a, b, out, count, 256, M=32, BLOCK=64, num_warps=4)
    assert "cp.async.wait_group" in listings[0]
    assert count.item() == 4 + 3 + 2
    parts = [a[:, :k].double() @ b[:, :k].double().T for k in (256, 192, 128)]
    assert error_ratio(out, sum(parts)) <= 1e-6

    def unwaited(ptx):
        return re.sub(r"cp\.async\.wait_group\s+\S+;", "", ptx)

    with (
        pytest.raises(Trap, match="nothing was written to"),
        executed(arch, edit=unwaited),
        torch.cuda.device_of(a),
    ):
        pipelined[(1,)](a, b, out, count, 256, M=32, BLOCK=64, num_warps=4)
