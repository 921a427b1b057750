"""The masked loss against what `torch.compile` makes of it, forward and backward.

`compile` is the naive loss as it stands: an int64 mask of the data's size and two `masked_select`, whose
sizes depend on the data, so that the graph breaks there. `compile_weighted` is what somebody would write for
the compiler: the mask as a factor, which it fuses with the rest.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from brainflow.kernels import masked_loss
from brainflow.kernels.testing import error_ratio

from .kernels import MASKS, NETWORKS, TIME, TOKENS, expander, fresh, naive_loss
from .timing import Row, WrongResultError, interleave, speed_rows


def measurements(quick: bool, device: str) -> dict[str, Callable[[], list[Row]]]:
    """Return name → what measures it; with `quick` for one mask alone, since compiling takes long."""
    if device == "cpu" and shutil.which("g++") is None:
        print(
            "kernels: the baseline compile is left out, torch.compile needs g++ on the CPU", file=sys.stderr
        )
        return {}
    seconds = 1.0 if quick else 2.0  # a full run has many processes
    return {
        f"compile/{name}": partial(_compare, name, seconds, device) for name in (["time"] if quick else MASKS)
    }


def weighted_loss(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Return the L1 mean with the int64 mask as a factor."""
    return ((pred - target).abs() * mask).sum() / mask.sum()


def _compare(name: str, seconds: float, device: str) -> list[Row]:
    mask = MASKS[name]
    pred = torch.randn(TOKENS, NETWORKS, device=device, requires_grad=True)
    target = torch.randn(TOKENS, NETWORKS, device=device)
    bounds = torch.arange(0, TOKENS + 1, TIME, dtype=torch.int32, device=device)
    expand = expander(mask, mask.dense(bounds, NETWORKS), TIME)
    step_mask = fresh(mask)
    torch._dynamo.reset()
    losses: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: masked_loss(pred, target, step_mask(), cu_seqlens=bounds),
        "compile": torch.compile(lambda: naive_loss(pred, target, expand())),
        "compile_weighted": torch.compile(lambda: weighted_loss(pred, target, expand())),
    }

    def step(loss: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        value = loss()
        return value, torch.autograd.grad(value, pred)[0]

    expected = step(lambda: masked_loss(pred, target, mask, cu_seqlens=bounds))
    for baseline in ("compile", "compile_weighted"):
        for got, want in zip(step(losses[baseline]), expected, strict=True):
            if error_ratio(got, want) > 1e-5:
                raise WrongResultError(f"masked_loss/{name}: differs from {baseline}")
    calls = {who: partial(step, loss) for who, loss in losses.items()}
    times = interleave(calls, device=device, seconds=seconds)
    return speed_rows("kernels", f"masked_loss/{name}", times)
