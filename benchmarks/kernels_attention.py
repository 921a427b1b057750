"""Attention over packed windows and gathering of windows, against what a user would run instead."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from brainflow.kernels.gather_windows import gather_windows
from brainflow.kernels.testing import error_ratio
from brainflow.kernels.varlen_attention import attention, shifted_attention

from .timing import Row, Timing, interleave

HEADS, HEAD_DIM = 12, 64
TOLERANCE = 1e-5


def run(quick: bool, device: str) -> list[Row]:
    """Return the rows of varlen_attention and gather_windows, forward + backward where there is one."""
    repeats = 3 if quick else 7
    return _attention_rows(repeats, device) + _gather_rows(repeats, device, windows=64 if quick else 256)


def _attention_rows(repeats: int, device: str) -> list[Row]:
    lengths = np.random.default_rng(0).integers(10, 50, 64).tolist()
    tokens, longest = sum(lengths), max(lengths)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    q, k, v, upstream = (
        torch.randn(tokens, HEADS, HEAD_DIM, generator=generator).to(device, dtype) for _ in range(4)
    )
    edges = torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32, device=device)
    valid = torch.arange(longest, device=device) < edges.diff()[:, None]
    causal = torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
    padded_mask = valid[:, None, None, :] & causal
    window = torch.repeat_interleave(torch.arange(len(lengths), device=device), edges.diff())
    block_mask = (window[:, None] == window) & torch.ones_like(window[:, None] == window).tril()

    def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (pad_sequence(x.split(lengths), batch_first=True).transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=padded_mask).transpose(1, 2)[valid]

    def block_diagonal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=block_mask)[0].transpose(0, 1)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attention(q, k, v, edges, longest, causal=True)
        assert isinstance(out, Tensor)  # no log-sum-exp was asked for
        return out

    def second_stream(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return shifted_attention(q, k, v, k, v, edges, longest)

    def step(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = function(*leaves)
        return (out, *torch.autograd.grad(out, leaves, upstream))

    exact = [x.double() for x in step(ours)]
    for other in (padded, block_diagonal):
        _require_equal("varlen_attention", step(other), exact, 2e-2 if device == "cuda" else TOLERANCE)
    times = interleave(
        {
            "ours": lambda: step(ours),
            "padded": lambda: step(padded),
            "block_diagonal": lambda: step(block_diagonal),
            "second_stream": lambda: step(second_stream),
        },
        repeats=repeats,
        device=device,
    )
    case = f"varlen_attention 64×10–49, {HEADS}×{HEAD_DIM}"
    floor = _copy_floor(8 * q.numel() * q.element_size(), repeats, device)
    rows = [
        _row(case, "forward + backward", times["ours"], baseline, times[baseline], floor)
        for baseline in ("padded", "block_diagonal")
    ]
    return [
        *rows,
        _row("shifted_attention, same", "forward + backward", times["second_stream"], None, None, floor),
    ]


def _gather_rows(repeats: int, device: str, windows: int) -> list[Row]:
    rng = np.random.default_rng(0)
    time, networks = 20_000, 1_024
    lengths = rng.integers(10, 50, windows)
    starts = rng.integers(0, time - 50, windows)
    pairs = list(zip(starts.tolist(), lengths.tolist(), strict=True))
    rows = []
    for name, dtype in (("fp32", torch.float32), ("fp16", torch.float16), ("int8", torch.int8)):
        generator = torch.Generator().manual_seed(0)
        store = (torch.randn(time, networks, generator=generator) * 30).to(device, dtype)
        scale = None if dtype.is_floating_point else torch.full((networks,), 0.03, device=device)

        def naive(store: Tensor = store, scale: Tensor | None = scale) -> Tensor:
            packed = torch.cat([store[s : s + n] for s, n in pairs]).float()
            return packed if scale is None else packed * scale

        def ours(store: Tensor = store, scale: Tensor | None = scale) -> Tensor:
            return gather_windows(store, starts, lengths, scale=scale)

        _require_equal("gather_windows", (ours(),), [naive().double()], 1e-6)
        times = interleave({"ours": ours, "naive": naive}, repeats=repeats, device=device)
        values = int(lengths.sum()) * networks
        floor = _copy_floor(values * (4 + store.element_size()), repeats, device)
        case = f"gather_windows {name} → fp32, {windows}×10–49×{networks}"
        rows.append(_row(case, "forward", times["ours"], "naive", times["naive"], floor))
    return rows


def _require_equal(case: str, actual: tuple[Tensor, ...], expected: list[Tensor], bound: float) -> None:
    """Refuse to print the speed of something whose result is wrong."""
    for a, e in zip(actual, expected, strict=True):
        if error_ratio(a, e) > bound:
            raise RuntimeError(
                f"{case}: results differ by {error_ratio(a, e):.1e}, expected at most {bound:.0e}"
            )


def _copy_floor(nbytes: int, repeats: int, device: str) -> float:
    """Return the seconds that moving as many bytes (read + written) takes in one copy."""
    source = torch.ones(max(1, nbytes // 8), device=device)
    target = torch.empty_like(source)
    return interleave({"copy": lambda: target.copy_(source)}, repeats=repeats, device=device)["copy"].p50


def _row(
    case: str, metric: str, ours: Timing, baseline: str | None, other: Timing | None, floor: float
) -> Row:
    return Row(
        suite="kernels",
        case=case,
        metric=metric,
        value=ours.p50 * 1e3,
        unit="ms",
        baseline=baseline or "",
        ratio=None if other is None else other.p50 / ours.p50,
        floor_share=floor / ours.p50,
        p20=ours.p20,
        p50=ours.p50,
        p80=ours.p80,
    )
