"""Masking, masked loss and projection + masked loss, forward and backward, beside what a user would write.

Shapes are those of a usual batch: 64 windows × 50 time points × 1,024 networks, hidden width 768; float32,
on CUDA bf16, too. `naive` is an int64 mask of the data's size, as in 2022, with two `masked_select`.
`compile` is what `torch.compile` makes of that: the sizes depend on the data, so its graph breaks.
`compile_weighted` is what somebody would write for the compiler: the mask as a factor. Every form is first
compared with the naive one in float32; a case that differs raises and gets no speed.
"""

from __future__ import annotations

import itertools
import shutil
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from brainflow.kernels import MaskSpec, linear_masked_loss, mask_tokens, masked_loss

from . import timing
from .roofline import TYPES, floor, roofline_rows
from .timing import Row, Timing, peak_bytes, require_close, speed_rows


@dataclass(frozen=True)
class Sizes:
    """Sizes of a batch, and the width of the hidden states that are projected."""

    windows: int = 64
    time: int = 50
    networks: int = 1024
    width: int = 768

    @property
    def tokens(self) -> int:
        """Time points of all windows."""
        return self.windows * self.time


USUAL = Sizes()
MASKS = {
    "time": MaskSpec.time_points(0.2, seed=1),
    "network": MaskSpec.networks(0.2, seed=1),
    "position": MaskSpec.position(seed=1),
}
LOSS_BOUND = {"fp32": 1e-5, "bf16": 1e-2}
GRADIENT_BOUND = {"fp32": 2e-6, "bf16": 1e-2}
LINEAR_GRADIENT_BOUND = {"fp32": 5e-3, "bf16": 1e-1}
"""A difference near 0 can fall on either side of the kink of L1; in bf16 more of them do."""
Outputs = tuple[Tensor, ...]


def measurements(quick: bool, device: str) -> dict[str, Callable[[], list[Row]]]:
    """Return name → what measures it; with `quick` `torch.compile` for one mask alone: compiling is slow."""
    found: dict[str, Callable[[], list[Row]]] = {}
    for kind in ("fp32", "bf16") if device == "cuda" else ("fp32",):
        compiled = [name for name in MASKS if _compiles(device) and (name == "time" or not quick)]
        found |= of_size(USUAL, kind, 1.0 if quick else 2.0, device, compiled=compiled)
    return found


def of_size(
    sizes: Sizes, kind: str, seconds: float, device: str, *, compiled: Collection[str] = ()
) -> dict[str, Callable[[], list[Row]]]:
    """Return name → what measures it at these sizes for so long; masks in `compiled` beside torch.compile."""
    found: dict[str, Callable[[], list[Row]]] = {}
    given = (sizes, kind, seconds, device)
    for name, mask in MASKS.items():
        case = _case("masked_loss", name, kind, sizes)
        found[case] = partial(_masked_loss, case, mask, *given, compiled=name in compiled)
    for name in ("time", "position"):
        case = _case("linear_masked_loss", name, kind, sizes)
        found[case] = partial(_linear, case, MASKS[name], *given)
    case = _case("mask_tokens", "time", kind, sizes)
    return found | {case: partial(_mask_tokens, case, MASKS["time"], *given)}


def naive_loss(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Return the L1 mean by two masked_select."""
    a = torch.masked_select(pred, mask.to(torch.bool))
    b = torch.masked_select(target, mask.to(torch.bool))
    return (a - b).abs().mean()


def weighted_loss(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Return the L1 mean with the int64 mask as a factor."""
    return ((pred - target).abs() * mask).sum() / mask.sum()


def _masked_loss(
    case: str, mask: MaskSpec, sizes: Sizes, kind: str, seconds: float, device: str, *, compiled: bool
) -> list[Row]:
    pred, target = (_random(sizes.tokens, sizes.networks, kind, device) for _ in range(2))
    pred.requires_grad_()
    bounds, step = _bounds(sizes, device), _following(mask)
    dense = mask.dense(bounds, sizes.networks)
    expand = _expander(mask, dense, sizes)

    def ours(chosen: MaskSpec | None = None) -> Outputs:
        return _with_gradient(masked_loss(pred, target, chosen or step(), cu_seqlens=bounds), pred)

    losses = {"naive": lambda: naive_loss(pred, target, expand())}
    if compiled:
        torch._dynamo.reset()  # else an earlier case's graphs count against this one's limit
        losses["compile"] = torch.compile(losses["naive"])
        losses["compile_weighted"] = torch.compile(lambda: weighted_loss(pred, target, expand()))
    theirs = {who: partial(_step, loss, pred) for who, loss in losses.items()}
    exact = pred.detach().float().requires_grad_()
    expected = _with_gradient(naive_loss(exact, target.float(), expand()), exact)
    for form in (partial(ours, mask), *theirs.values()):
        require_close(case, form(), expected, (LOSS_BOUND[kind], GRADIENT_BOUND[kind]))
    share = float(dense.float().mean()) if mask.by_rows else 1.0  # columns share cache lines: all are read
    # Prediction and target are read where they are masked, the whole gradient is written.
    least = pred.element_size() * pred.numel() * (2 * share + 1)
    times = timing.interleave({"ours": ours, **theirs}, device=device, seconds=seconds)
    memory = _memory_row(case, ours, theirs["naive"], "naive", device)
    return [*_rows(case, times, kind, device, least), memory]


def _linear(case: str, mask: MaskSpec, sizes: Sizes, kind: str, seconds: float, device: str) -> list[Row]:
    tokens, networks, width = sizes.tokens, sizes.networks, sizes.width
    hidden, weight = _random(tokens, width, kind, device), _random(networks, width, kind, device) / width**0.5
    inputs = (hidden, weight, torch.zeros(networks, device=device, dtype=hidden.dtype))
    for leaf in inputs:
        leaf.requires_grad_()
    target, step, host = _random(tokens, networks, kind, device), _following(mask), _bounds(sizes, "cpu")
    expand = _expander(mask, mask.dense(_bounds(sizes, device), networks), sizes)

    def project_all(inputs: Outputs = inputs, target: Tensor = target) -> Outputs:
        return _with_gradient(naive_loss(torch.nn.functional.linear(*inputs), target, expand()), *inputs)

    def ours(chosen: MaskSpec | None = None) -> Outputs:
        # As in training: on the host their number is known without waiting for the device.
        rows = (chosen or step()).rows(host).to(device, non_blocking=True)
        return _with_gradient(linear_masked_loss(*inputs, target, None, rows=rows), *inputs)

    exact = tuple(leaf.detach().float().requires_grad_() for leaf in inputs)
    bounds = (LOSS_BOUND[kind], *[LINEAR_GRADIENT_BOUND[kind]] * len(inputs))
    require_close(case, ours(mask), project_all(exact, target.float()), bounds)
    masked = int(mask.rows(host).numel())
    # Hidden states and targets that are masked, all hidden states' gradient, and the weight three times: read
    # forward and backward, its gradient written.
    least = masked * (2 * width + networks) + tokens * width + 3 * networks * width
    times = timing.interleave({"ours": ours, "project_all": project_all}, device=device, seconds=seconds)
    # A product forward, two backward.
    flops = 6 * masked * width * networks
    memory = _memory_row(case, ours, project_all, "project_all", device)
    return [*_rows(case, times, kind, device, hidden.element_size() * least, flops), memory]


def _mask_tokens(
    case: str, mask: MaskSpec, sizes: Sizes, kind: str, seconds: float, device: str
) -> list[Row]:
    x, upstream = (_random(sizes.tokens, sizes.networks, kind, device) for _ in range(2))
    bounds, step = _bounds(sizes, device), _following(mask)
    token = torch.randn(sizes.networks, device=device, dtype=x.dtype, requires_grad=True)
    dense = mask.dense(bounds, sizes.networks)
    expand = _expander(mask, dense, sizes)

    def naive(token: Tensor = token, x: Tensor = x, upstream: Tensor = upstream) -> Outputs:
        out = torch.where(expand() == 1, token.expand(*x.shape), x)
        return out, torch.autograd.grad(out, token, upstream)[0]

    def ours(chosen: MaskSpec | None = None) -> Outputs:
        out = mask_tokens(x, chosen or step(), token, cu_seqlens=bounds)
        return out, torch.autograd.grad(out, token, upstream)[0]

    exact = token.detach().float().requires_grad_()
    bounds_of = (LOSS_BOUND[kind], GRADIENT_BOUND[kind])
    require_close(case, ours(mask), naive(exact, x.float(), upstream.float()), bounds_of)
    # Read and written once, and of the gradient what is masked.
    least = x.element_size() * x.numel() * (2 + float(dense.float().mean()))
    times = timing.interleave({"ours": ours, "naive": naive}, device=device, seconds=seconds)
    return _rows(case, times, kind, device, least)


def _rows(
    case: str, times: dict[str, Timing], kind: str, device: str, nbytes: float, flops: float = 0.0
) -> list[Row]:
    found = speed_rows("kernels", case, times, floor=floor(nbytes, flops, device, TYPES[kind]))
    return found + roofline_rows(case, times["ours"], nbytes, flops, device, TYPES[kind])


def _memory_row(
    case: str, ours: Callable[[], object], theirs: Callable[[], object], baseline: str, device: str
) -> Row:
    mine, other = peak_bytes(ours, device), peak_bytes(theirs, device)
    return Row(
        suite="kernels", case=case, metric="peak_memory", value=mine / 1e6, unit="MB", baseline=baseline,
        ratio=other / mine,
    )  # fmt: skip


def _case(operator: str, mask: str, kind: str, sizes: Sizes) -> str:
    parts = [operator, mask, *([] if kind == "fp32" else [kind])]
    if sizes != USUAL:
        parts.append(f"{sizes.windows}x{sizes.time}x{sizes.networks}x{sizes.width}")
    return "/".join(parts)


def _compiles(device: str) -> bool:
    if device == "cpu" and shutil.which("g++") is None:
        print("kernels: torch.compile is left out, on the CPU it needs g++", file=sys.stderr)
        return False
    return True


def _random(rows: int, columns: int, kind: str, device: str) -> Tensor:
    return torch.randn(rows, columns, device=device).to(TYPES[kind])


def _bounds(sizes: Sizes, device: str) -> Tensor:
    return torch.arange(0, sizes.tokens + 1, sizes.time, dtype=torch.int32, device=device)


def _following(mask: MaskSpec) -> Callable[[], MaskSpec]:
    """Return a function that gives the mask of the next step, so that no draw is ever reused."""
    steps = itertools.count(1)
    return lambda: replace(mask, offset=next(steps))


def _expander(mask: MaskSpec, dense: Tensor, sizes: Sizes) -> Callable[[], Tensor]:
    """Return what makes the int64 mask of the data's size, as the naive form does in every step."""
    windows, time, networks = sizes.windows, sizes.time, sizes.networks
    small = dense[:, :1].clone() if mask.by_rows else dense.view(windows, time, networks)[:, 0].clone()

    def expand() -> Tensor:
        if mask.by_rows:
            return small.long().repeat(1, networks)
        return small[:, None].long().repeat(1, time, 1).view(windows * time, networks)

    return expand


def _step(loss: Callable[[], Tensor], *inputs: Tensor) -> Outputs:
    return _with_gradient(loss(), *inputs)


def _with_gradient(loss: Tensor, *inputs: Tensor) -> Outputs:
    return (loss, *torch.autograd.grad(loss, inputs))
