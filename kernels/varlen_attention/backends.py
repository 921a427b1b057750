"""Which backend computes attention, and the operators by which PyTorch sees it, whichever that is.

The operators are opaque to torch.compile, so the windows' lengths may be read inside.

The second stream attends to strictly earlier keys of the first stream, and to its own key and value. The
earlier keys are a plain causal attention after moving the queries up by one: if row t holds query t + 1,
"keys up to my row" means "keys before me". The queries keep their number, so cu_seqlens and max_seqlen stay
as they are and no window gets empty. The last row of each window then holds the first query of the next
window, a query without earlier keys; its result is dropped.

Forward: the two parts are merged by their log-sum-exps. Backward: a flash backward pass computes
P = exp(s − lse) and δ = Σ dout · out from what it is given, so with the MERGED lse and out it returns the
exact gradients of its part (the identity behind ring attention, Liu et al. 2023, arXiv 2310.01889).

Legend: T tokens, H heads, D head_dim.
"""

from __future__ import annotations

import warnings
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import dispatch
from ..dispatch import constant_to_compiler
from . import fa2, fa4, fallback, torch_varlen, window
from .adapter import Call, Limits

BACKENDS: dict[str, ModuleType] = {
    "window": window,
    "fa4": fa4,
    "fa2": fa2,
    "torch": torch_varlen,
    "fallback": fallback,
}
"""By name, the preferred first."""


def choose(q: Tensor, windows: int, max_seqlen: int, dropout_p: float, impl: str | None) -> str:
    """Return the name of the backend for q [tokens, heads, head_dim] and windows up to `max_seqlen` tokens.

    Left to itself on CUDA it warns, once for a reason, where only the fallback can compute this.

    Raises
    ------
    ValueError, TypeError
        If `impl` names no backend, or one that is not installed or cannot compute this.
    """
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: got {dropout_p}, expected a probability in [0, 1)")
    if impl is None:
        if q.device.type != "cuda":
            impl = "fallback"
        else:
            # The fallback takes everything, so there is always one.
            impl = next(name for name in BACKENDS if why_not(name, q, windows, max_seqlen, dropout_p) is None)
            if impl == "fallback":
                _warn(no_kernel(q, windows, max_seqlen, dropout_p))
    elif impl not in BACKENDS:
        expected = ", ".join(map(repr, ("naive", *BACKENDS)))
        raise ValueError(f"impl: got {impl!r}, expected one of {expected} or None")
    elif not _installed(impl):
        raise ValueError(f"impl: got {impl!r}, which is not installed here, expected None or 'fallback'")
    problem = refusal(_limits(impl), q, windows, max_seqlen, dropout_p)
    if problem is not None:
        raise problem
    return impl


def settle(q: Tensor, windows: int, max_seqlen: int, dropout_p: float, impl: str | None) -> tuple[str, float]:
    """Return backend and dropout of a model that rather keeps all attention weights than miss a GPU's kernel.

    Parameters
    ----------
    q
        [tokens, heads, head_dim].
    windows
        Their number.
    max_seqlen
        Tokens of the longest.
    dropout_p
        Probability with which a weight is dropped where that is possible; elsewhere none is.
    impl
        Backend on CUDA, or None: the best. On the CPU the fallback runs in any case.

    Raises
    ------
    ValueError, TypeError
        As :func:`choose`.
    """
    if q.device.type != "cuda":
        return choose(q, windows, max_seqlen, dropout_p, None), dropout_p
    if impl is not None:
        p = dropout_p if impl not in BACKENDS or _limits(impl).dropout else 0.0
        return choose(q, windows, max_seqlen, p, impl), p
    # A kernel that can drop weights is best, but any kernel is better than the fallback.
    for p in (dropout_p, 0.0):
        for name in BACKENDS:
            if name != "fallback" and why_not(name, q, windows, max_seqlen, p) is None:
                return name, p
    return choose(q, windows, max_seqlen, dropout_p, None), dropout_p


def why_not(name: str, q: Tensor, windows: int, max_seqlen: int, dropout_p: float) -> str | None:
    """Return why a backend cannot compute this here, or None if it can."""
    limits = _limits(name)
    if not _installed(name):
        return "it is not installed"
    problem = refusal(limits, q, windows, max_seqlen, dropout_p)
    if problem is not None:
        return str(problem)
    if q.is_cuda and limits.capability is not None and _capability(q.device.index or 0) < limits.capability:
        needed, has = (
            ".".join(map(str, pair)) for pair in (limits.capability, _capability(q.device.index or 0))
        )
        return f"it needs compute capability {needed}, this GPU has {has}"
    return None


def refusal(limits: Limits, q: Tensor, windows: int, max_seqlen: int, dropout_p: float) -> Exception | None:
    """Return the error to raise if a backend cannot compute this, or None if it can."""
    tokens, heads, head_dim = q.shape
    who = f'impl="{limits.name}"'
    on_cpu = q.device.type == "cpu" and limits.interpreted and dispatch.interpreting()
    if q.device.type not in limits.devices and not on_cpu:
        expected = " or ".join(limits.devices)
        return ValueError(f"q: got a tensor on {q.device}, expected one on {expected} for {who}")
    if q.dtype not in limits.dtypes:
        expected = ", ".join(map(str, limits.dtypes))
        return TypeError(f"q: got {q.dtype}, expected one of {expected} for {who}")
    if head_dim > limits.head_dim_max or head_dim % limits.head_dim_multiple:
        return ValueError(
            f"q: got head_dim {head_dim}, expected at most {limits.head_dim_max} and a multiple of "
            f'{limits.head_dim_multiple} for {who}; impl="fallback" takes any'
        )
    if dropout_p > 0.0 and not limits.dropout:
        return ValueError(
            f"dropout_p: got {dropout_p}, expected 0 for {who}, which cannot drop attention weights; "
            'impl="window", "fa2" and "fallback" can'
        )
    if limits.longest is not None and max_seqlen > limits.longest(q.dtype):
        return ValueError(
            f"max_seqlen: got {max_seqlen} (two streams count twice), expected at most "
            f"{limits.longest(q.dtype)} tokens in {q.dtype} for {who}"
        )
    # The size of flash-attn 2's buffer for dq, in which every window has 128 rows to spare.
    elements = (tokens + 128 * windows) * heads * head_dim
    if limits.index_limit is not None and elements >= limits.index_limit:
        return ValueError(
            f"q: got (tokens + 128 · windows) · heads · head_dim = {elements}, expected less than "
            f"{limits.index_limit} for {who}, which counts in int32: use smaller batches"
        )
    return None


def no_kernel(q: Tensor, windows: int, max_seqlen: int, dropout_p: float) -> str | None:
    """Return why no kernel for GPUs can compute this, or None if one can."""
    reasons = {
        name: why_not(name, q, windows, max_seqlen, dropout_p) for name in BACKENDS if name != "fallback"
    }
    if None in reasons.values():
        return None
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


# Not traced by torch.compile; the cache makes it one warning for each reason.
@constant_to_compiler
@cache
def _warn(reasons: str | None) -> None:
    warnings.warn(
        "attention: no kernel for GPUs can compute this, so the fallback runs, which loops over windows, "
        f"stops the GPU and is many times as slow ({reasons})",
        stacklevel=2,
    )


def _limits(name: str) -> Limits:
    limits: Limits = BACKENDS[name].LIMITS
    return limits


# torch.compile cannot trace a search for modules, and what is installed does not change.
@constant_to_compiler
def _installed(name: str) -> bool:
    return bool(BACKENDS[name].installed())


@constant_to_compiler
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


# Head columns that carry the gradient of lse; backends want a multiple of 8.
LSE_PAD = 8
# Without this tag, compiled and checkpointed, an operator drops other weights when it is computed again.
RANDOM = (torch.Tag.nondeterministic_seeded,)


@torch.library.custom_op("brainflow::attention", mutates_args=(), tags=RANDOM)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    dropout_p: float,
    softmax_scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return out [T, H, D], lse [T, H] and the backend's random state (empty without dropout)."""
    # Inputs have their type: inside, autocast would cast the fallback's products once more.
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        call = Call(cu_seqlens, max_seqlen, causal, dropout_p, softmax_scale)
        return BACKENDS[impl].forward(q, k, v, call)


@torch.library.custom_op("brainflow::attention_backward", mutates_args=())
def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    state: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    dropout_p: float,
    softmax_scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, each [T, H, D]."""
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        call = Call(cu_seqlens, max_seqlen, causal, dropout_p, softmax_scale)
        return BACKENDS[impl].backward(dout, q, k, v, out, lse, state, call)


def lse_dtype(q: Tensor) -> torch.dtype:
    """Return the element type of the log-sum-exp: float32, or float64 beside float64."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


@attention.register_fake
def _(q, k, v, cu_seqlens, max_seqlen, causal, dropout_p, softmax_scale, impl):
    # Transposed as the backends give it, or compiled code would expect other strides.
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=lse_dtype(q)).t()
    state = q.new_empty(2 if dropout_p > 0.0 else 0, dtype=torch.int64)
    return q.new_empty(q.shape), lse, state


@attention_backward.register_fake
def _(dout, q, k, v, out, lse, state, cu_seqlens, max_seqlen, causal, dropout_p, softmax_scale, impl):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, cu_seqlens, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _state: None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, state, cu_seqlens = ctx.saved_tensors
    if dout is None and dlse is None:
        return (None,) * 9
    if dout is None:
        dout = torch.zeros_like(out)
    head_dim = q.shape[-1]
    if dlse is not None:
        dout, q, k, v, out = _carry_lse_gradient(dout, dlse, q, k, v, out)
        # The head has grown by LSE_PAD, perhaps beyond what the backend takes.
        problem = refusal(BACKENDS[ctx.rest[-1]].LIMITS, q, cu_seqlens.shape[0] - 1, ctx.rest[0], 0.0)
        if problem is not None:
            raise problem
    grads = torch.ops.brainflow.attention_backward(dout, q, k, v, out, lse, state, cu_seqlens, *ctx.rest)
    if dlse is not None:
        grads = tuple(g[..., :head_dim] for g in grads)
    return (*grads, *(None,) * 6)


def _carry_lse_gradient(
    dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor
) -> tuple[Tensor, ...]:
    """Add head columns so that a backward pass that knows nothing of dlse adds its share.

    dS = P · (dout vᵀ − δ + dlse) with δ = Σ dout · out. One more column with v = 1, dout = dlse and out = 0
    adds dlse to the first term and nothing to δ; q and k get zeros, so the scores stay what they are.
    """
    one = torch.zeros(LSE_PAD, dtype=v.dtype, device=v.device)
    one[0] = 1
    grown = pad(dlse.to(dout.dtype).unsqueeze(-1), (0, LSE_PAD - 1))
    dout = torch.cat([dout, grown], -1)
    v = torch.cat([v, one.expand(*v.shape[:2], LSE_PAD)], -1)
    return dout, pad(q, (0, LSE_PAD)), pad(k, (0, LSE_PAD)), v, pad(out, (0, LSE_PAD))


attention.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("brainflow::shifted_attention", mutates_args=(), tags=RANDOM)
def shifted_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_self: Tensor,
    v_self: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float,
    softmax_scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return out [T, H, D] and what the backward pass needs.

    That is the lse of the moved rows [T, H], the softmax weight of the self term [T, H], its dropout factor
    [T, H] (empty without dropout) and the backend's random state.
    """
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        first, last = cu_seqlens[:-1].long(), cu_seqlens[1:].long() - 1
        call = Call(cu_seqlens, max_seqlen, True, dropout_p, softmax_scale)
        before, row_lse, state = BACKENDS[impl].forward(q.roll(-1, 0), k, v, call)
        row_lse = row_lse.contiguous()
        # The first query of a window has nothing before it: what came back for it belongs to another
        # window.
        lse_before = row_lse.roll(1, 0).index_fill_(0, first, -torch.inf)
        lse_self = (q.to(row_lse.dtype) * k_self).sum(-1).mul_(softmax_scale)
        lse = torch.logaddexp(lse_before, lse_self)
        weight = (lse_self - lse).exp_()
        keep = lse.new_empty(0)
        if dropout_p > 0.0:
            # The backend drops among the earlier keys only; the self term is dropped here.
            keep = torch.empty_like(lse).bernoulli_(1.0 - dropout_p).div_(1.0 - dropout_p)
        share = weight * keep if dropout_p > 0.0 else weight
        out = before.roll(1, 0).to(lse.dtype).mul_((lse_before - lse).exp_().unsqueeze(-1))
        out.addcmul_(share.unsqueeze(-1), v_self.to(lse.dtype))
        # The backward pass gets the merged log-sum-exp, but for rows whose result was dropped: theirs
        # stays, so that their probabilities stay finite beside an upstream gradient of 0.
        row_lse = lse.roll(-1, 0).index_copy_(0, last, row_lse.index_select(0, last))
        return out.to(q.dtype), row_lse, weight, keep, state


@torch.library.custom_op("brainflow::shifted_attention_backward", mutates_args=())
def shifted_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_self: Tensor,
    v_self: Tensor,
    out: Tensor,
    row_lse: Tensor,
    weight: Tensor,
    keep: Tensor,
    state: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float,
    softmax_scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, k_self and v_self, each [T, H, D]."""
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        last = cu_seqlens[1:].long() - 1
        # The last row of a window held the next window's first query; its result was dropped.
        row_dout = dout.roll(-1, 0).index_fill_(0, last, 0.0)
        call = Call(cu_seqlens, max_seqlen, True, dropout_p, softmax_scale)
        row_dq, dk, dv = BACKENDS[impl].backward(
            row_dout, q.roll(-1, 0), k, v, out.roll(-1, 0), row_lse, state, call
        )
        dout_ = dout.to(weight.dtype)
        delta = (dout_ * out).sum(-1)
        d_weight = (dout_ * v_self).sum(-1)
        share = weight
        if dropout_p > 0.0:
            d_weight, share = d_weight.mul_(keep), weight * keep
        d_score = d_weight.sub_(delta).mul_(weight).mul_(softmax_scale).unsqueeze(-1)
        dq = row_dq.roll(1, 0).to(weight.dtype).addcmul_(d_score, k_self.to(weight.dtype))
        dk_self = d_score * q
        dv_self = share.unsqueeze(-1) * dout_
        return dq.to(q.dtype), dk, dv, dk_self.to(q.dtype), dv_self.to(q.dtype)


@shifted_attention.register_fake
def _(q, k, v, k_self, v_self, cu_seqlens, max_seqlen, dropout_p, softmax_scale, impl):
    row_lse = q.new_empty(q.shape[:2], dtype=lse_dtype(q))
    keep = torch.empty_like(row_lse) if dropout_p > 0.0 else row_lse.new_empty(0)
    state = q.new_empty(2 if dropout_p > 0.0 else 0, dtype=torch.int64)
    return q.new_empty(q.shape), row_lse, torch.empty_like(row_lse), keep, state


@shifted_attention_backward.register_fake
def _(dout, q, k, v, k_self, v_self, *rest):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, k_self, v_self))


def _setup_shifted(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, cu_seqlens = inputs[:6]
    ctx.rest = inputs[6:]
    ctx.save_for_backward(*tensors, *output, cu_seqlens)


def _shifted_backward(ctx: Any, dout: Tensor, *_: object) -> tuple[Tensor | None, ...]:
    grads = torch.ops.brainflow.shifted_attention_backward(dout, *ctx.saved_tensors, *ctx.rest)
    return (*grads, *(None,) * 5)


shifted_attention.register_autograd(_shifted_backward, setup_context=_setup_shifted)
