"""The kernels of a decoder that reads its own output, against the loop that they stand for."""

import numpy as np
import pytest
import torch

from brainflow.models.autoencoder import Decoder, Steps, time_major


@pytest.mark.parametrize(
    ("layers", "width", "dropout", "half"),
    [(2, 40, 0.0, False), (1, 16, 0.5, False), (3, 16, 0.5, False), (2, 16, 0.5, True)],
)
def test_decoding_freely_matches_the_loop(layers, width, dropout, half, monkeypatch):
    order = time_major(np.array([2, 4, 1, 4]))
    tensors = {name: torch.from_numpy(getattr(order, name)) for name in ("before", "after", "last")}
    steps = Steps(**tensors, batch_sizes=order.batch_sizes)
    decoder = Decoder(width, layers, dropout)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    pooled, weigh = torch.randn(4, width, requires_grad=True), torch.randn(11, width)
    keep = torch.empty(layers, 11, width).bernoulli_(1 - dropout).div_(1 - dropout)
    called = []

    def fixed(x):
        """Dropout by the same factors in both forms: the loop calls it a layer and step after the other."""
        if x.dim() == 3:
            return keep.to(x.dtype)
        number = len(called)
        called.append(len(x))
        begin = sum(called[number % layers :: layers][:-1])
        return x * keep[number % layers, begin : begin + len(x)]

    monkeypatch.setattr(decoder.dropout, "forward", fixed)
    results = []
    for run in (decoder.run_free, decoder._run_free_fused):
        with torch.autocast("cpu", dtype=torch.float16, enabled=half):
            out = run(pooled, steps).float()
        inputs = (pooled, *decoder.parameters())
        results.append((out, *torch.autograd.grad((out * weigh).sum(), inputs)))
    for expected, actual in zip(*results, strict=True):
        if half:
            assert (actual - expected).norm() <= 0.03 * expected.norm()
        else:
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
