"""linear_masked_loss on the GPU: cuBLAS projects the rows, one kernel compares.

The kernel turns predictions (float32, also for 16-bit inputs) into the derivative of their loss, in place
where the types agree, and writes partial sums; two more products give the gradients of rows and weight. All
rows go through at once: their predictions take no more memory than a few of the encoder's activations, and
products of a quarter of the rows would leave half of a GPU idle. No host synchronisation where rows are
given.

Legend: M projected rows (masked rows, or all rows), N networks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import custom_op

from .. import masks
from ..dispatch import AotConfig, accumulator
from ..loss.triton import LANES, acc_type, launch_arguments
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
from .cpu import backward, empty_gradients, fake, setup_context


def tile_rows(dtype: torch.dtype) -> int:
    """Return the rows of a tile: 4, but 2 for float32 operands, which take more registers."""
    return 2 if dtype == torch.float32 else 4


@triton.jit(do_not_specialize=[*SCALARS, "count"])
def compare(
    pred, bias, target, slope, rows, row_weights, bounds, sums, weights, count, networks,
    windows, steps, period, threshold, seed, offset,
    KIND: tl.constexpr, SPAN: tl.constexpr, PADDED: tl.constexpr, LOSS: tl.constexpr, LISTED: tl.constexpr,
    BIASED: tl.constexpr, WEIGHTED: tl.constexpr, ACC: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Write weight · derivative at one tile of the predictions to `slope`, and its partial sums.

    Prediction i is of row `rows[i]` of the target where rows are listed, else of row i.
    """
    index = tl.program_id(0) * R + tl.arange(0, R)
    tile = tl.program_id(1)
    inside = index < count
    weight = tl.full([R], 1.0, ACC)
    if WEIGHTED:
        weight = tl.load(row_weights + index, mask=inside, other=0).to(ACC)
    source = tl.minimum(index, count - 1)
    if LISTED:
        source = tl.load(rows + index, mask=inside, other=0)
    if KIND == COLUMNS:
        window, position, length = locate(bounds, source, windows, steps, period, PADDED)
        taken = inside & row_mask(window, position, length, threshold, seed, offset, KIND, SPAN)
        words = column_words(tile, window, position, seed, offset, SPAN)
    else:
        taken = inside & (weight > 0)
    start = tl.program_id(0).to(tl.int64) * R * networks
    total = tl.zeros([R], ACC)
    amount = tl.zeros([R], ACC)
    for part in tl.static_range(4):
        column = tile * TILE + part * SUBTILE + tl.arange(0, SUBTILE)
        bound = (column < networks)[None, :]
        keep = taken[:, None] & bound
        at = tl.arange(0, R)[:, None] * networks + column[None, :]
        there = source[:, None].to(tl.int64) * networks + column[None, :]
        p = tl.load(pred + start + at, mask=keep, other=0).to(ACC)
        t = tl.load(target + there, mask=keep, other=0).to(ACC)
        if BIASED:
            p += tl.load(bias + column, mask=column < networks, other=0).to(ACC)[None, :]
        if KIND == COLUMNS:
            keep = keep & event(words[part], threshold)
        d = tl.where(keep, p - t, 0.0)
        w = tl.where(keep, weight[:, None], 0.0)
        total += tl.sum(w * loss_value(d, LOSS), 1)
        amount += tl.sum(w, 1)
        s = (w * loss_slope(d, LOSS)).to(slope.dtype.element_ty)
        tl.store(slope + start + at, s, mask=inside[:, None] & bound)
    program = tl.program_id(0) * tl.num_programs(1) + tile
    tl.store(sums + program, tl.sum(total, 0))
    tl.store(weights + program, tl.sum(amount, 0))


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
    """Project, compare and go back."""
    acc, networks = accumulator(hidden.dtype), weight.shape[0]
    # All rows go through, or all that count are known: padded, the lengths would have to be read.
    every = mask[0] == masks.COLUMNS or (mask[0] == masks.ALL and period == 0)
    if rows is None and not every:  # their number is read back from the device
        rows = masks.masked_rows(mask, *masks.windows(bounds, period))
    h = hidden if rows is None else hidden.index_select(0, rows)
    count = h.shape[0]
    if count == 0:
        value = hidden.new_zeros((), dtype=acc)
        return value, value.clone(), *_no_gradients(hidden, weight, bias, acc, gradients)
    weight = weight.to(hidden.dtype)
    pred = _wide_product(h, weight.t(), acc)
    slope = pred if hidden.dtype == acc else torch.empty_like(pred, dtype=hidden.dtype)
    tile = tile_rows(hidden.dtype)
    grid = (triton.cdiv(count, tile), triton.cdiv(networks, TILE.value))
    sums = hidden.new_empty(grid[0] * grid[1], dtype=acc)
    weights = torch.empty_like(sums)
    kind = mask[0] if rows is None else masks.ALL
    scalars, constants = launch_arguments(bounds, period, [kind, *mask[1:]])
    if kind == masks.ALL:
        constants |= {"SPAN": 1, "PADDED": False}  # the mask's own values would only compile it again
    # Tensors that a constexpr switches off are never read: any tensor stands in for them.
    compare[grid](
        pred, pred if bias is None else bias, target, slope, bounds if rows is None else rows,
        sums if row_weights is None else row_weights, bounds, sums, weights, count, networks,
        **scalars, **constants, LOSS=loss, LISTED=rows is not None, BIASED=bias is not None,
        WEIGHTED=row_weights is not None, ACC=acc_type(hidden.dtype), R=tile, num_warps=4,
    )  # fmt: skip
    value, inverse = hidden.new_empty((), dtype=acc), hidden.new_empty((), dtype=acc)
    finish[(1,)](sums, weights, value, inverse, len(sums), LANES=LANES, num_warps=4)
    if not gradients:
        return value, inverse, *_no_gradients(hidden, weight, bias, acc, gradients)
    grad_hidden = torch.mm(slope, weight)
    if rows is not None:
        # Each row is listed once, so copying is enough: adding would be atomic.
        grad_hidden = torch.zeros_like(hidden).index_copy_(0, rows, grad_hidden)
    grad_weight = _wide_product(slope.t(), h, acc)
    grad_bias = hidden.new_empty(0, dtype=acc) if bias is None else slope.sum(0, dtype=acc)
    return value, inverse, grad_hidden, grad_weight, grad_bias


def _no_gradients(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, acc: torch.dtype, wanted: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return gradients of 0, or nothing in their places where none are wanted."""
    grad_hidden = torch.zeros_like(hidden) if wanted else hidden.new_empty(0)
    return grad_hidden, *empty_gradients(weight, bias, acc, wanted)


def _wide_product(a: torch.Tensor, b: torch.Tensor, acc: torch.dtype) -> torch.Tensor:
    """Return a @ b in the accumulator's dtype: predictions are not rounded, sums in fp16 do not overflow."""
    if a.dtype == acc:
        return a @ b
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=acc)  # CUDA alone has out_dtype
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
    """Return (mean loss, 1 / Σ weights, and gradients of hidden, weight and bias that lack that factor)."""
    with torch.cuda.device_of(hidden), torch.autocast(hidden.device.type, enabled=False):
        return forward_impl(
            hidden, weight, bias, target, rows, row_weights, bounds, period, mask, loss, gradients
        )


linear_masked_loss.register_fake(fake)
linear_masked_loss.register_autograd(backward, setup_context=setup_context)


def _aot_configs() -> list[AotConfig]:
    tokens, count, networks, windows = 3200, 640, 1024, 64
    result = []
    for dtype, short in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        for kind, name in ((masks.ALL, "rows"), (masks.ALL, "all"), (masks.COLUMNS, "columns")):
            for code, loss in enumerate(("l1", "mse", "huber")):
                tile = tile_rows(dtype)
                programs, bounds = ((count // tile,), torch.float32), ((windows + 1,), torch.int32)
                listed = name == "rows"  # else bounds and sums are passed for what is not read
                result.append(
                    AotConfig(
                        name=f"linear_masked_loss.compare.{name}.{loss}.{short}",
                        kernel=compare,
                        arguments={
                            "pred": ((count, networks), torch.float32),
                            "bias": ((networks,), dtype),
                            "target": ((tokens, networks), dtype),
                            "slope": ((count, networks), dtype),
                            "rows": ((count,), torch.int64) if listed else bounds,
                            "row_weights": ((count,), torch.float32) if listed else programs,
                            "bounds": bounds,
                            "sums": programs,
                            "weights": programs,
                            "count": count,
                            "networks": networks,
                            "windows": windows,
                            "steps": 7,
                            "period": 0,
                            "threshold": 3355443,
                            "seed": 0 if name == "all" else 2**40 + 1,  # which decides its type
                            "offset": 12345,
                        },
                        constants={"KIND": kind, "SPAN": 0 if kind == masks.COLUMNS else 1, "PADDED": False,
                                   "LOSS": code, "LISTED": listed, "BIASED": True,
                                   "WEIGHTED": listed, "ACC": tl.float32, "R": tile},
                        wide=("pred", "target", "slope"),
                        computed=("slope",),
                    )
                )  # fmt: skip
    return result


AOT_CONFIGS = _aot_configs()
