"""Which face of an op runs, the checks that all ops share, and what an op tells the compiler.

Every op has three faces with one signature: "naive" (the float64 specification), "cpu" (fast, pure
PyTorch) and "triton" (GPU; on CPU tensors only under Triton's interpreter). The device of the tensors
picks the face, `impl=` overrides it; nothing is decided at import time.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
FACES = ("naive", "cpu", "triton")
LOSSES = ("l1", "mse", "huber")
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def pick(impl: str | None, device: torch.device) -> str:
    """Return the face that runs: `impl` if given, else "triton" on CUDA and "cpu" everywhere else.

    Raises
    ------
    ValueError
        If `impl` is unknown, or if it cannot run on `device`.

    Examples
    --------
    >>> pick(None, torch.device("cpu"))
    'cpu'
    """
    if impl is None:
        return "triton" if device.type == "cuda" else "cpu"
    if impl not in FACES:
        raise ValueError(f"impl: got {impl!r}, expected one of {FACES} or None (picked by device)")
    if impl == "triton" and not HAS_TRITON:
        raise ValueError("impl: got 'triton', expected an installed triton (pip install triton)")
    if impl == "triton" and device.type == "cpu" and not interpreting():
        raise ValueError(
            "impl: got 'triton' with CPU tensors, expected CUDA tensors, or TRITON_INTERPRET=1 set before "
            "triton is imported"
        )
    if impl == "cpu" and device.type == "cuda":
        raise ValueError("impl: got 'cpu' with CUDA tensors, expected CPU tensors; move them with .cpu()")
    return impl


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels (environment variable TRITON_INTERPRET)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def check_tensor(
    name: str,
    value: Any,
    *,
    ndim: int | tuple[int, ...] | None = None,
    shape: tuple[int, ...] | None = None,
    dtypes: tuple[torch.dtype, ...] | None = None,
    device: torch.device | None = None,
    contiguous: bool = True,
) -> None:
    """Check one tensor argument; the message names the argument, what came and what was expected.

    Raises
    ------
    TypeError
        If `value` is no tensor or its dtype is not one of `dtypes`.
    ValueError
        If its shape, device or layout differs.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor")
    if dtypes is not None and value.dtype not in dtypes:
        expected = ", ".join(str(d) for d in dtypes)
        raise TypeError(f"{name}: got dtype {value.dtype}, expected one of {expected}")
    if ndim is not None and value.ndim not in (ndim if isinstance(ndim, tuple) else (ndim,)):
        raise ValueError(f"{name}: got shape {list(value.shape)}, expected {ndim} dimensions")
    if shape is not None and tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name}: got shape {list(value.shape)}, expected {list(shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: got device {value.device}, expected {device}")
    if value.layout != torch.strided:
        raise ValueError(f"{name}: got layout {value.layout}, expected torch.strided (dense)")
    if contiguous and not value.is_contiguous():
        raise ValueError(
            f"{name}: got strides {value.stride()} for shape {list(value.shape)}, expected a contiguous "
            "tensor; call .contiguous()"
        )


def check_loss(loss: Any) -> int:
    """Return the code of a loss name, its place in :data:`LOSSES`."""
    if loss not in LOSSES:
        raise ValueError(f"loss: got {loss!r}, expected one of {LOSSES}")
    return LOSSES.index(loss)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that values of `dtype` are summed in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Once(torch.autograd.Function):
    """Passes a gradient on; raises where that is differentiated again."""

    @staticmethod
    def forward(ctx: Any, grad: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> None:
        raise RuntimeError("loss: got a second derivative to compute, expected the first only")


def once(value: torch.Tensor, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Return gradients that a forward pass computed along with `value`; differentiating them again raises.

    They would count as constants under `create_graph=True`, which is silently wrong. `value` ties them to
    the inputs, so that the engine comes by here.
    """
    if not torch.is_grad_enabled():
        return grads
    return tuple(None if grad is None else _Once.apply(grad, value) for grad in grads)


@dataclass(frozen=True, kw_only=True)
class AotConfig:
    """One production configuration of one Triton kernel, for compilation without a GPU."""

    name: str
    """Unique name, for example "masked_loss_gradient.l1.rows.bf16"."""
    kernel: Any
    """The `triton.jit` function."""
    arguments: Mapping[str, tuple[tuple[int, ...], torch.dtype] | int | float]
    """Runtime arguments in the kernel's order: (shape, dtype) for a tensor, a number for a scalar."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """`tl.constexpr` arguments."""
    num_warps: int = 4
    wide: tuple[str, ...] = ()
    """Arguments of shape [tokens, networks]: every load and store of theirs must be 128-bit wide."""
    max_registers: int | None = None
    """A thread, where a program's tiles take more than :data:`aot.MAX_REGISTERS`."""
    computed: tuple[str, ...] = ()
    """Arguments whose stores hold computed values: bfloat16 must be rounded to nearest (cvt.rn.bf16)."""
