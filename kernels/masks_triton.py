"""The masks of masks.py inside Triton kernels: the same counters, the same bits.

Legend: R rows of a tile, C = 256 columns of a subtile, W windows, N networks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import masks

ALL = tl.constexpr(masks.ALL)
POSITION = tl.constexpr(masks.POSITION)
COLUMNS = tl.constexpr(masks.COLUMNS)
TAG_POSITION = tl.constexpr(masks.TAG_POSITION)
TAG_ROWS = tl.constexpr(masks.TAG_ROWS)
TAG_COLUMNS = tl.constexpr(masks.TAG_COLUMNS)
TAG_PHASE = tl.constexpr(masks.TAG_PHASE)
SUBTILE = tl.constexpr(masks.SUBTILE)
TILE = tl.constexpr(masks.TILE)

# `networks` is not among them: that it is a multiple of 16 must be seen, or loads are not 128 bits wide.
SCALARS = ["windows", "steps", "period", "threshold", "seed", "offset"]
"""Runtime integers that must not be specialised on: a new value must not compile a new kernel."""


@triton.jit
def locate(bounds, rows, windows, steps, period, PADDED: tl.constexpr):
    """Return (window, position, length) of rows [R], int32; a packed row's window is searched for."""
    if PADDED:
        window = rows // period
        return window, rows % period, tl.load(bounds + window)
    low = rows * 0
    high = low + windows - 1
    # The host gives the number of halvings, enough for all windows.
    for _ in range(steps):
        # Rounded up, or `low` would not move where two windows are left.
        middle = (low + high + 1) // 2
        # The last window that begins here or before: empty ones in front of it are passed over.
        right = tl.load(bounds + middle) <= rows
        low = tl.where(right, middle, low)
        high = tl.where(right, high, middle - 1)
    start = tl.load(bounds + low)
    return low, rows - start, tl.load(bounds + low + 1) - start


@triton.jit
def draw(seed, c0, c1, c2, offset):
    """Return the four words of counters (c0, c1, c2, offset), given as int32 tensors of one shape."""
    # tl.philox wants four tensors of one shape; `* 0 +` gives a number that of its neighbour.
    c3 = (c2 * 0 + offset).to(tl.uint32)
    return tl.philox(seed, c0.to(tl.uint32), c1.to(tl.uint32), c2.to(tl.uint32), c3)


@triton.jit
def event(word, threshold):
    """Return whether the upper 24 bits of a word lie below the threshold."""
    return (word >> 8).to(tl.int32) < threshold


@triton.jit
def block_of(window, position, seed, offset, SPAN: tl.constexpr):
    """Return which draw along time a row uses: its position, its span, or 0 for the whole window."""
    if SPAN == 0:
        return position * 0
    if SPAN == 1:
        return position
    word, _, _, _ = draw(seed, window * 0 + TAG_PHASE, window * 0, window, offset)
    phase = tl.umulhi(word, (window * 0 + SPAN).to(tl.uint32)).to(tl.int32)
    return (position + phase) // SPAN


@triton.jit
def row_mask(window, position, length, threshold, seed, offset, KIND: tl.constexpr, SPAN: tl.constexpr):
    """Return which rows [R] a row mask masks; for a column mask, which rows are valid."""
    valid = position < length
    if (KIND == ALL) | (KIND == COLUMNS):
        return valid
    if KIND == POSITION:
        a, b, c, d = draw(seed, window * 0 + TAG_POSITION, window * 0, window // 4, offset)
        # A tensor cannot index a tuple, so one of the four words is selected.
        which = window % 4
        word = tl.where(which == 0, a, tl.where(which == 1, b, tl.where(which == 2, c, d)))
        # In a window of one time point position 1 is not valid, so nothing is masked.
        return valid & (position == 1 + tl.umulhi(word, (length - 1).to(tl.uint32)).to(tl.int32))
    block = block_of(window, position, seed, offset, SPAN)
    word, _, _, _ = draw(seed, window * 0 + TAG_ROWS, block, window, offset)
    return valid & event(word, threshold)


@triton.jit
def column_words(tile, window, position, seed, offset, SPAN: tl.constexpr):
    """Return the words of the four subtiles [R, C] of a tile of 1,024 columns."""
    block = block_of(window, position, seed, offset, SPAN)
    column = TAG_COLUMNS + tile * SUBTILE + tl.arange(0, SUBTILE)
    shape = window[:, None] * 0 + column[None, :] * 0
    return draw(seed, shape + column[None, :], shape + block[:, None], shape + window[:, None], offset)


@triton.jit
def loss_value(d, LOSS: tl.constexpr):
    """Return the loss of differences d: 0 l1, 1 mse, 2 huber with threshold 1."""
    if LOSS == 1:
        return d * d
    size = tl.abs(d)
    if LOSS == 0:
        return size
    return tl.where(size <= 1.0, 0.5 * d * d, size - 0.5)


@triton.jit
def loss_slope(d, LOSS: tl.constexpr):
    """Return the derivative of the loss at differences d."""
    if LOSS == 1:
        return 2.0 * d
    one = tl.minimum(tl.abs(d), 1.0)
    if LOSS == 0:
        # 0 as `torch.sign` has it on the CPU: where prediction and target agree there is no direction.
        one = tl.where(d == 0, 0.0, 1.0)
    return tl.where(d < 0, -one, one)


@triton.jit
def finish(sums, weights, loss, inverse, programs, LANES: tl.constexpr):
    """Add up partial sums in a fixed order; write the mean and 1 / Σ weights (both 0 if that is 0)."""
    lane = tl.arange(0, LANES)
    # float64 costs nothing here: one program adds a few thousand numbers.
    total = tl.zeros([LANES], tl.float64)
    weight = tl.zeros([LANES], tl.float64)
    # Not by atomics, whose order changes from run to run.
    for first in range(0, programs, LANES):
        inside = first + lane < programs
        total += tl.load(sums + first + lane, mask=inside, other=0).to(tl.float64)
        weight += tl.load(weights + first + lane, mask=inside, other=0).to(tl.float64)
    all_weight = tl.sum(weight, 0)
    some = all_weight > 0
    # `where` computes both sides: the inner one keeps 1 / 0 away.
    one_over = tl.where(some, 1.0 / tl.where(some, all_weight, 1.0), 0.0)
    tl.store(loss, tl.where(some, tl.sum(total, 0) * one_over, 0.0).to(loss.dtype.element_ty))
    tl.store(inverse, one_over.to(inverse.dtype.element_ty))
