"""Data-parallel training steps on 1, 2, 4 … processes, timed interleaved.

All processes live through the whole measurement. In the turn of `n` ranks the first `n` run one step of a
model that is spread over them, and the others wait; each rank has a batch of its own, so the work grows.
"""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from brainflow.data.batch import PackedBatch

from .timing import Timing, interleave
from .training_step import csm, random_batch, train_step

WINDOWS, NETWORKS = 8, 1024


def rank_times(amounts: Sequence[int], repeats: int, device: str) -> tuple[dict[str, Timing], dict[str, int]]:
    """Return "ranks/n" → :class:`Timing`, and → tokens of a step over all its ranks.

    Parameters
    ----------
    amounts
        Numbers of ranks, rising.
    repeats
        Timed rounds.
    device
        "cpu" (gloo, one thread a rank) or "cuda" (NCCL, one GPU a rank).
    """
    with tempfile.TemporaryDirectory(prefix="brainflow-bench-") as folder:
        arguments = (Path(folder), tuple(amounts), repeats, device)
        torch.multiprocessing.spawn(_rank, arguments, nprocs=amounts[-1])
        seconds, tokens = json.loads(Path(folder, "times.json").read_text())
    return {name: Timing(seconds=tuple(values)) for name, values in seconds.items()}, tokens


def _rank(rank: int, folder: Path, amounts: tuple[int, ...], repeats: int, device: str) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=amounts[-1],
    )
    times, tokens = _times(rank, amounts, repeats, device)
    if rank == 0:
        text = json.dumps([{name: timing.seconds for name, timing in times.items()}, tokens])
        Path(folder, "times.json").write_text(text)
    gc.collect()  # the models, before their group: see brainflow.training.parallel.process_group
    dist.destroy_process_group()


def _times(
    rank: int, amounts: tuple[int, ...], repeats: int, device: str
) -> tuple[dict[str, Timing], dict[str, int]]:
    """Time the steps; none of the models is referred to when it returns."""
    batch = random_batch(WINDOWS, NETWORKS, device=device)
    steps: dict[str, Callable[[], None]] = {}
    for amount in amounts:
        group = dist.new_group(list(range(amount)))
        if rank < amount:
            module = DistributedDataParallel(
                csm(NETWORKS, device),
                process_group=group,
                find_unused_parameters=True,  # as in training: CLS is trained only by decoding
            )
            steps[f"ranks/{amount}"] = partial(_turn, train_step(module), batch)
        else:
            steps[f"ranks/{amount}"] = dist.barrier
    # The clock of the host: a turn ends when all ranks have, which events of one device cannot tell.
    times = interleave(steps, repeats=repeats, warmup=2, lockstep=True)
    return times, {f"ranks/{amount}": amount * batch.tokens for amount in amounts}


def _turn(step: Callable[[PackedBatch], None], batch: PackedBatch) -> None:
    step(batch)
    if batch.bold.is_cuda:
        torch.cuda.synchronize()
    dist.barrier()
