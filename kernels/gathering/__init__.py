"""gather_windows: windows of a store, laid end to end, dequantised, cast and masked in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..dispatch import FLOATS, HAS_TRITON, check_tensor, pick
from ..masks import MaskSpec, check_mask
from . import cpu, naive

if HAS_TRITON:
    from . import triton

STORES = (torch.float32, torch.float16, torch.bfloat16, torch.int16, torch.int8)

Integers = torch.Tensor | Sequence[int] | Any
"""What `torch.as_tensor` takes, NumPy arrays too."""


def gather_windows(
    store: torch.Tensor,
    starts: Integers,
    lengths: Integers,
    *,
    scale: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    mask: MaskSpec | None = None,
    mask_token: torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """Return windows of a store laid end to end.

    Parameters
    ----------
    store
        [time, networks], float32, float16, bfloat16, int16 or int8, in device memory or memory-mapped.
    starts
        [windows], first time point of each window: integers on the host, a list, array or tensor (values in
        CUDA tensors are not checked: time points outside of the store come out as NaN).
    lengths
        [windows], time points of each window, at least 1. On CUDA their sum has to be read back (a sync).
    scale
        [networks] or [windows, networks], what a stored value is multiplied by; None: 1.
    out_dtype
        Element type of the result.
    mask, mask_token
        Replace masked values as :func:`mask_tokens` does on the result; both or neither.
    impl
        "naive", "cpu" or "triton"; None picks by device.

    Returns
    -------
    Tensor
        [sum(lengths), networks] in `out_dtype`. Its gradient goes to mask_token alone.

    Raises
    ------
    TypeError, ValueError
        For a wrong dtype, shape, device, layout or range, naming argument, got and expected.

    Examples
    --------
    >>> store = torch.arange(6, dtype=torch.int16).view(6, 1)
    >>> gather_windows(store, [4, 0], [2, 1], scale=torch.tensor([0.5])).flatten()
    tensor([2.0000, 2.5000, 0.0000])
    """
    check_tensor("store", store, ndim=2, dtypes=STORES, contiguous=False)
    if store.stride(1) != 1 and store.shape[1] > 1:
        raise ValueError(f"store: got strides {store.stride()}, expected networks next to each other")
    if store.requires_grad:
        raise ValueError(
            "store: got a tensor that requires grad, expected data; the gradient is not computed"
        )
    if out_dtype not in FLOATS:
        raise TypeError(f"out_dtype: got {out_dtype}, expected one of {', '.join(map(str, FLOATS))}")
    begin, count = _integers("starts", starts), _integers("lengths", lengths)
    if begin.shape != count.shape:
        raise ValueError(f"lengths: got shape {list(count.shape)}, expected starts' {list(begin.shape)}")
    tokens, longest = (int(count.sum()), int(count.max())) if count.numel() else (0, 0)
    if tokens >= 2**31:
        raise ValueError(f"lengths: got {tokens} time points in all, expected less than 2**31 a batch")
    if begin.device.type == "cpu" and count.device.type == "cpu":
        _check_range(begin, count, store.shape[0])
    cu_seqlens = torch.zeros(count.numel() + 1, dtype=torch.int32, device=count.device)
    torch.cumsum(count, 0, dtype=torch.int32, out=cu_seqlens[1:])
    if scale is not None:
        check_tensor("scale", scale, ndim=(1, 2), dtypes=FLOATS, device=store.device)
        expected = [begin.numel(), store.shape[1]][-scale.ndim :]
        if list(scale.shape) != expected:
            raise ValueError(
                f"scale: got shape {list(scale.shape)}, expected {expected} "
                "(a factor a network, or one a window and network)"
            )
    code = _check_masking(mask, mask_token, store, longest)
    begin, cu_seqlens = _on_device(begin, cu_seqlens, store.device)
    face = pick(impl, store.device)
    if face == "naive":
        return naive.gather_windows(store, begin, cu_seqlens, scale, out_dtype, mask, mask_token)
    op = cpu.gather_windows if face == "cpu" else triton.gather_windows
    return op(store, begin, cu_seqlens, tokens, longest, scale, out_dtype, code, mask_token)


def _integers(name: str, values: Integers) -> torch.Tensor:
    tensor = torch.as_tensor(values)
    if tensor.is_floating_point() or tensor.dtype == torch.bool or tensor.is_complex():
        raise TypeError(f"{name}: got {tensor.dtype}, expected integers")
    if tensor.ndim != 1:
        raise ValueError(f"{name}: got shape {list(tensor.shape)}, expected [windows]")
    return tensor.to(torch.int64)


def _on_device(
    starts: torch.Tensor, cu_seqlens: torch.Tensor, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both on `device`; what lies on the host goes to a GPU as one copy from pinned memory."""
    if device.type != "cuda" or "cuda" in (starts.device.type, cu_seqlens.device.type):
        return starts.to(device, non_blocking=True), cu_seqlens.to(device, non_blocking=True)
    windows = starts.numel()
    host = torch.empty(windows + windows // 2 + 1, dtype=torch.int64, pin_memory=True)
    host[:windows] = starts
    host[windows:].view(torch.int32)[: windows + 1] = cu_seqlens
    sent = host.to(device, non_blocking=True)
    return sent[:windows], sent[windows:].view(torch.int32)[: windows + 1]


def _check_range(starts: torch.Tensor, lengths: torch.Tensor, time: int) -> None:
    for name, bad, expected in (
        ("lengths", lengths < 1, "at least 1 time point"),
        ("starts", starts < 0, "at least 0"),
        ("starts", starts + lengths > time, f"windows that end within the store's {time} time points"),
    ):
        if bool(bad.any()):
            w = int(bad.nonzero()[0])
            raise ValueError(
                f"{name}: got start {int(starts[w])} and length {int(lengths[w])} for window {w}, "
                f"expected {expected}"
            )


def _check_masking(
    mask: MaskSpec | None, token: torch.Tensor | None, store: torch.Tensor, longest: int
) -> list[int]:
    """Return the mask's code, empty without a mask."""
    if mask is None and token is None:
        return []
    if mask is None or token is None:
        missing = "mask" if mask is None else "mask_token"
        raise ValueError(f"{missing}: got None, expected both of mask and mask_token, or neither")
    code = check_mask(mask)
    check_tensor("mask_token", token, ndim=(1, 2), dtypes=FLOATS, device=store.device)
    if token.ndim == 1 and token.shape[0] != store.shape[1]:
        raise ValueError(f"mask_token: got shape {list(token.shape)}, expected [{store.shape[1]}] (networks)")
    if token.ndim == 2 and (token.shape[1] != 1 or token.shape[0] < longest):
        raise ValueError(
            f"mask_token: got shape {list(token.shape)}, expected [positions, 1] with at least {longest} "
            "positions (the longest window)"
        )
    return code
