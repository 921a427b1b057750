"""Attention over packed windows and gathering of windows, against what a user would run instead."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from brainflow.kernels.gather_windows import gather_windows
from brainflow.kernels.testing import error_ratio
from brainflow.kernels.varlen_attention import attention, shifted_attention

from .ceilings import floor, roofline_rows
from .timing import Row, WrongResultError, interleave, speed_rows

HEADS, HEAD_DIM = 12, 64
TOLERANCE = 1e-5


def measurements(quick: bool, device: str) -> dict[str, Callable[[], list[Row]]]:
    """Return name → what measures it, forward + backward where there is a backward."""
    repeats, windows = (3, 64) if quick else (5, 256)  # a full run has many processes
    found: dict[str, Callable[[], list[Row]]] = {}
    found["varlen_attention"] = partial(_attention_rows, repeats, device)
    for name, dtype in (("fp16", torch.float16), ("fp32", torch.float32), ("int8", torch.int8)):
        case = "gather_windows" if name == "fp16" else f"gather_windows/{name}"
        found[case] = partial(_gather_rows, case, dtype, quick, device, windows)
    return found


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

    def pad(x: Tensor) -> Tensor:
        # Not torch's pad_sequence: its backward copies the whole padded gradient once for every window.
        return x.new_zeros(*valid.shape, HEADS, HEAD_DIM).index_put((valid,), x)

    def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (pad(x).transpose(1, 2) for x in (q, k, v))
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
    causal_pairs = sum(n * (n + 1) // 2 for n in lengths)
    flops = 14 * causal_pairs * HEADS * HEAD_DIM  # two products forward, five backward
    nbytes = 12 * q.numel() * q.element_size()  # forward: q, k, v, out; backward: these and their gradients
    lowest = floor(nbytes, flops, device, dtype)
    found = speed_rows(
        "kernels", "varlen_attention", times, baselines=("padded", "block_diagonal"), floor=lowest
    )
    found += speed_rows(
        "kernels", "shifted_attention", times, ours="second_stream", baselines=(), floor=lowest
    )
    return found + roofline_rows("varlen_attention", times["ours"], nbytes, flops, device, dtype)


def _gather_rows(case: str, dtype: torch.dtype, quick: bool, device: str, windows: int) -> list[Row]:
    """Windows of a store in memory, to packed float32."""
    rng = np.random.default_rng(0)
    time, networks = 20_000, 1_024
    lengths = rng.integers(10, 50, windows)
    starts = rng.integers(0, time - 50, windows)
    pairs = list(zip(starts.tolist(), lengths.tolist(), strict=True))
    generator = torch.Generator().manual_seed(0)
    store = (torch.randn(time, networks, generator=generator) * 30).to(device, dtype)
    scale = None if dtype.is_floating_point else torch.full((networks,), 0.03, device=device)

    def naive() -> Tensor:
        packed = torch.cat([store[s : s + n] for s, n in pairs]).float()
        return packed if scale is None else packed * scale

    def ours() -> Tensor:
        return gather_windows(store, starts, lengths, scale=scale)

    _require_equal(case, (ours(),), [naive().double()], 1e-6)
    times = interleave({"ours": ours, "naive": naive}, device=device, seconds=0.5 if quick else 1.0)
    nbytes = int(lengths.sum()) * networks * (4 + store.element_size())
    found = speed_rows("kernels", case, times, floor=floor(nbytes, 0, device))
    return found + roofline_rows(case, times["ours"], nbytes, 0, device)


def _require_equal(case: str, actual: tuple[Tensor, ...], expected: list[Tensor], bound: float) -> None:
    """Refuse to print the speed of something whose result is wrong."""
    for a, e in zip(actual, expected, strict=True):
        if error_ratio(a, e) > bound:
            raise WrongResultError(f"{case}: error {error_ratio(a, e):.1e} above {bound:.0e}")
