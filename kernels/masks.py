"""Masks as a few integers: which time points, networks or entries of a batch are masked.

A mask is a pure function of (scheme, p, span, seed, offset) and of a token's place (window, position in
its window) and network. So it is never stored: the masked input, the loss and the backward pass draw the
same bits again, on the CPU (here) and on the GPU (masks_triton.py), packed or padded.

Legend: W windows, T time points of a padded window, N networks, tokens = all time points laid end to end.

Counter of a draw: c0 = tag · 2²⁴ + column draw, c1 = position or block, c2 = window, c3 = offset.
One draw gives four words: column j of a block of 1,024 uses word (j mod 1024) // 256 of column draw
(j // 1024) · 256 + j mod 256. An event of probability p: upper 24 bits of the word < round(p · 2²⁴).
The position of window w uses word w mod 4 of draw c2 = w // 4; all others use their own window and word 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .dispatch import check_tensor, check_values
from .random import below, philox

ALL, POSITION, ROWS, COLUMNS = range(4)
KINDS = ("all", "position", "rows", "columns")
# In the upper byte of c0: draws for different purposes never share a counter.
TAG_POSITION, TAG_ROWS, TAG_COLUMNS, TAG_PHASE = (1 << 24, 2 << 24, 3 << 24, 4 << 24)
# A draw has four words: with a tile of four subtiles none of them is thrown away.
SUBTILE, TILE = 256, 1024


@dataclass(frozen=True, kw_only=True)
class MaskSpec:
    """What is masked, without a tensor of the data's size. Use the constructors below.

    Every rank of a data-parallel job needs a seed of its own; `offset` is the training step.

    Examples
    --------
    >>> import torch
    >>> spec = MaskSpec.position(seed=7)
    >>> cu_seqlens = torch.tensor([0, 5, 9], dtype=torch.int32)
    >>> rows = spec.rows(cu_seqlens)
    >>> bool(1 <= rows[0] < 5), bool(6 <= rows[1] < 9)
    (True, True)
    """

    kind: str
    """"all" (everything valid), "position" (one row a window), "rows" (time points), "columns" (networks)."""
    p: float = 1.0
    """Probability of a row or a column to be masked."""
    span: int = 1
    """Time points that share a draw; 0: the whole window."""
    seed: int = 0
    """64-bit seed, in [0, 2⁶⁴)."""
    offset: int = 0
    """Step counter, in [0, 2³²)."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: got {self.kind!r}, expected one of {KINDS}")
        if not 0.0 <= self.p <= 1.0:
            raise ValueError(f"p: got {self.p}, expected a probability in [0, 1]")
        if self.span < (0 if self.kind == "columns" else 1):
            raise ValueError(f"span: got {self.span}, expected at least 1 time point")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed: got {self.seed}, expected an int in [0, 2**64)")
        if not 0 <= self.offset < 2**32:
            raise ValueError(f"offset: got {self.offset}, expected an int in [0, 2**32)")

    @classmethod
    def all_valid(cls) -> MaskSpec:
        """Mask everything that is no padding."""
        return cls(kind="all")

    @classmethod
    def position(cls, *, seed: int, offset: int = 0) -> MaskSpec:
        """Mask one position of each window, uniform in [1, L); a window of length 1 has none."""
        return cls(kind="position", seed=seed, offset=offset)

    @classmethod
    def time_points(cls, p: float, *, seed: int, offset: int = 0) -> MaskSpec:
        """Mask each time point with probability p, all its networks."""
        return cls(kind="rows", p=p, seed=seed, offset=offset)

    @classmethod
    def spans(cls, p: float, span: int, *, seed: int, offset: int = 0) -> MaskSpec:
        """Mask spans of `span` time points, each with probability p; each window is cut at a random phase."""
        return cls(kind="rows", p=p, span=span, seed=seed, offset=offset)

    @classmethod
    def networks(cls, p: float, *, seed: int, offset: int = 0) -> MaskSpec:
        """Mask each network with probability p, over the whole window, drawn for each window."""
        return cls(kind="columns", p=p, span=0, seed=seed, offset=offset)

    @classmethod
    def tubes(cls, p: float, span: int, *, seed: int, offset: int = 0) -> MaskSpec:
        """Mask each network over spans of `span` time points, each with probability p."""
        if span < 1:
            raise ValueError(f"span: got {span}, expected at least 1 time point")
        return cls(kind="columns", p=p, span=span, seed=seed, offset=offset)

    @classmethod
    def entries(cls, p: float, *, seed: int, offset: int = 0) -> MaskSpec:
        """Mask each single entry (time point, network) with probability p."""
        return cls(kind="columns", p=p, span=1, seed=seed, offset=offset)

    @property
    def by_rows(self) -> bool:
        """Whether a masked time point is masked in all its networks."""
        return self.kind != "columns"

    def code(self) -> list[int]:
        """Return the mask as the five integers that the registered ops take."""
        # Operators take int64: seeds from 2⁶³ on go as their two's complement, which philox reads as the same
        # bits.
        seed = self.seed - 2**64 if self.seed >= 2**63 else self.seed
        # 24 bits and not 32: the threshold of p = 1 is 2²⁴, above every word and still an int32.
        return [KINDS.index(self.kind), round(self.p * 2**24), self.span, seed, self.offset]

    def rows(self, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """Return the indices of the masked tokens, int64 [masked], ascending.

        Call it on the host's cu_seqlens: on CUDA the number of rows has to be read back (a sync).

        Raises
        ------
        ValueError
            If the mask is one of networks or entries, which has no masked rows.
        """
        if not self.by_rows:
            raise ValueError(
                f"mask: got one of kind {self.kind!r}, expected one of time points (all_valid, position, "
                "time_points, spans)"
            )
        check_cu_seqlens(cu_seqlens)
        return masked_rows(self.code(), *windows(cu_seqlens, 0))

    def dense(self, cu_seqlens: torch.Tensor, networks: int) -> torch.Tensor:
        """Return the mask as bool [tokens, networks]: for tests and plots only."""
        check_cu_seqlens(cu_seqlens)
        starts, lengths = windows(cu_seqlens, 0)
        window, position = locate(lengths)
        if self.by_rows:
            mask = torch.zeros(window.numel(), dtype=torch.bool, device=cu_seqlens.device)
            mask[masked_rows(self.code(), starts, lengths)] = True
            return mask[:, None].expand(-1, networks).clone()
        return column_mask(self.code(), window, position, networks)


def check_mask(mask: MaskSpec) -> list[int]:
    """Return the code of a mask, or raise TypeError."""
    if not isinstance(mask, MaskSpec):
        shape = f" of shape {list(mask.shape)}" if isinstance(mask, torch.Tensor) else ""
        raise TypeError(
            f"mask: got {type(mask).__name__}{shape}, expected a MaskSpec, for example "
            "MaskSpec.time_points(0.2, seed=0)"
        )
    return mask.code()


def windows(bounds: torch.Tensor, period: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first row and the length of each window, int64 [W] each.

    Parameters
    ----------
    bounds
        Packed (period 0): cu_seqlens [W + 1]. Padded: lengths [W].
    period
        0 for packed rows, T for rows of a [W, T, N] tensor.
    """
    bounds = bounds.long()
    if period == 0:
        return bounds[:-1], bounds[1:] - bounds[:-1]
    return torch.arange(bounds.numel(), device=bounds.device) * period, bounds


def locate(lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (window, position in the window) of each valid token, int64 [tokens] each."""
    window = torch.repeat_interleave(torch.arange(lengths.numel(), device=lengths.device), lengths)
    first = lengths.cumsum(0) - lengths
    return window, torch.arange(window.numel(), device=lengths.device) - first[window]


def masked_rows(code: list[int], starts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Return the masked rows of a row mask, int64 [masked], ascending."""
    kind, *_, seed, offset = code
    if kind == POSITION:
        word = position_words(seed, offset, lengths)
        # From 1 on: the first time point has no past to be predicted from.
        return (starts + 1 + below(word, lengths - 1))[lengths > 1]
    window, position = locate(lengths)
    rows = starts[window] + position
    return rows if kind == ALL else rows[row_events(code, window, position)]


def row_events(code: list[int], window: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Return whether time points are masked, bool, for a mask of rows drawn with probability p."""
    _, threshold, _, seed, offset = code
    word = philox(seed, TAG_ROWS, block_of(code, window, position), window, offset)[0]
    # The same as comparing the upper 24 bits, without shifting every word.
    return word < threshold << 8


def position_words(seed: int, offset: int, lengths: torch.Tensor) -> torch.Tensor:
    """Return the word that gives each window its masked position: word w mod 4 of draw w // 4, int64 [W]."""
    index = torch.arange(-(-lengths.numel() // 4), device=lengths.device)
    return torch.stack(philox(seed, TAG_POSITION, 0, index, offset), dim=1).view(-1)[: lengths.numel()]


def column_mask(code: list[int], window: torch.Tensor, position: torch.Tensor, networks: int) -> torch.Tensor:
    """Return the mask of networks of each given token, bool [n, networks], for a column mask."""
    _, threshold, _, seed, offset = code
    block = block_of(code, window, position)
    tiles = -(-networks // TILE)
    draw = torch.arange(tiles * SUBTILE, device=window.device) + TAG_COLUMNS
    words = philox(seed, draw, block[:, None], window[:, None], offset)
    # The comparisons write where their columns lie: stacking four masks would copy them.
    hit = torch.empty(window.numel(), tiles, len(words), SUBTILE, dtype=torch.bool, device=window.device)
    for one, word in zip(hit.unbind(2), words, strict=True):
        torch.lt(word.view(-1, tiles, SUBTILE), threshold << 8, out=one)
    return hit.view(-1, tiles * TILE)[:, :networks]


def block_of(code: list[int], window: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Return which draw along time a token uses: its position, its span, or 0 for the whole window."""
    _, _, span, seed, offset = code
    if span == 0:
        return torch.zeros_like(position)
    if span == 1:
        return position
    # Without a phase all windows would be cut at the same positions, and neighbours across a cut never masked
    # together.
    phase = below(philox(seed, TAG_PHASE, 0, window, offset)[0], span)
    return (position + phase) // span


def check_cu_seqlens(cu_seqlens: torch.Tensor) -> None:
    """Check cu_seqlens; their values only where they lie on the host."""
    check_tensor("cu_seqlens", cu_seqlens, ndim=1, dtypes=(torch.int32, torch.int64))
    # On CUDA reading them would wait for the stream.
    if cu_seqlens.device.type == "cpu":
        check_values(tuple(cu_seqlens.tolist()), None, 0)
