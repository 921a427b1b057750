"""Attention within windows of at most 128 tokens on the GPU: one kernel forward, one backward.

A program owns one head of one window and sees all its keys, so a row of scores is whole: the softmax needs no
second pass, the backward pass neither the output nor the log-sum-exp (it computes the row again, and
δ = Σ P · dP), and the gradients of keys and values are summed in one place, in one order, without atomics.

Both streams (see backends.py) are rows of one tile. Row i of the second stream sees the keys before i and its
own: its scores are those of causal attention with another diagonal.

Dropped weights are drawn again in the backward pass: 16 bits a weight (dropout.py) of Philox, by counter
(token, head, key // 8, stream); naive.py draws the same ones.

Tensor cores want tiles that are powers of two, so the longest window decides how many registers a program
needs: see window.longest, and what `brainflow bench kernels --static` prints.

Legend: T tokens, H heads, D head_dim, BD ≥ D and BT ≥ the longest window powers of two, M queries of a
program, BT of each stream that asks.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from .. import dropout
from ..dispatch import AotConfig, host_lengths

# `stride` is not among them: that it is a multiple of 16 must be seen, or loads are not 128 bits wide.
SCALARS = ["tokens", "heads", "dropped", "seed"]


@triton.jit
def read(pointer, offset, inside, D: tl.constexpr, BD: tl.constexpr, ACROSS: tl.constexpr = False):
    """Return the rows that begin at offset [R] as [R, BD], ACROSS: as [BD, R]; 0 where not inside [R]."""
    column = tl.arange(0, BD)
    if ACROSS:
        offset, column, inside = offset[None, :], column[:, None], inside[None, :]
    else:
        offset, column, inside = offset[:, None], column[None, :], inside[:, None]
    if BD != D:
        inside = inside & (column < D)
    return tl.load(pointer + offset + column, mask=inside, other=0.0)


@triton.jit
def write(pointer, offset, inside, value, D: tl.constexpr, BD: tl.constexpr):
    """Write [R, BD] to the rows that begin at offset [R] and are inside [R]."""
    column = tl.arange(0, BD)[None, :]
    inside = inside[:, None]
    if BD != D:
        inside = inside & (column < D)
    tl.store(pointer + offset[:, None] + column, value.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def rows(BT: tl.constexpr, STREAMS: tl.constexpr, SECOND: tl.constexpr):
    """Return stream and position [M] of the queries; SECOND: whether the second stream asks."""
    m = tl.arange(0, STREAMS * BT)
    if STREAMS == 2:
        return m // BT, m % BT
    return m * 0 + SECOND, m


@triton.jit
def softmax(scores, row, length, CAUSAL: tl.constexpr):
    """Return probabilities [M, BT] and the log-sum-exp [M] in units of log 2."""
    key = tl.arange(0, scores.shape[1])[None, :]
    seen = key < length
    if CAUSAL:
        seen = seen & (key <= row[:, None])
    scores = tl.where(seen, scores, float("-inf"))
    # Finite in every row: each sees at least the first key, rows that stand for no query, too.
    top = tl.max(scores, 1)
    p = tl.exp2(scores - top[:, None])
    total = tl.sum(p, 1)
    # In units of log 2, as scores come: exp2 is the instruction, exp a product more.
    return p / total[:, None], top + tl.log2(total)


@triton.jit
def kept(token, head, stream, seed, dropped, BT: tl.constexpr):
    """Return which weights [M, BT] of tokens [M], counted over the batch, are kept."""
    key = tl.arange(0, BT)[None, :]
    four = tl.arange(0, 4)[None, :]
    zero = token[:, None] * 0 + four * 0
    keep = (token[:, None] * 0 + key * 0).to(tl.uint32)
    # A counter serves 8 keys, four of them 32: with one for each key most of what Philox draws would be
    # wasted.
    for part in tl.static_range((BT + 31) // 32):
        words = tl.philox(
            seed,
            (zero + token[:, None]).to(tl.uint32),
            (zero + head).to(tl.uint32),
            (zero + part * 4 + four).to(tl.uint32),
            (zero + stream[:, None]).to(tl.uint32),
        )
        bits = zero.to(tl.uint32)
        for i in tl.static_range(4):
            place = (four * 8 + 2 * i).to(tl.uint32)
            bits |= ((words[i] & 0xFFFF) >= dropped).to(tl.uint32) << place
            bits |= ((words[i] >> 16) >= dropped).to(tl.uint32) << (place + 1)
        of_row = tl.sum(bits, 1)[:, None]  # each bit is set once: the sum is their union
        keep = tl.where(key // 32 == part, of_row >> (key % 32).to(tl.uint32), keep)
    return (keep & 1) != 0


@triton.jit(do_not_specialize=SCALARS)
def attend(
    q,  # [tokens, H, D], `stride` elements between tokens; k, v, too; the second stream lies `apart` further
    k,
    v,
    out,  # [tokens, H, D], of two streams one after the other
    lse,  # [H, tokens], ignored without LSE
    bounds,  # [windows + 1] int32
    tokens,
    heads,
    stride,
    apart,
    scale,
    gain,  # 1 / probability with which a weight is kept
    dropped,
    seed,
    D: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
    STREAMS: tl.constexpr,
    SECOND: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    LSE: tl.constexpr,
    DOT: tl.constexpr,
):
    """Write the output of one head of one window."""
    head = tl.program_id(0) % heads
    window = tl.program_id(0) // heads
    first = tl.load(bounds + window)
    length = tl.load(bounds + window + 1) - first
    into = first.to(tl.int64) * stride + head * D
    onto = first.to(tl.int64) * heads * D + head * D
    key = tl.arange(0, BT)
    scale = tl.where(length > BT, float("nan"), scale * 1.4426950408889634)  # a window longer than promised
    stream, row = rows(BT, STREAMS, SECOND)
    inside = row < length
    at = row * stride
    if SECOND:
        at += stream.to(tl.int64) * apart
    keys = read(k + into, key * stride, key < length, D, BD, True)
    a = read(q + into, at, inside, D, BD)
    scores = tl.dot(a, keys, input_precision=DOT)
    if SECOND:
        second = inside & (stream == 1)
        itself = (key[None, :] == row[:, None]) & (stream == 1)[:, None]
        own = tl.sum(a.to(tl.float32) * read(k + into, at, second, D, BD).to(tl.float32), 1)
        scores = tl.where(itself, own[:, None], scores)
    p, log = softmax(scores * scale, row, length, CAUSAL)
    if LSE:
        tl.store(lse + head.to(tl.int64) * tokens + first + row, log * 0.6931471805599453, mask=inside)
    if DROPOUT:
        p = tl.where(kept(first + row, head, stream, seed, dropped, BT), p * gain, 0.0)
    if SECOND:
        # The own weight belongs to the second stream's value, which is not in the tile of values.
        share = tl.sum(tl.where(itself, p, 0.0), 1)
        p = tl.where(itself, 0.0, p)
    values = read(v + into, key * stride, key < length, D, BD)
    o = tl.dot(p.to(values.dtype), values, input_precision=DOT)
    if SECOND:
        o += share[:, None] * read(v + into, at, second, D, BD).to(tl.float32)
    down = row * heads * D
    if STREAMS == 2:
        down += stream * tokens.to(tl.int64) * heads * D
    write(out + onto, down, inside, o, D, BD)


@triton.jit(do_not_specialize=SCALARS)
def attend_backward(
    q,
    k,
    v,
    dout,  # as out
    dlse,  # [H, tokens], ignored without LSE
    dq,  # [tokens, H, D], `dstride` elements between tokens; dk, dv, too; the second stream `dapart` further
    dk,
    dv,
    bounds,
    tokens,
    heads,
    stride,
    apart,
    dstride,
    dapart,
    scale,
    gain,
    dropped,
    seed,
    D: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
    STREAMS: tl.constexpr,
    SECOND: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    LSE: tl.constexpr,
    DOT: tl.constexpr,
):
    """Write the gradients of one head of one window: with weights P, δ = Σ P · dP, dS = P · (dP − δ)."""
    head = tl.program_id(0) % heads
    window = tl.program_id(0) // heads
    first = tl.load(bounds + window)
    length = tl.load(bounds + window + 1) - first
    into = first.to(tl.int64) * stride + head * D
    onto = first.to(tl.int64) * heads * D + head * D
    back = first.to(tl.int64) * dstride + head * D
    key = tl.arange(0, BT)
    log2_scale = tl.where(length > BT, float("nan"), scale * 1.4426950408889634)
    stream, row = rows(BT, STREAMS, SECOND)
    inside = row < length
    at = row * stride
    if SECOND:
        at += stream.to(tl.int64) * apart
    keys = read(k + into, key * stride, key < length, D, BD, True)
    a = read(q + into, at, inside, D, BD)
    scores = tl.dot(a, keys, input_precision=DOT)
    if SECOND:
        second = inside & (stream == 1)
        itself = (key[None, :] == row[:, None]) & (stream == 1)[:, None]
        own = tl.sum(a.to(tl.float32) * read(k + into, at, second, D, BD).to(tl.float32), 1)
        scores = tl.where(itself, own[:, None], scores)
    p, _ = softmax(scores * log2_scale, row, length, CAUSAL)
    down = row * heads * D
    if STREAMS == 2:
        down += stream * tokens.to(tl.int64) * heads * D
    g = read(dout + onto, down, inside, D, BD)
    values = read(v + into, key * stride, key < length, D, BD, True)
    dp = tl.dot(g, values, input_precision=DOT)
    if SECOND:
        own = tl.sum(g.to(tl.float32) * read(v + into, at, second, D, BD).to(tl.float32), 1)
        dp = tl.where(itself, own[:, None], dp)
    used = p
    if DROPOUT:
        keep = kept(first + row, head, stream, seed, dropped, BT)
        dp = tl.where(keep, dp * gain, 0.0)
        used = tl.where(keep, p * gain, 0.0)
    delta = tl.sum(p * dp, 1)
    if LSE:
        # lse's own gradient: dS = P · (dP − δ + dlse).
        delta -= tl.load(dlse + head.to(tl.int64) * tokens + first + row, mask=inside, other=0.0)
    ds = p * (dp - delta[:, None])
    to = row * dstride
    if SECOND:
        to += stream.to(tl.int64) * dapart
    if SECOND:
        own = tl.sum(tl.where(itself, ds, 0.0), 1) * scale
        share = tl.sum(tl.where(itself, used, 0.0), 1)
        write(dk + back, to, second, own[:, None] * a.to(tl.float32), D, BD)
        write(dv + back, to, second, share[:, None] * g.to(tl.float32), D, BD)
        ds = tl.where(itself, 0.0, ds)
        used = tl.where(itself, 0.0, used)
    ds = ds.to(a.dtype)
    value_grad = tl.dot(tl.trans(used.to(a.dtype)), g, input_precision=DOT)
    key_grad = tl.dot(tl.trans(ds), a, input_precision=DOT)
    tl.debug_barrier()  # what follows is read again rather than kept in registers
    d = tl.dot(ds, read(k + into, key * stride, key < length, D, BD), input_precision=DOT) * scale
    if SECOND:
        d += own[:, None] * read(k + into, at, second, D, BD).to(tl.float32)
    write(dq + back, to, inside, d, D, BD)
    if SECOND & (STREAMS == 1):  # nobody asks for the first stream's queries
        write(dq + back, row * dstride, inside, tl.zeros([BT, BD], tl.float32), D, BD)
    write(dk + back, key * dstride, key < length, key_grad * scale, D, BD)
    write(dv + back, key * dstride, key < length, value_grad, D, BD)


def padded(size: int) -> int:
    """Return the power of two that a dimension of a tile has: at least 16, for the tensor cores."""
    return max(16, triton.next_power_of_2(size))


def constants(q: Tensor, max_seqlen: int, streams: str, causal: bool, dropout_p: float, lse: bool) -> dict:
    """Return the compile-time arguments of both kernels: a warp for 16 queries, in float32 for 8.

    The second stream alone has twice as many as that, as beside the first: it needs the registers.
    """
    # Three TF32 products are about as exact as one in float32, and still run on the tensor cores.
    exact = q.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    asking = 2 if streams == "two" else 1
    queries = asking * padded(max_seqlen)
    return {
        "D": q.shape[-1],
        "BD": padded(q.shape[-1]),
        "BT": padded(max_seqlen),
        "STREAMS": asking,
        "SECOND": streams != "one",
        "CAUSAL": causal or streams != "one",
        "DROPOUT": dropout_p > 0.0,
        "LSE": lse,
        "DOT": "tf32x3" if exact else "tf32",
        "num_warps": queries * q.element_size() // 32 * (2 if streams == "second" else 1),
    }


def laid_out(q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v [rows, H, D], rows at one distance in all three, dense in themselves.

    `q` alone holds all three, [rows, 3, H, D].
    """
    if k is None or v is None:
        q, k, v = q.unbind(1)
    if not q.stride() == k.stride() == v.stride() or q.stride()[1:] != (q.shape[2], 1):
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    return q, k, v


def random_arguments(dropout_p: float, state: Tensor) -> dict[str, Any]:
    """Return what the kernels draw dropped weights from."""
    seed = int(state[0]) if dropout_p > 0.0 else 0
    return {"gain": 1.0 / dropout.kept(dropout_p), "dropped": dropout.dropped(dropout_p), "seed": seed}


# The tag: as `RANDOM` in backends.py.
@custom_op("brainflow::window_attention", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def window_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    streams: str,
    causal: bool,
    dropout_p: float,
    softmax_scale: float,
    with_lse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return out [T (two: 2 T), H, D], lse [T, H] or empty, and the random state, empty without dropout.

    `q` alone holds q, k and v, [T (of two streams 2 T), 3, H, D]; of one stream they may also come apart. The
    state is a seed on the host, so that neither drawing nor reading it waits for the GPU.
    """
    a, b, c = laid_out(q, k, v)
    tokens, heads, head_dim = len(a) // (1 if streams == "one" else 2), *a.shape[1:]
    if a.device.type == "cpu":
        host_lengths(cu_seqlens, tokens, max_seqlen)
    out = a.new_empty(len(a) if streams == "two" else tokens, heads, head_dim)
    lse = a.new_empty((heads, tokens) if with_lse else (0, 0), dtype=torch.float32)
    # From 2³² on: a smaller seed would be an int32, for which both kernels would be compiled once more.
    state = torch.randint(2**32, 2**62, (1 if dropout_p > 0.0 else 0,))
    with torch.cuda.device_of(a):
        attend[((len(cu_seqlens) - 1) * heads,)](
            a, b, c, out, lse if with_lse else out, cu_seqlens, tokens, heads, a.stride(0),
            tokens * a.stride(0), softmax_scale, **random_arguments(dropout_p, state),
            **constants(a, max_seqlen, streams, causal, dropout_p, with_lse),
        )  # fmt: skip
    return out, lse.t(), state


@custom_op("brainflow::window_attention_backward", mutates_args=())
def window_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    state: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    streams: str,
    causal: bool,
    dropout_p: float,
    softmax_scale: float,
) -> list[Tensor]:
    """Return the gradients of q, k and v, or of what holds all three."""
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v) if x is not None]
    dq, dk, dv = laid_out(*grads) if len(grads) == 3 else laid_out(grads[0], None, None)
    a, b, c = laid_out(q, k, v)
    tokens, heads = len(a) // (1 if streams == "one" else 2), a.shape[1]
    dout = dout.contiguous()
    with torch.cuda.device_of(a):
        attend_backward[((len(cu_seqlens) - 1) * heads,)](
            a, b, c, dout, dout if dlse is None else dlse.t().contiguous(), dq, dk, dv, cu_seqlens, tokens,
            heads, a.stride(0), tokens * a.stride(0), dq.stride(0), tokens * dq.stride(0), softmax_scale,
            **random_arguments(dropout_p, state),
            **constants(a, max_seqlen, streams, causal, dropout_p, dlse is not None),
        )  # fmt: skip
    return grads


@window_attention.register_fake
def _(q, k, v, cu_seqlens, max_seqlen, streams, causal, dropout_p, softmax_scale, with_lse):
    rows, tokens = q.shape[0], q.shape[0] if streams == "one" else q.shape[0] // 2
    heads, head_dim = q.shape[-2:]
    out = q.new_empty(rows if streams == "two" else tokens, heads, head_dim)
    lse = q.new_empty((heads, tokens) if with_lse else (0, 0), dtype=torch.float32)
    return out, lse.t(), torch.empty(1 if dropout_p > 0.0 else 0, dtype=torch.int64)


@window_attention_backward.register_fake
def _(dout, dlse, q, k, v, state, *rest):
    return [x.new_empty(x.shape) for x in (q, k, v) if x is not None]


def _setup(ctx, inputs, output):
    q, k, v, cu_seqlens, *ctx.rest, _ = inputs
    ctx.save_for_backward(q, k, v, output[2], cu_seqlens)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dout, dlse, _):
    if dout is None and dlse is None:
        return (None,) * 10
    q, k, v, *saved = ctx.saved_tensors
    if dout is None:
        dout = q.new_zeros(*dlse.shape, q.shape[-1])
    grads = torch.ops.brainflow.window_attention_backward(dout, dlse, q, k, v, *saved, *ctx.rest)
    return (*grads, *(None,) * (10 - len(grads)))


window_attention.register_autograd(_differentiate, setup_context=_setup)


def _aot_configs() -> list[AotConfig]:
    """Return both kernels for the streams, tiles and types that models take; first CSM's production step."""
    cases = [  # streams, BT, element type, products in float32, dropout, log-sum-exp
        ("two", 64, torch.bfloat16, "high", 0.1, False),
        ("two", 32, torch.float16, "high", 0.1, False),
        ("second", 64, torch.bfloat16, "high", 0.1, False),
        ("full", 128, torch.bfloat16, "high", 0.1, False),
        ("causal", 64, torch.bfloat16, "high", 0.0, True),
        ("two", 32, torch.float32, "high", 0.1, False),
        ("causal", 32, torch.float32, "highest", 0.0, True),
    ]
    return [config(kernel, *case) for case in cases for kernel in (attend, attend_backward)]


def config(
    kernel: Any, streams: str, tile: int, dtype: torch.dtype, products: str, dropout_p: float, lse: bool
):
    """Return the production configuration of a kernel for 64 windows of 12 heads."""
    windows, heads, head_dim, tokens = 64, 12, 64, 1_824
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(products)
    try:
        asked = streams if streams in ("two", "second") else "one"
        q = torch.empty(1, heads, head_dim, dtype=dtype)
        fixed = constants(q, tile, asked, streams != "full", dropout_p, lse)
    finally:
        torch.set_float32_matmul_precision(before)
    stride = 3 * heads * head_dim
    packed = ((tokens * (1 if asked == "one" else 2), stride), dtype)
    out = ((tokens * fixed["STREAMS"], heads * head_dim), dtype)
    statistics = ((heads, tokens), torch.float32) if lse else out
    given, far = dict.fromkeys(("q", "k", "v"), packed), {"stride": stride, "apart": tokens * stride}
    if kernel is attend:
        given |= {"out": out, "lse": statistics}
    else:
        given |= {"dout": out, "dlse": statistics}
        given |= dict.fromkeys(("dq", "dk", "dv"), packed)
        far |= {"dstride": stride, "dapart": tokens * stride}
    way = "forward" if kernel is attend else "backward"
    written = ("out",) if kernel is attend else ("dq", "dk", "dv")
    seed = 2**40 + 1 if dropout_p else 0
    short = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(
        dtype, "fp32" if products == "highest" else "tf32"
    )
    return AotConfig(
        name=f"window_attention.{way}.{streams}.{tile}.{short}",
        kernel=kernel,
        arguments={**given, "bounds": ((windows + 1,), torch.int32), "tokens": tokens, "heads": heads, **far,
                   "scale": 0.125, "gain": 1.0, "dropped": dropout.dropped(dropout_p), "seed": seed},
        constants={name: value for name, value in fixed.items() if name != "num_warps"},
        num_warps=fixed["num_warps"],
        wide=("q", "k", "v", *written, *(("dout",) if kernel is attend_backward else ())),
        max_registers=255,  # a row of scores and its gradient stay in registers
        computed=written,
    )  # fmt: skip


AOT_CONFIGS = _aot_configs()
