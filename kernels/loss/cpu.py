"""masked_loss on the CPU: pure PyTorch, a cache-sized block of rows at a time, in place.

The forward pass writes the gradient too if it is wanted, while the differences are in cache: pred and
target are read once, the gradient is written once.

Legend: rows = tokens (packed) or W · T (padded), N networks.
"""

from __future__ import annotations

import math

import torch

from ..blocks import (
    BLOCK,
    LARGE,
    as_windows,
    column_blocks,
    column_count,
    host_bounds,
    keep,
    keep_bits,
    lazy_zeros,
    rows_of,
    sum_and_slope,
)
from ..dispatch import accumulator, once
from ..masks import COLUMNS, POSITION


@torch.library.custom_op("brainflow::masked_loss_cpu", mutates_args=(), device_types="cpu")
def masked_loss(
    pred: torch.Tensor,
    target: torch.Tensor,
    bounds: torch.Tensor,
    period: int,
    mask: list[int],
    loss: int,
    gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean loss (0 if nothing is masked) and the gradient of pred (empty if not wanted)."""
    acc = accumulator(pred.dtype)
    host = host_bounds(bounds, pred.shape[0], period)
    grad = _gradient_memory(pred, mask) if gradient else pred.new_empty(0)
    if pred.numel() == 0:
        return torch.zeros((), dtype=acc), grad
    mean = _run(pred, target, host, period, mask, loss, grad, 1.0)
    return torch.tensor(mean, dtype=acc), grad


@torch.library.custom_op("brainflow::masked_loss_cpu_backward", mutates_args=(), device_types="cpu")
def masked_loss_backward(
    upstream: torch.Tensor,
    pred: torch.Tensor,
    target: torch.Tensor,
    bounds: torch.Tensor,
    period: int,
    mask: list[int],
    loss: int,
) -> torch.Tensor:
    """Return the gradient of pred times `upstream`, rounded once."""
    grad = _gradient_memory(pred, mask)
    if pred.numel():
        host = host_bounds(bounds, pred.shape[0], period)
        _run(pred, target, host, period, mask, loss, grad, upstream.item())
    return grad


def _gradient_memory(pred: torch.Tensor, mask: list[int]) -> torch.Tensor:
    """Return memory for the gradient; it is clear for a mask of positions, which writes hardly a row."""
    return lazy_zeros(pred) if mask[0] == POSITION else torch.empty_like(pred)


def _run(
    pred: torch.Tensor,
    target: torch.Tensor,
    bounds: tuple[int, ...],
    period: int,
    mask: list[int],
    loss: int,
    grad: torch.Tensor,
    factor: float,
) -> float:
    """Return the mean loss; write factor · its gradient to `grad` unless that is empty."""
    if mask[0] == COLUMNS:
        return _columns(pred, target, bounds, period, mask, loss, grad, factor)
    rows = rows_of(tuple(mask), bounds, period)
    return _rows(pred, target, rows, loss, grad, mask[0] == POSITION, factor)


def _rows(
    pred: torch.Tensor,
    target: torch.Tensor,
    index: torch.Tensor,
    loss: int,
    grad: torch.Tensor,
    clear: bool,
    factor: float,
) -> float:
    """Compute loss and gradient of masked rows, ascending; `clear`: the gradient is zero already."""
    networks, acc = pred.shape[1], accumulator(pred.dtype)
    count = index.numel() * networks
    scale = factor / max(1, count)
    # Predictions, targets and slopes of a block stay in cache until its gradient is written.
    step = max(1, 2 * BLOCK // networks)
    shape = (min(step, index.numel()), networks)
    taken, wanted = pred.new_empty(shape), target.new_empty(shape)
    # The target's rows are spent once d is taken, so the slopes take their memory.
    slope = wanted if wanted.dtype == acc else torch.empty(shape, dtype=acc)
    total, done = 0.0, 0
    for rows in index.split(step) if count else ():
        if rows.numel() < shape[0]:
            taken, wanted, slope = (x[: rows.numel()] for x in (taken, wanted, slope))
        torch.index_select(pred, 0, rows, out=taken)
        torch.index_select(target, 0, rows, out=wanted)
        d = taken.to(acc).sub_(wanted)
        # Blocks are added as Python floats, in double precision.
        total += float(sum_and_slope(d, slope, loss))
        if not grad.numel():
            continue
        if not clear:
            end = int(rows[-1]) + 1
            grad[done:end].zero_()  # just before it is written, so that these rows are in cache
            done = end
        if clear or grad.dtype != acc:  # adding to rows of a fresh map would fault twice
            grad[rows] = slope.mul_(scale).to(grad.dtype)
        else:
            grad.index_add_(0, rows, slope, alpha=scale)
    if grad.numel() and not clear:
        grad[done:].zero_()
    return total / max(1, count)


def _columns(
    pred: torch.Tensor,
    target: torch.Tensor,
    bounds: tuple[int, ...],
    period: int,
    mask: list[int],
    loss: int,
    grad: torch.Tensor,
    factor: float,
) -> float:
    """Compute those of masked columns: whole windows' differences, weighted by the scale or by 0."""
    acc, networks = accumulator(pred.dtype), pred.shape[1]
    # direct: slopes are computed where the gradient will stand.
    direct = grad.numel() > 0 and grad.dtype == acc
    # Counted beforehand where that is cheap, so that the scale is applied in cache, and where the gradient
    # has a short mantissa, which should be rounded once.
    known = mask[2] == 0 or (grad.numel() > 0 and not direct)
    count = column_count(mask, bounds, period, networks) if known else 0
    scale = factor / max(1, count) if known else 1.0
    total, done = 0.0, 0
    buffer = torch.empty(0, dtype=acc)
    blocks = column_blocks(
        mask, bounds, period, networks, lambda selected: selected.to(acc).mul_(scale), LARGE if direct else 0
    )
    for first, end, weights in blocks:
        p, t = as_windows(pred[first:end], weights), as_windows(target[first:end], weights)
        size = end - first
        if direct and end + size <= len(grad):  # the next rows of the gradient are still to be written
            d = as_windows(grad[end : end + size], weights)
        else:
            if len(buffer) < size:
                buffer = torch.empty(size, networks, dtype=acc)
            d = as_windows(buffer[:size], weights)
        _difference(p, t, d)
        slope = as_windows(grad[first:end], weights) if direct else torch.empty_like(d)
        part = float(sum_and_slope(d, slope, loss, weights))
        if not math.isfinite(part):  # NaN or infinity times 0: clear what is not masked, then once more
            keep(_difference(p, t, d), keep_bits(weights != 0, acc))
            part = float(sum_and_slope(d, slope, loss, weights))
        total += part
        if not known:
            count += int(weights.sum(dtype=torch.float64))
        if grad.numel():
            if first > done:
                grad[done:first].zero_()
            done = end
            if not direct:
                grad[first:end] = slope.view(-1, networks)
    if grad.numel():
        grad[done:].zero_()
        if not known:
            grad.mul_(factor / max(1, count))
    return total / (1 if known else max(1, count))


def _difference(p: torch.Tensor, t: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Write p − t to `out`, in its dtype."""
    return torch.sub(p, t, out=out) if p.dtype == t.dtype == out.dtype else out.copy_(p).sub_(t)


@masked_loss_backward.register_fake
def _(upstream, pred, target, bounds, period, mask, loss):
    return torch.empty_like(pred)


@masked_loss.register_fake
def _(pred, target, bounds, period, mask, loss, gradient):
    value = pred.new_empty((), dtype=accumulator(pred.dtype))
    return value, torch.empty_like(pred) if gradient else pred.new_empty(0)


def setup_context(ctx, inputs, output):
    """Keep the gradient; no zeros are made for an output that nobody differentiates."""
    ctx.set_materialize_grads(False)
    pred, target, bounds, *ctx.rest, _ = inputs
    again = () if accumulator(pred.dtype) == pred.dtype else (pred, target, bounds)
    ctx.save_for_backward(*output, *again)
    ctx.mark_non_differentiable(output[1])


def backward(ctx, upstream, _):
    """Scale the gradient; an upstream gradient of 1 (looked at on the host only) costs nothing.

    A gradient of 16 bits is computed again for another upstream gradient, so that it is rounded once.
    """
    if upstream is None:
        return (None,) * 7
    value, grad, *again = ctx.saved_tensors
    # A subclass, as under torch.compile, may have no value to look at.
    if type(upstream) is torch.Tensor and upstream.device.type == "cpu" and upstream.item() == 1.0:
        return (*once(value, grad), *(None,) * 6)
    scaled = masked_loss_backward(upstream, *again, *ctx.rest) if again else grad * upstream
    return (*once(value, scaled), *(None,) * 6)


masked_loss.register_autograd(backward, setup_context=setup_context)
