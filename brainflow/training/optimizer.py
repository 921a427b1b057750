"""AdamW, schedules, autocast and loss scale, moving average.

A step that is not finite leaves all of them untouched.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from brainflow.config import TrainConfig

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return the learning rate of optimizer step `step` (0-based): linear rise, then `config.schedule`.

    It is computed from the step alone, so resuming needs no state. "linear" is as published, but for the
    first step, whose rate is not 0; "wsd" decays over the last tenth (arXiv 2405.18392).
    """
    warmup = math.ceil(config.warmup * config.steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    left = max(0, config.steps - step)
    share = left / max(1, config.steps - warmup)
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 - math.cos(math.pi * share))
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "wsd":
        return config.lr * min(1.0, left / max(1, math.ceil(0.1 * config.steps)))
    return config.lr * share


def make_optimizer(module: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Build the fused AdamW of a module; biases, norms and other vectors are not decayed."""
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for _, p in named if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]
    # Fused for its `found_inf`: multiplying an update by 0 would still poison the moments with NaN.
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)


def guarded_step(optimizer: torch.optim.AdamW, lr: float, found_inf: Tensor) -> None:
    """Take one step at rate `lr`, or none at all where `found_inf` (float32, 0-d, on the device) is 1."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.found_inf = found_inf  # type: ignore[attr-defined]
    optimizer.step()
    # None, not zeros: the next backward pass then writes gradients instead of adding to them.
    optimizer.zero_grad(set_to_none=True)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """Return a context in which a model runs in the element type of `train.precision`."""
    half = HALF.get(precision)
    return cast(
        AbstractContextManager[None], torch.autocast(device.type, dtype=half, enabled=half is not None)
    )


class LossScale:
    """Loss scale of fp16, kept on the device: halved after an overflow, doubled after 2,000 good steps.

    `values` float32 [2]: the scale, good steps since it changed. It is part of a checkpoint.
    """

    # A power of two, also halved and doubled: scaling changes exponents and costs no digit.
    START, GROW_EVERY = 2.0**14, 2_000

    def __init__(self, device: torch.device) -> None:
        self.values = torch.zeros(2, device=device)
        self.values[0].fill_(self.START)

    def unscale(self, module: nn.Module) -> None:
        """Divide all gradients by the scale."""
        gradients = [local(p.grad) for p in module.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, 1 / self.values[0])

    def update(self, found_inf: Tensor) -> None:
        """Adapt the scale after a step."""
        scale, good = self.values.unbind()
        good = (good + 1) * (1 - found_inf)
        grow = good >= self.GROW_EVERY
        scale = torch.where(found_inf > 0, scale * 0.5, torch.where(grow, scale * 2, scale))
        self.values = torch.stack([scale.clamp(min=1.0), torch.where(grow, 0.0, good)])


class MovingAverage:
    """Exponential moving average of a module's parameters; a skipped step leaves it as it is."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, found_inf: Tensor) -> None:
        """Move towards the module's parameters by 1 - decay, or not at all where `found_inf` is 1."""
        weight = (1 - self.decay) * (1 - found_inf)
        named = dict(module.named_parameters())
        averages = [local(self.values[name]) for name in named]
        approach = approach_together if weight.is_cuda else approach_one_by_one
        approach(averages, [local(parameter) for parameter in named.values()], weight)

    @contextmanager
    def swapped(self, module: nn.Module) -> Iterator[None]:
        """Have the averaged parameters in the module for a while."""
        self._swap(module)
        try:
            yield
        finally:
            self._swap(module)

    @torch.no_grad()
    def _swap(self, module: nn.Module) -> None:
        if isinstance(module, FSDPModule):  # FSDP leaves the root's parameters whole after a forward pass
            module.reshard()
        for name, parameter in module.named_parameters():
            here, average = local(parameter), local(self.values[name])
            # In place: the optimizer and what wraps the module hold these very tensors.
            kept = here.clone()
            here.copy_(average)
            average.copy_(kept)


def approach_one_by_one(averages: list[Tensor], values: list[Tensor], weight: Tensor) -> None:
    """Move averages towards values by `weight`, 0-d."""
    for average, value in zip(averages, values, strict=True):
        average.lerp_(value, weight.to(average.dtype))


def approach_together(averages: list[Tensor], values: list[Tensor], weight: Tensor) -> None:
    """Do the same in a few launches on a GPU, where one for each parameter takes longer than what it does."""
    ways = torch._foreach_sub(values, averages)
    torch._foreach_mul_(ways, weight)
    torch._foreach_add_(averages, ways)


def local(value: Tensor) -> Tensor:
    """Return this rank's part of a tensor that may be sharded."""
    return value.to_local() if isinstance(value, DTensor) else value


def optimizer_tensors(module: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """Return AdamW's state as flat tensors named "<parameter>|<moment>"."""
    return {
        f"{name}|{key}": value
        for name, parameter in module.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def allocate_state(module: nn.Module, optimizer: torch.optim.AdamW, names: Iterable[str]) -> None:
    """Make room for the state tensors of these names, as :func:`optimizer_tensors` gives them.

    Raises
    ------
    ValueError
        If one belongs to no parameter of the module.
    """
    parameters = dict(module.named_parameters())
    for flat in names:
        name, _, key = flat.rpartition("|")
        if name not in parameters:
            raise ValueError(f"checkpoint: optimizer state for {name!r}, which is no parameter of this model")
        parameter = parameters[name]
        # Fused AdamW counts its steps in float32, on the parameter's device.
        optimizer.state[parameter][key] = (
            torch.zeros((), dtype=torch.float32, device=parameter.device)
            if key == "step"
            else torch.zeros_like(parameter)
        )
