"""Philox4x32-10 in pure PyTorch, bit-identical to Triton's `tl.philox`.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). The generator is a pure function of
(seed, counter): nothing is stored, any part of a mask can be drawn anywhere, in any order.

Words are unsigned 32-bit numbers held in int64 tensors, because PyTorch has no complete uint32 arithmetic.
The GPU side is `tl.philox` itself (see masks_triton.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

import torch

MASK = 0xFFFFFFFF
# Multipliers and key increments of Philox4x32 as published, and as in `tl.philox`.
ROUND_A, ROUND_B = 0xD2511F53, 0xCD9E8D57
KEY_A, KEY_B = 0x9E3779B9, 0xBB67AE85
# Seven rounds pass BigCrush and draw 30 % faster, but then some of the compiled kernels need up to 128
# registers a thread; with ten all of them stay within their limit.
ROUNDS = 10


def philox(
    seed: int,
    c0: torch.Tensor | int,
    c1: torch.Tensor | int = 0,
    c2: torch.Tensor | int = 0,
    c3: torch.Tensor | int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the four 32-bit words of each counter (c0, c1, c2, c3).

    Parameters
    ----------
    seed
        64-bit key; negative numbers stand for their two's complement.
    c0, c1, c2, c3
        Counter words in [0, 2³²), int64 tensors that broadcast against each other, or ints. At least one
        is a tensor.

    Returns
    -------
    tuple of Tensor
        Four int64 tensors of the broadcast shape, values in [0, 2³²).

    Examples
    --------
    >>> words = philox(0, torch.zeros(1, dtype=torch.int64))
    >>> [hex(int(w)) for w in words]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    if not any(isinstance(c, torch.Tensor) for c in (c0, c1, c2, c3)):
        raise TypeError("c0, c1, c2, c3: got four ints, expected at least one int64 tensor")
    device = next(c.device for c in (c0, c1, c2, c3) if isinstance(c, torch.Tensor))
    keys = _key_schedule(seed)
    # Numbers as tensors: an operator that has to wrap one takes half as long again.
    factor_a, factor_b, half, mask, *numbers = torch.tensor(
        [ROUND_A, ROUND_B, 32, MASK, *chain(*keys)], device=device
    ).unbind(0)
    # Words stay ints, or of their own small shape, until a round mixes them: the first rounds cost little.
    for (k0, k1), t0, t1 in zip(keys, numbers[::2], numbers[1::2], strict=True):
        a = c0 * (factor_a if isinstance(c0, torch.Tensor) else ROUND_A)
        b = c2 * (factor_b if isinstance(c2, torch.Tensor) else ROUND_B)
        c0 = _mix(b, c1, k0, t0, half, mask)
        c2 = _mix(a, c3, k1, t1, half, mask)
        # A tensor's low half keeps what lies above bit 31: `_mix` cuts it when it is next used, the last line
        # at the end.
        c1, c3 = (word if isinstance(word, torch.Tensor) else word & MASK for word in (b, a))
    w0, w1, w2, w3 = torch.broadcast_tensors(c0, c1 & mask, c2, c3 & mask)
    return w0, w1, w2, w3


def _mix(
    product: torch.Tensor | int,
    word: torch.Tensor | int,
    key: int,
    key_tensor: torch.Tensor,
    half: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor | int:
    """Return the upper half of a product ^ word ^ key, cut to 32 bits.

    A tensor's product wraps in int64 and keeps its bits; its word may still hold the upper half of the last
    product, so it is cut here only, once a round.
    """
    if not isinstance(product, torch.Tensor):
        upper = (product >> 32 ^ key) & MASK
        return upper ^ word if isinstance(word, int) else (word ^ upper).bitwise_and_(mask)
    mixed = product >> half
    if isinstance(word, int):
        return mixed.bitwise_xor_(word ^ key).bitwise_and_(mask)
    mixed = mixed.bitwise_xor_(word) if word.shape == mixed.shape else mixed ^ word
    return mixed.bitwise_xor_(key_tensor).bitwise_and_(mask)


def philox_ints(seed: int, counters: Iterable[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    """Return the four words of each counter in plain ints: faster than tensors for a few dozen draws.

    Examples
    --------
    >>> [hex(w) for w in philox_ints(0, [(0, 0, 0, 0)])[0]]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    keys = _key_schedule(seed)
    result = []
    for c0, c1, c2, c3 in counters:
        for k0, k1 in keys:
            a, b = c0 * ROUND_A, c2 * ROUND_B
            c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & MASK, (a >> 32) ^ c3 ^ k1, a & MASK
        result.append((c0, c1, c2, c3))
    return result


def below(word: torch.Tensor, bound: torch.Tensor | int) -> torch.Tensor:
    """Map 32-bit words to integers in [0, bound): the upper half of word · bound."""
    # As `tl.umulhi` on the GPU. A word below 2³² times a length below 2³¹ fits int64.
    return (word * bound) >> 32


def _key_schedule(seed: int) -> tuple[tuple[int, int], ...]:
    low, high = seed & MASK, (seed >> 32) & MASK
    return tuple(((low + i * KEY_A) & MASK, (high + i * KEY_B) & MASK) for i in range(ROUNDS))
