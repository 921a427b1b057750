"""A decoder of LSTM layers that reads its own output: one kernel a layer and step, where loops take dozens.

Layer i reads x_i and its hidden state h_i; x_(i+1) = keep · LayerNorm(x_i + h_i) goes up. What the next step
reads, x_0, is the projection of keep · h of the last layer. The projection is part of the lowest layer's
weights (`inputs[0]` is their product), so no step waits for it; x_0 itself is only needed for the sum.

A program computes the four gates of R windows and C units, and from them cell and hidden state. Windows that
have ended are at the end of a step's rows (time-major, sorted from long to short), so rows of one step are a
prefix of those of the step before. Backward, a program turns gradients of R hidden states and C units into
those of their gates; gradients of weights are one product each over all steps.

Legend: T tokens, time-major; W windows; H width; L layers. Gates in PyTorch's order i, f, g, o.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

R, C, K = 32, 32, 32


@triton.jit
def moments(pre, row, inside, width, eps, K: tl.constexpr):
    """Return mean and 1 / standard deviation of rows [R] of `pre`."""
    total = tl.sum(tl.zeros_like(row).to(tl.float32)[:, None] + tl.zeros([1, K], tl.float32), 1)
    squares = total
    for first in range(0, width, K):
        k = first + tl.arange(0, K)
        mask = inside[:, None] & (k < width)[None, :]
        total += tl.sum(tl.load(pre + row[:, None] * width + k[None, :], mask=mask, other=0.0), 1)
    mean = total / width
    # A second pass: the mean of squares minus the square of the mean would cancel.
    for first in range(0, width, K):
        k = first + tl.arange(0, K)
        mask = inside[:, None] & (k < width)[None, :]
        value = tl.load(pre + row[:, None] * width + k[None, :], mask=mask, other=0.0)
        away = tl.where(mask, value - mean[:, None], 0.0)
        squares += tl.sum(away * away, 1)
    return mean, 1.0 / tl.sqrt(squares / width + eps)


@triton.jit
def normed(pre, keep, gamma, beta, row, column, mask, mean, scale, width):
    """Return keep · LayerNorm(pre) at rows and columns, float32."""
    at = row[:, None] * width + column[None, :]
    value = (tl.load(pre + at, mask=mask, other=0.0) - mean[:, None]) * scale[:, None]
    there = column < width
    g = tl.load(gamma + column, mask=there, other=0.0).to(tl.float32)
    b = tl.load(beta + column, mask=there, other=0.0).to(tl.float32)
    return tl.load(keep + at, mask=mask, other=0.0).to(tl.float32) * (value * g[None, :] + b[None, :])


@triton.jit
def tanh(x):
    """Return the hyperbolic tangent."""
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit(do_not_specialize=["count"])
def step(
    below, keep, gamma, beta, before, cells_before, inputs, recurrent, bias, output, output_bias,
    gates, cells, hidden, pre, count, width, eps,
    LOWEST: tl.constexpr, TOP: tl.constexpr, START: tl.constexpr, PRECISION: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Compute one layer at one step: gates, cells, hidden states, and x + h for the layer above.

    `below` are the top layer's hidden states of the step before, and `keep` theirs, for the lowest layer;
    x + h of the layer below for the others.
    """
    row = tl.program_id(0) * R + tl.arange(0, R)
    column = tl.program_id(1) * C + tl.arange(0, C)
    inside = row < count
    there = column < width
    square = width * width
    # Each program of a row computes them again: a kernel for them alone would be one more launch a step.
    if not LOWEST:
        mean, scale = moments(below, row, inside, width, eps, K)
    i = tl.zeros([R, C], tl.float32)
    f = tl.zeros([R, C], tl.float32)
    g = tl.zeros([R, C], tl.float32)
    o = tl.zeros([R, C], tl.float32)
    x = tl.zeros([R, C], tl.float32)
    for first in range(0, width, K):
        k = first + tl.arange(0, K)
        mask = inside[:, None] & (k < width)[None, :]
        bound = (k < width)[:, None] & there[None, :]
        at = column[None, :] * width + k[:, None]
        h = tl.load(before + row[:, None] * width + k[None, :], mask=mask, other=0.0)
        w = recurrent + at
        i = tl.dot(h, tl.load(w, mask=bound, other=0.0), i, input_precision=PRECISION)
        f = tl.dot(h, tl.load(w + square, mask=bound, other=0.0), f, input_precision=PRECISION)
        g = tl.dot(h, tl.load(w + 2 * square, mask=bound, other=0.0), g, input_precision=PRECISION)
        o = tl.dot(h, tl.load(w + 3 * square, mask=bound, other=0.0), o, input_precision=PRECISION)
        if not (LOWEST and START):
            if LOWEST:
                u = tl.load(below + row[:, None] * width + k[None, :], mask=mask, other=0.0).to(tl.float32)
                u *= tl.load(keep + row[:, None] * width + k[None, :], mask=mask, other=0.0).to(tl.float32)
                u = u.to(h.dtype)
            else:
                u = normed(below, keep, gamma, beta, row, k, mask, mean, scale, width).to(h.dtype)
            w = inputs + at
            i = tl.dot(u, tl.load(w, mask=bound, other=0.0), i, input_precision=PRECISION)
            f = tl.dot(u, tl.load(w + square, mask=bound, other=0.0), f, input_precision=PRECISION)
            g = tl.dot(u, tl.load(w + 2 * square, mask=bound, other=0.0), g, input_precision=PRECISION)
            o = tl.dot(u, tl.load(w + 3 * square, mask=bound, other=0.0), o, input_precision=PRECISION)
            if LOWEST and not TOP:
                x = tl.dot(u, tl.load(output + at, mask=bound, other=0.0), x, input_precision=PRECISION)
    b = bias + column
    i = tl.sigmoid(i + tl.load(b, mask=there, other=0.0).to(tl.float32)[None, :])
    f = tl.sigmoid(f + tl.load(b + width, mask=there, other=0.0).to(tl.float32)[None, :])
    g = tanh(g + tl.load(b + 2 * width, mask=there, other=0.0).to(tl.float32)[None, :])
    o = tl.sigmoid(o + tl.load(b + 3 * width, mask=there, other=0.0).to(tl.float32)[None, :])
    mask = inside[:, None] & there[None, :]
    at = row[:, None] * width + column[None, :]
    c = f * tl.load(cells_before + at, mask=mask, other=0.0) + i * g
    h = o * tanh(c)
    tl.store(cells + at, c, mask=mask)
    tl.store(hidden + at, h.to(hidden.dtype.element_ty), mask=mask)
    a = gates + row[:, None] * (4 * width) + column[None, :]
    tl.store(a, i, mask=mask)
    tl.store(a + width, f, mask=mask)
    tl.store(a + 2 * width, g, mask=mask)
    tl.store(a + 3 * width, o, mask=mask)
    if not TOP:
        if LOWEST:
            if not START:
                x += tl.load(output_bias + column, mask=there, other=0.0).to(tl.float32)[None, :]
        else:
            x = normed(below, keep, gamma, beta, row, column, mask, mean, scale, width)
        tl.store(pre + at, x + h, mask=mask)


@triton.jit(do_not_specialize=["count", "later"])
def step_backward(
    upstream, keep, pre, gamma, later_gates, recurrent, later_lowest, inputs, later_pre, output,
    gates, cells, cells_before, d_cells, d_gates, d_pre, count, later, width, eps,
    LOWEST: tl.constexpr, TOP: tl.constexpr, END: tl.constexpr, PRECISION: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Turn gradients of a layer's hidden states at one step into those of its gates before activation.

    `upstream` is the gradient of the top layer's hidden states, or of what the layer above reads. `later_…`
    belong to the step after, in which `later` windows still run.
    """
    row = tl.program_id(0) * R + tl.arange(0, R)
    column = tl.program_id(1) * C + tl.arange(0, C)
    inside = row < count
    there = column < width
    mask = inside[:, None] & there[None, :]
    at = row[:, None] * width + column[None, :]
    dh = tl.zeros([R, C], tl.float32)
    fed = tl.zeros([R, C], tl.float32)
    if not END:
        running = row < later
        for first in range(0, 4 * width, K):
            k = first + tl.arange(0, K)
            some = running[:, None] & (k < 4 * width)[None, :]
            bound = (k < 4 * width)[:, None] & there[None, :]
            w = k[:, None] * width + column[None, :]
            d = tl.load(later_gates + row[:, None] * (4 * width) + k[None, :], mask=some, other=0.0)
            dh = tl.dot(d, tl.load(recurrent + w, mask=bound, other=0.0), dh, input_precision=PRECISION)
            if TOP:
                d = tl.load(later_lowest + row[:, None] * (4 * width) + k[None, :], mask=some, other=0.0)
                fed = tl.dot(d, tl.load(inputs + w, mask=bound, other=0.0), fed, input_precision=PRECISION)
        if TOP and not LOWEST:
            for first in range(0, width, K):
                k = first + tl.arange(0, K)
                some = running[:, None] & (k < width)[None, :]
                bound = (k < width)[:, None] & there[None, :]
                d = tl.load(later_pre + row[:, None] * width + k[None, :], mask=some, other=0.0)
                w = tl.load(output + k[:, None] * width + column[None, :], mask=bound, other=0.0)
                fed = tl.dot(d, w, fed, input_precision=PRECISION)
    kept = tl.load(keep + at, mask=mask, other=0.0).to(tl.float32)
    if TOP:
        dh += tl.load(upstream + at, mask=mask, other=0.0).to(tl.float32) + kept * fed
    else:
        mean, scale = moments(pre, row, inside, width, eps, K)
        one = tl.zeros_like(mean)
        both = tl.zeros_like(mean)
        for first in range(0, width, K):
            k = first + tl.arange(0, K)
            some = inside[:, None] & (k < width)[None, :]
            there_k = row[:, None] * width + k[None, :]
            d = tl.load(upstream + there_k, mask=some, other=0.0).to(tl.float32)
            d *= tl.load(keep + there_k, mask=some, other=0.0).to(tl.float32)
            d *= tl.load(gamma + k, mask=k < width, other=0.0).to(tl.float32)[None, :]
            unit = (tl.load(pre + there_k, mask=some, other=0.0) - mean[:, None]) * scale[:, None]
            one += tl.sum(d, 1)
            both += tl.sum(d * tl.where(some, unit, 0.0), 1)
        d = tl.load(upstream + at, mask=mask, other=0.0).to(tl.float32) * kept
        d *= tl.load(gamma + column, mask=there, other=0.0).to(tl.float32)[None, :]
        unit = (tl.load(pre + at, mask=mask, other=0.0) - mean[:, None]) * scale[:, None]
        d = scale[:, None] * (d - (one / width)[:, None] - unit * (both / width)[:, None])
        tl.store(d_pre + at, d.to(d_pre.dtype.element_ty), mask=mask)
        dh += d
    a = gates + row[:, None] * (4 * width) + column[None, :]
    i = tl.load(a, mask=mask, other=0.0)
    f = tl.load(a + width, mask=mask, other=0.0)
    g = tl.load(a + 2 * width, mask=mask, other=0.0)
    o = tl.load(a + 3 * width, mask=mask, other=0.0)
    # Computed again, not kept from the forward pass.
    bent = tanh(tl.load(cells + at, mask=mask, other=0.0))
    dc = dh * o * (1.0 - bent * bent)
    if not END:
        dc += tl.load(d_cells + at, mask=mask & running[:, None], other=0.0)
    # In place: the step before finds here what came to its cells from later ones.
    tl.store(d_cells + at, dc * f, mask=mask)
    out = d_gates + row[:, None] * (4 * width) + column[None, :]
    kind = d_gates.dtype.element_ty
    tl.store(out, (dc * g * i * (1.0 - i)).to(kind), mask=mask)
    c = tl.load(cells_before + at, mask=mask, other=0.0)
    tl.store(out + width, (dc * c * f * (1.0 - f)).to(kind), mask=mask)
    tl.store(out + 2 * width, (dc * i * (1.0 - g * g)).to(kind), mask=mask)
    tl.store(out + 3 * width, (dh * bent * o * (1.0 - o)).to(kind), mask=mask)


def decode_freely(
    sizes: tuple[int, ...],
    previous: Tensor,
    eps: float,
    start: Tensor,
    first_bias: Tensor,
    output: Tensor,
    output_bias: Tensor,
    keep: Tensor,
    layers: list[tuple[Tensor, Tensor, Tensor]],
    norms: list[tuple[Tensor, Tensor]],
) -> Tensor:
    """Return the top layer's hidden states, [T, H]."""
    flat = [tensor for group in (*layers, *norms) for tensor in group]
    result: Tensor = _Decoded.apply(sizes, previous, eps, start, first_bias, output, output_bias, keep, *flat)
    return result


class _Decoded(Function):
    @staticmethod
    def forward(
        ctx: Any,
        sizes: tuple[int, ...],
        previous: Tensor,
        eps: float,
        start: Tensor,
        first_bias: Tensor,
        output: Tensor,
        output_bias: Tensor,
        keep: Tensor,
        *flat: Tensor,
    ) -> Tensor:
        count, tokens, width = keep.shape
        layers, norms = _unflat(flat, count)
        # float32 also beside 16-bit states: rounding would add up from step to step.
        wide: dict[str, Any] = {"dtype": torch.float32, "device": start.device}
        gates = torch.empty(count, tokens, 4 * width, **wide)
        cells, pre = torch.empty(2, count, tokens, width, **wide).unbind(0)
        hidden = [start.new_empty(tokens, width) for _ in layers]
        nothing = torch.zeros(len(start), width, **wide)
        top = count - 1
        with torch.cuda.device_of(start):
            for number, (begin, end, last) in enumerate(_steps(sizes)):
                n, first = end - begin, number == 0
                for i, (inputs, recurrent, bias) in enumerate(layers):
                    below = hidden[top][last:] if i == 0 else pre[i - 1, begin:]
                    kept = keep[top, last:] if i == 0 else keep[i - 1, begin:]
                    gamma, beta = norms[max(i - 1, 0)] if norms else (bias, bias)
                    step[_grid(n, width)](
                        below, kept, gamma, beta, start if first else hidden[i][last:],
                        nothing if first else cells[i, last:], inputs, recurrent,
                        first_bias if first and i == 0 else bias, output, output_bias,
                        gates[i, begin:], cells[i, begin:], hidden[i][begin:], pre[i, begin:], n, width, eps,
                        LOWEST=i == 0, TOP=i == top, START=first, PRECISION=_precision(), R=R, C=C, K=K,
                    )  # fmt: skip
        ctx.save_for_backward(start, output, keep, previous, gates, cells, pre, nothing, *hidden, *flat)
        ctx.sizes, ctx.eps = sizes, eps
        return hidden[top]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        start, output, keep, _, gates, cells, pre, nothing, *rest = ctx.saved_tensors
        count, tokens, width = keep.shape
        layers, norms = _unflat(rest[count:], count)
        d_gates = start.new_empty(count, tokens, 4 * width)
        d_pre, read = start.new_empty(2, count, tokens, width).unbind(0)
        d_cells = nothing.new_empty(count, len(start), width)
        top, upstream, steps = count - 1, upstream.contiguous(), list(_steps(ctx.sizes))
        with torch.cuda.device_of(start):
            for number in reversed(range(len(steps))):
                begin, end, last = steps[number]
                n, ended = end - begin, number == len(steps) - 1
                after, later = (0, 0) if ended else (end, steps[number + 1][1] - end)
                for i in reversed(range(count)):
                    inputs, recurrent, _ = layers[i]
                    gamma = norms[min(i, top - 1)][0] if norms else recurrent
                    step_backward[_grid(n, width)](
                        upstream[begin:] if i == top else read[i, begin:], keep[i, begin:], pre[i, begin:],
                        gamma, d_gates[i, after:], recurrent, d_gates[0, after:], layers[0][0],
                        d_pre[0, after:], output, gates[i, begin:], cells[i, begin:],
                        cells[i, last:] if number else nothing, d_cells[i], d_gates[i, begin:],
                        d_pre[i, begin:], n, later, width, ctx.eps,
                        LOWEST=i == 0, TOP=i == top, END=ended, PRECISION=_precision(), R=R, C=C, K=K,
                    )  # fmt: skip
                    if i > 0:
                        torch.mm(d_gates[i, begin:end], inputs, out=read[i - 1, begin:end])
                        if i < top:
                            read[i - 1, begin:end] += d_pre[i, begin:end]
        return None, None, None, *_gradients(ctx, d_gates, d_pre, read)


def _gradients(ctx: Any, d_gates: Tensor, d_pre: Tensor, read: Tensor) -> list[Tensor | None]:
    """Return the gradients of start, first bias, output and its bias, keep (none) and all weights."""
    start, _, keep, previous, _, _, pre, nothing, *rest = ctx.saved_tensors
    count = len(keep)
    hidden, (layers, norms) = rest[:count], _unflat(rest[count:], count)
    first, kind = len(start), start.dtype
    d_start = d_gates[0, :first] @ layers[0][1]
    below, of_layers, of_norms = None, [], []
    fed = torch.cat((hidden[-1] * keep[-1], nothing.to(kind))).index_select(0, previous)
    for i, (_, recurrent, _) in enumerate(layers):
        d, x = d_gates[i], fed if below is None else below
        before = torch.cat((hidden[i], start)).index_select(0, previous)
        if i > 0:
            d_start.addmm_(d[:first], recurrent)
        # The lowest layer's first step has a bias of its own, so its rows are left out.
        of_layers += [d.t() @ x, d.t() @ before, d[first if i == 0 else 0 :].sum(0)]
        if i < len(norms):
            shape, (gamma, beta) = [pre.shape[2]], norms[i]
            normed, mean, scale = torch.native_layer_norm(pre[i], shape, gamma, beta, ctx.eps)
            below = (normed * keep[i]).to(kind)
            of_norms += torch.ops.aten.native_layer_norm_backward(
                (read[i] * keep[i]).to(pre.dtype),
                pre[i],
                shape,
                mean,
                scale,
                gamma,
                beta,
                [False, True, True],
            )[1:]
    alone = not norms  # nothing reads the projection but the gates
    return [
        d_start,
        d_gates[0, :first].sum(0),
        None if alone else d_pre[0].t() @ fed,
        None if alone else d_pre[0, first:].sum(0),
        None,
        *of_layers,
        *of_norms,
    ]


def _unflat(flat: Any, count: int) -> tuple[list[Any], list[Any]]:
    layers = [tuple(flat[3 * i : 3 * i + 3]) for i in range(count)]
    rest = flat[3 * count :]
    return layers, [tuple(rest[2 * i : 2 * i + 2]) for i in range(count - 1)]


def _steps(sizes: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Return first row, last row + 1, and first row of the step before (0 for the first step)."""
    steps, begin, last = [], 0, 0
    for n in sizes:
        steps.append((begin, begin + n, last))
        begin, last = begin + n, begin
    return steps


def _grid(rows: int, width: int) -> tuple[int, int]:
    return triton.cdiv(rows, R), triton.cdiv(width, C)


def _precision() -> str:
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
