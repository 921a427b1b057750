"""AdamW with a linear schedule; a step that is not finite leaves weights and moments untouched."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from brainflow.config import TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return the learning rate of optimizer step `step` (0-based): linear rise, then linear decay to 0.

    It is computed from the step alone, so resuming needs no state. As published, but for the first step,
    whose rate is not 0.
    """
    warmup = math.ceil(config.warmup * config.steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * max(0, config.steps - step) / max(1, config.steps - warmup)


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
    optimizer.zero_grad(set_to_none=True)


def optimizer_tensors(module: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """Return AdamW's state as flat tensors named "<parameter>|<moment>"."""
    return {
        f"{name}|{key}": value
        for name, parameter in module.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    module: nn.Module, optimizer: torch.optim.AdamW, tensors: dict[str, Tensor]
) -> None:
    """Put back what :func:`optimizer_tensors` gave.

    Raises
    ------
    ValueError
        If a tensor belongs to no parameter of the module.
    """
    parameters = dict(module.named_parameters())
    for flat, value in tensors.items():
        name, _, key = flat.rpartition("|")
        if name not in parameters:
            raise ValueError(f"checkpoint: optimizer state for {name!r}, which is no parameter of this model")
        optimizer.state[parameters[name]][key] = value.to(parameters[name].device)
