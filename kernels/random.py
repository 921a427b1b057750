"""Philox4x32-10 in pure PyTorch, bit-identical to Triton's `tl.philox`, `tl.randint` and `tl.randint4x`.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). The generator is a pure function of
(seed, counter): nothing is stored, any part of a mask can be drawn anywhere, in any order.

Words are unsigned 32-bit numbers held in int64 tensors, because PyTorch has no complete uint32 arithmetic.
The GPU side is `tl.philox` itself (see masks_triton.py).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

MASK = 0xFFFFFFFF
ROUND_A, ROUND_B = 0xD2511F53, 0xCD9E8D57
KEY_A, KEY_B = 0x9E3779B9, 0xBB67AE85
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
    # Words stay ints, or of their own small shape, until a round mixes them: the first rounds cost little.
    for k0, k1 in _key_schedule(seed):
        a, b = c0 * ROUND_A, c2 * ROUND_B
        c0, c2 = _mix(b, c1, k0), _mix(a, c3, k1)
        c1, c3 = (word if isinstance(word, torch.Tensor) else word & MASK for word in (b, a))
    w0, w1, w2, w3 = torch.broadcast_tensors(c0, c1 & MASK, c2, c3 & MASK)
    return w0, w1, w2, w3


def _mix(product: torch.Tensor | int, word: torch.Tensor | int, key: int) -> torch.Tensor | int:
    """Return the upper half of a product ^ word ^ key, cut to 32 bits.

    A tensor's product wraps in int64 and keeps its bits; its word may still hold the upper half of the last
    product, so it is cut here only, once a round.
    """
    upper = product >> 32
    if isinstance(upper, torch.Tensor) and upper.shape == getattr(word, "shape", upper.shape):
        upper.bitwise_xor_(word)
    else:
        upper = upper ^ word
    if isinstance(upper, torch.Tensor):
        return upper.bitwise_xor_(key).bitwise_and_(MASK)
    return (upper ^ key) & MASK


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


def randint4x(
    seed: int, offset: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the four words that `tl.randint4x(seed, offset)` gives, as int64 in [0, 2³²)."""
    return philox(seed, offset & MASK, (offset >> 32) & MASK)


def randint(seed: int, offset: torch.Tensor) -> torch.Tensor:
    """Return the word that `tl.randint(seed, offset)` gives, as int64 in [0, 2³²)."""
    return randint4x(seed, offset)[0]


def below(word: torch.Tensor, bound: torch.Tensor | int) -> torch.Tensor:
    """Map 32-bit words to integers in [0, bound): the upper half of word · bound."""
    return (word * bound) >> 32


def _key_schedule(seed: int) -> tuple[tuple[int, int], ...]:
    low, high = seed & MASK, (seed >> 32) & MASK
    return tuple(((low + i * KEY_A) & MASK, (high + i * KEY_B) & MASK) for i in range(ROUNDS))
