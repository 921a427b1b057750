"""How the cost of a dense CSM training step grows with the work: threads, batch, length, networks.

One thing grows at a time, and all its amounts are timed interleaved. The ratio is tokens a second over those
of the smallest amount. For batch and length 1 means that the cost grows as the work does; a token of more
networks is more work; for threads the ratio is the gain.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from brainflow.batch import PackedBatch
from brainflow.config import ModelConfig
from brainflow.frameworks import build

from . import timing
from .timing import Row, Timing, speed_rows
from .training import T_R, loss_of, random_batch, train_step

WINDOWS, NETWORKS, TOKENS, REPEATS = 8, 1024, 400, 5
WIDTH, LAYERS, HEADS = 256, 4, 4


def measurements(quick: bool, device: str) -> dict[str, Callable[[], list[Row]]]:
    """Return what grows → what measures it; with `quick` two amounts of each."""
    batch, length, networks = ((4, 16), (20, 80), (256, 1024)) if quick else (
        (4, 8, 16, 32, 64), (10, 25, 50, 100, 200, 400), (64, 200, 400, 1024, 2048)
    )  # fmt: skip
    found: dict[str, Callable[[], list[Row]]] = {
        "batch": partial(_grow, "batch", batch, device),
        "length": partial(_grow, "length", length, device),
        "networks": partial(_grow, "networks", networks, device),
    }
    if device == "cpu":
        found["threads"] = partial(_threads, _powers_of_two(len(os.sched_getaffinity(0))))
    return found


def _csm(networks: int, device: str) -> nn.Module:
    torch.manual_seed(0)
    config = ModelConfig(
        networks=networks, width=WIDTH, layers=LAYERS, heads=HEADS, max_positions=1024, max_seconds=1024 * T_R
    )
    return build(config).to(device)


def _step(module: nn.Module, batch: PackedBatch) -> Callable[[], None]:
    return train_step(module, partial(loss_of, module, batch))


def _grow(what: str, amounts: Sequence[int], device: str) -> list[Row]:
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
        batch = random_batch(windows, networks, shortest=lengths[0], longest=lengths[1], device=device)
        steps[f"{what}/{amount}"] = _step(_csm(networks, device), batch)
        tokens[f"{what}/{amount}"] = batch.tokens
    return growth_rows(timing.interleave(steps, repeats=REPEATS, device=device), tokens)


def growth_rows(times: dict[str, Timing], tokens: dict[str, int]) -> list[Row]:
    """Return a row for each amount; the first of `times` is the baseline of the others."""
    first, *_ = times
    found = []
    for name in times:
        found += speed_rows(
            "scaling", name, times, ours=name, baselines=() if name == first else (first,),
            metric="tokens_per_s", unit="tokens/s", work=tokens,
        )  # fmt: skip
    return found


def _threads(amounts: Sequence[int]) -> list[Row]:
    before, batch = torch.get_num_threads(), random_batch(WINDOWS, NETWORKS)
    step = _step(_csm(NETWORKS, "cpu"), batch)

    def with_threads(count: int) -> None:
        torch.set_num_threads(count)
        step()

    steps = {f"threads/{count}": partial(with_threads, count) for count in amounts}
    try:
        times = timing.interleave(steps, repeats=REPEATS)
    finally:
        torch.set_num_threads(before)
    return growth_rows(times, dict.fromkeys(steps, batch.tokens))


def _powers_of_two(most: int) -> list[int]:
    return [2**i for i in range(most.bit_length()) if 2**i <= most]
