"""mask_tokens: replace the masked values of a batch by a learned token, in one pass."""

from __future__ import annotations

import torch

from ..dispatch import FLOATS, HAS_TRITON, check_tensor, flat, layout_of, pick
from ..masks import MaskSpec, check_mask
from . import cpu, naive

if HAS_TRITON:
    from . import triton


def mask_tokens(
    x: torch.Tensor,
    mask: MaskSpec,
    mask_token: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """Return the batch with its masked values replaced by `mask_token`.

    Parameters
    ----------
    x
        [tokens, networks] (packed) or [batch, time, networks] (padded), any float dtype.
    mask
        What is replaced.
    mask_token
        [networks]: a value for each network; or [positions, 1]: a value for each position in the window,
        with at least as many positions as the longest window.
    cu_seqlens
        Packed: int32 [windows + 1], bounds of the windows; None: one window.
    lengths
        Padded: int32 [batch], valid time points; None: all.
    impl
        "naive", "cpu" or "triton"; None picks by device.

    Returns
    -------
    Tensor
        Same shape and dtype as x. Gradients go to x (0 where masked) and to mask_token.

    Raises
    ------
    TypeError, ValueError
        For a wrong dtype, shape, device, layout or mask, naming argument, got and expected.

    Examples
    --------
    >>> mask_tokens(torch.ones(2, 3), MaskSpec.all_valid(), torch.zeros(3))
    tensor([[0., 0., 0.],
            [0., 0., 0.]])
    """
    code = check_mask(mask)
    bounds, period = layout_of("x", x, cu_seqlens, lengths)
    check_tensor("mask_token", mask_token, ndim=(1, 2), dtypes=FLOATS, device=x.device)
    expected = (x.shape[-1],) if mask_token.ndim == 1 else (mask_token.shape[0], 1)
    if tuple(mask_token.shape) != expected:
        raise ValueError(
            f"mask_token: got shape {list(mask_token.shape)}, expected [{x.shape[-1]}] (a value a network) "
            "or [positions, 1] (a value a position)"
        )
    # Packed, the longest window may be known to the device alone: the faces look for themselves.
    if mask_token.ndim == 2 and mask_token.shape[0] < period:
        raise ValueError(f"mask_token: got {mask_token.shape[0]} positions, expected at least {period}")
    face = pick(impl, x.device)
    if face == "naive":
        return naive.mask_tokens(x, mask, mask_token, bounds, period)
    op = cpu.mask_tokens if face == "cpu" else triton.mask_tokens
    return op(flat(x), mask_token, bounds, period, code).view(x.shape)
