"""The GPU adapters against strict stand-ins: modules with exactly the documented signatures.

A stand-in rejects positional arguments, unknown keywords, wrong types, wrong cu_seqlens, empty windows and
the region where int32 overflows, and computes in float64, so an adapter's results are checked too. Its
backward pass works from the out and the log-sum-exp that it is given, as the real kernels do.
"""

import dataclasses
import inspect
import sys
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from brainflow.kernels.conformance import error_ratio
from brainflow.kernels.varlen_attention import (
    attention,
    backends,
    fa2,
    fa4,
    qkv_attention,
    shifted_attention,
    torch_varlen,
)
from brainflow.kernels.varlen_attention.adapter import Call

LENGTHS = [5, 1, 9, 3]
FA2_FORWARD = (
    "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p softmax_scale causal "
    "window_size_left=-1 window_size_right=-1 softcap=0.0 alibi_slopes=None return_softmax=False "
    "block_table=None leftpad_k=None seqused_k=None zero_tensors=False"
)
FA2_BACKWARD = (
    "dout q k v out softmax_lse dq dk dv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k "
    "dropout_p softmax_scale causal window_size_left window_size_right softcap alibi_slopes "
    "deterministic rng_state=None zero_tensors=False"
)
FA4_FORWARD = (
    "q k v qv=None cu_seqlens_q=None cu_seqlens_k=None max_seqlen_q=None max_seqlen_k=None "
    "min_seqlen_k=None seqused_q=None seqused_k=None gather_kv_indices=None page_table=None "
    "softmax_scale=None causal=False window_size=(None,None) learnable_sink=None softcap=0.0 "
    "num_splits=1 pack_gqa=None deterministic=False score_mod=None score_mod_bwd=None mask_mod=None "
    "block_sparse_tensors=None aux_tensors=None aux_scalars=None return_lse=False "
    "scheduler_metadata=None seqlen_k_per_split=None disable_scheduler_metadata=False "
    "gather_bwd_recompute_p=False gather_bwd_token_chunk=None"
)
FA4_BACKWARD = (
    "q k v out dout lse softmax_scale=None causal=False softcap=0.0 window_size_left=None "
    "window_size_right=None cu_seqlens_q=None cu_seqlens_k=None seqused_q=None seqused_k=None "
    "max_seqlen_q=None max_seqlen_k=None deterministic=False dq=None dk=None dv=None score_mod=None "
    "score_mod_bwd=None mask_mod=None aux_tensors=None aux_scalars=None block_sparse_tensors=None "
    "dlse=None learnable_sink=None"
)
TORCH_FORWARD = (
    "query key value cu_seq_q cu_seq_k max_q max_k return_aux=None scale=None window_size=(-1,-1) "
    "enable_gqa=False seqused_k=None block_table=None num_splits=None"
)


def strict(signature, compute):
    """Return a function of exactly these keywords; a trailing =value marks an optional one."""
    parameters = {}
    for word in signature.split():
        name, _, default = word.partition("=")
        parameters[name] = eval(default) if default else inspect.Parameter.empty

    def function(*args, **given):
        assert not args, "positional arguments"
        assert set(given) <= set(parameters), f"unknown keywords {set(given) - set(parameters)}"
        missing = {n for n, d in parameters.items() if d is inspect.Parameter.empty} - set(given)
        assert not missing, f"missing {missing}"
        return compute(types.SimpleNamespace(**{**parameters, **given}))

    return function


def check(q, k, v, cu, longest):
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert q.dtype == k.dtype == v.dtype
    assert cu.dtype == torch.int32
    assert cu.is_contiguous()
    lengths = cu.diff()
    assert int(cu[0]) == 0
    assert int(cu[-1]) == q.shape[0]
    assert int(lengths.min()) >= 1, "an empty window"
    assert int(lengths.max()) <= longest
    assert isinstance(longest, int)
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert (q.shape[0] + 128 * lengths.numel()) * q.shape[1] * q.shape[2] < 2**31


def keep_of(state, shape, p):
    if not p:
        return torch.ones(shape, dtype=torch.float64)
    generator = torch.Generator().manual_seed(int(state[0]))
    return torch.rand(shape, dtype=torch.float64, generator=generator).ge(p) / (1 - p)


def compute_forward(q, k, v, cu, longest, scale, causal, p=0.0, state=None):
    check(q, k, v, cu, longest)
    outs, lses = [], []
    for start, end in zip(cu.tolist(), cu.tolist()[1:], strict=False):
        a, b, c = (x[start:end].double().transpose(0, 1) for x in (q, k, v))
        s = a @ b.mT * scale
        if causal:
            s = s.masked_fill(torch.ones_like(s[0], dtype=torch.bool).triu(1), -torch.inf)
        outs.append((s.softmax(-1) * keep_of(state, s.shape, p)) @ c)
        lses.append(s.logsumexp(-1))
    return torch.cat(outs, 1).transpose(0, 1).to(q.dtype).contiguous(), torch.cat(lses, 1).float()


def compute_backward(dout, q, k, v, out, lse, cu, longest, scale, causal, p=0.0, state=None):
    check(q, k, v, cu, longest)
    assert dout.dtype == out.dtype == q.dtype
    assert lse.dtype == torch.float32
    assert lse.shape == (q.shape[1], q.shape[0])
    assert lse.is_contiguous()
    grads = []
    for start, end in zip(cu.tolist(), cu.tolist()[1:], strict=False):
        g, a, b, c, o = (x[start:end].double().transpose(0, 1) for x in (dout, q, k, v, out))
        s = a @ b.mT * scale
        if causal:
            s = s.masked_fill(torch.ones_like(s[0], dtype=torch.bool).triu(1), -torch.inf)
        prob = (s - lse[:, start:end, None]).exp()
        keep = keep_of(state, s.shape, p)
        ds = prob * ((g @ c.mT) * keep - (g * o).sum(-1, keepdim=True)) * scale
        grads.append([x.transpose(0, 1) for x in (ds @ b, ds.mT @ a, (prob * keep).mT @ g)])
    return [torch.cat(x).to(q.dtype) for x in zip(*grads, strict=True)]


def fa2_forward(a):
    assert a.cu_seqlens_q is a.cu_seqlens_k
    state = torch.randint(2**31, (2,))
    out, lse = compute_forward(
        a.q, a.k, a.v, a.cu_seqlens_q, a.max_seqlen_q, a.softmax_scale, a.causal, a.dropout_p, state
    )
    return out, lse, torch.empty(0), state


def fa2_backward(a):
    assert (a.rng_state is not None) == (a.dropout_p > 0)
    grads = compute_backward(
        a.dout, a.q, a.k, a.v, a.out, a.softmax_lse, a.cu_seqlens_q, a.max_seqlen_q, a.softmax_scale,
        a.causal, a.dropout_p, a.rng_state,
    )  # fmt: skip
    for target, grad in zip((a.dq, a.dk, a.dv), grads, strict=True):
        target.copy_(grad)
    return torch.empty(0)


def fa4_forward(a):
    assert a.qv is None
    assert a.return_lse
    return compute_forward(a.q, a.k, a.v, a.cu_seqlens_q, a.max_seqlen_q, a.softmax_scale, a.causal)


def fa4_backward(a):
    return tuple(
        compute_backward(
            a.dout, a.q, a.k, a.v, a.out, a.lse, a.cu_seqlens_q, a.max_seqlen_q, a.softmax_scale, a.causal
        )
    )


def torch_forward(a):
    assert a.window_size in ((-1, 0), (-1, -1))
    assert a.return_aux.lse
    causal = a.window_size == (-1, 0)
    return compute_forward(a.query, a.key, a.value, a.cu_seq_q, a.max_q, a.scale, causal)


@torch.library.custom_op("brainflow_test::varlen_backward", mutates_args=())
def torch_backward(
    grad_out: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor,
    lse: torch.Tensor, cu_seq_q: torch.Tensor, cu_seq_k: torch.Tensor, max_q: int, max_k: int,
    is_causal: bool, rng_state: torch.Tensor, scale: float | None = None,
    window_size: list[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    assert rng_state.shape == (2,)
    assert window_size == ([-1, 0] if is_causal else [-1, -1])
    return tuple(compute_backward(grad_out, query, key, value, out, lse, cu_seq_q, max_q, scale, is_causal))  # type: ignore[return-value]


@pytest.fixture(params=["fa2", "fa4", "torch"])
def backend(request, monkeypatch):
    """Put the stand-ins where the adapters look, and let them take CPU tensors."""
    name = request.param
    if name == "torch":
        import torch.nn.attention.varlen as varlen

        real = inspect.signature(varlen.varlen_attn)
        assert list(real.parameters) == [w.partition("=")[0] for w in TORCH_FORWARD.split()]
        monkeypatch.setattr(varlen, "varlen_attn", strict(TORCH_FORWARD, torch_forward))
        monkeypatch.setattr(
            torch.ops.torch_attn, "_varlen_attn_backward", torch.ops.brainflow_test.varlen_backward
        )
        module = torch_varlen
    else:
        package = types.ModuleType("flash_attn")
        package.__path__ = []
        monkeypatch.setitem(sys.modules, "flash_attn", package)
        if name == "fa2":
            interface = types.ModuleType("flash_attn.flash_attn_interface")
            interface._flash_attn_varlen_forward = strict(FA2_FORWARD, fa2_forward)
            interface._flash_attn_varlen_backward = strict(FA2_BACKWARD, fa2_backward)
            monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
            module = fa2
        else:
            interface = types.ModuleType("flash_attn.cute.interface")
            interface.flash_attn_varlen_func = strict(FA4_FORWARD, fa4_forward)
            interface._flash_attn_bwd = strict(FA4_BACKWARD, fa4_backward)
            monkeypatch.setitem(sys.modules, "flash_attn.cute", types.ModuleType("flash_attn.cute"))
            monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", interface)
            module = fa4
    monkeypatch.setattr(module, "installed", lambda: True)
    monkeypatch.setattr(module, "LIMITS", dataclasses.replace(module.LIMITS, devices=("cpu",)))
    return name


def cumulative(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def draw(count, dtype=torch.bfloat16):
    return [torch.randn(sum(LENGTHS), 2, 16).to(dtype).requires_grad_() for _ in range(count)]


def assert_close(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.bfloat16 or a.dtype == torch.float32
        assert error_ratio(a, e) < 1e-2


@pytest.mark.parametrize("causal", [False, True])
def test_results_and_gradients_through_the_log_sum_exp(backend, causal):
    tensors = draw(3)
    upstream = (torch.randn(tensors[0].shape), torch.randn(tensors[0].shape[:2]))
    results = []
    for impl, inputs in (
        (backend, tensors),
        ("naive", [x.detach().double().requires_grad_() for x in tensors]),
    ):
        out, lse = attention(*inputs, cumulative(LENGTHS), 9, causal, 0.0, 0.3, True, impl=impl)
        grads = torch.autograd.grad(
            (out, lse), inputs, [g.to(o.dtype) for g, o in zip(upstream, (out, lse), strict=True)]
        )
        results.append((out, lse, *grads))
    assert results[0][1].dtype == torch.float32
    assert_close(*results)


def test_second_stream(backend):
    tensors = draw(5)
    upstream = torch.randn(tensors[0].shape).bfloat16()
    results = []
    for impl, inputs in (
        (backend, tensors),
        ("naive", [x.detach().double().requires_grad_() for x in tensors]),
    ):
        out = shifted_attention(*inputs, cumulative(LENGTHS), 9, impl=impl)
        results.append((out, *torch.autograd.grad(out, inputs, upstream.to(out.dtype))))
    assert_close(*results)


def test_only_flash_attention_2_drops_weights_and_its_backward_replays_them(backend):
    tensors = draw(3)
    if backend != "fa2":
        with pytest.raises(ValueError, match=r"dropout_p: got 0\.2, expected 0 for impl"):
            attention(*tensors, cumulative(LENGTHS), 9, dropout_p=0.2, impl=backend)
        return
    q, k, v = (x.detach() for x in draw(3))
    v.requires_grad_()
    out = attention(q, k, v, cumulative(LENGTHS), 9, dropout_p=0.5, impl=backend)
    (grad,) = torch.autograd.grad(out, v, torch.ones_like(out))
    # out is linear in v, so ⟨dout, out⟩ = ⟨grad, v⟩ if and only if the same weights were dropped.
    assert abs(float((out.double().sum() - (grad.double() * v.double()).sum()).detach())) < 0.5


def test_a_log_sum_exp_of_another_shape_is_refused_by_name(monkeypatch):
    """As cuDNN's statistics have: [tokens, heads, 1]."""
    import torch.nn.attention.varlen as varlen

    def other(query, **given):
        return query, query.new_zeros(*query.shape[:2], 1)

    monkeypatch.setattr(varlen, "varlen_attn", other)
    q = torch.zeros(4, 2, 16, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"log-sum-exp of shape \(4, 2, 1\) from .*, expected .* \(2, 4\)"):
        torch_varlen.forward(q, q, q, Call(cumulative([4]), 4, True, 0.0, 1.0))


def test_compiles_without_graph_breaks(backend):
    tensors = draw(3)
    windows = cumulative(LENGTHS)
    compiled = torch.compile(
        lambda *x: attention(*x, windows, 9, impl=backend), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(*tensors), attention(*tensors, windows, 9, impl=backend))


def test_refuses_types_and_head_sizes(backend):
    windows = cumulative([4])
    with pytest.raises(
        TypeError, match=r"q: got torch\.float32, expected one of torch\.float16, torch\.bfloat16"
    ):
        attention(*torch.zeros(3, 4, 2, 16), windows, 4, impl=backend)
    limit = backends.BACKENDS[backend].LIMITS.head_dim_max
    for head_dim in (12, limit + 8):
        with pytest.raises(ValueError, match=f"q: got head_dim {head_dim}, expected at most {limit}"):
            attention(*torch.zeros(3, 4, 2, head_dim, dtype=torch.bfloat16), windows, 4, impl=backend)


def test_refuses_the_lse_gradient_where_it_does_not_fit(backend):
    limit = backends.BACKENDS[backend].LIMITS.head_dim_max
    tensors = [torch.randn(4, 1, limit, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    _, lse = attention(*tensors, cumulative([4]), 4, return_lse=True, impl=backend)
    with pytest.raises(ValueError, match=f"q: got head_dim {limit + 8}"):
        lse.sum().backward()


def test_refuses_the_region_where_int32_overflows():
    with FakeTensorMode():
        tokens, heads, head_dim, windows = 130_000, 128, 128, 4
        q = torch.empty(tokens, heads, head_dim, dtype=torch.bfloat16, device="cuda")
        for impl in ("fa2", "torch"):
            limits = backends.BACKENDS[impl].LIMITS
            assert backends.refusal(limits, q, windows, 9, 0.0) is None
            assert "2147483648" in str(backends.refusal(limits, q, 1_100, 9, 0.0))
        assert backends.refusal(fa4.LIMITS, q, 1_100, 9, 0.0) is None


def fake_choice(
    monkeypatch, installed, longest=129, capability=(9, 0), dtype=torch.bfloat16, head_dim=64, dropout_p=0.0
):
    for name, module in backends.BACKENDS.items():
        monkeypatch.setattr(module, "installed", lambda name=name: name in installed)
    monkeypatch.setattr(backends, "_capability", lambda index: capability)
    with FakeTensorMode():
        q = torch.empty(10, 2, head_dim, dtype=dtype, device="cuda")
        return backends.choose(q, 2, longest, dropout_p, None)


@pytest.mark.filterwarnings("ignore:attention. no kernel for GPUs:UserWarning")
def test_choice_by_device_and_what_is_installed(monkeypatch):
    everything = {"window", "fa4", "fa2", "torch", "fallback"}
    assert fake_choice(monkeypatch, everything) == "fa4"
    assert fake_choice(monkeypatch, everything, dropout_p=0.1) == "fa2"
    assert fake_choice(monkeypatch, everything, capability=(8, 0)) == "fa2"
    assert fake_choice(monkeypatch, everything, head_dim=192) == "fa2"
    assert fake_choice(monkeypatch, everything - {"fa4", "fa2"}) == "torch"
    assert fake_choice(monkeypatch, everything - {"fa4", "fa2"}, dropout_p=0.1) == "fallback"
    assert fake_choice(monkeypatch, everything, dtype=torch.float32) == "fallback"
    assert fake_choice(monkeypatch, everything, capability=(7, 5)) == "fallback"
    assert backends.choose(torch.empty(1, 1, 8), 1, 1, 0.0, None) == "fallback"


@pytest.mark.filterwarnings("ignore:attention. no kernel for GPUs:UserWarning")
def test_short_windows_go_to_the_kernels_for_them_whatever_dropout_and_precision(monkeypatch):
    everything = {"window", "fa4", "fa2", "torch", "fallback"}

    def choice(longest, **changes):
        return fake_choice(monkeypatch, everything, longest, **changes)

    assert choice(128) == choice(1, dropout_p=0.1) == choice(128, head_dim=12) == "window"
    assert choice(129) == choice(128, head_dim=128) == "fa4"
    assert choice(128, capability=(7, 5)) == choice(33, dtype=torch.float32) == "fallback"
    assert choice(32, dtype=torch.float32, dropout_p=0.1) == "window"
    torch.set_float32_matmul_precision("high")
    try:
        assert choice(64, dtype=torch.float32) == "window"
        assert choice(65, dtype=torch.float32) == "fallback"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_limit_counts_both_streams(monkeypatch):
    with FakeTensorMode():
        qkv = torch.empty(260, 3, 2, 64, dtype=torch.bfloat16, device="cuda")
        windows = torch.empty(3, dtype=torch.int32, device="cuda")
        assert qkv_attention(qkv, windows, 64, streams="two", impl="window").shape == (260, 2, 64)
        for streams in ("two", "second"):
            with pytest.raises(
                ValueError, match=r"max_seqlen: got 130 \(two streams count twice\), expected"
            ):
                qkv_attention(qkv, windows, 65, streams=streams, impl="window")
        assert qkv_attention(qkv, windows, 128, impl="window").shape == (260, 2, 64)


@pytest.mark.parametrize("impl", ["window", "fa2", "fa4", "torch"])
def test_cpu_tensors_are_refused(impl, monkeypatch):
    monkeypatch.setattr(backends.BACKENDS[impl], "installed", lambda: True)
    with pytest.raises(ValueError, match="q: got a tensor on cpu, expected one on cuda"):
        attention(*torch.zeros(3, 4, 2, 16, dtype=torch.bfloat16), cumulative([4]), 4, impl=impl)


def test_a_backend_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr(fa2, "installed", lambda: False)
    with pytest.raises(ValueError, match="impl: got 'fa2', which is not installed"):
        attention(*torch.zeros(3, 4, 2, 16), cumulative([4]), 4, impl="fa2")


def test_no_synchronisation_on_cuda_around_the_backend(monkeypatch):
    """The public functions run on fake CUDA tensors, whose values cannot be read."""
    monkeypatch.setattr(fa2, "installed", lambda: True)
    with FakeTensorMode(), torch.no_grad():
        q, k, v, k_self, v_self = (
            torch.empty(10, 2, 64, dtype=torch.bfloat16, device="cuda") for _ in range(5)
        )
        windows = torch.empty(4, dtype=torch.int32, device="cuda")
        out, lse = attention(q, k, v, windows, 5, True, return_lse=True, impl="fa2")
        second = shifted_attention(q, k, v, k_self, v_self, windows, 5, impl="fa2")
    assert out.shape == second.shape == (10, 2, 64)
    assert (lse.shape, lse.dtype, lse.device.type) == ((10, 2), torch.float32, "cuda")
