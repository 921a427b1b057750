import numpy as np
import pytest
import torch
from torch import nn

from brainflow.frameworks import AutoencoderConfig
from brainflow.frameworks.autoencode import Autoencoder
from brainflow.models.autoencoder import Decoder, Steps, run_lstm, time_major

LENGTHS = np.array([3, 6, 1, 6, 4])


def make_steps(lengths):
    order = time_major(lengths)
    tensors = {name: torch.from_numpy(getattr(order, name)) for name in ("before", "after", "last")}
    return order, Steps(batch_sizes=order.batch_sizes, **tensors)


def randomised(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.double()


@pytest.mark.parametrize("bidirectional", [False, True])
def test_pass_equals_torch_lstm_forward_and_backward(bidirectional):
    torch.manual_seed(0)
    lstm = randomised(nn.LSTM(4, 5, bidirectional=bidirectional))
    order, steps = make_steps(LENGTHS)
    x = torch.randn(LENGTHS.sum(), 4, dtype=torch.float64, requires_grad=True)
    start = torch.randn(len(LENGTHS), 5, dtype=torch.float64, requires_grad=True)
    hidden, final = run_lstm(lstm, x[torch.from_numpy(order.order)], steps, start)
    hidden, final = hidden[torch.from_numpy(order.back)], final[torch.from_numpy(order.ranks)]
    weights, final_weights = torch.randn_like(hidden), torch.randn_like(final)
    inputs = [x, start, *lstm.parameters()]
    ours = torch.autograd.grad((hidden * weights).sum() + (final * final_weights).sum(), inputs)
    directions = 2 if bidirectional else 1
    outs, finals = [], []
    for window, part in enumerate(x.split(LENGTHS.tolist())):
        state = start[order.ranks[window]].expand(directions, 5)
        out, (last, _) = lstm(part, (state, torch.zeros_like(state)))
        outs.append(out.view(-1, directions, 5))
        finals.append(last)
    expected, expected_final = torch.cat(outs), torch.stack(finals)
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(final, expected_final, rtol=0, atol=1e-12)
    loss = (expected * weights).sum() + (expected_final * final_weights).sum()
    for a, b in zip(ours, torch.autograd.grad(loss, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_forced_decoding_of_its_own_output_is_free_running():
    torch.manual_seed(1)
    decoder = randomised(Decoder(5, 2, dropout=0.0))
    _, steps = make_steps(LENGTHS)
    pooled = torch.randn(len(LENGTHS), 5, dtype=torch.float64, requires_grad=True)
    free = decoder.run_free(pooled, steps)
    before = torch.cat((free, torch.zeros_like(pooled)))[steps.before]
    forced = decoder(pooled, before, steps)
    torch.testing.assert_close(forced, free, rtol=0, atol=1e-12)
    inputs = [pooled, *decoder.parameters()]
    weights = torch.randn_like(free)
    # The forced pass reads `free`, which leads back to the same parameters: its gradient holds both ways.
    for a, b in zip(
        torch.autograd.grad((free * weights).sum(), inputs, retain_graph=True),
        torch.autograd.grad((forced * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("layers", [1, 3])
def test_free_running_by_the_kernels_of_a_gpu_is_the_loop(layers):
    """What they are given, computed by their specification."""
    torch.manual_seed(5)
    decoder = randomised(Decoder(5, layers, dropout=0.3)).eval()
    _, steps = make_steps(LENGTHS)
    pooled = torch.randn(len(LENGTHS), 5, dtype=torch.float64, requires_grad=True)
    inputs = [pooled, *decoder.parameters()]
    loop, fused = decoder.run_free(pooled, steps), decoder._run_free_fused(pooled, steps)
    torch.testing.assert_close(fused, loop, rtol=0, atol=1e-12)
    grads = (torch.autograd.grad(out.square().sum(), inputs) for out in (loop, fused))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_every_weight_learns_from_free_running_under_autocast():
    torch.manual_seed(4)
    decoder, pooled = Decoder(8, 2, dropout=0.0), torch.randn(len(LENGTHS), 8)
    _, steps = make_steps(LENGTHS)
    found = []
    for half in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            out = decoder.run_free(pooled, steps)
        found.append(torch.autograd.grad(out.float().square().sum(), list(decoder.parameters())))
    for wide, half in zip(*found, strict=True):
        assert (half - wide).norm() <= 0.05 * wide.norm()


def test_free_running_gradients_are_those_of_plain_autograd():
    torch.manual_seed(2)
    decoder = randomised(Decoder(4, 2, dropout=0.0))
    _, steps = make_steps(np.array([3, 2]))
    pooled = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    inputs = [pooled, *decoder.parameters()]
    ours = torch.autograd.grad(decoder.run_free(pooled, steps).square().sum(), inputs)
    states = [(pooled[None], torch.zeros_like(pooled)[None])] * 2
    fed, outputs = torch.zeros_like(pooled), []
    for n in (2, 2, 1):
        x = fed[:n]
        for i, lstm in enumerate(decoder.lstms):
            out, states[i] = lstm(x[None], tuple(part[:, :n].contiguous() for part in states[i]))
            x = decoder.norms[i](x + out[0]) if i == 0 else out[0]
        fed = decoder.output(x)
        outputs.append(fed)
    plain = torch.autograd.grad(torch.cat(outputs).square().sum(), inputs)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_teacher_forcing_is_drawn_once_a_batch(monkeypatch):
    model = Autoencoder(AutoencoderConfig(networks=4, width=8, layers=1, heads=2))
    calls = []

    def decoded(batch, forced):
        calls.append(forced)
        raise InterruptedError

    monkeypatch.setattr(model, "_decoded", decoded)

    class Batch:
        step, mask = 0, None

    for step in range(200):
        Batch.step = step
        with pytest.raises(InterruptedError):
            model(Batch, seed=3)
    assert 70 < sum(calls) < 130
    model.eval()
    with pytest.raises(InterruptedError):
        model(Batch, seed=3)
    assert calls[-1] is False
