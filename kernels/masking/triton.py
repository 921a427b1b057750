"""mask_tokens on the GPU: one kernel forward (one read of x, one write), one or two more backward.

Tiles of 16 rows (8 or 4 under a column mask) × 256 networks. The gradient of the token is summed per group
of tiles and then over groups, both in a fixed order, so it has the same bits at every run.

Legend: rows = tokens (packed) or W · T (padded), N networks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import custom_op

from .. import masks
from ..dispatch import AotConfig, accumulator
from ..loss.triton import acc_type, launch_arguments
from ..masks_triton import COLUMNS, SCALARS, SUBTILE, column_words, event, locate, row_mask
from .cpu import register

GROUPS = 256
"""Most groups of tiles: fixed, so that sums do not depend on the device."""


def tile_rows(kind: int, dtype: torch.dtype) -> int:
    """Return the rows of a tile: 16, fewer where column draws take registers."""
    if kind != masks.COLUMNS:
        return 16
    return 8 if dtype.itemsize == 2 else 4


@triton.jit
def tile_mask(
    bounds, row, block, rows, windows, steps, period, threshold, seed, offset,
    KIND: tl.constexpr, SPAN: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Return (position [R], masked rows [R], masked entries [R, C]) of one tile."""
    # Rows behind the last one are looked up as the last one, so that `bounds` is not read outside of
    # itself.
    window, position, length = locate(bounds, tl.minimum(row, rows - 1), windows, steps, period, PADDED)
    taken = (row < rows) & row_mask(window, position, length, threshold, seed, offset, KIND, SPAN)
    # `>= 0` is always true: it only gives the rows' mask the tile's shape.
    hit = taken[:, None] & (tl.arange(0, SUBTILE) >= 0)[None, :]
    if KIND == COLUMNS:
        # One draw gives the words of four subtiles; the same one is drawn in the programs of all four.
        a, b, c, d = column_words(block // 4, window, position, seed, offset, SPAN)
        part = block % 4
        hit = hit & event(
            tl.where(part == 0, a, tl.where(part == 1, b, tl.where(part == 2, c, d))), threshold
        )
    return position, taken, hit


@triton.jit(do_not_specialize=SCALARS)
def replace(
    x, token, bounds, out, rows, networks, positions,
    windows, steps, period, threshold, seed, offset,
    KIND: tl.constexpr, SPAN: tl.constexpr, PADDED: tl.constexpr, BY_POSITION: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Write one tile of x with masked entries replaced. Masked rows are not read."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    block = tl.program_id(1)
    column = block * SUBTILE + tl.arange(0, SUBTILE)
    position, taken, hit = tile_mask(
        bounds, row, block, rows, windows, steps, period, threshold, seed, offset, KIND, SPAN, PADDED
    )
    inside = (row < rows)[:, None] & (column < networks)[None, :]
    read = inside
    # A mask of columns is no load predicate: loads of single columns would be scalar.
    if KIND != COLUMNS:
        read = inside & (taken == 0)[:, None]
    # One 64-bit base a program and 32-bit offsets inside the tile: 64-bit offsets take twice the registers,
    # which spilled in masked_loss.
    start = tl.program_id(0).to(tl.int64) * R * networks
    at = tl.arange(0, R)[:, None] * networks + column[None, :]
    value = tl.load(x + start + at, mask=read, other=0)
    if BY_POSITION:
        # A window longer than the token has positions shows as NaN: the host cannot know without a sync.
        t = tl.load(token + position, mask=taken & (position < positions), other=float("nan"))[:, None]
    else:
        t = tl.load(token + column, mask=column < networks, other=0)[None, :]
    tl.store(out + start + at, tl.where(hit, t.to(value.dtype), value), mask=inside)


@triton.jit(do_not_specialize=SCALARS)
def gradients(
    grad, bounds, grad_x, partial, rows, networks, tiles,
    windows, steps, period, threshold, seed, offset,
    KIND: tl.constexpr, SPAN: tl.constexpr, PADDED: tl.constexpr, BY_POSITION: tl.constexpr,
    NEED_X: tl.constexpr, NEED_TOKEN: tl.constexpr, ACC: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Write the gradient of x for a group of tiles, and the group's part of the token's gradient.

    partial: [groups, N] for a token per network, [blocks, rows] for a token per position.
    """
    group = tl.program_id(0)
    block = tl.program_id(1)
    column = block * SUBTILE + tl.arange(0, SUBTILE)
    total = tl.zeros([R, SUBTILE], ACC)
    for tile in range(tiles):
        row = (group * tiles + tile) * R + tl.arange(0, R)
        _, taken, hit = tile_mask(
            bounds, row, block, rows, windows, steps, period, threshold, seed, offset, KIND, SPAN, PADDED
        )
        inside = (row < rows)[:, None] & (column < networks)[None, :]
        at = row[:, None].to(tl.int64) * networks + column[None, :]
        read = inside
        if not NEED_X:
            # Only the token's gradient is wanted, to which rows that are not masked add nothing.
            read = inside & taken[:, None]
        g = tl.load(grad + at, mask=read, other=0)
        if NEED_X:
            tl.store(grad_x + at, tl.where(hit, 0.0, g).to(g.dtype), mask=inside)
        masked = tl.where(hit, g.to(ACC), 0.0)
        if NEED_TOKEN and BY_POSITION:
            tl.store(partial + block.to(tl.int64) * rows + row, tl.sum(masked, 1), mask=row < rows)
        if NEED_TOKEN and not BY_POSITION:
            total += masked
    if NEED_TOKEN and not BY_POSITION:
        tl.store(partial + group * networks + column, tl.sum(total, 0), mask=column < networks)


@triton.jit(do_not_specialize=["period", "windows", "blocks"])
def sum_positions(
    partial, bounds, grad_token, rows, positions, period, windows, blocks,
    PADDED: tl.constexpr, ACC: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Add the rows' sums of each position over windows and blocks of networks."""
    position = tl.program_id(0) * LANES + tl.arange(0, LANES)
    total = tl.zeros([LANES], ACC)
    for window in range(windows):
        if PADDED:
            start = window * period
            length = tl.load(bounds + window)
        else:
            start = tl.load(bounds + window)
            length = tl.load(bounds + window + 1) - start
        at = partial + start + position
        for _ in range(blocks):
            total += tl.load(at, mask=position < length, other=0)
            at += rows
    tl.store(grad_token + position, total, mask=position < positions)


def forward_impl(
    x: torch.Tensor, mask_token: torch.Tensor, bounds: torch.Tensor, period: int, mask: list[int]
) -> torch.Tensor:
    """Launch the forward kernel."""
    out = torch.empty_like(x)
    rows, networks = x.shape
    # CUDA refuses a grid without programs.
    if out.numel() == 0:
        return out
    scalars, constants = launch_arguments(bounds, period, mask)
    tile = tile_rows(mask[0], x.dtype)
    with torch.cuda.device_of(x):
        replace[(triton.cdiv(rows, tile), triton.cdiv(networks, SUBTILE.value))](
            x, mask_token, bounds, out, rows, networks, mask_token.shape[0], **scalars, **constants,
            BY_POSITION=mask_token.ndim == 2, R=tile, num_warps=4,
        )  # fmt: skip
    return out


def backward_impl(
    grad: torch.Tensor,
    bounds: torch.Tensor,
    period: int,
    mask: list[int],
    positions: int,
    need_x: bool,
    need_token: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the backward kernels; a gradient that is not needed is empty."""
    rows, networks = grad.shape
    grad_x = torch.empty_like(grad) if need_x else grad.new_empty(0)
    acc = accumulator(grad.dtype)
    shape = (positions, 1) if positions else (networks,)
    if grad.numel() == 0:
        return grad_x, grad.new_zeros(shape if need_token else 0, dtype=acc)
    blocks, tiles = triton.cdiv(networks, SUBTILE.value), triton.cdiv(rows, tile_rows(mask[0], grad.dtype))
    # Only sums over rows are shorter where a program adds up several tiles: a token per position keeps a
    # sum a row.
    per_group = 1 if positions or not need_token else triton.cdiv(tiles, GROUPS)
    groups = triton.cdiv(tiles, per_group)
    partial = grad.new_empty((blocks, rows) if positions else (groups, networks), dtype=acc)
    scalars, constants = launch_arguments(bounds, period, mask)
    with torch.cuda.device_of(grad):
        gradients[(groups, blocks)](
            grad, bounds, grad_x, partial, rows, networks, per_group, **scalars, **constants,
            BY_POSITION=positions > 0, NEED_X=need_x, NEED_TOKEN=need_token, ACC=acc_type(grad.dtype),
            R=tile_rows(mask[0], grad.dtype), num_warps=4,
        )  # fmt: skip
    if not need_token:
        return grad_x, grad.new_empty(0, dtype=acc)
    if not positions:
        return grad_x, partial.sum(0)
    grad_token = grad.new_empty(shape, dtype=acc)
    with torch.cuda.device_of(grad):
        sum_positions[(triton.cdiv(positions, 128),)](
            partial, bounds, grad_token, rows, positions, period, scalars["windows"], blocks,
            PADDED=period > 0, ACC=acc_type(grad.dtype), LANES=128, num_warps=4,
        )  # fmt: skip
    return grad_x, grad_token


@custom_op("brainflow::mask_tokens_triton", mutates_args=())
def mask_tokens(
    x: torch.Tensor, mask_token: torch.Tensor, bounds: torch.Tensor, period: int, mask: list[int]
) -> torch.Tensor:
    """Return x [rows, networks] with masked values replaced by the token."""
    return forward_impl(x, mask_token, bounds, period, mask)


@custom_op("brainflow::mask_tokens_triton_backward", mutates_args=())
def mask_tokens_backward(
    grad: torch.Tensor,
    bounds: torch.Tensor,
    period: int,
    mask: list[int],
    positions: int,
    need_x: bool,
    need_token: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of x and of the token."""
    return backward_impl(grad, bounds, period, mask, positions, need_x, need_token)


register(mask_tokens, mask_tokens_backward)


def _aot_configs() -> list[AotConfig]:
    # 64 windows of 50 time points, DiFuMo's 1,024 networks.
    rows, networks, windows, positions = 3200, 1024, 64, 512
    # The threshold of p = 0.2; a seed of more than 32 bits, because its width decides its type.
    scalars = {"windows": windows, "steps": 7, "period": 0, "threshold": 3355443, "seed": 2**40 + 1,
               "offset": 12345}  # fmt: skip
    bounds = ((windows + 1,), torch.int32)
    result = []
    for dtype, short in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        data = ((rows, networks), dtype)
        for kind, name in ((masks.ROWS, "rows"), (masks.COLUMNS, "columns"), (masks.POSITION, "position")):
            by_position = kind == masks.COLUMNS
            token = ((positions, 1) if by_position else (networks,), torch.float32)  # a parameter
            partial = ((networks // 256, rows) if by_position else (200, networks), torch.float32)
            constants = {"KIND": kind, "SPAN": 0 if by_position else 1, "PADDED": False,
                         "BY_POSITION": by_position, "R": tile_rows(kind, dtype)}  # fmt: skip
            result.append(
                AotConfig(
                    name=f"mask_tokens.replace.{name}.{short}",
                    kernel=replace,
                    arguments={"x": data, "token": token, "bounds": bounds, "out": data, "rows": rows,
                               "networks": networks, "positions": token[0][0], **scalars},
                    constants=constants,
                    wide=("x", "out"),
                    computed=("out",),
                )
            )  # fmt: skip
            for need_x in (True, False):
                result.append(
                    AotConfig(
                        name=f"mask_tokens.gradients.{name}.{'x' if need_x else 'token'}.{short}",
                        kernel=gradients,
                        arguments={"grad": data, "bounds": bounds, "grad_x": data, "partial": partial,
                                   "rows": rows, "networks": networks, "tiles": 1, **scalars},
                        constants={**constants, "NEED_X": need_x, "NEED_TOKEN": True, "ACC": tl.float32},
                        wide=("grad", "grad_x") if need_x else ("grad",),
                    )
                )  # fmt: skip
    result.append(
        AotConfig(
            name="mask_tokens.sum_positions",
            kernel=sum_positions,
            arguments={"partial": ((4, rows), torch.float32), "bounds": bounds,
                       "grad_token": ((positions, 1), torch.float32), "rows": rows, "positions": positions,
                       "period": 0, "windows": windows, "blocks": 4},
            constants={"PADDED": False, "ACC": tl.float32, "LANES": 128},
        )
    )  # fmt: skip
    return result


AOT_CONFIGS = _aot_configs()
