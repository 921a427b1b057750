"""Bytes that the operators read and write, naive against fused: a count, not a time, so it needs no GPU.

The naive form is counted operator by operator while it runs (what each reads and writes; views are free).
The fused form is what the Triton kernels touch: forward and backward read the masked values, gradients and
outputs are written once. The floor is what any implementation must move.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .timing import Row


class Traffic(TorchDispatchMode):
    """Adds up the bytes that operators read and write.

    Examples
    --------
    >>> a = torch.ones(1000)
    >>> with Traffic() as traffic:
    ...     b = a.view(10, 100) + 1
    >>> traffic.bytes
    8000
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.is_view or function.namespace == "prim" or "empty" in function.name():
            return result
        read = {_key(t): t.nbytes for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        written = [t.nbytes for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.bytes += sum(read.values()) + sum(written)
        return result


def _key(t: torch.Tensor) -> tuple[int, torch.Size]:
    return t.data_ptr(), t.shape


def bytes_rows(
    case: str, naive: Callable[[], object], name: str, fused_bytes: float, least_bytes: float
) -> list[Row]:
    """Return one row: MB of the fused form, ratio to the naive form `name`, share of the floor."""
    with Traffic() as traffic:
        naive()
    return [
        Row(
            suite="kernels", case=case, metric="bytes", value=fused_bytes / 1e6, unit="MB", baseline=name,
            ratio=traffic.bytes / fused_bytes, floor_share=least_bytes / fused_bytes,
        )
    ]  # fmt: skip


def memory_rows(
    case: str, ours: Callable[[], object], naive: Callable[[], object], gradient: int
) -> list[Row]:
    """Return one row: MB that a call of ours allocates at most, ratio to the naive form (CPU only).

    `gradient` bytes are added where the gradient lies in a map of its own, which the allocator does not see.
    """
    mine, theirs = _peak(ours), _peak(naive)
    mine += gradient if mine < gradient else 0
    return [
        Row(
            suite="kernels", case=case, metric="peak_memory", value=mine / 1e6, unit="MB", baseline="naive",
            ratio=theirs / mine, floor_share=gradient / mine,
        )
    ]  # fmt: skip


def _peak(function: Callable[[], object]) -> int:
    """Return the most bytes that a call holds at once, results included."""
    function()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        result = function()
    del result
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def fused_loss_bytes(share: float, tokens: int, networks: int, element: int) -> float:
    """Return the bytes of the loss kernels: prediction and target read twice, the gradient written."""
    return element * tokens * networks * (4 * share + 1)


def fused_linear_bytes(masked: int, tokens: int, width: int, networks: int, element: int = 4) -> float:
    """Return the bytes of projection + loss + gradients, product by product (each operand once).

    Gathered rows, three products, the kernel between them, the scattered gradient, and the scaling of the
    three gradients in the backward pass.
    """
    rows = masked * width * (2 + 1 + 1 + 1 + 2)  # gather; operand twice; gradient; scatter
    block = masked * networks * (1 + 3 + 2 + 1)  # predictions; compare; two products; bias
    weights = networks * width * (2 + 4 + 2)  # operand twice; gradient added up; scaled
    return element * (rows + block + weights + 3 * tokens * width)
