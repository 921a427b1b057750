"""impl="window" as compiled: the PTX of every AOT configuration is executed, against the specification."""

import pytest
import torch
from kernel_checks import guarded, nan_memory

from brainflow.kernels import attention, dispatch, qkv_attention, shifted_attention
from brainflow.kernels.conformance import error_ratio
from brainflow.kernels.varlen_attention import naive, window

aot = pytest.importorskip("brainflow.kernels.aot", reason="needs triton")
from ptx_launch import executed, names_of  # noqa: E402
from ptx_memory import Global  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
BOUND = {"bf16": 6e-3, "fp16": 1e-3, "tf32": 2e-3, "fp32": 1e-6}
CASES = {  # heads, lengths, dropout, log-sum-exp
    "two.64.bf16": (1, [2, 49], 0.3, False),
    "two.32.fp16": (1, [1, 2, 17, 30], 0.3, False),
    "second.64.bf16": (1, [49], 0.3, False),
    "full.128.bf16": (1, [101], 0.3, False),
    "causal.64.bf16": (1, [49], 0.0, True),
    "two.32.tf32": (1, [17], 0.3, False),
    "causal.32.fp32": (2, [31], 0.0, True),
}


@pytest.fixture(scope="module")
def executing():
    with executed() as launches:
        yield launches


@pytest.fixture
def products():
    """Set how float32 is multiplied, for one test."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def draw(streams, lengths, dtype=torch.float32, heads=2, head_dim=64, seed=0):
    rows = sum(lengths) * (1 if streams in ("causal", "full") else 2)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, heads, head_dim, generator=generator).to(dtype)


def expect(qkv, lengths, streams, dropout_p=0.0, seed=0):
    """Return out and lse of the specification."""
    windows, scale = cumulative(lengths), qkv.shape[-1] ** -0.5
    chance = {"softmax_scale": scale, "dropout_p": dropout_p, "seed": seed}
    q, k, v = qkv[: sum(lengths)].unbind(1)
    if streams in ("causal", "full"):
        return naive.attention(q, k, v, windows, causal=streams == "causal", **chance)
    q2, k2, v2 = qkv[sum(lengths) :].unbind(1)
    out, _ = naive.shifted_attention(q2, k, v, k2, v2, windows, **chance)
    if streams == "two":
        out = torch.cat((naive.attention(q, k, v, windows, causal=True, **chance)[0], out))
    return out, None


@pytest.mark.parametrize("case", CASES)
def test_every_configuration(case, executing, products):
    heads, lengths, dropout_p, with_lse = CASES[case]
    streams, _, short = case.split(".")
    products("highest" if short == "fp32" else "high")
    qkv, check = guarded(draw(streams, lengths, DTYPES[short], heads).requires_grad_())
    asked = streams if streams in ("two", "second") else "one"
    executing.clear()
    with nan_memory():
        out, lse, state = window.triton.window_attention(
            qkv, None, None, cumulative(lengths), max(lengths), asked, streams == "causal", dropout_p, 0.125,
            with_lse,
        )  # fmt: skip
        results = (out, lse) if with_lse else (out,)
        upstream = [torch.randn(x.shape).to(x.dtype) for x in results]
        (grad,) = torch.autograd.grad(results, qkv, upstream)
    exact = qkv.detach().double().requires_grad_()
    expected = expect(exact, lengths, streams, dropout_p, int(state[0]) if dropout_p else 0)[: len(results)]
    (expected_grad,) = torch.autograd.grad(expected, exact, [x.double() for x in upstream])
    for actual, wanted in zip((*results, grad), (*expected, expected_grad), strict=True):
        assert error_ratio(actual, wanted) <= BOUND[short]
    if streams == "second":
        assert not grad[: sum(lengths), 0].any()  # nobody asks for the first stream's queries
    check()
    assert names_of(executing) == {f"window_attention.{way}.{case}" for way in ("forward", "backward")}
    assert len(executing) == 2


def test_no_configuration_is_left_out():
    names = {config.name for config in aot.configs() if config.name.startswith("window_attention")}
    assert names == {f"window_attention.{way}.{case}" for case in CASES for way in ("forward", "backward")}


def test_dropped_weights_are_those_of_the_specification_bit_for_bit(executing):
    """Equal scores and one-hot values show the weights themselves."""
    length, p = 30, 0.25
    qkv = torch.zeros(length, 3, 1, 64)
    qkv[:, 2, 0, :length] = torch.eye(length)
    out, _, state = window.triton.window_attention(
        qkv.half(), None, None, cumulative([length]), length, "one", False, p, 0.125, False
    )
    kept = naive.kept(0, torch.zeros(1, length, length), 0, p, int(state[0]))
    assert torch.equal(out[:, 0, :length] != 0, kept[0] != 0)
    assert abs(float((kept == 0).float().mean()) - p) < 0.03


def test_queries_keys_and_values_may_come_apart_and_in_any_head_size(executing):
    lengths = [5, 16]
    windows = cumulative(lengths)
    leaves = [x for seed in (0, 1) for x in draw("full", lengths, heads=2, head_dim=12, seed=seed).unbind(1)]
    q, k, v, _, k2, v2 = (x.requires_grad_() for x in leaves)
    calls = (
        (lambda impl: attention(q, k, v, windows, 16, True, return_lse=True, impl=impl)[1], (q, k)),
        (lambda impl: shifted_attention(q, k, v, k2, v2, windows, 16, impl=impl), (q, k, v, k2, v2)),
    )
    for call, given in calls:
        found, wanted = call("window"), call("naive")
        upstream = torch.randn(found.shape)
        grads, expected = (torch.autograd.grad(x, given, upstream) for x in (found, wanted))
        for a, e in zip((found, *grads), (wanted, *expected), strict=True):
            assert error_ratio(a, e) <= 1e-6


def test_opcheck_and_compilation_without_graph_breaks(executing, monkeypatch):
    monkeypatch.setattr(dispatch, "interpreting", lambda: True)  # a mock is no function to the compiler
    windows, qkv = cumulative([2, 5]), draw("two", [2, 5], heads=1, head_dim=16).requires_grad_()
    rest = (windows, 5, "two", True, 0.0, 0.25)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    op = torch.ops.brainflow.window_attention
    torch.library.opcheck(op.default, (qkv, None, None, *rest, False), test_utils=tests)
    backward = torch.ops.brainflow.window_attention_backward.default
    state, dout = torch.empty(0, dtype=torch.int64), torch.randn(14, 1, 16)
    torch.library.opcheck(backward, (dout, None, qkv.detach(), None, None, state, *rest), test_utils=tests)

    def run(x):
        return qkv_attention(x * 2, windows, 5, streams="two", impl="window").square().sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        torch.autograd.grad(compiled(qkv), qkv), torch.autograd.grad(run(qkv), qkv), rtol=0, atol=0
    )


def test_a_window_longer_than_promised_is_no_number(executing, monkeypatch):
    """On a GPU nobody reads the lengths."""
    monkeypatch.setattr(window.triton, "host_lengths", lambda *_: None)
    qkv = draw("causal", [20, 4], heads=1, head_dim=16).requires_grad_()
    out = qkv_attention(qkv, cumulative([20, 4]), 16, causal=True, impl="window")
    (grad,) = torch.autograd.grad(out.sum(), qkv)
    assert out[:16].isnan().all()
    assert out[20:].isfinite().all()
    assert grad[:16].isnan().all()
    assert grad[20:].isfinite().all()


def test_a_launch_moves_little_more_than_it_must(executing, monkeypatch):
    """Forward q, k, v and out of both streams; backward these, the gradients of out, and of q, k and v."""
    moved = []
    for name in ("read", "write"):
        real = getattr(Global, name)

        def counting(self, addresses, lanes, given, real=real, name=name):
            moved.append(len(addresses) * (given if name == "read" else given.shape[-1]))
            return real(self, addresses, lanes, given)

        monkeypatch.setattr(Global, name, counting)
    lengths = [33, 49]
    qkv = draw("two", lengths, torch.bfloat16, heads=1).requires_grad_()
    out = qkv_attention(qkv, cumulative(lengths), 49, dropout_p=0.1, streams="two", impl="window")
    forward = sum(moved)
    out.backward(torch.ones_like(out))
    stream = sum(lengths) * 64 * 2
    assert forward <= 1.3 * 8 * stream
    assert sum(moved) - forward <= 1.3 * 16 * stream
    assert len(executing) >= 2
