"""linear_masked_loss on the CPU: project, compare and go back, a block of rows at a time.

The forward pass computes the gradients too, while a block's predictions are in cache; the backward pass
only scales them by the upstream gradient. Products are in float32 also for 16-bit inputs: rounded
predictions would cost the loss three digits, and l1 the sign of small differences.

Legend: M projected rows (masked rows, or all valid rows under a column mask), N networks.
"""

from __future__ import annotations

import torch

from ..blocks import (
    column_count,
    host_bounds,
    keep,
    keep_bits,
    lazy_zeros,
    rows_of,
    sum_and_slope,
    window_masks,
)
from ..dispatch import accumulator, once
from ..masks import COLUMNS, column_mask, locate, windows

ROWS = 256
"""Rows of a block: predictions of 1,024 networks take one megabyte in float32."""


def empty_gradients(
    weight: torch.Tensor, bias: torch.Tensor | None, acc: torch.dtype, gradients: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return zeros for the gradients of the weight and the bias; empty if they are not wanted."""
    return (
        weight.new_zeros(weight.shape if gradients else 0, dtype=acc),
        weight.new_zeros(weight.shape[0] if gradients and bias is not None else 0, dtype=acc),
    )


@torch.library.custom_op("brainflow::linear_masked_loss_cpu", mutates_args=(), device_types="cpu")
def linear_masked_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    rows: torch.Tensor | None,
    row_weights: torch.Tensor | None,
    bounds: torch.Tensor,
    period: int,
    mask: list[int],
    loss: int,
    gradients: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (mean loss, factor, and gradients of hidden, weight and bias that lack that factor).

    rows None: found from the mask. The factor 1 / Σ weights waits where gradients have 16 bits: an upstream
    gradient that scales the loss comes first then, so that nothing is lost below their range.
    """
    # The products below are float32 by choice: autocast would round them again.
    with torch.autocast("cpu", enabled=False):
        acc, networks = accumulator(hidden.dtype), weight.shape[0]
        host = host_bounds(bounds, hidden.shape[0], period)
        columns = mask[0] == COLUMNS
        window = position = torch.empty(0)
        if columns:
            starts, lengths = windows(bounds, period)
            window, position = locate(lengths)
            rows = starts[window] + position
        elif rows is None:
            rows = rows_of(tuple(mask), host, period)
        elif rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < hidden.shape[0]:
            raise ValueError(
                f"rows: got values in [{int(rows.min())}, {int(rows.max())}], expected [0, {hidden.shape[0]})"
            )
        if columns:
            amount = float(column_count(mask, host, period, networks))
        else:
            amount = rows.numel() if row_weights is None else float(row_weights.sum(dtype=torch.float64))
            amount *= networks
        inverse = 1.0 / amount if amount > 0 else 0.0
        now, later = (inverse, 1.0) if hidden.dtype == acc else (1.0, inverse)
        few = 16 * rows.numel() < hidden.shape[0]
        zeros = lazy_zeros if few else torch.zeros_like
        grad_hidden = zeros(hidden) if gradients else hidden.new_empty(0)
        grad_weight, grad_bias = empty_gradients(weight, bias, acc, gradients)
        wide_weight = weight.to(hidden.dtype).to(acc)  # under autocast it comes as it is
        wide_bias = None if bias is None else bias.to(acc)
        total = 0.0
        for start in range(0, rows.numel(), ROWS):
            block = slice(start, start + ROWS)
            at = rows[block]
            h = hidden.index_select(0, at).to(acc)
            # In float32 also where the inputs have 16 bits: rounded predictions cost the loss up to 8e-3
            # and turned the sign of small differences.
            d = torch.nn.functional.linear(h, wide_weight, wide_bias).sub_(target.index_select(0, at))
            weights = None if row_weights is None else row_weights[block].to(acc)[:, None]
            if columns:
                keep(d, keep_bits(_selected(mask, len(host), window[block], position[block], networks), acc))
            elif weights is not None:
                # A row of weight 0 may hold NaN, which a product with 0 would keep.
                keep(d, keep_bits(weights > 0, acc))
            slope = torch.empty_like(d)
            total += float(sum_and_slope(d, slope, loss, weights))
            if not gradients:
                continue
            slope.mul_(now)
            if bias is not None:
                grad_bias.add_(slope.sum(0))
            grad_hidden.index_add_(0, at, (slope @ wide_weight).to(hidden.dtype))
            grad_weight.addmm_(slope.t(), h, beta=1.0 if start else 0.0)
        scalars = torch.tensor([total * inverse, later], dtype=acc)
        # Clones: outputs of an operator may not share memory.
        return scalars[0].clone(), scalars[1].clone(), grad_hidden, grad_weight, grad_bias


def _selected(
    mask: list[int], count: int, window: torch.Tensor, position: torch.Tensor, networks: int
) -> torch.Tensor:
    """Return the column mask of some rows, bool [rows, N]."""
    if mask[2] == 0:
        return window_masks(tuple(mask), count, networks)[window]
    return column_mask(mask, window, position, networks)


def fake(hidden, weight, bias, target, rows, row_weights, bounds, period, mask, loss, gradients):
    """Return what the op returns, without values."""
    acc = accumulator(hidden.dtype)
    scalar = hidden.new_empty((), dtype=acc)
    grad_hidden = torch.empty_like(hidden) if gradients else hidden.new_empty(0)
    return (scalar, torch.empty_like(scalar), grad_hidden, *empty_gradients(weight, bias, acc, gradients))


linear_masked_loss.register_fake(fake)


def setup_context(ctx, inputs, output):
    """Save what the backward pass scales; no zeros are made for outputs that nobody differentiates."""
    ctx.set_materialize_grads(False)
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
    ctx.gradients = inputs[-1]
    ctx.save_for_backward(*output)
    ctx.mark_non_differentiable(*output[1:])


def backward(ctx, upstream, *_):
    """Scale the gradients; a factor of 1 (looked at on the host only) costs nothing."""
    if upstream is None:
        return (None,) * 11
    if not ctx.gradients:
        raise RuntimeError("linear_masked_loss: gradients asked for, but it ran where no input required them")
    value, factor, *saved = ctx.saved_tensors
    factor = factor * upstream
    # A subclass, as under torch.compile, may have no value to look at.
    done = type(factor) is torch.Tensor and factor.device.type == "cpu" and factor.item() == 1.0
    grads = [
        (grad if done else _scaled(grad, factor, dtype)).to(dtype) if needed else None
        for grad, dtype, needed in zip(saved, ctx.dtypes, ctx.needs_input_grad, strict=False)
    ]
    return (*once(value, *grads), *(None,) * 8)


@torch.no_grad()
def _scaled(grad: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return grad · factor in `dtype`; a factor without dimension would be rounded to 16 bits before."""
    # Autograd does not record `out=`; second derivatives are refused by `once` anyway.
    return torch.mul(grad, factor.view(1), out=torch.empty_like(grad, dtype=dtype))


linear_masked_loss.register_autograd(backward, setup_context=setup_context)
