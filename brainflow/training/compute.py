"""In which precision and with which attention kernel a run computes, and what is said about it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from brainflow.config import PretrainConfig
from brainflow.frameworks import framework_spec, own_config
from brainflow.kernels.varlen_attention import backends

from .optimizer import HALF
from .run_dir import Resume
from .setup import as_begun


def settle_precision(
    config: PretrainConfig, folder: Path, device: torch.device, *, resume: Resume
) -> PretrainConfig:
    """Return the configuration with `train.precision`: as asked for, as the run began, or by the device."""
    precision: Any = config.train.precision
    if precision == "auto":
        precision = as_begun(folder, "precision", resume) or _best_precision(device)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, precision=precision))


def _best_precision(device: torch.device) -> str:
    # By itself PyTorch says yes for GPUs, too, that only emulate bf16.
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    return "fp32"


def compiles(wanted: str, device: torch.device) -> bool:
    """Whether the transformer's blocks are compiled with this setting of `train.compile`."""
    return wanted == "on" or (wanted == "auto" and device.type == "cuda")


def describe_compute(config: PretrainConfig, device: torch.device) -> str:
    """Say on what, in which precision and with which attention kernel a run computes, and why.

    Raises
    ------
    ValueError
        If a transformer on a GPU would run without a flash kernel and nobody asked for that.
    """
    model, precision = config.model, config.train.precision
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    line = f"{name}, precision {precision}"
    if not framework_spec(model.framework).transformer:
        return f"{line}, no attention: {model.framework} is not built of transformer blocks"
    blocks = "; blocks compiled" if compiles(config.train.compile, device) else ""
    if device.type != "cuda":
        return f"{line}, attention in plain PyTorch{blocks}"
    dtype = HALF.get(precision, torch.float32)
    q = torch.empty(2, model.heads, model.width // model.heads, dtype=dtype, device=device)
    asked = None if model.attention == "auto" else model.attention
    allow_tf32(precision == "tf32")  # which kernels can compute this depends on it
    longest = _longest(config)
    if asked is None and (reason := backends.no_kernel(q, 1, longest, 0.0)):
        raise ValueError(
            f"model.attention: got auto with train.precision {precision} on {name}, where no kernel for GPUs "
            f"runs ({reason}); take --train.precision bf16 if the GPU has it, or --model.attention fallback, "
            "which is many times as slow"
        )
    try:
        backend, dropout = backends.settle(q, 1, longest, model.dropout, asked)
    except (ValueError, TypeError) as error:
        raise ValueError(f"model.attention: got {asked}; {error}") from error
    why = "the first kernel that is installed and can" if asked is None else "as asked for"
    line += f", attention {backend} ({why})"
    if dropout != model.dropout:
        line += f"; {backend} cannot drop attention weights, so dropout {model.dropout:g} is elsewhere only"
    if backend == "fallback":
        line += "; it stops the GPU and is many times as slow as a kernel of its own"
    return line + blocks


def _longest(config: PretrainConfig) -> int:
    """Return how many tokens a window has at most."""
    model = own_config(config.model)
    return model.tokens_per_time_point * (
        config.data.seq_max - 1 + framework_spec(model.framework).special_tokens
    )


def allow_tf32(allowed: bool) -> None:
    """Let GPUs round inputs of float32 products to 10 bits, or not: those of cuBLAS and of cuDNN's LSTMs."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
