"""LSTM passes on the CPU whose weight gradients are one matrix product, not one a step.

PyTorch's CPU LSTM over packed windows keeps an autograd graph of a dozen nodes a step and adds two weight
gradients at every one. Here a pass is one autograd node: the backward loop only carries the state's gradients
from step to step and stores those of the gates; weights, inputs and biases get theirs from all steps at once.

Letters: T tokens, time-major; W windows by rank, longest first; H width. Gates in PyTorch's order i, f, g, o.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def _in_float32(forward: Any) -> Any:
    """Run a forward pass in float32 under autocast: cells add up over the steps."""
    for device in ("cpu", "cuda"):
        forward = torch.amp.custom_fwd(forward, device_type=device, cast_inputs=torch.float32)
    return forward


class LSTMPass(Function):
    """One direction of one LSTM layer over all steps."""

    @staticmethod
    @_in_float32
    def forward(
        ctx: Any,
        x: Tensor,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias: Tensor,
        start: Tensor,
        previous: Tensor,
        batch_sizes: tuple[int, ...],
        reverse: bool,
    ) -> Tensor:
        """Return the hidden states, [T, H].

        Parameters
        ----------
        ctx
            Autograd context.
        x
            [T, inputs].
        weight_ih, weight_hh, bias
            [4H, inputs], [4H, H], [4H] (the sum of PyTorch's two).
        start
            [W, H], hidden states before the first step; cells start at 0.
        previous
            int64 [T], row of the step before in [hidden; start].
        batch_sizes
            Windows still running at each step.
        reverse
            Whether windows are read from their ends.
        """
        width = weight_hh.shape[1]
        # One product for all steps: only the recurrent part has to wait for the step before.
        gates = torch.addmm(bias, x, weight_ih.t())
        hidden, cells = gates.new_empty(len(gates), width), gates.new_empty(len(gates), width)
        # A copy: the steps overwrite `h`, and the backward pass needs `start`.
        h, c = start.clone(), torch.zeros_like(start)
        recurrent = weight_hh.t().contiguous()
        steps = _steps(batch_sizes, reverse)
        for begin, end, n in steps:
            a = gates[begin:end].addmm_(h[:n], recurrent)
            _activate(a, width)
            c_now = torch.mul(a[:, width : 2 * width], c[:n], out=cells[begin:end])
            c_now.addcmul_(a[:, :width], a[:, 2 * width : 3 * width])
            h_now = torch.mul(a[:, 3 * width :], c_now.tanh(), out=hidden[begin:end])
            # The rows below stay as they were: a window that joins later, read from its end, starts from
            # them.
            h[:n], c[:n] = h_now, c_now
        ctx.save_for_backward(x, weight_ih, weight_hh, start, previous, gates, hidden, cells)
        ctx.steps = steps
        return hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_hidden: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, the weights, the bias and the start."""
        x, weight_ih, weight_hh, start, previous, gates, hidden, cells = ctx.saved_tensors
        width = weight_hh.shape[1]
        before = torch.cat((cells, torch.zeros_like(start))).index_select(0, previous)
        d_gates, d_cell = _slopes(gates, cells, before)
        forget = gates[:, width : 2 * width]
        dh, dc = torch.zeros_like(start), torch.zeros_like(start)
        for begin, end, n in reversed(ctx.steps):
            dh_now = dh[:n].add_(d_hidden[begin:end])
            dc_now = dc[:n].addcmul_(dh_now, d_cell[begin:end])
            d = d_gates[begin:end]
            d[:, : 3 * width].view(n, 3, width).mul_(dc_now.unsqueeze(1))
            d[:, 3 * width :].mul_(dh_now)
            dc_now.mul_(forget[begin:end])
            torch.mm(d, weight_hh, out=dh_now)
        states = torch.cat((hidden, start)).index_select(0, previous)
        across = d_gates.t()
        return (
            d_gates @ weight_ih if ctx.needs_input_grad[0] else None,
            across @ x,
            across @ states,
            d_gates.sum(0),
            dh,
            None,
            None,
            None,
        )


class Left:
    """What the backward passes of a layer's steps leave: gradients of gates, and the inputs that they had.

    Not a list itself: under autocast `custom_fwd` hands on a copy of every list that it is given.
    """

    def __init__(self) -> None:
        self.pairs: list[tuple[Tensor, Tensor]] = []


class LSTMStep(Function):
    """One step of one layer, for decoding that feeds itself; see :class:`Gathered`."""

    @staticmethod
    @_in_float32
    def forward(
        ctx: Any, x: Tensor, h: Tensor, c: Tensor, weight: Tensor, bias: Tensor, gathered: Left
    ) -> tuple[Tensor, Tensor]:
        """Return hidden state and cell [n, H] after reading x [n, inputs]; weight is [4H, inputs + H]."""
        inputs, width = torch.cat((x, h), 1), h.shape[1]
        gates = torch.addmm(bias, inputs, weight.t())
        _activate(gates, width)
        cell = (gates[:, width : 2 * width] * c).addcmul_(gates[:, :width], gates[:, 2 * width : 3 * width])
        ctx.save_for_backward(inputs, c, weight, gates, cell)
        ctx.gathered = gathered
        return gates[:, 3 * width :] * cell.tanh(), cell

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor, dc: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, h and c; leave those of the gates with their inputs in `gathered`."""
        inputs, c, weight, gates, cell = ctx.saved_tensors
        width = c.shape[1]
        d, d_cell = _slopes(gates, cell, c)
        dc = torch.addcmul(dc, dh, d_cell)
        d[:, : 3 * width].view(-1, 3, width).mul_(dc.unsqueeze(1))
        d[:, 3 * width :].mul_(dh)
        ctx.gathered.pairs.append((d, inputs))
        d_inputs = d @ weight
        size = inputs.shape[1] - width
        return d_inputs[:, :size], d_inputs[:, size:], dc * gates[:, width : 2 * width], None, None, None


class Gathered(Function):
    """Weight and bias as they are; their gradients come from what the steps have left in `gathered`.

    Autograd runs this node after all nodes that its outputs went to, so every step is in by then.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor, gathered: Left) -> tuple[Tensor, Tensor]:
        """Return views of weight and bias."""
        # The steps hand up no gradients of the weights; zeros for them would only take memory.
        ctx.set_materialize_grads(False)
        ctx.gathered = gathered
        return weight.view_as(weight), bias.view_as(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: None) -> tuple[Tensor | None, ...]:
        """Return both gradients, one product and one sum over all steps."""
        pairs = ctx.gathered.pairs
        if not pairs:
            return None, None, None
        gates, inputs = (torch.cat(part) for part in zip(*pairs, strict=True))
        # A second backward pass leaves them anew, and would count these twice.
        pairs.clear()
        return gates.t() @ inputs, gates.sum(0), None


def _steps(batch_sizes: tuple[int, ...], reverse: bool) -> list[tuple[int, int, int]]:
    steps, begin = [], 0
    for n in batch_sizes:
        steps.append((begin, begin + n, n))
        begin += n
    return steps[::-1] if reverse else steps


def _activate(gates: Tensor, width: int) -> None:
    gates[:, : 2 * width].sigmoid_()
    gates[:, 2 * width : 3 * width].tanh_()
    gates[:, 3 * width :].sigmoid_()


def _slopes(gates: Tensor, cells: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Return d cell / d gates (i, f, g) and d hidden / d gate o, [n, 4H], and d hidden / d cell, [n, H]."""
    # From the activations alone: `_activate` has overwritten what they are of.
    i, f, g, o = gates.chunk(4, 1)
    bent = cells.tanh()
    slopes = torch.empty_like(gates)
    di, df, dg, do = slopes.chunk(4, 1)
    torch.mul(i, 1 - i, out=di).mul_(g)
    torch.mul(f, 1 - f, out=df).mul_(before)
    torch.addcmul(i, i * g, g, value=-1, out=dg)
    torch.mul(o, 1 - o, out=do).mul_(bent)
    return slopes, torch.addcmul(o, o * bent, bent, value=-1)
