"""The specification of decode_freely: a loop over steps and layers, differentiated by autograd."""

from __future__ import annotations

import torch
from torch import Tensor


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
    hidden, cells = [start] * len(layers), [torch.zeros_like(start)] * len(layers)
    states: list[Tensor] = []
    begin = 0
    for n in sizes:
        x = fed = torch.zeros_like(start)
        if states:
            fed = (states[-1] * keep[-1, begin - len(states[-1]) : begin])[:n]
            x = fed @ output.t() + output_bias
        for i, (inputs, recurrent, bias) in enumerate(layers):
            read, offset = (x, bias) if i else (fed, bias if states else first_bias)
            gates = read @ inputs.t() + hidden[i][:n] @ recurrent.t() + offset
            let_in, forget, new, out = gates.chunk(4, 1)
            cells[i] = forget.sigmoid() * cells[i][:n] + let_in.sigmoid() * new.tanh()
            hidden[i] = out.sigmoid() * cells[i].tanh()
            if i < len(norms):
                normed = torch.nn.functional.layer_norm(x + hidden[i], [start.shape[1]], *norms[i], eps)
                x = keep[i, begin : begin + n] * normed
        states.append(hidden[-1])
        begin += n
    return torch.cat(states)
