"""linear_masked_loss: output projection and masked loss in one, for masked rows only."""

from __future__ import annotations

import torch

from ..dispatch import FLOATS, HAS_TRITON, check_loss, check_tensor, flat, layout_of, pick
from ..masks import ALL, COLUMNS, MaskSpec, check_mask
from . import cpu, naive

if HAS_TRITON:
    from . import triton


def linear_masked_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    mask: MaskSpec | None,
    *,
    loss: str = "l1",
    cu_seqlens: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    row_weights: torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """Return the mean loss of `hidden @ weight.T + bias` against `target` over the masked values.

    Only masked rows are projected, on the CPU in blocks, and the forward pass computes the gradients along
    with the loss.

    Parameters
    ----------
    hidden
        [tokens, width] (packed) or [batch, time, width] (padded), any float dtype. Under autocast the
        projection runs in the autocast dtype.
    weight, bias
        [networks, width] and [networks] (or None), in the dtype of hidden.
    target
        [tokens, networks] or [batch, time, networks], any float dtype, without gradient.
    mask
        What counts; may be None if `rows` is given.
    loss
        "l1", "mse" or "huber" (threshold 1).
    cu_seqlens, lengths
        Bounds of the windows, as in :func:`masked_loss`.
    rows
        int64 [masked]: the masked rows, each once, `mask.rows(cu_seqlens)` taken on the host. On CUDA this
        avoids the one host synchronisation that finding the rows of a mask of time points costs.
    row_weights
        float32 [masked], ≥ 0: the mean is weighted, Σ w · mean over networks / Σ w. Needs `rows`.
    impl
        "naive", "cpu" or "triton"; None picks by device.

    Returns
    -------
    Tensor
        Scalar, float32 (float64 for float64 input). 0 with zero gradient if nothing is masked.

    Raises
    ------
    TypeError, ValueError
        For a wrong dtype, shape, device, layout or mask, naming argument, got and expected.

    Examples
    --------
    >>> hidden, weight = torch.ones(6, 8), torch.zeros(4, 8)
    >>> float(linear_masked_loss(hidden, weight, None, torch.ones(6, 4), MaskSpec.position(seed=1)))
    1.0
    """
    check_loss(loss)
    layout = layout_of("hidden", hidden, cu_seqlens, lengths)
    _check(hidden, weight, bias, target, rows, row_weights)
    if mask is None and rows is None:
        raise ValueError("mask: got None without rows, expected a MaskSpec or rows")
    code = [ALL, 0, 1, 0, 0] if mask is None else check_mask(mask)
    if rows is not None and code[0] == COLUMNS:
        raise ValueError("rows: got a tensor with a mask of columns, expected a mask of time points or None")
    face = pick(impl, hidden.device)
    if face == "naive":
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        value = naive.linear_masked_loss(
            hidden, weight, bias, target, mask, rows, row_weights, loss, layout.bounds, layout.period
        )
        return value.to(dtype)
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        # The op casts the weight itself: its gradient is then not rounded on the way.
        hidden = hidden.to(torch.get_autocast_dtype(kind))
    gradients = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (hidden, weight, bias)
    )
    op = cpu.linear_masked_loss if face == "cpu" else triton.linear_masked_loss
    return op(
        flat(hidden),
        weight,
        bias,
        flat(target),
        rows,
        row_weights,
        *layout,
        code,
        check_loss(loss),
        gradients,
    )[0]


def _check(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    rows: torch.Tensor | None,
    row_weights: torch.Tensor | None,
) -> None:
    device = hidden.device
    check_tensor("weight", weight, ndim=2, dtypes=FLOATS, device=device)
    networks, width = weight.shape
    if width != hidden.shape[-1]:
        raise ValueError(
            f"weight: got shape {[networks, width]}, expected [networks, {hidden.shape[-1]}] "
            "(width of hidden)"
        )
    if not torch.is_autocast_enabled(device.type):
        check_tensor("weight", weight, dtypes=(hidden.dtype,))
        if bias is not None:
            check_tensor("bias", bias, dtypes=(hidden.dtype,))
    if bias is not None:
        check_tensor("bias", bias, shape=(networks,), dtypes=FLOATS, device=device)
    check_tensor("target", target, shape=(*hidden.shape[:-1], networks), dtypes=FLOATS, device=device)
    if target.requires_grad:
        raise ValueError(
            "target: got a tensor that requires grad, expected one without; call target.detach()"
        )
    if rows is not None:
        check_tensor("rows", rows, ndim=1, dtypes=(torch.int64,), device=device)
    if row_weights is None:
        return
    if rows is None:
        raise ValueError("row_weights: got a tensor without rows, expected rows too (one weight a row)")
    floats = (torch.float32, torch.float64)
    check_tensor("row_weights", row_weights, shape=tuple(rows.shape), dtypes=floats, device=device)
    if row_weights.requires_grad:
        raise ValueError("row_weights: got a tensor that requires grad, expected one without")
