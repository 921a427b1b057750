"""Windows of about equal length next to each other, padded to the longest, one matrix a window and head.

Legend: T tokens, H heads, D head_dim, L length of a group's longest window, B matrices [L, L] of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

SMALL = 2**14
"""Values (time points × heads × head_dim) of a mean window up to which windows are grouped: the products of
larger ones take longer than calling them, and copying them costs more than it saves."""
SCORES = 2**16
"""Scores that the windows of a group may have together, so that they stay in the cache."""
PADDING = 1.5
"""Scores of a group over those of its windows alone, at most."""


@dataclass(frozen=True)
class Group:
    """Rows `begin` to `end` of the padded order: matrices of `length` rows.

    `hidden` [B, 1, L], float32, is −inf at padding; None where there is none.
    """

    begin: int
    end: int
    length: int
    hidden: Tensor | None


@dataclass(frozen=True)
class Groups:
    """The padded order: group by group, window by window, head by head, token by token.

    Attributes
    ----------
    take
        int64, row of [T · H, …] for each padded row; padding repeats a window's last token.
    back
        int64 [T · H], the padded row of each row.
    padding
        int64, padded rows that stand for no token.
    groups
        Its parts.
    """

    take: Tensor
    back: Tensor
    padding: Tensor
    groups: tuple[Group, ...]

    def place(self, x: Tensor) -> Tensor:
        """Return x [T, H, …] in the padded order, [padded rows, …]."""
        return x.reshape(-1, *x.shape[2:]).index_select(0, self.take)

    def restore(self, x: Tensor, heads: int) -> Tensor:
        """Return the opposite of :meth:`place`."""
        return x.index_select(0, self.back).unflatten(0, (-1, heads))


def grouped(lengths: list[int], q: Tensor) -> Groups | None:
    """Return groups of these windows of q [T, H, D] where windows are small and several, else None."""
    heads, width = q.shape[1], q.shape[1] * q.shape[2]
    if len(lengths) < 2 or len(q) * width > SMALL * len(lengths) or max(lengths) ** 2 * heads > SCORES:
        return None
    return _groups(tuple(lengths), heads, q.device)


@lru_cache(maxsize=8)
def _groups(lengths: tuple[int, ...], heads: int, device: torch.device) -> Groups:
    """Return the groups: they are the same in every layer of a step, forward and backward."""
    size = torch.tensor(lengths, device="cpu")
    starts = size.cumsum(0) - size
    head = torch.arange(heads, device="cpu")[:, None]
    take, padding, groups = [], [], []
    back = torch.empty(sum(lengths) * heads, dtype=torch.int64, device="cpu")
    done = 0
    for windows in _alike(lengths, heads):
        chosen = torch.tensor(windows, device="cpu")
        own, length = size[chosen, None], lengths[windows[0]]
        place = torch.arange(length, device="cpu")
        real = place < own
        token = starts[chosen, None] + torch.minimum(place, own - 1)
        rows = (token[:, None] * heads + head).flatten()
        mask = real[:, None].expand(-1, heads, -1).flatten()
        padded = torch.arange(done, done + len(rows), device="cpu")
        take.append(rows)
        back[rows[mask]] = padded[mask]
        padding.append(padded[~mask])
        hidden = None
        if not bool(real.all()):
            outside = torch.zeros(real.shape, device="cpu").masked_fill_(~real, -torch.inf)
            hidden = outside.repeat_interleave(heads, 0)[:, None].to(device)
        groups.append(Group(done, done + len(rows), length, hidden))
        done += len(rows)
    return Groups(torch.cat(take).to(device), back.to(device), torch.cat(padding).to(device), tuple(groups))


def _alike(lengths: tuple[int, ...], heads: int) -> list[list[int]]:
    """Return groups of windows, the longest first: as many as SCORES and PADDING allow."""
    groups: list[list[int]] = []
    own = 0
    for window in sorted(range(len(lengths)), key=lambda w: -lengths[w]):
        scores = lengths[window] ** 2
        if groups:
            together = (len(groups[-1]) + 1) * lengths[groups[-1][0]] ** 2
            if together * heads <= SCORES and together <= PADDING * (own + scores):
                groups[-1].append(window)
                own += scores
                continue
        groups.append([window])
        own = scores
    return groups
