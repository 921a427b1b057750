"""masked_loss on the GPU: two kernels forward, one backward, no host synchronisation.

Forward: each program sums a tile of 4 rows × 1,024 networks, then one program adds the partial sums in a
fixed order. Backward: the mask is drawn again, the gradient is written once. Masked-out rows are not read;
a column mask is applied to values and never used as load predicate, which would make loads scalar.

Triton launches on the current device, whatever its arguments' is: every launch here and in the other ops
stands under `torch.cuda.device_of`. It is a plain `kernel[grid](…)`: `torch.library.wrap_triton` is for
`triton_op`; in a `custom_op` it traces every launch and keeps its constants for ever.

Legend: rows = tokens (packed) or W · T (padded), N networks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import custom_op

from .. import masks
from ..dispatch import AotConfig, accumulator
from ..masks_triton import (
    COLUMNS,
    SCALARS,
    SUBTILE,
    TILE,
    column_words,
    event,
    finish,
    locate,
    loss_slope,
    loss_value,
    row_mask,
)

LANES = 1024


def tile_rows(kind: int, dtype: torch.dtype) -> int:
    """Return the rows of a tile: 4, but 2 where float32 values and column draws share the registers."""
    return 2 if kind == masks.COLUMNS and dtype == torch.float32 else 4


@triton.jit(do_not_specialize=SCALARS)
def partial_sums(
    pred,
    target,
    bounds,
    sums,
    weights,
    rows,
    networks,
    windows,
    steps,
    period,
    threshold,
    seed,
    offset,
    KIND: tl.constexpr,
    SPAN: tl.constexpr,
    PADDED: tl.constexpr,
    LOSS: tl.constexpr,
    ACC: tl.constexpr,
    R: tl.constexpr,
):
    """Write the loss and the number of masked values of one tile."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    tile = tl.program_id(1)
    inside = row < rows
    # Rows behind the last one are looked up as the last one: `bounds` is not read outside of itself.
    window, position, length = locate(bounds, tl.minimum(row, rows - 1), windows, steps, period, PADDED)
    taken = inside & row_mask(window, position, length, threshold, seed, offset, KIND, SPAN)
    if KIND == COLUMNS:
        # Drawn once, before the loop: the four words are for its four subtiles.
        words = column_words(tile, window, position, seed, offset, SPAN)
    total = tl.zeros([R], ACC)
    count = tl.zeros([R], tl.int32)
    # One 64-bit base a program, 32-bit offsets inside the tile: 64-bit offsets for both spilled registers.
    start = tl.program_id(0).to(tl.int64) * R * networks
    for part in tl.static_range(4):
        column = tile * TILE + part * SUBTILE + tl.arange(0, SUBTILE)
        keep = taken[:, None] & (column < networks)[None, :]
        at = tl.arange(0, R)[:, None] * networks + column[None, :]
        p = tl.load(pred + start + at, mask=keep, other=0).to(ACC)
        t = tl.load(target + start + at, mask=keep, other=0).to(ACC)
        if KIND == COLUMNS:
            keep = keep & event(words[part], threshold)
            count += tl.sum(keep.to(tl.int32), 1)
        total += tl.sum(loss_value(tl.where(keep, p - t, 0.0), LOSS), 1)
    if KIND != COLUMNS:  # whole rows: counting in the loop costs registers
        count += tl.where(taken, tl.minimum(networks - tile * TILE, TILE), 0)
    program = tl.program_id(0) * tl.num_programs(1) + tile
    tl.store(sums + program, tl.sum(total, 0))
    tl.store(weights + program, tl.sum(count, 0))


@triton.jit(do_not_specialize=SCALARS)
def gradient(
    pred,
    target,
    bounds,
    upstream,
    inverse,
    grad,
    rows,
    networks,
    windows,
    steps,
    period,
    threshold,
    seed,
    offset,
    KIND: tl.constexpr,
    SPAN: tl.constexpr,
    PADDED: tl.constexpr,
    LOSS: tl.constexpr,
    ACC: tl.constexpr,
    R: tl.constexpr,
):
    """Write the gradient of one tile: upstream · slope / count where masked, 0 elsewhere."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    tile = tl.program_id(1)
    inside = row < rows
    window, position, length = locate(bounds, tl.minimum(row, rows - 1), windows, steps, period, PADDED)
    taken = inside & row_mask(window, position, length, threshold, seed, offset, KIND, SPAN)
    # Multiplied on the device: the host knows neither the upstream gradient nor the count.
    scale = tl.load(upstream).to(ACC) * tl.load(inverse).to(ACC)
    if KIND == COLUMNS:
        words = column_words(tile, window, position, seed, offset, SPAN)
    for part in tl.static_range(4):
        column = tile * TILE + part * SUBTILE + tl.arange(0, SUBTILE)
        bound = (column < networks)[None, :]
        keep = taken[:, None] & bound
        at = row[:, None].to(tl.int64) * networks + column[None, :]
        p = tl.load(pred + at, mask=keep, other=0).to(ACC)
        t = tl.load(target + at, mask=keep, other=0).to(ACC)
        if KIND == COLUMNS:
            keep = keep & event(words[part], threshold)
        slope = tl.where(keep, loss_slope(p - t, LOSS) * scale, 0.0)
        # `grad` is not cleared beforehand: the zeros are written here, too.
        tl.store(grad + at, slope.to(grad.dtype.element_ty), mask=inside[:, None] & bound)


def launch_arguments(bounds: torch.Tensor, period: int, mask: list[int]) -> tuple[dict, dict]:
    """Return the runtime and the compile-time arguments that describe a mask and a layout."""
    kind, threshold, span, seed, offset = mask
    windows = bounds.shape[0] - (1 if period == 0 else 0)
    scalars = {
        "windows": windows,
        # Halvings that find one of `windows` windows; a padded row's window is a division.
        "steps": 0 if period else max(1, int(windows).bit_length()),
        "period": period,
        "threshold": threshold,
        "seed": seed,
        "offset": offset,
    }
    return scalars, {"KIND": int(kind), "SPAN": int(span), "PADDED": period > 0}


def acc_type(dtype: torch.dtype) -> tl.dtype:
    """Return Triton's name of the accumulator's dtype."""
    return tl.float64 if accumulator(dtype) == torch.float64 else tl.float32


def forward_impl(
    pred: torch.Tensor, target: torch.Tensor, bounds: torch.Tensor, period: int, mask: list[int], loss: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the two forward kernels."""
    rows, networks = pred.shape
    value = pred.new_empty((), dtype=accumulator(pred.dtype))
    inverse = torch.empty_like(value)
    if rows == 0 or networks == 0:
        return value.zero_(), inverse.zero_()
    tile = tile_rows(mask[0], pred.dtype)
    grid = (triton.cdiv(rows, tile), triton.cdiv(networks, TILE.value))
    programs = grid[0] * grid[1]
    sums = pred.new_empty(programs, dtype=value.dtype)
    weights = pred.new_empty(programs, dtype=torch.int32)
    scalars, constants = launch_arguments(bounds, period, mask)
    with torch.cuda.device_of(pred):
        partial_sums[grid](
            pred, target, bounds, sums, weights, rows, networks, **scalars, **constants,
            LOSS=loss, ACC=acc_type(pred.dtype), R=tile, num_warps=4,
        )  # fmt: skip
        finish[(1,)](sums, weights, value, inverse, programs, LANES=LANES, num_warps=4)
    return value, inverse


def backward_impl(
    upstream: torch.Tensor,
    inverse: torch.Tensor,
    pred: torch.Tensor,
    target: torch.Tensor,
    bounds: torch.Tensor,
    period: int,
    mask: list[int],
    loss: int,
) -> torch.Tensor:
    """Launch the gradient kernel."""
    rows, networks = pred.shape
    grad = torch.empty_like(pred)
    if rows == 0 or networks == 0:
        return grad
    scalars, constants = launch_arguments(bounds, period, mask)
    tile = tile_rows(mask[0], pred.dtype)
    with torch.cuda.device_of(pred):
        gradient[(triton.cdiv(rows, tile), triton.cdiv(networks, TILE.value))](
            pred, target, bounds, upstream, inverse, grad, rows, networks, **scalars, **constants,
            LOSS=loss, ACC=acc_type(pred.dtype), R=tile, num_warps=4,
        )  # fmt: skip
    return grad


@custom_op("brainflow::masked_loss_triton", mutates_args=())
def _forward(
    pred: torch.Tensor, target: torch.Tensor, bounds: torch.Tensor, period: int, mask: list[int], loss: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return forward_impl(pred, target, bounds, period, mask, loss)


@custom_op("brainflow::masked_loss_triton_backward", mutates_args=())
def _backward(
    upstream: torch.Tensor,
    inverse: torch.Tensor,
    pred: torch.Tensor,
    target: torch.Tensor,
    bounds: torch.Tensor,
    period: int,
    mask: list[int],
    loss: int,
) -> torch.Tensor:
    return backward_impl(upstream, inverse, pred, target, bounds, period, mask, loss)


@_forward.register_fake
def _(pred, target, bounds, period, mask, loss):
    value = pred.new_empty((), dtype=accumulator(pred.dtype))
    return value, torch.empty_like(value)


@_backward.register_fake
def _(upstream, inverse, pred, target, bounds, period, mask, loss):
    return torch.empty_like(pred)


def _setup(ctx, inputs, output):
    pred, target, bounds, ctx.period, ctx.mask, ctx.loss = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], pred, target, bounds)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, upstream, _):
    if upstream is None:
        return (None,) * 6
    inverse, pred, target, bounds = ctx.saved_tensors
    grad = _backward(upstream, inverse, pred, target, bounds, ctx.period, ctx.mask, ctx.loss)
    return grad, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup)


def masked_loss(
    pred: torch.Tensor,
    target: torch.Tensor,
    bounds: torch.Tensor,
    period: int,
    mask: list[int],
    loss: int,
    gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (mean loss, 1 / count); `gradient` is for the CPU face, which computes it along the way."""
    return _forward(pred, target, bounds, period, mask, loss)


def _aot_configs() -> list[AotConfig]:
    result = []
    rows, networks, windows = 3200, 1024, 64
    for dtype, short in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        for kind, name in enumerate(masks.KINDS):
            for code, loss in enumerate(("l1", "mse", "huber")):
                data = ((rows, networks), dtype)
                seed = 0 if kind == masks.ALL else 2**40 + 1  # which decides its type
                scalars = {"rows": rows, "networks": networks, "windows": windows, "steps": 7, "period": 0,
                           "threshold": 3355443, "seed": seed, "offset": 12345}  # fmt: skip
                constants = {"KIND": kind, "SPAN": 0 if name == "columns" else 1, "PADDED": False,
                             "LOSS": code, "ACC": tl.float32, "R": tile_rows(kind, dtype)}  # fmt: skip
                bounds = ((windows + 1,), torch.int32)
                programs = (rows // tile_rows(kind, dtype),)
                result.append(
                    AotConfig(
                        name=f"masked_loss.sums.{name}.{loss}.{short}",
                        kernel=partial_sums,
                        arguments={"pred": data, "target": data, "bounds": bounds,
                                   "sums": (programs, torch.float32), "weights": (programs, torch.int32),
                                   **scalars},
                        constants=constants,
                        wide=("pred", "target"),
                    )
                )  # fmt: skip
                scalar = ((1,), torch.float32)
                result.append(
                    AotConfig(
                        name=f"masked_loss.gradient.{name}.{loss}.{short}",
                        kernel=gradient,
                        arguments={"pred": data, "target": data, "bounds": bounds, "upstream": scalar,
                                   "inverse": scalar, "grad": data, **scalars},
                        constants=constants,
                        wide=("pred", "target", "grad"),
                        computed=("grad",),
                    )
                )  # fmt: skip
    partials = ((800,), torch.float32)
    one = ((1,), torch.float32)
    result.append(
        AotConfig(
            name="masked_loss.finish",
            kernel=finish,
            arguments={"sums": partials, "weights": ((800,), torch.int32), "loss": one, "inverse": one,
                       "programs": 800},
            constants={"LANES": LANES},
        )
    )  # fmt: skip
    return result


AOT_CONFIGS = _aot_configs()
