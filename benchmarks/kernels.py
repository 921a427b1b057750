"""Masking, masked loss and projection + masked loss, forward and backward, beside what a user would write.

Shapes are those of a usual batch: 64 windows × 50 time points × 1,024 networks, hidden width 768, float32.
Every case is compared with the naive form first; a case that differs raises and prints no speed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from brainflow.kernels import MaskSpec, linear_masked_loss, mask_tokens, masked_loss
from brainflow.kernels.testing import error_ratio

from . import kernels_attention
from .allocator import fresh_memory
from .ceilings import floor, roofline_rows
from .fresh import in_a_fresh_process
from .kernels_bytes import bytes_rows, fused_linear_bytes, fused_loss_bytes, memory_rows
from .timing import Row, Timing, WrongResultError, interleave, speed_rows

WINDOWS, TIME, NETWORKS, WIDTH = 64, 50, 1024, 768
TOKENS = WINDOWS * TIME
MASKS = {
    "time": MaskSpec.time_points(0.2, seed=1),
    "network": MaskSpec.networks(0.2, seed=1),
    "position": MaskSpec.position(seed=1),
}


def measurements(quick: bool, device: str) -> dict[str, Callable[[], list[Row]]]:
    """Return name → what measures it; `quick` takes fewer repeats."""
    seconds = 1.0 if quick else 1.5  # a full run has many processes
    found: dict[str, Callable[[], list[Row]]] = {}
    for name, mask in MASKS.items():
        found[f"masked_loss/{name}"] = partial(_masked_loss, name, mask, seconds, device)
    for name in ("time", "position"):
        found[f"linear_masked_loss/{name}"] = partial(_linear, name, MASKS[name], seconds, device)
    found["mask_tokens/time"] = partial(_mask_tokens, "time", MASKS["time"], seconds, device)
    return found | kernels_attention.measurements(quick, device)


def naive_loss(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Return the L1 mean by two masked_select."""
    a = torch.masked_select(pred, mask.to(torch.bool))
    b = torch.masked_select(target, mask.to(torch.bool))
    return (a - b).abs().mean()


def fresh(mask: MaskSpec) -> Callable[[], MaskSpec]:
    """Return a function that gives the mask of the next step, so that no draw is ever reused."""
    steps = itertools.count(1)
    return lambda: replace(mask, offset=next(steps))


def _bounds(device: str) -> Tensor:
    return torch.arange(0, TOKENS + 1, TIME, dtype=torch.int32, device=device)


def expander(mask: MaskSpec, dense: Tensor, time: int) -> Callable[[], Tensor]:
    """Return what makes the int64 mask of the data's size, as the naive form does in every step.

    `dense` [tokens, networks] is the mask, `time` the length of each window.
    """
    tokens, networks = dense.shape
    small = dense[:, :1].clone() if mask.by_rows else dense.view(-1, time, networks)[:, 0].clone()

    def expand() -> Tensor:
        if mask.by_rows:
            return small.long().repeat(1, networks)
        return small[:, None].long().repeat(1, time, 1).view(tokens, networks)

    return expand


def _loss_functions(
    name: str, mask: MaskSpec, device: str
) -> tuple[dict[str, Callable[[], tuple[Tensor, Tensor]]], float]:
    """Return ours and the naive form, which give loss and gradient, and the share of values that is read."""
    pred = torch.randn(TOKENS, NETWORKS, device=device, requires_grad=True)
    target, bounds, step = torch.randn(TOKENS, NETWORKS, device=device), _bounds(device), fresh(mask)
    dense = mask.dense(bounds, NETWORKS)
    expand = expander(mask, dense, TIME)

    def naive() -> tuple[Tensor, Tensor]:
        value = naive_loss(pred, target, expand())
        return value, torch.autograd.grad(value, pred)[0]

    def ours(chosen: MaskSpec | None = None) -> tuple[Tensor, Tensor]:
        value = masked_loss(pred, target, chosen or step(), cu_seqlens=bounds)
        return value, torch.autograd.grad(value, pred)[0]

    _require_equal(f"masked_loss/{name}", ours(mask), naive())
    share = float(dense.float().mean()) if mask.by_rows else 1.0  # columns share cache lines: all are read
    return {"ours": ours, "naive": naive}, share


def _times_in_fresh_memory(name: str, mask: MaskSpec, seconds: float) -> dict[str, Timing]:
    fresh_memory()
    return interleave(_loss_functions(name, mask, "cpu")[0], seconds=seconds)


def _masked_loss(name: str, mask: MaskSpec, seconds: float, device: str) -> list[Row]:
    functions, share = _loss_functions(name, mask, device)
    ours, naive = functions["ours"], functions["naive"]
    case, element, gradient = f"masked_loss/{name}", 4, 4 * TOKENS * NETWORKS
    least = element * TOKENS * NETWORKS * (2 * share + 1)
    times = interleave(functions, device=device, seconds=seconds)
    fused = fused_loss_bytes(share, TOKENS, NETWORKS, element)
    rows = [*_rows(case, times, device, least), *bytes_rows(case, naive, "naive", fused, least)]
    if device == "cpu":
        times = in_a_fresh_process(_times_in_fresh_memory, name, mask, seconds)
        rows += speed_rows("kernels", case, times, metric="time_fresh_memory", floor=floor(least, 0, device))
        rows += memory_rows(case, ours, naive, gradient)
    return rows


def _linear(name: str, mask: MaskSpec, seconds: float, device: str) -> list[Row]:
    hidden = torch.randn(TOKENS, WIDTH, device=device, requires_grad=True)
    weight = (torch.randn(NETWORKS, WIDTH, device=device) / WIDTH**0.5).requires_grad_()
    bias = torch.zeros(NETWORKS, device=device, requires_grad=True)
    inputs = (hidden, weight, bias)
    target, step = torch.randn(TOKENS, NETWORKS, device=device), fresh(mask)
    host, bounds = _bounds("cpu"), _bounds(device)
    small = mask.dense(bounds, 1)

    def project_all() -> tuple[Tensor, ...]:
        pred = torch.nn.functional.linear(hidden, weight, bias)
        value = naive_loss(pred, target, small.long().repeat(1, NETWORKS))
        return (value, *torch.autograd.grad(value, inputs))

    def ours(chosen: MaskSpec | None = None) -> tuple[Tensor, ...]:
        rows = (chosen or step()).rows(host).to(device, non_blocking=True)
        value = linear_masked_loss(*inputs, target, None, rows=rows)
        return (value, *torch.autograd.grad(value, inputs))

    # A difference near 0 can fall on either side of the kink of L1: the bound on gradients allows for a few.
    _require_equal(f"linear_masked_loss/{name}", ours(mask), project_all(), gradient_bound=5e-3)
    masked = int(mask.rows(host).numel())
    least = 4 * (masked * (2 * WIDTH + NETWORKS) + TOKENS * WIDTH + 3 * NETWORKS * WIDTH)
    flops = 6 * masked * WIDTH * NETWORKS
    times = interleave({"ours": ours, "project_all": project_all}, device=device, seconds=seconds)
    fused = fused_linear_bytes(masked, TOKENS, WIDTH, NETWORKS)
    return [
        *_rows(f"linear_masked_loss/{name}", times, device, least, flops),
        *bytes_rows(f"linear_masked_loss/{name}", project_all, "project_all", fused, least),
    ]


def _mask_tokens(name: str, mask: MaskSpec, seconds: float, device: str) -> list[Row]:
    x, bounds, step = torch.randn(TOKENS, NETWORKS, device=device), _bounds(device), fresh(mask)
    token = torch.randn(NETWORKS, device=device, requires_grad=True)
    upstream = torch.randn_like(x)
    small = mask.dense(bounds, 1)

    def naive() -> tuple[Tensor, Tensor]:
        dense = small.long().repeat(1, NETWORKS)
        out = torch.where(dense == 1, token.expand(TOKENS, NETWORKS), x)
        return out, torch.autograd.grad(out, token, upstream)[0]

    def ours(chosen: MaskSpec | None = None) -> tuple[Tensor, Tensor]:
        out = mask_tokens(x, chosen or step(), token, cu_seqlens=bounds)
        return out, torch.autograd.grad(out, token, upstream)[0]

    _require_equal(f"mask_tokens/{name}", ours(mask), naive())
    least = 4 * TOKENS * NETWORKS * (2 + float(small.float().mean()))
    times = interleave({"ours": ours, "naive": naive}, device=device, seconds=seconds)
    return [
        *_rows(f"mask_tokens/{name}", times, device, least),
        *bytes_rows(f"mask_tokens/{name}", naive, "naive", least, least),
    ]


def _require_equal(
    case: str, actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], gradient_bound: float = 2e-6
) -> None:
    for a, e, bound in zip(actual, expected, [1e-5] + [gradient_bound] * len(expected), strict=False):
        if error_ratio(a, e) > bound:
            raise WrongResultError(f"{case}: error {error_ratio(a, e):.1e} above {bound:.0e}")


def _rows(
    case: str, times: dict[str, Timing], device: str, least_bytes: float, flops: float = 0.0
) -> list[Row]:
    found = speed_rows("kernels", case, times, floor=floor(least_bytes, flops, device))
    return found + roofline_rows(case, times["ours"], least_bytes, flops, device)
