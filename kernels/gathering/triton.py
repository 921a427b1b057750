"""gather_windows on the GPU: one read of the store, one write of the batch, masked on the way.

Legend: W windows, R rows of a tile, C = 256 columns of a subtile, N networks. A program takes R time points
of one window and one tile of 1,024 columns in four subtiles, as the mask is drawn.
"""

from __future__ import annotations

import math
from itertools import product

import torch
import triton
import triton.language as tl

from ..dispatch import AotConfig
from ..masks import COLUMNS
from ..masks import ROWS as ROW_KIND
from ..masks_triton import SUBTILE, TILE, column_words, event, row_mask
from . import cpu

WARPS = 4
NO_MASK = -1


@triton.jit(do_not_specialize=["time", "threshold", "seed", "offset"])
def gather_kernel(
    store,  # [time, N], any supported type
    starts,  # [W] int64
    bounds,  # [W + 1] int32
    scale,  # [N] or [W, N], ignored if SCALE is 0
    token,  # [N] or [positions], ignored without a mask
    out,  # [tokens, N]
    time,
    networks,
    stride,  # elements between rows of the store
    threshold,
    seed,
    offset,
    R: tl.constexpr,
    SCALE: tl.constexpr,  # 0 none, 1 per network, 2 per window and network
    KIND: tl.constexpr,  # of the mask, -1 without
    SPAN: tl.constexpr,
    BY_POSITION: tl.constexpr,
    COLUMN_KIND: tl.constexpr,
):
    """Write R rows × 1,024 columns of window program_id(0)."""
    window = tl.program_id(0)
    tile = tl.program_id(2)
    first = tl.load(bounds + window)
    length = tl.load(bounds + window + 1) - first
    position = tl.program_id(1) * R + tl.arange(0, R)
    # The grid is as high as the longest window; shorter ones have programs with nothing to do.
    if tl.program_id(1) * R >= length:
        return
    row = tl.load(starts + window) + position
    inside = (row >= 0) & (row < time)
    valid = position < length
    source = store + row[:, None] * stride
    target = out + (first + position).to(tl.int64)[:, None] * networks
    windows = position * 0 + window
    if KIND >= 0:
        masked = row_mask(windows, position, windows * 0 + length, threshold, seed, offset, KIND, SPAN)
    if KIND == COLUMN_KIND:
        if SPAN == 0:  # one draw a column for all rows of the window
            one = tl.zeros([1], tl.int32)
            words = column_words(tile, one + window, one, seed, offset, SPAN)
        else:
            words = column_words(tile, windows, position, seed, offset, SPAN)
    for subtile in tl.static_range(4):
        column = tile * TILE + subtile * SUBTILE + tl.arange(0, SUBTILE)
        within = column < networks
        load = (inside & valid)[:, None] & within[None, :]
        value = tl.load(source + column[None, :], mask=load, other=0).to(tl.float32)
        if SCALE == 1:
            value = value * tl.load(scale + column, mask=within, other=0).to(tl.float32)[None, :]
        if SCALE == 2:
            row_scale = scale + window.to(tl.int64) * networks
            value = value * tl.load(row_scale + column, mask=within, other=0).to(tl.float32)[None, :]
        # A window that leaves the store cannot be refused without a sync: its rows come out as NaN.
        value = tl.where(inside[:, None], value, float("nan"))
        if KIND >= 0:
            if BY_POSITION:
                replacement = tl.load(token + position, mask=valid, other=0).to(tl.float32)[:, None]
            else:
                replacement = tl.load(token + column, mask=within, other=0).to(tl.float32)[None, :]
            selected = masked[:, None] & within[None, :]
            if KIND == COLUMN_KIND:
                selected = selected & event(words[subtile], threshold)
            value = tl.where(selected, replacement, value)
        tl.store(
            target + column[None, :], value.to(out.dtype.element_ty), mask=valid[:, None] & within[None, :]
        )


@torch.library.custom_op("brainflow::gather_windows_triton", mutates_args=())
def gather_windows(
    store: torch.Tensor,
    starts: torch.Tensor,
    cu_seqlens: torch.Tensor,
    tokens: int,
    longest: int,
    scale: torch.Tensor | None,
    out_dtype: torch.dtype,
    mask: list[int],
    mask_token: torch.Tensor | None,
) -> torch.Tensor:
    """Return the windows end to end, [tokens, networks] in `out_dtype`; an empty `mask` masks nothing."""
    # The kernel's values pass through float32.
    if out_dtype == torch.float64:
        raise TypeError(
            "out_dtype: got torch.float64, expected torch.float32, float16 or bfloat16 on the GPU"
        )
    time, networks = store.shape
    out = torch.empty((tokens, networks), dtype=out_dtype, device=store.device)
    if out.numel() == 0:
        return out
    kind, threshold, span, seed, offset = mask or [NO_MASK, 0, 0, 0, 0]
    rows = _rows(store.dtype, kind)
    grid = (starts.numel(), math.ceil(longest / rows), math.ceil(networks / TILE.value))
    with torch.cuda.device_of(store):
        gather_kernel[grid](
            store,
            starts,
            cu_seqlens,
            store if scale is None else scale,
            out if mask_token is None else mask_token,
            out,
            time,
            networks,
            store.stride(0),
            threshold,
            seed,
            offset,
            R=rows,
            SCALE=0 if scale is None else scale.ndim,
            KIND=kind,
            SPAN=span,
            BY_POSITION=mask_token is not None and mask_token.ndim == 2,
            COLUMN_KIND=COLUMNS,
            num_warps=WARPS,
        )
    return out


@gather_windows.register_fake
def _(store, starts, cu_seqlens, tokens, longest, scale, out_dtype, mask, mask_token):
    return store.new_empty((tokens, store.shape[1]), dtype=out_dtype)


gather_windows.register_autograd(cpu.backward, setup_context=cpu.setup)


def _rows(dtype: torch.dtype, kind: int) -> int:
    """Return R: each of 128 threads loads 16 bytes of a subtile, unless draws would take the registers."""
    # int8 under a mask of networks with 16 columns a thread took 128 registers; it reads 64 bits at a time
    # instead.
    return 8 if dtype.itemsize == 1 and kind != COLUMNS else 4


def _aot_configs() -> list[AotConfig]:
    """Return one configuration for each type of store, output and way of masking."""
    tokens, time, windows, networks = 1_824, 4_096, 64, 1_024
    stores = (
        (torch.float32, "fp32", 0),
        (torch.float16, "fp16", 0),
        (torch.bfloat16, "bf16", 0),
        (torch.int16, "int16", 1),
        (torch.int8, "int8", 2),
    )
    outs = ((torch.float32, "fp32"), (torch.bfloat16, "bf16"))
    masks = (("plain", NO_MASK, 0), ("rows", ROW_KIND, 1), ("networks", COLUMNS, 0), ("entries", COLUMNS, 1))
    configs = []
    for (store, store_name, scale), (out, out_name), (mask, kind, span) in product(stores, outs, masks):
        rows = _rows(store, kind)
        data, batch = ((time, networks), store), ((tokens, networks), out)
        configs.append(
            AotConfig(
                name=f"gather_windows.{store_name}.{out_name}.{mask}",
                kernel=gather_kernel,
                arguments={
                    "store": data,
                    "starts": ((windows,), torch.int64),
                    "bounds": ((windows + 1,), torch.int32),
                    "scale": ((windows, networks), torch.float32) if scale else data,
                    "token": ((networks,), torch.float32) if mask != "plain" else batch,
                    "out": batch,
                    "time": time,
                    "networks": networks,
                    "stride": networks,
                    "threshold": 3_355_443,
                    "seed": 2**40 + 1 if mask != "plain" else 0,
                    "offset": 1,
                },
                constants={
                    "R": rows,
                    "SCALE": scale,
                    "KIND": kind,
                    "SPAN": span,
                    "BY_POSITION": False,
                    "COLUMN_KIND": COLUMNS,
                },
                num_warps=WARPS,
                wide=("store", "out") if rows * store.itemsize >= 8 else ("out",),
                computed=() if store == out and mask == "plain" else ("out",),  # a copy rounds nothing
            )
        )
    return configs


AOT_CONFIGS = _aot_configs()
"""Production configurations, see aot.py."""
