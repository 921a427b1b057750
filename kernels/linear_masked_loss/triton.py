"""linear_masked_loss on the GPU: cuBLAS projects a block of rows, one kernel compares and overwrites.

The kernel replaces a block's predictions by the derivative of their loss, in place, and writes partial
sums; two more products give the gradients of rows, weight and bias. No host synchronisation.

Legend: M projected rows (masked rows, or all rows under a column mask), N networks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import custom_op, wrap_triton

from .. import masks
from ..dispatch import AotConfig, accumulator
from ..masked_loss.triton import LANES, acc_type, launch_arguments, tile_rows
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
from .cpu import backward, empty_gradients, setup_context

BLOCK_ROWS = 2048


@triton.jit(do_not_specialize=[*SCALARS, "first", "count"])
def compare(
    pred, target, rows, row_weights, bounds, sums, weights, first, count, networks,
    windows, steps, period, threshold, seed, offset,
    KIND: tl.constexpr, SPAN: tl.constexpr, PADDED: tl.constexpr, LOSS: tl.constexpr,
    WEIGHTED: tl.constexpr, ACC: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Overwrite one tile of a block's predictions by weight · derivative; write its partial sums.

    Row i of the block is row `rows[i]` of the target, or row first + i under a column mask.
    """
    index = tl.program_id(0) * R + tl.arange(0, R)
    tile = tl.program_id(1)
    inside = index < count
    weight = tl.full([R], 1.0, ACC)
    if WEIGHTED:
        weight = tl.load(row_weights + index, mask=inside, other=0).to(ACC)
    if KIND == COLUMNS:
        source = first + tl.minimum(index, count - 1)
        window, position, length = locate(bounds, source, windows, steps, period, PADDED)
        taken = inside & row_mask(window, position, length, threshold, seed, offset, KIND, SPAN)
        words = column_words(tile, window, position, seed, offset, SPAN)
    else:
        source = tl.load(rows + index, mask=inside, other=0)
        taken = inside & (weight > 0)
    total = tl.zeros([R], ACC)
    amount = tl.zeros([R], ACC)
    for part in tl.static_range(4):
        column = tile * TILE + part * SUBTILE + tl.arange(0, SUBTILE)
        bound = (column < networks)[None, :]
        keep = taken[:, None] & bound
        at = index[:, None].to(tl.int64) * networks + column[None, :]
        there = source[:, None].to(tl.int64) * networks + column[None, :]
        p = tl.load(pred + at, mask=keep, other=0).to(ACC)
        t = tl.load(target + there, mask=keep, other=0).to(ACC)
        if KIND == COLUMNS:
            keep = keep & event(words[part], threshold)
        d = tl.where(keep, p - t, 0.0)
        w = tl.where(keep, weight[:, None], 0.0)
        total += tl.sum(w * loss_value(d, LOSS), 1)
        amount += tl.sum(w, 1)
        tl.store(pred + at, (w * loss_slope(d, LOSS)).to(pred.dtype.element_ty), mask=inside[:, None] & bound)
    program = tl.program_id(0) * tl.num_programs(1) + tile
    tl.store(sums + program, tl.sum(total, 0))
    tl.store(weights + program, tl.sum(amount, 0))


def block_rows(rows: int, tokens: int) -> int:
    """Return the rows of a block: at most a quarter of all tokens, so that predictions stay small."""
    return max(1, min(rows, BLOCK_ROWS, max(128, tokens // 4)))


def forward_impl(
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
    """Project, compare and go back, block by block."""
    acc, networks = accumulator(hidden.dtype), weight.shape[0]
    count = hidden.shape[0] if rows is None else rows.shape[0]
    grad_rows, grad_weight, grad_bias = empty_gradients(hidden, weight, bias, count, gradients)
    value = hidden.new_zeros((), dtype=acc)
    inverse = torch.zeros_like(value)
    if count == 0:
        return value, inverse, grad_rows, grad_weight, grad_bias
    kind = masks.COLUMNS if rows is None else masks.ALL
    step, tile = block_rows(count, hidden.shape[0]), tile_rows(kind, hidden.dtype)
    columns = triton.cdiv(networks, TILE.value)
    programs = [triton.cdiv(min(step, count - first), tile) * columns for first in range(0, count, step)]
    sums = hidden.new_empty(sum(programs), dtype=acc)
    weights = torch.empty_like(sums)
    scalars, constants = launch_arguments(bounds, period, [kind, *mask[1:]])
    if kind == masks.ALL:
        constants |= {"SPAN": 1, "PADDED": False}  # the mask's own values would only compile it again
    done = 0
    for number, first in enumerate(range(0, count, step)):
        block = slice(first, min(first + step, count))
        size = block.stop - block.start
        h = hidden[block] if rows is None else hidden.index_select(0, rows[block])
        pred = torch.nn.functional.linear(h, weight, bias)
        wrap_triton(compare)[(triton.cdiv(size, tile), columns)](
            pred, target, bounds if rows is None else rows[block],
            sums if row_weights is None else row_weights[block], bounds,
            sums[done:], weights[done:], first, size, networks, **scalars, **constants,
            LOSS=loss, WEIGHTED=row_weights is not None, ACC=acc_type(hidden.dtype), R=tile, num_warps=4,
        )  # fmt: skip
        done += programs[number]
        if not gradients:
            continue
        torch.mm(pred, weight, out=grad_rows[block])
        grad_weight.add_(_wide_product(pred.t(), h, acc))
        if bias is not None:
            grad_bias.add_(pred.sum(0, dtype=acc))
    wrap_triton(finish)[(1,)](sums, weights, value, inverse, done, LANES=LANES, num_warps=4)
    return value, inverse, grad_rows, grad_weight, grad_bias


def _wide_product(a: torch.Tensor, b: torch.Tensor, acc: torch.dtype) -> torch.Tensor:
    """Return a @ b in the accumulator's dtype (sums of fp16 derivatives could overflow fp16)."""
    if a.dtype == acc:
        return a @ b
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=acc)
    return a.to(acc) @ b.to(acc)


@custom_op("brainflow::linear_masked_loss_triton", mutates_args=())
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
    """Return (mean loss, 1 / Σ weights, and the unscaled gradients of rows, weight and bias)."""
    return forward_impl(
        hidden, weight, bias, target, rows, row_weights, bounds, period, mask, loss, gradients
    )


@linear_masked_loss.register_fake
def _(hidden, weight, bias, target, rows, row_weights, bounds, period, mask, loss, gradients):
    count = hidden.shape[0] if rows is None else rows.shape[0]
    scalar = hidden.new_empty((), dtype=accumulator(hidden.dtype))
    return (scalar, torch.empty_like(scalar), *empty_gradients(hidden, weight, bias, count, gradients))


linear_masked_loss.register_autograd(backward, setup_context=setup_context)


def _aot_configs() -> list[AotConfig]:
    tokens, count, networks, windows = 3200, 640, 1024, 64
    result = []
    for dtype, short in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        for kind, name in ((masks.ALL, "rows"), (masks.COLUMNS, "columns")):
            for code, loss in enumerate(("l1", "mse", "huber")):
                tile = tile_rows(kind, dtype)
                programs = ((count // tile,), torch.float32)
                result.append(
                    AotConfig(
                        name=f"linear_masked_loss.compare.{name}.{loss}.{short}",
                        kernel=compare,
                        arguments={
                            "pred": ((count, networks), dtype),
                            "target": ((tokens, networks), dtype),
                            "rows": ((count,), torch.int64),
                            "row_weights": ((count,), torch.float32),
                            "bounds": ((windows + 1,), torch.int32),
                            "sums": programs,
                            "weights": programs,
                            "first": 0,
                            "count": count,
                            "networks": networks,
                            "windows": windows,
                            "steps": 7,
                            "period": 0,
                            "threshold": 3355443,
                            "seed": 2**40 + 1,
                            "offset": 12345,
                        },
                        constants={"KIND": kind, "SPAN": 0 if kind == masks.COLUMNS else 1, "PADDED": False,
                                   "LOSS": code, "WEIGHTED": kind == masks.ALL, "ACC": tl.float32,
                                   "R": tile},
                        wide=("pred", "target"),
                    )
                )  # fmt: skip
    return result


AOT_CONFIGS = _aot_configs()
