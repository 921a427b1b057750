"""Many processes, one training: who is who, how the model is spread, sums over all of them.

`torchrun` (or SLURM with one task a GPU) starts the processes. The ranks' shares of a batch are weighed so
that the gradient is that of one process with the whole batch. Control messages are tensors: nothing that
travels between ranks is unpickled.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from brainflow.frameworks.base import Framework
from brainflow.models.transformer import Transformer

# What gloo's errors say (NCCL's are DistErrors).
_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "timeout caused pair closure",
    "gloo",
    "Gloo",
)
FIRST_TIMEOUT, TIMEOUT = timedelta(minutes=30), timedelta(minutes=5)


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """A process among the others.

    Attributes
    ----------
    rank, world
        This process and how many there are.
    local
        Its number on this machine: which GPU it takes.
    local_world
        Processes on this machine; HSDP shards among them and replicates across machines.
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    local_world: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes the run directory."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over all ranks; `values` is overwritten."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def agree(self, value: int, device: torch.device) -> int:
        """Return rank 0's integer on every rank."""
        if self.world == 1:
            return value
        said = torch.tensor([value], dtype=torch.int64, device=device)
        dist.broadcast(said, src=0)
        return int(said)


def from_environment(environ: Any = os.environ) -> Ranks:
    """Read what torchrun, or else SLURM, says about this process.

    Raises
    ------
    ValueError
        If the variables contradict each other, or MASTER_ADDR or MASTER_PORT is missing.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    elif int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
    else:
        return Ranks()
    # Without the variables: rank 0 of 1, on the first GPU.
    rank, world, local = (
        int(environ.get(name, default)) for name, default in zip(names, "010", strict=False)
    )
    # SLURM writes "4(x2)" for four tasks on each of two nodes
    local_world = int(environ.get(names[3], "1").split("(")[0].split(",")[0])
    if not 0 <= rank < world:
        raise ValueError(f"{names[0]}: got {rank} of {world} processes; start them with torchrun or srun")
    for name, what in (("MASTER_ADDR", "the first node's name"), ("MASTER_PORT", "a free port there")):
        if world > 1 and name not in environ:
            raise ValueError(
                f"{name}: is not set, expected {what}; export it in the sbatch script, or start with torchrun"
            )
    return Ranks(rank=rank, world=world, local=local, local_world=local_world)


@contextmanager
def process_group(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """Join the other ranks; a group that is already there is used and left alone."""
    if ranks.world == 1 or dist.is_initialized():
        yield
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    store, _, _ = next(dist.rendezvous("env://", ranks.rank, ranks.world, timeout=FIRST_TIMEOUT))
    # torchrun keeps its store over a restart, and with it the addresses of the processes before.
    attempt = f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}-of-{ranks.world}"
    store = dist.PrefixStore(attempt, store)
    dist.init_process_group(
        backend, store=store, rank=ranks.rank, world_size=ranks.world, timeout=FIRST_TIMEOUT
    )
    try:
        yield
    finally:
        # The last to let go of a group waits for gloo's threads. DDP would hold the GIL meanwhile, and one of
        # the threads may be waiting for that (torch 2.13). Only the collector takes DDP: it is in a cycle.
        gc.collect()
        dist.destroy_process_group()


def shorten_timeout() -> None:
    """Let a collective wait no longer than `TIMEOUT`: after the first step nothing compiles any more."""
    if dist.is_initialized():
        _set_pg_timeout(TIMEOUT, dist.group.WORLD)


def spread(module: Framework, ranks: Ranks, how: str, device: torch.device, precision: str) -> nn.Module:
    """Return what the step calls: `module` itself, its DDP wrapper, or `module` with sharded parameters.

    Parameters
    ----------
    module
        The framework, on `device`.
    ranks
        Who shares the work.
    how
        "ddp" copies the parameters to every rank, "fsdp" shards them over all, "hsdp" over the ranks of a
        machine.
    device
        Of this rank.
    precision
        `train.precision`; see :func:`gathering`.

    Raises
    ------
    ValueError
        If "hsdp" finds different numbers of ranks on machines.
    """
    if ranks.world == 1:
        return module
    if how == "ddp":
        # To look for parameters without a gradient stops the GPU once a step. TrainingStep has taken out
        # those that never have one.
        return DistributedDataParallel(
            module,
            find_unused_parameters=module.varying,
            broadcast_buffers=False,  # all ranks fit the same linear path
        )
    shape: tuple[int, ...] = (ranks.world,)
    names: tuple[str, ...] = ("shard",)
    if how == "hsdp":
        if ranks.world % ranks.local_world:
            raise ValueError(
                f"train.parallel: got hsdp with {ranks.world} ranks, {ranks.local_world} on this machine; "
                "expected the same number on every machine"
            )
        shape, names = (ranks.world // ranks.local_world, ranks.local_world), ("replicate", "shard")
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    policy = gathering(precision, device)
    for part in module.modules():
        if isinstance(part, Transformer):  # the LSTMs' weights are read without calling the LSTM
            for block in part.blocks:
                fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh)
    # Validation calls `score`, and FSDP gathers parameters only where it knows of the call.
    register_fsdp_forward_method(module, "score")
    return module


def gathering(precision: str, device: torch.device) -> MixedPrecisionPolicy:
    """Return in which element types the blocks' sharded parameters are gathered and their gradients summed.

    GPUs that compute in bf16 gather in it, half the traffic of float32, and sum in float32. What goes in and
    out of a block stays in the type that autocast gives it.
    """
    if precision != "bf16" or device.type != "cuda":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
    )


def accumulating(model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """Return a context in which gradients are exchanged only if this is the step's last part."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    elif isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return nullcontext()


def whole(value: Tensor) -> Tensor:
    """Return all of a tensor that may be sharded; every rank has to call it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def lost_rank(error: BaseException) -> bool:
    """Whether an error says that another rank is gone or does not answer."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(sign in text for sign in _LOST)
