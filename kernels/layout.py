"""Packed and padded batches as one thing: rows of networks, and the bounds of the windows among them.

Packed: x [tokens, N] with cu_seqlens [W + 1]; without cu_seqlens all tokens are one window.
Padded: x [W, T, N] with lengths [W]; without lengths every window has T time points.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .dispatch import FLOATS, check_tensor
from .masks import MaskSpec


class Layout(NamedTuple):
    """Where the windows lie in the rows of a batch."""

    bounds: torch.Tensor
    """int32: cu_seqlens [W + 1] if packed, lengths [W] if padded."""
    period: int
    """0 if packed, T if padded."""


def layout_of(
    name: str,
    x: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    lengths: torch.Tensor | None,
) -> Layout:
    """Check a batch and its bounds and return the layout.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what came and what was expected.
    """
    check_tensor(name, x, ndim=(2, 3), dtypes=FLOATS)
    integers = (torch.int32, torch.int64)
    if x.shape[:-1].numel() >= 2**31:
        raise ValueError(f"{name}: got shape {list(x.shape)}, expected less than 2**31 time points")
    if x.ndim == 2:
        if lengths is not None:
            raise ValueError(
                f"lengths: got a tensor with {name} of 2 dimensions (packed), expected cu_seqlens instead"
            )
        if cu_seqlens is None:
            steps = x.shape[0]
            return Layout(torch.arange(2, dtype=torch.int32, device=x.device) * steps, 0)
        check_tensor("cu_seqlens", cu_seqlens, ndim=1, dtypes=integers, device=x.device)
        if cu_seqlens.shape[0] < (2 if x.shape[0] else 1):
            raise ValueError(f"cu_seqlens: got shape {list(cu_seqlens.shape)}, expected [windows + 1]")
        return Layout(cu_seqlens.to(torch.int32), 0)
    if cu_seqlens is not None:
        raise ValueError(
            f"cu_seqlens: got a tensor with {name} of 3 dimensions (padded), expected lengths instead"
        )
    batch, time, _ = x.shape
    if lengths is None:
        return Layout(torch.full((batch,), time, dtype=torch.int32, device=x.device), time)
    check_tensor("lengths", lengths, shape=(batch,), dtypes=integers, device=x.device)
    return Layout(lengths.to(torch.int32), time)


def check_mask(mask: MaskSpec) -> list[int]:
    """Return the code of a mask, or raise TypeError."""
    if not isinstance(mask, MaskSpec):
        shape = f" of shape {list(mask.shape)}" if isinstance(mask, torch.Tensor) else ""
        raise TypeError(
            f"mask: got {type(mask).__name__}{shape}, expected a MaskSpec, for example "
            "MaskSpec.time_points(0.2, seed=0)"
        )
    return mask.code()


def flat(x: torch.Tensor) -> torch.Tensor:
    """View [W, T, N] or [tokens, N] as [rows, N]."""
    return x if x.ndim == 2 else x.flatten(0, 1)
