"""What the CPU faces share: cache-sized blocks of masked rows or columns, and sums of losses in place.

Legend: rows = tokens (packed) or W · T (padded), N networks.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import chain, pairwise

import torch

from .dispatch import check_values
from .masks import (
    POSITION,
    ROWS,
    TAG_POSITION,
    column_mask,
    locate,
    masked_rows,
    row_events,
    windows,
)
from .random import philox_ints

BLOCK = 1 << 16
"""Values of a block: a quarter of a megabyte of float32, so that two or three stay in a core's cache."""

LARGE = 1 << 19
"""Values of a block that borrows its memory: the fewer blocks, the fewer calls."""

LAZY_BYTES = 1 << 20
"""Least size of a lazily zeroed gradient."""
FEW_WINDOWS = 256
"""Up to so many windows positions are drawn in plain ints, which costs less than sixty small tensors."""


def lazy_zeros(like: torch.Tensor) -> torch.Tensor:
    """Return zeros of the shape and dtype of `like` whose memory the kernel clears where it is written.

    For a gradient with hardly a row in it a fresh anonymous map costs those rows, where `torch.zeros` clears
    all of it (one position in each of 64 windows of 50, 1,024 networks: 0.2 against 1.3 ms). With many
    rows the page faults cost more than they save.
    """
    if like.nbytes < LAZY_BYTES or not hasattr(mmap, "MAP_ANONYMOUS"):  # Windows has none
        return torch.zeros_like(like)
    memory = mmap.mmap(-1, like.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # The tensor keeps the map alive, which goes when the last view of it does.
    return torch.frombuffer(memory, dtype=like.dtype).view(like.shape)


def host_bounds(bounds: torch.Tensor, rows: int | None, period: int) -> tuple[int, ...]:
    """Return checked bounds as a tuple of ints."""
    # Plain numbers, once an op: they are checked, and they are the keys under which masks are kept below.
    result = tuple(bounds.tolist())
    check_values(result, rows, period)
    return result


def host_windows(bounds: tuple[int, ...], period: int) -> list[tuple[int, int]]:
    """Return (first row, length) of each window."""
    if period:
        return [(w * period, length) for w, length in enumerate(bounds)]
    return [(start, end - start) for start, end in pairwise(bounds)]


@lru_cache(maxsize=8)
def rows_of(code: tuple[int, ...], bounds: tuple[int, ...], period: int) -> torch.Tensor:
    """Return the masked rows of a row mask: drawn once for masking, loss and gradient."""
    if code[0] == ROWS:
        rows, window, position = _places(bounds, period)
        return rows[row_events(list(code), window, position)]
    if code[0] != POSITION or len(bounds) > FEW_WINDOWS:
        return masked_rows(list(code), *windows(torch.tensor(bounds), period))
    ranges = host_windows(bounds, period)
    draws = philox_ints(code[3], [(TAG_POSITION, 0, draw, code[4]) for draw in range(-(-len(ranges) // 4))])
    words = chain.from_iterable(draws)
    # Not strict: the last draw may have words to spare.
    pairs = zip(ranges, words, strict=False)
    drawn = [start + 1 + (word * (n - 1) >> 32) for (start, n), word in pairs if n > 1]
    return torch.tensor(drawn, dtype=torch.int64)


@lru_cache(maxsize=8)
def _places(bounds: tuple[int, ...], period: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return row, window and position in it of each valid token; steps of equally long windows share them."""
    starts, lengths = windows(torch.tensor(bounds), period)
    window, position = locate(lengths)
    return starts[window] + position, window, position


@lru_cache(maxsize=8)
def window_masks(code: tuple[int, ...], count: int, networks: int) -> torch.Tensor:
    """Return the networks that are masked in each window, bool [W, N], for a mask of whole windows."""
    index = torch.arange(count)
    return column_mask(list(code), index, torch.zeros_like(index), networks)


@lru_cache(maxsize=8)
def _pieces(
    bounds: tuple[int, ...], period: int, networks: int, whole: bool, most: int
) -> list[tuple[int, int, int, int]]:
    """Return (first row, end, first window, windows) of each block of :func:`column_blocks`."""
    pieces: list[tuple[int, int, int, int]] = []
    ranges = host_windows(bounds, period)
    last = sum(ranges[-1]) if ranges else 0  # its start + length: where the batch ends
    size = 0  # rows of each window of the last piece; 0: nothing can join it
    for w, (start, length) in enumerate(ranges):
        # A block costs some 46 µs of calls whatever it holds, so windows of one length that follow each
        # other share one. Windows of different lengths would need the weights spread over rows, which cost
        # more than it saved.
        if size and size == length and pieces[-1][1] == start:
            first, _, before, count = pieces[-1]
            # What borrows memory borrows it of gradient rows that come later: as many must follow as the
            # block has.
            limit = max(2 * BLOCK, min(most, (last - first) * networks // 2))
            if (count + 1) * length * networks <= limit:
                pieces[-1] = first, start + length, before, count + 1
                continue
        step = max(1, BLOCK // max(1, networks))
        for first in range(start, start + length, step):
            pieces.append((first, min(first + step, start + length), w, 1))
        size = length if whole and length <= step else 0
    return pieces


def column_blocks(
    code: list[int],
    bounds: tuple[int, ...],
    period: int,
    networks: int,
    convert: Callable[[torch.Tensor], torch.Tensor] = lambda mask: mask,
    most: int = 0,
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield (first row, end, mask) of each block of a column mask, bool or what `convert` makes of that.

    Masks are [k, 1, N] for k windows of one length whose time points share a draw, or for a part of one
    window; else [1, rows, N]. :func:`as_windows` gives the rows of a block that shape. Blocks have up to
    2 · BLOCK values, and up to `most` where as many rows follow.
    """
    ranges = host_windows(bounds, period)
    whole = code[2] == 0
    # Converted once for all windows, not once a block.
    masks = convert(window_masks(tuple(code), len(ranges), networks))[:, None] if whole else torch.empty(0)
    for first, end, w, count in _pieces(bounds, period, networks, whole, most):
        if whole:
            yield first, end, masks[w : w + count]
            continue
        position = torch.arange(first - ranges[w][0], end - ranges[w][0])
        yield first, end, convert(column_mask(code, torch.full_like(position, w), position, networks))[None]


def as_windows(rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the rows [k · length, C] of a block as [k, length, C], for its mask of k windows."""
    return rows.view(mask.shape[0], -1, rows.shape[1])


def column_count(code: list[int], bounds: tuple[int, ...], period: int, networks: int) -> int:
    """Return the number of masked values of a column mask (which draws it, unless of whole windows)."""
    if code[2]:
        return sum(int(mask.sum()) for *_, mask in column_blocks(code, bounds, period, networks))
    lengths = torch.tensor([length for _, length in host_windows(bounds, period)], dtype=torch.int64)
    return int(window_masks(tuple(code), lengths.numel(), networks).sum(1).dot(lengths))


def keep_bits(selected: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return all-ones integers where `selected`, else 0, of the width of `dtype` (float32 or float64).

    `keep` clears what is not selected with them; unlike a product with 0 that removes NaN too.
    """
    # −1 in two's complement has all bits set.
    return selected.to(torch.int64 if dtype == torch.float64 else torch.int32).neg_()


def keep(d: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Set what is not selected in d to 0, in place; `bits` is from :func:`keep_bits`."""
    d.view(bits.dtype).bitwise_and_(bits)
    return d


def sum_and_slope(
    d: torch.Tensor, slope: torch.Tensor, loss: int, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Return Σ w · loss of differences d, which are overwritten; write w · derivative to `slope`.

    As products with the derivative s: l1 |d| = d · s; mse d² = d · s / 2; huber (d − s / 2) · s. They are
    added pairwise: a dot product adds in long chains, which drift where many terms are equal.
    """
    if loss == 0:
        torch.sign(d, out=slope)
    elif loss == 1:
        torch.mul(d, 2.0, out=slope)
    else:
        torch.clamp(d, -1.0, 1.0, out=slope)
        d.sub_(slope, alpha=0.5)
    if weights is not None:
        slope.mul_(weights)
    total = d.mul_(slope).sum()
    return total / 2 if loss == 1 else total
