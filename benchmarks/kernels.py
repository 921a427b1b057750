"""Masking, masked loss and projection + masked loss, forward and backward, beside what a user would write.

Shapes are those of a usual batch: 64 windows × 50 time points × 1,024 networks, hidden width 768, float32.
Every case is compared with the naive form first; a case that differs raises and prints no speed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from brainflow.kernels import MaskSpec, linear_masked_loss, mask_tokens, masked_loss
from brainflow.kernels.testing import error_ratio

from . import kernels_attention
from .timing import Row, Timing, interleave

WINDOWS, TIME, NETWORKS, WIDTH = 64, 50, 1024, 768
TOKENS = WINDOWS * TIME
MASKS = {
    "time": MaskSpec.time_points(0.2, seed=1),
    "network": MaskSpec.networks(0.2, seed=1),
    "position": MaskSpec.position(seed=1),
}


def run(quick: bool, device: str) -> list[Row]:
    """Return the rows of this suite; `quick` takes fewer repeats."""
    repeats = 5 if quick else 15
    floor = _seconds_per_byte(device)
    rows: list[Row] = []
    for name, mask in MASKS.items():
        rows += _masked_loss(name, mask, repeats, device, floor)
    for name in ("time", "position"):
        rows += _linear(name, MASKS[name], repeats, device, floor)
    rows += _mask_tokens("time", MASKS["time"], repeats, device, floor)
    return rows + kernels_attention.run(quick, device)


def naive_loss(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Return the L1 mean by two masked_select."""
    a = torch.masked_select(pred, mask.to(torch.bool))
    b = torch.masked_select(target, mask.to(torch.bool))
    return (a - b).abs().mean()


def _fresh(mask: MaskSpec) -> Callable[[], MaskSpec]:
    """Return a function that gives the mask of the next step, so that no draw is ever reused."""
    steps = itertools.count(1)
    return lambda: replace(mask, offset=next(steps))


def _bounds(device: str) -> Tensor:
    return torch.arange(0, TOKENS + 1, TIME, dtype=torch.int32, device=device)


def _masked_loss(name: str, mask: MaskSpec, repeats: int, device: str, floor: float) -> list[Row]:
    pred = torch.randn(TOKENS, NETWORKS, device=device, requires_grad=True)
    target, bounds, step = torch.randn(TOKENS, NETWORKS, device=device), _bounds(device), _fresh(mask)
    dense = mask.dense(bounds, NETWORKS)
    small = dense[:, :1].clone() if mask.by_rows else dense.view(WINDOWS, TIME, NETWORKS)[:, 0].clone()

    def expand() -> Tensor:
        if mask.by_rows:
            return small.long().repeat(1, NETWORKS)
        return small[:, None].long().repeat(1, TIME, 1).view(TOKENS, NETWORKS)

    def naive() -> tuple[Tensor, Tensor]:
        value = naive_loss(pred, target, expand())
        return value, torch.autograd.grad(value, pred)[0]

    def ours(chosen: MaskSpec | None = None) -> tuple[Tensor, Tensor]:
        value = masked_loss(pred, target, chosen or step(), cu_seqlens=bounds)
        return value, torch.autograd.grad(value, pred)[0]

    _require_equal(f"masked_loss/{name}", ours(mask), naive())
    element = pred.element_size()
    share = float(dense.float().mean()) if mask.by_rows else 1.0  # columns share cache lines: all are read
    least = element * TOKENS * NETWORKS * (2 * share + 1)
    timings = interleave({"ours": ours, "naive": naive}, repeats=repeats, device=device)
    return _rows(f"masked_loss/{name}", timings, least * floor, least)


def _linear(name: str, mask: MaskSpec, repeats: int, device: str, floor: float) -> list[Row]:
    hidden = torch.randn(TOKENS, WIDTH, device=device, requires_grad=True)
    weight = (torch.randn(NETWORKS, WIDTH, device=device) / WIDTH**0.5).requires_grad_()
    bias = torch.zeros(NETWORKS, device=device, requires_grad=True)
    inputs = (hidden, weight, bias)
    target, step = torch.randn(TOKENS, NETWORKS, device=device), _fresh(mask)
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
    timings = interleave({"ours": ours, "project_all": project_all}, repeats=repeats, device=device)
    return _rows(f"linear_masked_loss/{name}", timings, least * floor, least)


def _mask_tokens(name: str, mask: MaskSpec, repeats: int, device: str, floor: float) -> list[Row]:
    x, bounds, step = torch.randn(TOKENS, NETWORKS, device=device), _bounds(device), _fresh(mask)
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
    timings = interleave({"ours": ours, "naive": naive}, repeats=repeats, device=device)
    return _rows(f"mask_tokens/{name}", timings, least * floor, least)


def _require_equal(
    case: str, actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], gradient_bound: float = 2e-6
) -> None:
    for a, e, bound in zip(actual, expected, [1e-5] + [gradient_bound] * len(expected), strict=False):
        if error_ratio(a, e) > bound:
            raise RuntimeError(
                f"{case}: error {error_ratio(a, e):.1e} above {bound:.0e}: no speed is printed"
            )


def _seconds_per_byte(device: str) -> float:
    source = torch.randn(TOKENS, NETWORKS, device=device)
    copy = torch.empty_like(source)
    timing = interleave({"copy": lambda: copy.copy_(source)}, repeats=15, device=device)["copy"]
    return timing.p50 / (2 * source.nbytes)


def _rows(case: str, timings: dict[str, Timing], floor: float, least_bytes: float) -> list[Row]:
    (baseline,) = (name for name in timings if name != "ours")
    ours, other = timings["ours"], timings[baseline]
    return [
        Row(
            suite="kernels", case=case, metric="forward + backward", value=ours.p50 * 1e3, unit="ms",
            baseline=baseline, ratio=other.p50 / ours.p50, floor_share=floor / ours.p50,
            p20=ours.p20, p50=ours.p50, p80=ours.p80,
        ),
        Row(
            suite="kernels", case=f"{case}/{baseline}", metric="forward + backward", value=other.p50 * 1e3,
            unit="ms", floor_share=floor / other.p50, p20=other.p20, p50=other.p50, p80=other.p80,
        ),
        Row(
            suite="kernels", case=case, metric="bytes that must move", value=least_bytes / 1e6, unit="MB",
        ),
    ]  # fmt: skip
