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
    counters = (c0, c1, c2, c3)
    tensors = [c for c in counters if isinstance(c, torch.Tensor)]
    if not tensors:
        raise TypeError("c0, c1, c2, c3: got four ints, expected at least one int64 tensor")
    device = tensors[0].device
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    even = torch.empty((2, *shape), dtype=torch.int64, device=device)  # words 0 and 2
    odd = torch.empty_like(even)  # words 1 and 3
    for store, pair in ((even, (c0, c2)), (odd, (c1, c3))):
        for i, c in enumerate(pair):
            store[i] = c
    tail = (1,) * len(shape)
    keys = torch.tensor(_key_schedule(seed), dtype=torch.int64, device=device).view(ROUNDS, 2, *tail)
    multipliers = torch.tensor([ROUND_A, ROUND_B], dtype=torch.int64, device=device).view(2, *tail)
    for key in keys.unbind(0):
        # The 64-bit products wrap in int64 and keep their bits. Words are cut to 32 bits where that counts:
        # before a product, and at the end.
        product = even.mul_(multipliers).flip(0)
        even = (product >> 32).bitwise_xor_(odd).bitwise_xor_(key).bitwise_and_(MASK)
        odd = product
    odd.bitwise_and_(MASK)
    return even[0], odd[0], even[1], odd[1]


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
