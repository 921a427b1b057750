"""The second stream: strictly earlier keys of the first stream plus its own, exact forward and backward."""

import pytest
import torch
from kernel_checks import nan_memory

from brainflow.kernels.conformance import error_ratio
from brainflow.kernels.varlen_attention import attention, qkv_attention, shifted_attention

LENGTHS = {"mixed": [3, 1, 17, 9, 1], "single": [1], "last of length 1": [5, 1], "all of length 1": [1, 1, 1]}


def cumulative(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def draw(lengths, dtype=torch.float32, heads=2, head_dim=8):
    tensors = torch.randn(5, sum(lengths), heads, head_dim, dtype=torch.float64)
    return [x.to(dtype).requires_grad_() for x in tensors]


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)],
)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_matches_the_specification(lengths, dtype, bound):
    tensors = draw(lengths, dtype)
    windows, longest = cumulative(lengths), max(lengths)
    with nan_memory():
        out = shifted_attention(*tensors, windows, longest)
        upstream = torch.randn_like(out)
        grads = torch.autograd.grad(out, tensors, upstream)
    reference = [x.detach().double().requires_grad_() for x in tensors]
    expected = shifted_attention(*reference, windows, longest, impl="naive")
    expected_grads = torch.autograd.grad(expected, reference, upstream.double(), allow_unused=True)
    assert out.dtype == dtype
    for a, e in zip((out, *grads), (expected, *expected_grads), strict=True):
        e = torch.zeros_like(a, dtype=torch.float64) if e is None else e
        assert bool(torch.isfinite(a).all())
        assert error_ratio(a, e) <= bound or float((a.double() - e).abs().max()) <= bound * 1e-2


def test_equals_one_masked_position_at_a_time():
    length = 6
    q, k, v, k_self, v_self = (x.detach() for x in draw([length], torch.float64))
    out = shifted_attention(q, k, v, k_self, v_self, cumulative([length]), length)
    for i in range(length):
        keys = torch.cat([k[:i], k_self[i : i + 1]])
        values = torch.cat([v[:i], v_self[i : i + 1]])
        queries = torch.cat([torch.zeros_like(k[:i]), q[i : i + 1]])
        single = attention(queries, keys, values, cumulative([i + 1]), i + 1, causal=True)[-1]
        torch.testing.assert_close(out[i], single, rtol=0, atol=1e-14)


def test_nothing_leaks_from_the_same_or_later_time_points():
    lengths = [7, 4]
    q, k, v, k_self, v_self = (x.detach() for x in draw(lengths, torch.float64))
    windows = cumulative(lengths)
    out = shifted_attention(q, k, v, k_self, v_self, windows, 7)
    for start, end in ((0, 7), (7, 11)):
        for i in range(start, end):
            changed_k, changed_v = k.clone(), v.clone()
            changed_k[i:end] += 100.0
            changed_v[i:end] -= 100.0
            changed = shifted_attention(q, changed_k, changed_v, k_self, v_self, windows, 7)
            assert torch.equal(changed[start : i + 1], out[start : i + 1])


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck(dropout_p):
    tensors = draw([1, 4, 2], torch.float64, head_dim=3)
    windows = cumulative([1, 4, 2])

    def run(*x):
        torch.manual_seed(3)
        return shifted_attention(*x, windows, 4, dropout_p=dropout_p)

    assert torch.autograd.gradcheck(run, tensors)


def test_dropout_keeps_the_mean():
    torch.manual_seed(0)
    ones = torch.ones(30, 400, 2)
    out = shifted_attention(ones, ones, ones, ones, ones, cumulative([30]), 30, dropout_p=0.25)
    assert abs(float(out.mean()) - 1.0) < 0.02
    first = out[0, :, 0]
    assert abs(float((first == 0).float().mean()) - 0.25) < 0.08


def test_very_unlikely_self_term_and_very_likely_self_term():
    tensors = draw([5, 3], torch.float64)
    windows = cumulative([5, 3])
    for factor in (-400.0, 400.0):
        scaled = [x.detach().requires_grad_() for x in tensors]
        scaled[3] = (scaled[0].detach() * factor).requires_grad_()
        out = shifted_attention(*scaled, windows, 5)
        expected = shifted_attention(*scaled, windows, 5, impl="naive")
        torch.testing.assert_close(out, expected)
        grads = torch.autograd.grad(out.sum(), scaled)
        for g, e in zip(grads, torch.autograd.grad(expected.sum(), scaled), strict=True):
            torch.testing.assert_close(g, e)


def test_opcheck():
    tensors = draw([2, 1, 4])
    windows = cumulative([2, 1, 4])
    forward = torch.ops.brainflow.shifted_attention
    torch.library.opcheck(forward.default, (*tensors, windows, 4, 0.0, 0.3, "fallback"))
    outputs = [x.detach() for x in forward(*tensors, windows, 4, 0.0, 0.3, "fallback")]
    torch.library.opcheck(
        torch.ops.brainflow.shifted_attention_backward.default,
        (outputs[0], *(x.detach() for x in tensors), *outputs, windows, 4, 0.0, 0.3, "fallback"),
    )


def test_compiles_without_graph_breaks_and_equals_eager():
    tensors = draw([2, 1, 4])
    windows = cumulative([2, 1, 4])

    def run(*x):
        return (shifted_attention(*x, windows, 4) ** 2).sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*tensors), tensors), torch.autograd.grad(run(*tensors), tensors)
    )


@pytest.mark.parametrize("name", ["k", "v", "k_self", "v_self"])
def test_refuses_another_shape(name):
    arguments = dict(zip(("q", "k", "v", "k_self", "v_self"), draw([2, 3]), strict=True))
    arguments[name] = torch.zeros(5, 2, 4)
    with pytest.raises(ValueError, match=rf"{name}: got shape \(5, 2, 4\), expected q's, \(5, 2, 8\)"):
        shifted_attention(**arguments, cu_seqlens=cumulative([2, 3]), max_seqlen=3)


def test_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = shifted_attention(*draw([2, 3]), cumulative([2, 3]), 3)
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("impl", ["naive", "fallback"])
def test_both_streams_of_one_projection(impl):
    qkv, windows = torch.randn(2 * 7, 3, 2, 8), cumulative([3, 4])
    (q, k, v), (q2, k2, v2) = (stream.unbind(1) for stream in qkv.chunk(2))
    first = attention(q, k, v, windows, 4, True, impl=impl)
    second = shifted_attention(q2, k, v, k2, v2, windows, 4, impl=impl)
    for streams, expected in (("two", torch.cat((first, second))), ("second", second)):
        assert torch.equal(qkv_attention(qkv, windows, 4, streams=streams, impl=impl), expected)
    assert torch.equal(qkv_attention(qkv[:7], windows, 4, True, impl=impl), first)


@pytest.mark.parametrize(
    ("shape", "streams", "message"),
    [
        ((7, 3, 2, 8), "two", r"qkv: got shape \(7, 3, 2, 8\), expected \[2 · tokens, 3, heads, head_dim\]"),
        ((7, 2, 2, 8), "one", r"qkv: got shape \(7, 2, 2, 8\), expected \[tokens, 3, heads, head_dim\]"),
        ((7, 3, 2, 8), "three", "streams: got 'three', expected 'one', 'two' or 'second'"),
    ],
)
def test_refuses_what_is_no_projection(shape, streams, message):
    with pytest.raises(ValueError, match=message):
        qkv_attention(torch.zeros(shape), cumulative([3, 4]), 4, streams=streams)
