"""Variable-length attention on the CPU: numbers, gradients, refusals, and its fit with PyTorch."""

import pytest
import torch
from kernel_checks import guarded, nan_memory
from torch.utils.checkpoint import checkpoint

from brainflow.kernels.conformance import error_ratio
from brainflow.kernels.varlen_attention import attention, fallback, shifted_attention

LENGTHS = {"mixed": [3, 1, 17, 9, 1], "single": [1], "one window": [33], "all of length 1": [1, 1, 1]}


def cumulative(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def draw(count, lengths, heads=3, head_dim=8, dtype=torch.float32):
    tensors = torch.randn(count, sum(lengths), heads, head_dim, dtype=torch.float64)
    return [x.to(dtype).requires_grad_() for x in tensors]


def gradients(function, tensors, upstream):
    outputs = function(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = torch.autograd.grad(
        outputs, tensors, [g.to(o.dtype) for g, o in zip(upstream, outputs, strict=True)]
    )
    return (*outputs, *grads)


def compare(lengths, causal, dtype, bound, scale=None, head_dim=8, lse=True):
    tensors = draw(3, lengths, head_dim=head_dim, dtype=dtype)
    windows, longest = cumulative(lengths), max(lengths)
    upstream = [torch.randn(tensors[0].shape), torch.randn(tensors[0].shape[:2])][: 1 + lse]

    def run(*qkv, impl=None):
        return attention(*qkv, windows, longest, causal, 0.0, scale, lse, impl=impl)

    actual = gradients(run, tensors, upstream)
    reference = [x.detach().double().requires_grad_() for x in tensors]
    expected = gradients(lambda *qkv: run(*qkv, impl="naive"), reference, upstream)
    for a, e in zip(actual, expected, strict=True):
        assert error_ratio(a, e) <= bound
    return actual


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_float32_matches_the_specification(lengths, causal):
    out, lse, *_ = compare(lengths, causal, torch.float32, 1e-5)
    assert out.dtype == lse.dtype == torch.float32
    assert lse.shape == out.shape[:2]


@pytest.mark.parametrize("scale", [None, 1.7])
@pytest.mark.parametrize("head_dim", [1, 5, 64])
def test_any_head_size_and_scale(head_dim, scale):
    compare([5, 12], True, torch.float32, 1e-5, scale=scale, head_dim=head_dim)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_low_precision_is_computed_in_float32(dtype, bound):
    out, lse, *_ = compare([7, 30], True, dtype, bound)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32


@pytest.fixture(params=["groups", "products of a window", "PyTorch's kernel"])
def way(request, monkeypatch):
    """One of the ways of the fallback, whichever it would choose for these windows."""
    if request.param != "groups":
        monkeypatch.setattr(fallback, "grouped", lambda *_: None)
    if request.param == "products of a window":
        monkeypatch.setattr(fallback, "_by_flash_cpu", lambda *_: False)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_every_way_of_the_fallback_matches_the_specification(lengths, causal):
    compare(lengths, causal, torch.float32, 1e-5)
    compare(lengths, causal, torch.float64, 1e-12, head_dim=5)


@pytest.mark.usefixtures("way")
def test_every_way_reads_values_that_lie_apart_and_gradients_of_one_number():
    lengths, windows = [9, 4, 14], cumulative([9, 4, 14])
    apart = torch.randn(27, 3, 8, 3, requires_grad=True)  # a row's values are three numbers apart
    together = [x.detach().contiguous().requires_grad_() for x in apart.unbind(-1)]
    out = attention(*apart.unbind(-1), windows, max(lengths), True)
    (actual,) = torch.autograd.grad(out.sum(), apart)  # the upstream gradient is one number, expanded
    expected_out = attention(*together, windows, max(lengths), True)
    expected = torch.autograd.grad(expected_out, together, torch.ones_like(expected_out))
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(actual, torch.stack(expected, -1))


@pytest.mark.parametrize("kernel", [False, True])
def test_a_window_of_1200_by_blocks_of_heads_or_by_the_kernel(kernel, monkeypatch):
    assert fallback.BLOCK_SCORES < 1200**2
    monkeypatch.setattr(fallback, "_by_flash_cpu", lambda *_: kernel)
    compare([4, 1200], True, torch.float32, 1e-5, head_dim=4, lse=False)


def test_large_windows_without_dropout_go_to_the_kernel_on_the_cpu(monkeypatch):
    calls = []
    monkeypatch.setattr(
        fallback, "_flash_forward", lambda *args, f=fallback._flash_forward: calls.append(1) or f(*args)
    )
    for lengths, dropout_p, expected in (([40, 50], 0.0, 1), ([40, 50], 0.1, 0), ([3, 4], 0.0, 0)):
        calls.clear()
        attention(*draw(3, lengths, 12, 64), cumulative(lengths), max(lengths), True, dropout_p)
        assert len(calls) == expected


def test_large_scores_do_not_overflow():
    q, k, v = draw(3, [6, 11])
    out, lse = attention(q * 300, k * 300, v, cumulative([6, 11]), 11, True, return_lse=True)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(bool(torch.isfinite(x).all()) for x in (out, lse, *grads))


def test_reads_and_writes_stay_inside_with_memory_full_of_nan():
    lengths = [5, 1, 8]
    tensors, checks = zip(*(guarded(x.detach()) for x in draw(3, lengths)), strict=True)
    tensors = [x.requires_grad_() for x in tensors]
    with nan_memory():
        out = attention(*tensors, cumulative(lengths), 8, True)
        grads = torch.autograd.grad(out.sum(), tensors)
    assert all(bool(torch.isfinite(x).all()) for x in (out, *grads))
    for check in checks:
        check()


def test_windows_do_not_see_each_other():
    lengths = [4, 6]
    q, k, v = draw(3, lengths)
    out = attention(q, k, v, cumulative(lengths), 6)
    alone = attention(q[4:], k[4:], v[4:], cumulative([6]), 6)
    torch.testing.assert_close(out[4:], alone)


def test_strided_inputs():
    qkv = torch.randn(9, 3, 2, 8)
    windows = cumulative([4, 5])
    out = attention(*qkv.unbind(1), windows, 5, True)
    torch.testing.assert_close(out, attention(*(x.contiguous() for x in qkv.unbind(1)), windows, 5, True))


def test_gradcheck_with_log_sum_exp():
    tensors = draw(3, [1, 4, 3], heads=2, head_dim=3, dtype=torch.float64)
    windows = cumulative([1, 4, 3])
    assert torch.autograd.gradcheck(lambda *x: attention(*x, windows, 4, True, return_lse=True), tensors)


def test_gradcheck_with_dropout_replays_the_same_weights():
    tensors = draw(3, [4, 3], heads=2, head_dim=3, dtype=torch.float64)
    windows = cumulative([4, 3])

    def run(*x):
        torch.manual_seed(5)
        return attention(*x, windows, 4, True, 0.4)

    assert torch.autograd.gradcheck(run, tensors)


def test_dropout_keeps_the_mean_and_drops_at_its_rate():
    torch.manual_seed(0)
    tokens, p = 40, 0.3
    v = torch.eye(tokens).unsqueeze(1).expand(tokens, 50, tokens).contiguous()
    pad = torch.zeros(tokens, 50, tokens)
    weights = attention(pad, pad, v, cumulative([tokens]), tokens, dropout_p=p)
    dropped = (weights == 0).float().mean()
    assert abs(float(dropped) - p) < 0.01
    assert abs(float(weights.sum(-1).mean()) - 1.0) < 0.02
    again = attention(pad, pad, v, cumulative([tokens]), tokens, dropout_p=p)
    assert not torch.equal(weights, again)


@pytest.mark.parametrize("second", [False, True])
def test_what_is_computed_again_drops_the_same_weights(second):
    """The output is linear in the values, so its gradient times the values is the output."""
    q, k, v, k_self, v_self = (x.detach() for x in draw(5, [9, 40], dtype=torch.float64))
    windows = cumulative([9, 40])

    def attend(v, v_self):
        if second:
            return shifted_attention(q, k, v, k_self, v_self, windows, 40, dropout_p=0.5)
        return attention(q, k, v, windows, 40, True, dropout_p=0.5)

    def run(v, v_self):
        return checkpoint(attend, v, v_self, use_reentrant=False)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager_decomp_partition")
    tensors = [v.requires_grad_(), v_self.requires_grad_()]
    total = compiled(*tensors).sum()
    grads = torch.autograd.grad(total, tensors, allow_unused=True)
    sums = [(g * x).sum() for g, x in zip(grads, tensors, strict=True) if g is not None]
    torch.testing.assert_close(sum(sums), total)


def bad(**changes):
    q, k, v = (x.detach() for x in draw(3, [2, 3]))
    arguments = {"q": q, "k": k, "v": v, "cu_seqlens": cumulative([2, 3]), "max_seqlen": 3}
    return {**arguments, **changes}


REFUSED = {
    "q: got shape (5, 24)": {"q": torch.zeros(5, 24)},
    "k: got shape (5, 3, 4)": {"k": torch.zeros(5, 3, 4)},
    "v: got torch.float64": {"v": torch.zeros(5, 3, 8, dtype=torch.float64)},
    "q: got torch.int64": {"q": torch.zeros(5, 3, 8, dtype=torch.int64)},
    "k: got a tensor on meta": {"k": torch.zeros(5, 3, 8, device="meta")},
    "cu_seqlens: got torch.int64": {"cu_seqlens": torch.tensor([0, 2, 5])},
    "cu_seqlens: got shape (1,)": {"cu_seqlens": torch.zeros(1, dtype=torch.int32)},
    "cu_seqlens: got a tensor on meta": {"cu_seqlens": torch.zeros(3, dtype=torch.int32, device="meta")},
    "cu_seqlens: got 1 as first entry": {"cu_seqlens": torch.tensor([1, 5], dtype=torch.int32)},
    "cu_seqlens: got 4 as last entry": {"cu_seqlens": torch.tensor([0, 4], dtype=torch.int32)},
    "cu_seqlens: got a window of 0 tokens (window 1)": {
        "cu_seqlens": torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    },
    "cu_seqlens: got a window of -1 tokens": {"cu_seqlens": torch.tensor([0, 3, 2, 5], dtype=torch.int32)},
    "max_seqlen: got 2, expected at least the longest window, 3": {"max_seqlen": 2},
    "max_seqlen: got 0": {"max_seqlen": 0},
    "max_seqlen: got Tensor, expected an int": {"max_seqlen": torch.tensor(3)},
    "dropout_p: got 1.0": {"dropout_p": 1.0},
    "impl: got 'triton', expected one of 'naive', 'window'": {"impl": "triton"},
    'dropout_p: got 0.1, expected 0 for impl="naive"': {"impl": "naive", "dropout_p": 0.1},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals_name_argument_got_and_expected(message):
    with pytest.raises((ValueError, TypeError)) as error:
        attention(**bad(**REFUSED[message]))
    assert message in str(error.value)
    assert "expected" in str(error.value)


def test_opcheck():
    q, k, v = draw(3, [2, 5])
    windows = cumulative([2, 5])
    torch.library.opcheck(
        torch.ops.brainflow.attention.default, (q, k, v, windows, 5, True, 0.0, 0.3, "fallback")
    )
    out, lse, state = torch.ops.brainflow.attention(q, k, v, windows, 5, True, 0.0, 0.3, "fallback")
    arguments = [x.detach() for x in (out, q, k, v, out, lse, state)]
    torch.library.opcheck(
        torch.ops.brainflow.attention_backward.default,
        (*arguments, windows, 5, True, 0.0, 0.3, "fallback"),
    )


def test_compiles_without_graph_breaks_and_equals_eager():
    tensors = draw(3, [2, 5])
    windows = cumulative([2, 5])

    def run(q, k, v):
        out, lse = attention(q * 2, k, v, windows, 5, True, return_lse=True)
        return out.sum() + (lse * lse).sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*tensors), tensors), torch.autograd.grad(run(*tensors), tensors)
    )


def test_autocast_casts_and_returns_its_type():
    tensors = draw(3, [2, 5])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(*tensors, cumulative([2, 5]), 5, True)
    assert out.dtype == torch.bfloat16
    grads = torch.autograd.grad(out.float().sum(), tensors)
    assert all(g.dtype == torch.float32 for g in grads)
    expected = attention(*(x.bfloat16() for x in tensors), cumulative([2, 5]), 5, True)
    torch.testing.assert_close(out, expected)


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, k, v = (torch.empty(7, 3, 8, dtype=torch.bfloat16) for _ in range(3))
        out, lse = attention(q, k, v, torch.empty(3, dtype=torch.int32), 5, return_lse=True)
    assert out.shape == (7, 3, 8)
    assert (lse.shape, lse.dtype) == ((7, 3), torch.float32)
