"""Attention over packed windows, forward and backward, and gathering of windows, beside what users would run.

`padded` pads every window to the longest, `block_diagonal` masks one long sequence; both are torch's scaled
dot-product attention. Every backend that is installed has a row of its own against the one that is chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from brainflow.kernels.gathering import gather_windows
from brainflow.kernels.varlen_attention import attention, qkv_attention, shifted_attention
from brainflow.kernels.varlen_attention.backends import BACKENDS

from . import timing
from .roofline import TYPES, floor, roofline_rows
from .timing import Row, require_close, speed_rows

HEADS, HEAD_DIM, WINDOWS = 12, 64, 64
STORE = (20_000, 1_024)
"""Time points and networks of the array that windows are gathered from."""
BOUND = {"fp32": 1e-5, "bf16": 2e-2}
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def measurements(quick: bool, device: str) -> dict[str, Callable[[], list[Row]]]:
    """Return name → what measures it; `quick` takes fewer repeats and windows."""
    repeats, windows = (3, 64) if quick else (5, 256)
    found: dict[str, Callable[[], list[Row]]] = {"varlen_attention": partial(_attention, repeats, device)}
    for name, dtype in (("fp16", torch.float16), ("fp32", torch.float32), ("int8", torch.int8)):
        case = "gather_windows" if name == "fp16" else f"gather_windows/{name}"
        found[case] = partial(_gather, case, dtype, quick, device, windows)
    return found


def _attention(repeats: int, device: str) -> list[Row]:
    kind = "bf16" if device == "cuda" else "fp32"
    lengths = np.random.default_rng(0).integers(10, 50, WINDOWS).tolist()
    # Of the CPU, so that every device is given the same numbers.
    generator = torch.Generator().manual_seed(0)
    q, k, v, upstream = (
        torch.randn(sum(lengths), HEADS, HEAD_DIM, generator=generator).to(device, TYPES[kind])
        for _ in range(4)
    )
    edges = torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32, device=device)
    longest = max(lengths)

    def step(attend: Attend) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = attend(*leaves)
        return (out, *torch.autograd.grad(out, leaves, upstream))

    def backend(q: Tensor, k: Tensor, v: Tensor, impl: str | None = None) -> Tensor:
        out = attention(q, k, v, edges, longest, causal=True, impl=impl)
        assert isinstance(out, Tensor)  # no log-sum-exp was asked for
        return out

    theirs: dict[str, Attend] = {"padded": _padded(edges, longest), "block_diagonal": _block_diagonal(edges)}
    backends: dict[str, Attend] = {name: partial(backend, impl=name) for name in BACKENDS}
    backends = {name: attend for name, attend in backends.items() if _runs(partial(attend, q, k, v))}
    # Agreement is enough here: against float64 they are compared in `conformance`.
    exact = [x.double() for x in step(backend)]
    for other in (*theirs.values(), *backends.values()):
        require_close("varlen_attention", step(other), exact, [BOUND[kind]] * 4)
    ways: dict[str, Attend] = {"ours": backend, **theirs}
    ways["second_stream"] = lambda q, k, v: shifted_attention(q, k, v, k, v, edges, longest)
    # A single backend is what `ours` runs already.
    if len(backends) > 1:
        ways |= backends
    calls = {name: partial(step, way) for name, way in ways.items()}
    times = timing.interleave(calls, repeats=repeats, device=device)
    # Causal: a token sees itself and those before it.
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    flops = 14 * pairs * HEADS * HEAD_DIM  # two products forward, five backward
    nbytes = 12 * q.numel() * q.element_size()  # forward: q, k, v, out; backward: these and their gradients
    lowest = floor(nbytes, flops, device, TYPES[kind])
    rows = partial(speed_rows, "kernels", floor=lowest)
    found = rows("varlen_attention", times, baselines=tuple(theirs))
    found += rows("shifted_attention", times, ours="second_stream", baselines=())
    for name in backends if len(backends) > 1 else ():
        found += rows(f"varlen_attention/{name}", times, ours=name, baselines=("ours",))
    return found + roofline_rows("varlen_attention", times["ours"], nbytes, flops, device, TYPES[kind])


def race(
    shortest: int,
    longest: int,
    windows: int,
    seconds: float,
    device: str,
    dtype: torch.dtype,
    *,
    heads: int = HEADS,
) -> list[Row]:
    """Return forward + backward times of all backends as a transformer calls them, over the chosen one's.

    Cases are attention/STREAMS/WINDOWS/TYPE/BACKEND, causal.

    Parameters
    ----------
    shortest, longest, windows
        Windows of `shortest` to `longest` tokens, and how many.
    seconds
        For each of the two.
    device, dtype, heads
        Where, in which type, and heads of 64 values each.
    """
    lengths = np.random.default_rng(0).integers(shortest, longest, windows, endpoint=True)
    # Else no window may be as long as the case says.
    lengths[0] = longest
    tokens, edges = int(lengths.sum()), torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32)
    edges = edges.to(device)
    name = f"{shortest}-{longest}x{windows}/{str(dtype)[6:]}"
    found = []
    for streams, count in (("one", 1), ("two", 2)):
        generator = torch.Generator().manual_seed(0)
        given = torch.randn(count * tokens, 4, heads, HEAD_DIM, generator=generator).to(device, dtype)
        qkv, upstream = given[:, :3].contiguous().requires_grad_(), given[:, 3].contiguous()

        def step(
            impl: str | None, qkv: Tensor = qkv, upstream: Tensor = upstream, streams: str = streams
        ) -> Tensor:
            out = qkv_attention(qkv, edges, longest, causal=True, streams=streams, impl=impl)
            return torch.autograd.grad(out, qkv, upstream)[0]

        ways = {way: partial(step, way) for way in BACKENDS if _runs(partial(step, way))}
        if len(ways) > 1:  # a turn lasts as long as that of the slowest, which is known to be
            del ways["fallback"]
        ways["chosen"] = partial(step, None)
        times = timing.interleave(ways, repeats=3, seconds=seconds, device=device)
        for backend in ways:
            found += speed_rows(
                "kernels", f"attention/{streams}/{name}/{backend}", times, ours=backend,
                baselines=() if backend == "chosen" else ("chosen",),
            )  # fmt: skip
    return found


def _padded(edges: Tensor, longest: int) -> Attend:
    valid = torch.arange(longest, device=edges.device) < edges.diff()[:, None]
    causal = torch.ones(longest, longest, dtype=torch.bool, device=edges.device).tril()
    mask = valid[:, None, None, :] & causal

    def pad(x: Tensor) -> Tensor:
        # Not torch's pad_sequence: its backward copies the whole padded gradient once for every window.
        return x.new_zeros(*valid.shape, HEADS, HEAD_DIM).index_put((valid,), x)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (pad(x).transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)[valid]

    return attend


def _block_diagonal(edges: Tensor) -> Attend:
    window = torch.repeat_interleave(torch.arange(len(edges) - 1, device=edges.device), edges.diff())
    same = window[:, None] == window
    mask = same & torch.ones_like(same).tril()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)

    return attend


def _runs(call: Callable[[], object]) -> bool:
    """Whether a backend of attention computes this here."""
    try:
        call()
    except (ValueError, TypeError):  # not installed, or it says that it cannot
        return False
    return True


def _gather(case: str, dtype: torch.dtype, quick: bool, device: str, windows: int) -> list[Row]:
    """Measure windows of a store in memory, to packed float32."""
    rng = np.random.default_rng(0)
    time, networks = STORE
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

    require_close(case, [ours()], [naive()], [1e-6])
    ways = {"ours": ours, "naive": naive}
    times = timing.interleave(ways, device=device, seconds=0.5 if quick else 1.0)
    # Read once in the store's type, written once as float32.
    nbytes = int(lengths.sum()) * networks * (4 + store.element_size())
    found = speed_rows("kernels", case, times, floor=floor(nbytes, 0, device))
    return found + roofline_rows(case, times["ours"], nbytes, 0, device)
