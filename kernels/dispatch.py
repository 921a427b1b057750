"""Which face of an op runs, the checks that all ops share, and what an op tells the compiler.

Every op has three faces with one signature: "naive" (the float64 specification), "cpu" (fast, pure
PyTorch) and "triton" (GPU; on CPU tensors only under Triton's interpreter). The device of the tensors
picks the face, `impl=` overrides it; nothing is decided at import time.

Packed and padded batches are one thing to an op, rows of networks and the bounds of the windows among them
(:class:`Layout`). Packed: x [tokens, N] with cu_seqlens [W + 1]; without cu_seqlens all tokens are one
window. Padded: x [W, T, N] with lengths [W]; without lengths every window has T time points.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
FACES = ("naive", "cpu", "triton")
LOSSES = ("l1", "mse", "huber")
Called = TypeVar("Called", bound="Callable[..., Any]")
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


def constant_to_compiler(function: Called) -> Called:
    """Return a function that torch.compile calls while it traces, and takes the result for a constant.

    As `torch.compiler.assume_constant_result`, which imports all of Dynamo: most of what
    `import brainflow.kernels` took beside `import torch`.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


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
    # Gradient mode is off in an ordinary backward pass, and on under `create_graph=True`.
    if not torch.is_grad_enabled():
        return grads
    return tuple(None if grad is None else _Once.apply(grad, value) for grad in grads)


class Layout(NamedTuple):
    """Where the windows lie in the rows of a batch."""

    bounds: torch.Tensor
    """int32: cu_seqlens [W + 1] if packed, lengths [W] if padded."""
    period: int
    """0 if packed, T if padded."""


def layout_of(
    name: str,
    x: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    lengths: torch.Tensor | None,
) -> Layout:
    """Check a batch and its bounds and return the layout.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what came and what was expected.
    """
    check_tensor(name, x, ndim=(2, 3), dtypes=FLOATS)
    integers = (torch.int32, torch.int64)
    if x.shape[:-1].numel() >= 2**31:  # rows are int32 in the kernels
        raise ValueError(f"{name}: got shape {list(x.shape)}, expected less than 2**31 time points")
    if x.ndim == 2:
        if lengths is not None:
            raise ValueError(
                f"lengths: got a tensor with {name} of 2 dimensions (packed), expected cu_seqlens instead"
            )
        if cu_seqlens is None:
            steps = x.shape[0]
            # Made on the device: a tensor from a list would be copied there, which waits for the stream.
            return Layout(torch.arange(2, dtype=torch.int32, device=x.device) * steps, 0)
        check_tensor("cu_seqlens", cu_seqlens, ndim=1, dtypes=integers, device=x.device)
        if cu_seqlens.shape[0] < (2 if x.shape[0] else 1):
            raise ValueError(f"cu_seqlens: got shape {list(cu_seqlens.shape)}, expected [windows + 1]")
        return Layout(cu_seqlens.to(torch.int32), 0)
    if cu_seqlens is not None:
        raise ValueError(
            f"cu_seqlens: got a tensor with {name} of 3 dimensions (padded), expected lengths instead"
        )
    batch, time, _ = x.shape
    if lengths is None:
        return Layout(torch.full((batch,), time, dtype=torch.int32, device=x.device), time)
    check_tensor("lengths", lengths, shape=(batch,), dtypes=integers, device=x.device)
    return Layout(lengths.to(torch.int32), time)


def flat(x: torch.Tensor) -> torch.Tensor:
    """View [W, T, N] or [tokens, N] as [rows, N]."""
    return x if x.ndim == 2 else x.flatten(0, 1)


def check_values(bounds: tuple[int, ...], rows: int | None, period: int) -> None:
    """Check the values of cu_seqlens (period 0) or lengths (period T).

    Raises
    ------
    ValueError
        If they do not describe windows that cover `rows` rows (packed) or fit into T (padded).
    """
    if period:
        if bounds and not 0 <= min(bounds) <= max(bounds) <= period:
            raise ValueError(
                f"lengths: got values in [{min(bounds)}, {max(bounds)}], expected values in [0, {period}]"
            )
        return
    # Empty windows pass here: a loss has nothing in them. Attention refuses them.
    if not bounds or bounds[0] != 0 or any(a > b for a, b in pairwise(bounds)):
        raise ValueError("cu_seqlens: got values that do not ascend from 0, expected 0 ≤ … ≤ tokens")
    if rows is not None and bounds[-1] != rows:
        raise ValueError(f"cu_seqlens: got {bounds[-1]} as last value, expected {rows} (tokens)")


def host_lengths(cu_seqlens: torch.Tensor, tokens: int, max_seqlen: int) -> list[int]:
    """Read the windows' lengths from a CPU tensor and check them.

    Returns
    -------
    list of int
        Length of each window in tokens.

    Raises
    ------
    ValueError
        If `cu_seqlens` does not rise from 0 to `tokens`, holds an empty window or one above `max_seqlen`.
    """
    edges = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(edges)]
    if edges[0] != 0:
        raise ValueError(f"cu_seqlens: got {edges[0]} as first entry, expected 0")
    if edges[-1] != tokens:
        raise ValueError(f"cu_seqlens: got {edges[-1]} as last entry, expected {tokens} (tokens)")
    if min(lengths) < 1:
        window = next(i for i, length in enumerate(lengths) if length < 1)
        raise ValueError(
            f"cu_seqlens: got a window of {lengths[window]} tokens (window {window}), expected rising "
            "entries, at least 1 token a window"
        )
    if max(lengths) > max_seqlen:
        raise ValueError(
            f"max_seqlen: got {max_seqlen}, expected at least the longest window, {max(lengths)}"
        )
    return lengths


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
