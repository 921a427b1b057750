"""The kernels of a decoder that reads its own output, as compiled, against the loop that specifies it."""

import pytest
import torch

from brainflow.kernels.feedback import decode_freely

pytest.importorskip("brainflow.kernels.aot", reason="needs triton")
from ptx_launch import executed

SIZES = (4, 3, 2)
PREVIOUS = torch.tensor([9, 10, 11, 12, 0, 1, 2, 4, 5])


@pytest.mark.parametrize(("layers", "width", "half"), [(2, 16, False), (1, 16, False), (2, 40, True)])
def test_decoding_freely_matches_the_loop(layers, width, half):
    def draw(*shape):
        return (0.3 * torch.randn(shape)).to(torch.float16 if half else torch.float32).requires_grad_()

    gates = 4 * width
    inputs = [draw(4, width), draw(gates), draw(width, width), draw(width)]
    keep = torch.rand(layers, sum(SIZES), width).to(inputs[0].dtype)
    weights = [(draw(gates, width), draw(gates, width), draw(gates)) for _ in range(layers)]
    norms = [tuple(torch.randn(2, width).unbind(0)) for _ in range(layers - 1)]
    leaves = [*inputs[: 4 if layers > 1 else 2], *(x for group in (*weights, *norms) for x in group)]
    upstream, results = torch.randn(sum(SIZES), width), []
    with executed():
        for impl, dtype in (("naive", torch.float32), ("triton", inputs[0].dtype)):
            given = {id(x): x.detach().to(dtype if x.dtype == keep.dtype else x.dtype).requires_grad_()
                     for x in (*inputs, *(x for group in (*weights, *norms) for x in group))}  # fmt: skip
            mine = [given[id(x)] for x in inputs]
            of_layers, of_norms = ([tuple(given[id(x)] for x in group) for group in groups]
                                   for groups in (weights, norms))  # fmt: skip
            out = decode_freely(SIZES, PREVIOUS, 1e-5, *mine, keep.to(dtype), of_layers, of_norms, impl=impl)
            grads = torch.autograd.grad((out.float() * upstream).sum(), [given[id(x)] for x in leaves])
            results.append([out.detach().float(), *(grad.float() for grad in grads)])
    for expected, actual in zip(*results, strict=True):
        assert (actual - expected).norm() <= (5e-3 if half else 1e-5) * expected.norm()
