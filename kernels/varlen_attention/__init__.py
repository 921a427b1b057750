"""Variable-length attention over packed windows, and the second stream of dense causal modelling.

Legend: T tokens, H heads, D head_dim. Windows lie end to end; window w holds the tokens
`cu_seqlens[w] : cu_seqlens[w + 1]`. Nothing is padded and nothing attends across windows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends, naive, window
from .backends import choose, settle

__all__ = ["attention", "qkv_attention", "settle", "shifted_attention"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool = False,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    *,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend within each window of a packed batch.

    Parameters
    ----------
    q, k, v
        [tokens, heads, head_dim], all of one type and device. Under autocast they are cast to its type.
    cu_seqlens
        int32 [windows + 1], where each window begins and the last one ends; no window is empty.
    max_seqlen
        Length of the longest window in tokens (a Python int: nothing is read back from the device).
    causal
        Whether a token sees only itself and earlier tokens of its window.
    dropout_p
        Probability with which a single attention weight is dropped. The caller passes 0 in evaluation.
    softmax_scale
        Factor on q · k; None means 1 / √head_dim.
    return_lse
        Also return log Σ exp(scores), float32 [tokens, heads] (float64 beside float64), differentiable.
    impl
        "window", "fa4", "fa2", "torch", "fallback", "naive", or None: on CUDA the first of these that is
        installed and can (window.py says why "window" comes first), on the CPU the fallback.

    Returns
    -------
    Tensor or tuple of Tensor
        out [tokens, heads, head_dim] in q's type; with `return_lse` also the log-sum-exp.

    Raises
    ------
    ValueError, TypeError
        If shapes, types, devices or lengths are wrong, or if the chosen backend cannot compute them.

    Examples
    --------
    >>> q, k, v = torch.randn(3, 5, 2, 8)
    >>> windows = torch.tensor([0, 2, 5], dtype=torch.int32)
    >>> attention(q, k, v, windows, 3, causal=True).shape
    torch.Size([5, 2, 8])
    """
    q, k, v = _autocast(q, k, v)
    _check_shapes(q, {"k": k, "v": v}, cu_seqlens, max_seqlen)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    if impl == "naive":
        _check_dropout(dropout_p)
        out, lse = naive.attention(q, k, v, cu_seqlens, causal=causal, softmax_scale=scale)
        out, lse = out.to(q.dtype), lse.to(backends.lse_dtype(q))
    else:
        impl = choose(q, cu_seqlens.shape[0] - 1, max_seqlen, dropout_p, impl)
        if impl == "window":
            rest = (cu_seqlens, max_seqlen, "one", causal, dropout_p, scale, return_lse)
            out, lse = window.attention(q, k, v, *rest)
            return (out, lse) if return_lse else out
        out, lse, _ = backends.attention(q, k, v, cu_seqlens, max_seqlen, causal, dropout_p, scale, impl)
    return (out, lse) if return_lse else out


def shifted_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_self: Tensor,
    v_self: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float | None = None,
    *,
    dropout_p: float = 0.0,
    impl: str | None = None,
) -> Tensor:
    """Attend from each entry of a second stream to strictly earlier tokens of the first, and to itself.

    Query i of a window sees (k_j, v_j) for j < i and (k_self_i, v_self_i): what a mask token that stood at
    position i would see, for every i in one pass. The first query of a window sees only itself.

    Parameters
    ----------
    q, k_self, v_self
        [tokens, heads, head_dim], the second stream.
    k, v
        [tokens, heads, head_dim], the first stream.
    cu_seqlens, max_seqlen, softmax_scale, dropout_p, impl
        As in :func:`attention`.

    Returns
    -------
    Tensor
        [tokens, heads, head_dim] in q's type, with exact gradients for all five inputs.

    Raises
    ------
    ValueError, TypeError
        As in :func:`attention`.

    Examples
    --------
    >>> q, k, v, k_self, v_self = torch.randn(5, 4, 2, 8)
    >>> windows = torch.tensor([0, 1, 4], dtype=torch.int32)
    >>> out = shifted_attention(q, k, v, k_self, v_self, windows, 3)
    >>> bool(torch.allclose(out[0], v_self[0]))
    True
    """
    q, k, v, k_self, v_self = _autocast(q, k, v, k_self, v_self)
    _check_shapes(q, {"k": k, "v": v, "k_self": k_self, "v_self": v_self}, cu_seqlens, max_seqlen)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    if impl == "naive":
        _check_dropout(dropout_p)
        out, _ = naive.shifted_attention(q, k, v, k_self, v_self, cu_seqlens, softmax_scale=scale)
        return out.to(q.dtype)
    impl = choose(q, cu_seqlens.shape[0] - 1, 2 * max_seqlen, dropout_p, impl)
    if impl == "window":
        # For "second" the first stream's queries are not read: `q` stands in for them, without a gradient.
        both = torch.cat((torch.stack((q.detach(), k, v), 1), torch.stack((q, k_self, v_self), 1)))
        rest = (cu_seqlens, max_seqlen, "second", True, dropout_p, scale, False)
        return window.attention(both, None, None, *rest)[0]
    out, *_ = backends.shifted_attention(
        q, k, v, k_self, v_self, cu_seqlens, max_seqlen, dropout_p, scale, impl
    )
    return out


def qkv_attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool = False,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    *,
    streams: str = "one",
    impl: str | None = None,
) -> Tensor:
    """Attend as a transformer does whose queries, keys and values come from one projection.

    The kernels of `impl="window"` compute it in one launch forward and one backward, both streams, too.

    Parameters
    ----------
    qkv
        [tokens, 3, heads, head_dim]; of two streams [2 · tokens, 3, heads, head_dim], the first one above.
    cu_seqlens, max_seqlen, causal, dropout_p, softmax_scale, impl
        As in :func:`attention`; of the first stream's tokens. Two streams are causal in any case.
    streams
        "one"; "two": :func:`attention` of the first, :func:`shifted_attention` of the second; "second": the
        latter alone.

    Returns
    -------
    Tensor
        [tokens, heads, head_dim]; of "two" [2 · tokens, heads, head_dim].

    Raises
    ------
    ValueError, TypeError
        As in :func:`attention`.

    Examples
    --------
    >>> qkv = torch.randn(2 * 5, 3, 2, 8)
    >>> windows = torch.tensor([0, 2, 5], dtype=torch.int32)
    >>> qkv_attention(qkv, windows, 3, streams="two").shape
    torch.Size([10, 2, 8])
    """
    if streams not in ("one", "two", "second"):
        raise ValueError(f"streams: got {streams!r}, expected 'one', 'two' or 'second'")
    count = 1 if streams == "one" else 2
    if qkv.dim() != 4 or qkv.shape[1] != 3 or qkv.shape[0] % count:
        rows = "tokens" if count == 1 else "2 · tokens"
        raise ValueError(f"qkv: got shape {tuple(qkv.shape)}, expected [{rows}, 3, heads, head_dim]")
    (qkv,) = _autocast(qkv)
    *first, last = qkv.unflatten(0, (count, -1)).unbind(0)
    q, k, v = (first[0] if first else last).unbind(1)
    _check_shapes(q, {}, cu_seqlens, max_seqlen)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    if impl != "naive":
        impl = choose(q, cu_seqlens.shape[0] - 1, count * max_seqlen, dropout_p, impl)
    if impl == "window":
        rest = (cu_seqlens, max_seqlen, streams, causal, dropout_p, scale, False)
        return window.attention(qkv, None, None, *rest)[0]
    parts = []
    if streams != "second":
        out = attention(q, k, v, cu_seqlens, max_seqlen, causal or count == 2, dropout_p, scale, impl=impl)
        assert isinstance(out, Tensor)  # no log-sum-exp was asked for
        parts.append(out)
    if count == 2:
        q2, k2, v2 = last.unbind(1)
        parts.append(
            shifted_attention(q2, k, v, k2, v2, cu_seqlens, max_seqlen, scale, dropout_p=dropout_p, impl=impl)
        )
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to autocast's type where it is on; float64 stays, as in PyTorch's own rule."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _check_shapes(q: Tensor, named: dict[str, Tensor], cu_seqlens: Tensor, max_seqlen: int) -> None:
    """Refuse tensors that do not describe one packed batch.

    Parameters
    ----------
    q
        [tokens, heads, head_dim].
    named
        The other tensors of q's shape, by the name of their argument.
    cu_seqlens
        int32 [windows + 1] on q's device.
    max_seqlen
        Length of the longest window in tokens.

    Raises
    ------
    TypeError
        If an element type is wrong.
    ValueError
        If a shape, device or length is wrong.
    """
    if q.dim() != 3:
        raise ValueError(f"q: got shape {tuple(q.shape)}, expected [tokens, heads, head_dim]")
    if not q.is_floating_point():
        raise TypeError(f"q: got {q.dtype}, expected a floating-point type")
    for name, tensor in named.items():
        if tensor.shape != q.shape:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected q's, {tuple(q.shape)}")
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name}: got {tensor.dtype}, expected the type of q, {q.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name}: got a tensor on {tensor.device}, expected q's device, {q.device}")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens: got {cu_seqlens.dtype}, expected torch.int32")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"cu_seqlens: got shape {tuple(cu_seqlens.shape)}, expected [windows + 1], at least 2 entries"
        )
    if cu_seqlens.device != q.device:
        raise ValueError(f"cu_seqlens: got a tensor on {cu_seqlens.device}, expected q's device, {q.device}")
    if not isinstance(max_seqlen, int):
        raise TypeError(f"max_seqlen: got {type(max_seqlen).__name__}, expected an int (tokens)")
    if max_seqlen < 1:
        raise ValueError(f"max_seqlen: got {max_seqlen}, expected at least 1 token")


def _check_dropout(dropout_p: float) -> None:
    """Refuse dropout: a specification draws nothing at random."""
    if dropout_p != 0.0:
        raise ValueError(f'dropout_p: got {dropout_p}, expected 0 for impl="naive"')
