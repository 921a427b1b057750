"""masked_loss: the mean loss over masked values, reading nothing else."""

from __future__ import annotations

import torch

from ..dispatch import FLOATS, HAS_TRITON, check_loss, check_tensor, flat, layout_of, pick
from ..masks import MaskSpec, check_mask
from . import cpu, naive

if HAS_TRITON:
    from . import triton


def masked_loss(
    pred: torch.Tensor,
    target: torch.Tensor,
    mask: MaskSpec,
    *,
    loss: str = "l1",
    cu_seqlens: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """Return the mean of a loss over the masked values of a batch.

    Parameters
    ----------
    pred
        Predictions, [tokens, networks] (packed) or [batch, time, networks] (padded), any float dtype.
    target
        What is to be predicted, same shape, any float dtype, without gradient.
    mask
        What counts.
    loss
        "l1", "mse" or "huber" (threshold 1).
    cu_seqlens
        Packed: int32 [windows + 1], bounds of the windows; None: one window.
    lengths
        Padded: int32 [batch], valid time points; None: all.
    impl
        "naive", "cpu" or "triton"; None picks by device.

    Returns
    -------
    Tensor
        Scalar, float32 (float64 for float64 input). 0 with zero gradient if nothing is masked. The same
        input gives the same bits at every run. Never synchronises with the host on CUDA.

    Raises
    ------
    TypeError, ValueError
        For a wrong dtype, shape, device, layout or mask, naming argument, got and expected.

    Examples
    --------
    >>> pred = torch.zeros(6, 4, requires_grad=True)
    >>> float(masked_loss(pred, torch.ones(6, 4), MaskSpec.all_valid(), loss="mse"))
    1.0
    """
    check_loss(loss)
    code = check_mask(mask)
    bounds, period = layout_of("pred", pred, cu_seqlens, lengths)
    check_tensor("target", target, shape=tuple(pred.shape), dtypes=FLOATS, device=pred.device)
    if target.requires_grad:
        raise ValueError(
            "target: got a tensor that requires grad, expected one without; call target.detach()"
        )
    face = pick(impl, pred.device)
    if face == "naive":
        dtype = torch.float64 if pred.dtype == torch.float64 else torch.float32
        return naive.masked_loss(pred, target, mask, loss, bounds, period).to(dtype)
    op = cpu.masked_loss if face == "cpu" else triton.masked_loss
    # For the CPU face, which computes it in the same pass.
    gradient = pred.requires_grad and torch.is_grad_enabled()
    return op(flat(pred), flat(target), bounds, period, code, check_loss(loss), gradient)[0]
