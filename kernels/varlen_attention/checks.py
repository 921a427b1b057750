"""What attention refuses, and in which words.

Everything here reads shapes, types and devices, which the host knows. The values of `cu_seqlens` are read
only where reading costs no synchronisation: on CPU tensors (:func:`host_lengths`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .. import dispatch

LOW_PRECISION = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one backend can do; everything else is refused, see :func:`refusal`."""

    name: str
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    head_dim_max: int
    head_dim_multiple: int = 1
    capability: tuple[int, int] | None = None
    """Least CUDA compute capability."""
    dropout: bool = False
    index_limit: int | None = None
    """Bound of (tokens + 128 · windows) · heads · head_dim, where the backend counts in int32."""
    interpreted: bool = False
    """Whether it also takes CPU tensors under Triton's interpreter."""
    longest: Callable[[torch.dtype], int] | None = None
    """Tokens of the longest window that it takes, both streams counted where there are two."""


def check_shapes(q: Tensor, named: dict[str, Tensor], cu_seqlens: Tensor, max_seqlen: int) -> None:
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
    elements = (tokens + 128 * windows) * heads * head_dim
    if limits.index_limit is not None and elements >= limits.index_limit:
        return ValueError(
            f"q: got (tokens + 128 · windows) · heads · head_dim = {elements}, expected less than "
            f"{limits.index_limit} for {who}, which counts in int32: use smaller batches"
        )
    return None


def host_lengths(cu_seqlens: Tensor, tokens: int, max_seqlen: int) -> list[int]:
    """Read the windows' lengths from a CPU tensor and check them.

    Returns
    -------
    list of int
        Length of each window in tokens.

    Raises
    ------
    ValueError
        If `cu_seqlens` does not rise from 0 to `tokens`, holds an empty window or one above `max_seqlen`.
    """
    edges = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(edges)]
    if edges[0] != 0:
        raise ValueError(f"cu_seqlens: got {edges[0]} as first entry, expected 0")
    if edges[-1] != tokens:
        raise ValueError(f"cu_seqlens: got {edges[-1]} as last entry, expected {tokens} (tokens)")
    if min(lengths) < 1:
        window = next(i for i, length in enumerate(lengths) if length < 1)
        raise ValueError(
            f"cu_seqlens: got a window of {lengths[window]} tokens (window {window}), expected rising "
            "entries, at least 1 token a window"
        )
    if max(lengths) > max_seqlen:
        raise ValueError(
            f"max_seqlen: got {max_seqlen}, expected at least the longest window, {max(lengths)}"
        )
    return lengths


def check_dropout(dropout_p: float) -> None:
    """Refuse dropout: a specification draws nothing at random."""
    if dropout_p != 0.0:
        raise ValueError(f'dropout_p: got {dropout_p}, expected 0 for impl="naive"')
