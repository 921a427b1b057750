"""linear_masked_loss on the CPU: project, compare and go back, a block of rows at a time.

The forward pass computes the gradients too, each block's predictions being overwritten by their
derivatives while they are in cache; the backward pass only scales them by the upstream gradient.

Legend: M projected rows (masked rows, or all rows under a column mask), N networks.
"""

from __future__ import annotations

import torch

from ..blocks import host_bounds, keep, keep_bits, sum_and_slope, window_masks
from ..dispatch import accumulator
from ..masks import column_mask, locate, windows

ROWS = 256
"""Rows of a block: predictions of 1,024 networks take one megabyte in float32."""


def empty_gradients(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, count: int, gradients: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return zeros for the gradients of the projected rows, the weight and the bias."""
    acc = accumulator(hidden.dtype)
    return (
        hidden.new_zeros((count, hidden.shape[1]) if gradients else 0),
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
    """Return (mean loss, 1 / Σ weights, and the unscaled gradients of rows, weight and bias).

    rows None: every row is projected and the mask is one of columns.
    """
    acc = accumulator(hidden.dtype)
    full = rows is None
    window = position = torch.empty(0)
    if rows is None:
        starts, lengths = windows(torch.tensor(host_bounds(bounds, hidden.shape[0], period)), period)
        window, position = locate(lengths)
        rows = starts[window] + position
    elif rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < hidden.shape[0]:
        raise ValueError(
            f"rows: got values in [{int(rows.min())}, {int(rows.max())}], expected [0, {hidden.shape[0]})"
        )
    networks = weight.shape[0]
    count = hidden.shape[0] if full else rows.numel()
    grad_rows, grad_weight, grad_bias = empty_gradients(hidden, weight, bias, count, gradients)
    total, weights_sum = 0.0, 0.0
    for start in range(0, rows.numel(), ROWS):
        block = slice(start, start + ROWS)
        at = rows[block]
        h = hidden.index_select(0, at)
        d = torch.nn.functional.linear(h, weight, bias).to(acc).sub_(target.index_select(0, at))
        weights = None if row_weights is None else row_weights[block].to(acc)[:, None]
        if full:
            bits = keep_bits(_selected(mask, lengths.numel(), window[block], position[block], networks), acc)
            keep(d, bits)
            weights_sum -= float(bits.sum())
        elif weights is not None:
            keep(d, keep_bits(weights > 0, acc))
            weights_sum += float(weights.sum(dtype=torch.float64)) * networks
        else:
            weights_sum += d.numel()
        slope = torch.empty_like(d)
        total += float(sum_and_slope(d, slope, loss, weights))
        if not gradients:
            continue
        if bias is not None:
            grad_bias.add_(slope.sum(0))
        slope = slope.to(h.dtype)
        grad = slope @ weight
        if full:
            grad_rows.index_copy_(0, at, grad)
        else:
            grad_rows[block] = grad
        if acc == h.dtype:
            grad_weight.addmm_(slope.t(), h)
        else:
            grad_weight.add_(slope.t() @ h)
    inverse = 1.0 / weights_sum if weights_sum > 0 else 0.0
    scalars = torch.tensor([total * inverse, inverse], dtype=acc)
    return scalars[0].clone(), scalars[1].clone(), grad_rows, grad_weight, grad_bias


def _selected(
    mask: list[int], count: int, window: torch.Tensor, position: torch.Tensor, networks: int
) -> torch.Tensor:
    """Return the column mask of some rows, bool [rows, N]."""
    if mask[2] == 0:
        return window_masks(tuple(mask), count, networks)[window]
    return column_mask(mask, window, position, networks)


@linear_masked_loss.register_fake
def _(hidden, weight, bias, target, rows, row_weights, bounds, period, mask, loss, gradients):
    acc = accumulator(hidden.dtype)
    count = hidden.shape[0] if rows is None else rows.shape[0]
    scalar = hidden.new_empty((), dtype=acc)
    return (scalar, torch.empty_like(scalar), *empty_gradients(hidden, weight, bias, count, gradients))


def setup_context(ctx, inputs, output):
    """Save what the backward pass scales; no zeros are made for outputs that nobody differentiates."""
    ctx.set_materialize_grads(False)
    hidden, weight, bias, _, rows, _, _, _, _, _, gradients = inputs
    _, inverse, grad_rows, grad_weight, grad_bias = output
    ctx.rows, ctx.shape, ctx.gradients = rows is not None, hidden.shape, gradients
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.weight_dtype = weight.dtype
    saved = (rows,) if rows is not None else ()
    ctx.save_for_backward(inverse, grad_rows, grad_weight, grad_bias, *saved)
    ctx.mark_non_differentiable(inverse, grad_rows, grad_weight, grad_bias)


def backward(ctx, grad, *_):
    """Scale the gradients by upstream gradient / Σ weights, and scatter those of the rows."""
    if grad is None:
        return (None,) * 11
    inverse, grad_rows, grad_weight, grad_bias, *saved = ctx.saved_tensors
    if not ctx.gradients:
        raise RuntimeError("linear_masked_loss: gradients asked for, but it ran where no input required them")
    scale = grad * inverse
    grads = [None] * 11
    if ctx.needs_input_grad[0]:
        scaled = (grad_rows * scale).to(grad_rows.dtype)
        grads[0] = scaled
        if saved:
            grads[0] = scaled.new_zeros(ctx.shape).index_add_(0, saved[0], scaled)
    if ctx.needs_input_grad[1]:
        grads[1] = (grad_weight * scale).to(ctx.weight_dtype)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
        grads[2] = (grad_bias * scale).to(ctx.bias_dtype)
    return tuple(grads)


linear_masked_loss.register_autograd(backward, setup_context=setup_context)
