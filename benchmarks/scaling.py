"""How the cost of a dense CSM training step grows with the work: threads, ranks, batch, length, networks.

One thing grows at a time, and all its amounts are timed interleaved. The ratio is tokens a second over those
of the smallest amount. For batch and length 1 means that the cost grows as the work does; a token of more
networks is more work; for threads and ranks (each rank with a batch of its own) the ratio is the gain.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch

from .ranks import rank_times
from .timing import Row, Timing, interleave, speed_rows
from .training_step import csm, random_batch, train_step

WINDOWS, NETWORKS, TOKENS = 8, 1024, 400


def measurements(quick: bool, device: str) -> dict[str, Callable[[], list[Row]]]:
    """Return what grows → what measures it."""
    repeats = 3
    batch, length, networks = ((4, 16), (20, 80), (256, 1024)) if quick else (
        (4, 8, 16, 32, 64), (10, 25, 50, 100, 200, 400), (64, 200, 400, 1024, 2048)
    )  # fmt: skip
    found: dict[str, Callable[[], list[Row]]] = {
        "batch": partial(_grow, "batch", batch, repeats, device),
        "length": partial(_grow, "length", length, repeats, device),
        "networks": partial(_grow, "networks", networks, repeats, device),
    }
    if device == "cpu":
        found["threads"] = partial(_threads, _powers_of_two(len(os.sched_getaffinity(0))), repeats)
    found["ranks"] = partial(_ranks, repeats, device)
    return found


def growth_rows(times: dict[str, Timing], tokens: dict[str, int]) -> list[Row]:
    """Return a row for each amount; the first of `times` is the baseline of the others."""
    first, *others = times
    found = speed_rows(
        "scaling", first, times, ours=first, baselines=(), metric="tokens_per_s", unit="tokens/s", work=tokens
    )
    for name in others:
        found += speed_rows(
            "scaling", name, times, ours=name, baselines=(first,), metric="tokens_per_s", unit="tokens/s",
            work=tokens,
        )  # fmt: skip
    return found


def _grow(what: str, amounts: Sequence[int], repeats: int, device: str) -> list[Row]:
    steps: dict[str, Callable[[], None]] = {}
    tokens: dict[str, int] = {}
    for amount in amounts:
        windows, networks, lengths = WINDOWS, NETWORKS, (10, 50)
        if what == "batch":
            windows = amount
        elif what == "length":  # as many tokens in fewer windows
            windows, lengths = TOKENS // amount, (amount, amount + 1)
        else:
            networks = amount
        name = f"{what}/{amount}"
        batch = random_batch(windows, networks, shortest=lengths[0], longest=lengths[1], device=device)
        steps[name] = partial(train_step(csm(networks, device)), batch)
        tokens[name] = batch.tokens
    return growth_rows(interleave(steps, repeats=repeats, device=device), tokens)


def _threads(amounts: Sequence[int], repeats: int) -> list[Row]:
    before = torch.get_num_threads()
    step, batch = train_step(csm(NETWORKS, "cpu")), random_batch(WINDOWS, NETWORKS)

    def with_threads(count: int) -> None:
        torch.set_num_threads(count)
        step(batch)

    steps = {f"threads/{count}": partial(with_threads, count) for count in amounts}
    try:
        times = interleave(steps, repeats=repeats)
    finally:
        torch.set_num_threads(before)
    return growth_rows(times, dict.fromkeys(steps, batch.tokens))


def _ranks(repeats: int, device: str) -> list[Row]:
    most = torch.cuda.device_count() if device == "cuda" else len(os.sched_getaffinity(0))
    amounts = _powers_of_two(min(most, 8))
    if len(amounts) < 2:
        print("scaling: ranks are left out, they need two GPUs (on the CPU two cores)", file=sys.stderr)
        return []
    times, tokens = rank_times(amounts, repeats, device)
    return growth_rows(times, tokens)


def _powers_of_two(most: int) -> list[int]:
    return [2**i for i in range(most.bit_length()) if 2**i <= most]
