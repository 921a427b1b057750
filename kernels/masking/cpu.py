"""mask_tokens on the CPU: one copy of x, then the masked rows or columns of it."""

from __future__ import annotations

import torch
from torch.library import CustomOpDef

from ..blocks import BLOCK, as_windows, column_blocks, host_bounds, keep, keep_bits, rows_of
from ..dispatch import accumulator
from ..masks import COLUMNS, windows


def _positions(rows: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Return the position in its window of each row."""
    # `right`: among windows that begin at one row, all but the last are empty.
    return rows - starts[torch.searchsorted(starts, rows, right=True) - 1]


def _check_positions(token: torch.Tensor, lengths: torch.Tensor) -> None:
    longest = int(lengths.max()) if lengths.numel() else 0
    if token.ndim == 2 and longest > token.shape[0]:
        raise ValueError(
            f"mask_token: got {token.shape[0]} positions, expected at least {longest} (longest window)"
        )


@torch.library.custom_op("brainflow::mask_tokens_cpu", mutates_args=(), device_types="cpu")
def mask_tokens(
    x: torch.Tensor, mask_token: torch.Tensor, bounds: torch.Tensor, period: int, mask: list[int]
) -> torch.Tensor:
    """Return x [rows, networks] with masked values replaced by the token."""
    host = host_bounds(bounds, x.shape[0], period)
    starts, lengths = windows(bounds, period)
    _check_positions(mask_token, lengths)
    # The token is a parameter and may be wider than the batch; the output has the type of what it replaces.
    token, by_position = mask_token.to(x.dtype), mask_token.ndim == 2
    out = x.clone()
    if mask[0] == COLUMNS:
        for first, end, selected in column_blocks(mask, host, period, x.shape[1]):
            old, new = as_windows(x[first:end], selected), as_windows(out[first:end], selected)
            value = token
            if by_position:
                value = as_windows(token[_positions(torch.arange(first, end), starts)], selected)
            torch.where(selected, value, old, out=new)
        return out
    index = rows_of(tuple(mask), host, period)
    for rows in index.split(max(1, BLOCK // max(1, x.shape[1]))):
        value = token[_positions(rows, starts)] if by_position else token
        out.index_copy_(0, rows, value.expand(rows.numel(), x.shape[1]))
    return out


@torch.library.custom_op("brainflow::mask_tokens_cpu_backward", mutates_args=(), device_types="cpu")
def mask_tokens_backward(
    grad: torch.Tensor,
    bounds: torch.Tensor,
    period: int,
    mask: list[int],
    positions: int,
    need_x: bool,
    need_token: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of x (0 where masked) and of the token (sums over what it replaced).

    `positions` is 0 for a token per network. A gradient that is not needed is empty.
    """
    starts, _ = windows(bounds, period)
    host, networks, dtype = host_bounds(bounds, None, period), grad.shape[1], accumulator(grad.dtype)
    grad_x = grad.clone() if need_x else grad.new_empty(0)
    shape = (positions, 1) if positions else (networks,)
    # A sum over the whole batch: wide also where the gradients have 16 bits.
    grad_token = torch.zeros(shape if need_token else 0, dtype=dtype)

    def add(rows: torch.Tensor, masked: torch.Tensor) -> None:
        if not need_token:
            return
        if positions:
            grad_token.index_add_(0, _positions(rows, starts), masked.sum(1, keepdim=True))
        else:
            grad_token.add_(masked.sum(0))

    if mask[0] == COLUMNS:
        for first, end, bits in column_blocks(mask, host, period, networks, lambda m: keep_bits(m, dtype)):
            if need_x:
                as_windows(grad_x[first:end], bits).masked_fill_(bits.bool(), 0.0)
            if need_token:
                # A copy, because what is not masked is cleared in place and the upstream gradient is not
                # ours.
                masked = grad[first:end].to(dtype, copy=True)
                keep(as_windows(masked, bits), bits)
                add(torch.arange(first, end), masked)
        return grad_x, grad_token
    index = rows_of(tuple(mask), host, period)
    if need_x:
        grad_x.index_fill_(0, index, 0.0)
    for rows in index.split(max(1, BLOCK // max(1, networks))):
        add(rows, grad.index_select(0, rows).to(dtype))
    return grad_x, grad_token


def register(forward: CustomOpDef, backward: CustomOpDef) -> None:
    """Give shapes and gradients to the two operators of one implementation."""

    @forward.register_fake
    def _(x, mask_token, bounds, period, mask):
        return torch.empty_like(x)

    @backward.register_fake
    def _(grad, bounds, period, mask, positions, need_x, need_token):
        shape = (positions, 1) if positions else (grad.shape[1],)
        grad_token = grad.new_empty(shape if need_token else 0, dtype=accumulator(grad.dtype))
        return torch.empty_like(grad) if need_x else grad.new_empty(0), grad_token

    def setup(ctx, inputs, output):
        _, mask_token, bounds, ctx.period, ctx.mask = inputs
        ctx.positions = mask_token.shape[0] if mask_token.ndim == 2 else 0
        ctx.token_dtype = mask_token.dtype
        # Neither x nor the token is kept: gradients need the mask alone, which is drawn again.
        ctx.save_for_backward(bounds)

    def differentiate(ctx, grad):
        (bounds,) = ctx.saved_tensors
        need_x, need_token = ctx.needs_input_grad[:2]
        # The gradient of a sum comes expanded, with strides of 0.
        grad_x, grad_token = backward(
            grad.contiguous(), bounds, ctx.period, ctx.mask, ctx.positions, need_x, need_token
        )
        token = grad_token.to(ctx.token_dtype) if need_token else None
        return grad_x if need_x else None, token, None, None, None

    forward.register_autograd(differentiate, setup_context=setup)


register(mask_tokens, mask_tokens_backward)
