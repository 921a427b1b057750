"""Every op on a device against its float64 specification: what tests run and `brainflow bench gpu`.

A comparison returns its largest error as a share of what rounding allows: at most 1 where the op is right,
infinite where something differs that must be equal to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import accumulate, product
from typing import Any

import torch
from torch import Tensor

from .feedback import decode_freely
from .gathering import gather_windows
from .linear_loss import linear_masked_loss
from .loss import masked_loss
from .masking import mask_tokens
from .masks import MaskSpec
from .varlen_attention import attention, qkv_attention, shifted_attention
from .varlen_attention.backends import BACKENDS, why_not

# A window without a second time point, and one longer than a tile of 16 rows.
LENGTHS = (7, 1, 30, 12)
# 333: rows that are not aligned, more than one subtile of 256, and the last one partly filled.
NETWORKS, WIDTH, HEADS, HEAD_DIM = 333, 24, 2, 64
MASKS = {
    # Beyond int64 and int32: signs must not matter.
    "time_points": MaskSpec.time_points(0.3, seed=2**63 + 5, offset=2**31 + 1),
    "spans": MaskSpec.spans(0.3, 3, seed=1),
    "position": MaskSpec.position(seed=2),
    "networks": MaskSpec.networks(0.3, seed=3),
    "tubes": MaskSpec.tubes(0.3, 4, seed=4),
    "entries": MaskSpec.entries(0.3, seed=5),
    "all_valid": MaskSpec.all_valid(),
}
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
"""Element type → relative error (L2) that is allowed."""
ATTENTION_BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
STORES = (torch.float32, torch.float16, torch.bfloat16, torch.int16, torch.int8)
FORMS = ("causal", "both directions", "second stream", "two streams")
Comparison = Callable[[], float]


class NotHereError(Exception):
    """What was to be compared does not run on this device; the message says why."""


def ops(
    device: str,
    *,
    impl: str | None = None,
    lengths: Sequence[int] = LENGTHS,
    networks: int = NETWORKS,
    masks: Iterable[str] = tuple(MASKS),
    dtypes: Iterable[torch.dtype] = tuple(BOUNDS),
) -> dict[str, Comparison]:
    """Return name → comparison of every op but attention, for every mask and element type.

    Parameters
    ----------
    device
        "cpu" or "cuda".
    impl
        Face of the ops; None: the device's own.
    lengths, networks
        Sizes: time points of each window, networks.
    masks, dtypes
        Names of masks, element types.

    Examples
    --------
    >>> ops("cpu")["masked_loss/spans/float32/l1"]() <= 1
    True
    """
    found: dict[str, Comparison] = {}
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    for dtype, scheme in product(dtypes, masks):
        name, given = f"{scheme}/{str(dtype)[6:]}", (device, impl, bounds, networks, MASKS[scheme], dtype)
        for loss in ("l1", "huber"):
            found[f"masked_loss/{name}/{loss}"] = partial(_masked_loss, *given, loss)
        found[f"linear_masked_loss/{name}/mse"] = partial(_linear_masked_loss, *given)
        for token, by_position in (("network", False), ("position", True)):
            found[f"mask_tokens/{name}/{token}"] = partial(_mask_tokens, *given, by_position)
    for dtype in dtypes:
        found[f"decode_freely/{str(dtype)[6:]}"] = partial(_decode_freely, device, impl, lengths, dtype)
    for store in STORES:
        found[f"gather_windows/{str(store)[6:]}"] = partial(
            _gather_windows, device, impl, lengths, networks, store
        )
    return found


def attentions(
    device: str,
    *,
    backends: Iterable[str] = tuple(BACKENDS),
    longest: Iterable[int] = (16, 49, 200),
    head_dims: Iterable[int] = (HEAD_DIM,),
    dtypes: Iterable[torch.dtype] = tuple(BOUNDS),
) -> dict[str, Comparison]:
    """Return name → comparison of every attention backend, form and length of the longest window.

    A comparison raises :class:`NotHereError` where its backend does not run.
    """
    return {
        f"{backend}/{form}/{length}/{head_dim}/{str(dtype)[6:]}": partial(
            _attention, device, backend, form, length, head_dim, dtype
        )
        for backend, form, length, head_dim, dtype in product(backends, FORMS, longest, head_dims, dtypes)
    }


def _draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _gradients(function: Callable[..., Any], *inputs: Tensor, upstream: Tensor | None = None) -> list[Tensor]:
    """Return the result and the gradients of the inputs, all on the CPU."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    seed = torch.ones_like(out) if upstream is None else upstream.to(out)
    return [x.cpu() for x in (out.detach(), *torch.autograd.grad(out, leaves, seed))]


def _share(found: Sequence[Tensor], expected: Sequence[Tensor], bound: float, *equal: bool) -> float:
    """Return the largest error ÷ bound; infinite if not all of `equal` holds."""
    if not all(equal):
        return float("inf")
    errors = (error_ratio(got, wanted) / bound for got, wanted in zip(found, expected, strict=True))
    return max(errors, default=0.0)


def _masked_loss(
    device: str,
    impl: str | None,
    bounds: Tensor,
    networks: int,
    mask: MaskSpec,
    dtype: torch.dtype,
    loss: str,
) -> float:
    shape = (int(bounds[-1]), networks)
    pred, target = _draw(*shape, dtype=dtype), _draw(*shape, dtype=dtype, seed=1)
    there, on = target.to(device), bounds.to(device)
    found = _gradients(
        lambda p: masked_loss(p, there, mask, loss=loss, cu_seqlens=on, impl=impl), pred.to(device)
    )
    expected = _gradients(
        lambda p: masked_loss(p, target.double(), mask, loss=loss, cu_seqlens=bounds, impl="naive"),
        pred.double(),
    )
    # The slope of huber may be too small for float16.
    same = loss == "huber" or torch.equal(found[1] == 0, expected[1] == 0)
    return _share(found, expected, BOUNDS[dtype], same)


def _linear_masked_loss(
    device: str, impl: str | None, bounds: Tensor, networks: int, mask: MaskSpec, dtype: torch.dtype
) -> float:
    shapes = ((int(bounds[-1]), WIDTH), (networks, WIDTH), (networks,), (int(bounds[-1]), networks))
    *operands, target = (_draw(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes))
    rows = mask.rows(bounds) if mask.by_rows else None

    def loss(*inputs: Tensor, impl: str | None) -> Tensor:
        on = inputs[0].device
        at = None if rows is None else rows.to(on)
        hidden, weight, bias = inputs
        goal, edges = target.to(on, hidden.dtype), bounds.to(on)
        return linear_masked_loss(
            hidden, weight, bias, goal, mask, rows=at, cu_seqlens=edges, loss="mse", impl=impl
        )

    found = _gradients(partial(loss, impl=impl), *(x.to(device) for x in operands))
    expected = _gradients(partial(loss, impl="naive"), *(x.double() for x in operands))
    return _share(found, expected, BOUNDS[dtype])


def _mask_tokens(
    device: str,
    impl: str | None,
    bounds: Tensor,
    networks: int,
    mask: MaskSpec,
    dtype: torch.dtype,
    by_position: bool,
) -> float:
    shape = (int(bounds[-1]), networks)
    x, upstream = _draw(*shape, dtype=dtype), _draw(*shape, dtype=dtype, seed=3)
    token = _draw(*((int(bounds.diff().max()), 1) if by_position else (networks,)), seed=2)
    on = bounds.to(device)
    found = _gradients(
        lambda a, t: mask_tokens(a, mask, t, cu_seqlens=on, impl=impl),
        x.to(device), token.to(device), upstream=upstream,
    )  # fmt: skip
    expected = _gradients(
        lambda a, t: mask_tokens(a, mask, t, cu_seqlens=bounds, impl="naive"),
        x.double(), token.to(dtype).double(), upstream=upstream,
    )  # fmt: skip
    same = (torch.equal(found[i].double(), expected[i]) for i in (0, 1))
    return _share(found[2:], expected[2:], BOUNDS[torch.float32], *same)


def _gather_windows(
    device: str, impl: str | None, lengths: Sequence[int], networks: int, store: torch.dtype
) -> float:
    values = (_draw(200, networks) * 30).to(store)
    scale = None if store.is_floating_point else _draw(networks, seed=4).abs()
    starts = [(3 + 57 * i) % (200 - length) for i, length in enumerate(lengths)]
    expected = gather_windows(values, starts, lengths, scale=scale, impl="naive")
    there = None if scale is None else scale.to(device)
    found = gather_windows(values.to(device), starts, lengths, scale=there, impl=impl)
    return _share([], [], 1.0, torch.equal(found.cpu(), expected))


def _decode_freely(device: str, impl: str | None, lengths: Sequence[int], dtype: torch.dtype) -> float:
    sizes = tuple(sum(length > step for length in lengths) for step in range(max(lengths)))
    windows, tokens, gates, layers = len(lengths), sum(lengths), 4 * WIDTH, 2
    ends = list(accumulate(sizes))
    previous = torch.cat(
        [torch.arange(n) + begin for n, begin in zip(sizes, [tokens, 0, *ends], strict=False)]
    )
    shapes = [(windows, WIDTH), (gates,), (WIDTH, WIDTH), (WIDTH,)]
    shapes += [(gates, WIDTH), (gates, WIDTH), (gates,)] * layers
    operands = [(0.3 * _draw(*shape, seed=i)).to(dtype) for i, shape in enumerate(shapes)]
    operands += [_draw(WIDTH, seed=i) for i in (20, 21)]
    keep = torch.rand(layers, tokens, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)

    def decode(*inputs: Tensor, impl: str | None) -> Tensor:
        start, first_bias, output, output_bias, *flat, weight, bias = inputs
        low = [(flat[i], flat[i + 1], flat[i + 2]) for i in range(0, len(flat), 3)]
        given = (start, first_bias, output, output_bias, keep.to(start))
        return decode_freely(sizes, previous.to(start.device), 1e-5, *given, low, [(weight, bias)], impl=impl)

    upstream = _draw(tokens, WIDTH, seed=30)
    found = _gradients(partial(decode, impl=impl), *(x.to(device) for x in operands), upstream=upstream)
    expected = _gradients(partial(decode, impl="naive"), *(x.double() for x in operands), upstream=upstream)
    return _share(found, expected, 5 * BOUNDS[dtype])  # rounding adds up over steps


def _attention(
    device: str, backend: str, form: str, longest: int, head_dim: int, dtype: torch.dtype
) -> float:
    lengths = [1, longest, min(17, longest), longest // 2]
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    shape: tuple[int, ...] = (sum(lengths), HEADS, head_dim)
    inputs = [_draw(*shape, dtype=dtype, seed=i) for i in range(5 if form == "second stream" else 3)]
    asked = 2 * longest if "stream" in form else longest
    if reason := why_not(backend, inputs[0].to(device), len(lengths), asked, 0.0):
        raise NotHereError(f"{backend}: {reason}")

    def attend(*inputs: Tensor, impl: str) -> Any:
        on = bounds.to(inputs[0].device)
        if form == "two streams":
            return qkv_attention(inputs[0], on, longest, streams="two", impl=impl)
        op: Any = shifted_attention
        if form != "second stream":
            op = partial(attention, causal=form == "causal")
        return op(*inputs, on, longest, impl=impl)

    if form == "two streams":
        shape = (2 * sum(lengths), HEADS, head_dim)
        inputs = [_draw(2 * sum(lengths), 3, HEADS, head_dim, dtype=dtype)]
    upstream = _draw(*shape, seed=9)
    found = _gradients(partial(attend, impl=backend), *(x.to(device) for x in inputs), upstream=upstream)
    expected = _gradients(partial(attend, impl="naive"), *(x.double() for x in inputs), upstream=upstream)
    return _share(found, expected, ATTENTION_BOUNDS[dtype])


def error_ratio(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return ‖actual − expected‖ / ‖expected‖ in float64 (0 if both are zero, inf if only one is).

    NaN anywhere in `actual` gives inf, so that a comparison with a bound cannot pass by accident.

    Examples
    --------
    >>> error_ratio(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))
    0.0
    """
    if actual.shape != expected.shape:
        raise ValueError(f"actual: got shape {list(actual.shape)}, expected {list(expected.shape)}")
    a, e = actual.detach().double(), expected.detach().double()
    if not bool(torch.isfinite(a).all()):
        return float("inf")
    error, norm = float((a - e).norm()), float(e.norm())
    if error == 0.0:
        return 0.0
    return error / norm if norm > 0 else float("inf")
