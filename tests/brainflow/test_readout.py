"""Readouts keep time: bins against their definition, moments, layers of every framework."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from brainflow.config import ModelConfig
from brainflow.decoding.readout import SPREAD, Readout, layers, moments, read, read_line, time_bins
from brainflow.decoding.windows import ArrayWindows
from brainflow.frameworks import build

NETWORKS = 6


def batch_of(lengths):
    rng = np.random.default_rng(0)
    source = ArrayWindows([rng.normal(size=(n, NETWORKS)) for n in lengths], t_r=2.0)
    everything = np.arange(len(lengths))
    with source.loader(everything, batch=99, shuffle=False, seed=0, device=torch.device("cpu")) as batches:
        return next(batches)


def module(**options):
    torch.manual_seed(0)
    sizes = {"networks": NETWORKS, "width": 8, "layers": 3, "heads": 2, "dropout": 0.0}
    return build(ModelConfig(**(sizes | options))).eval()


def bins_by_definition(window, bins):
    """The integral of the step function over each bin, divided by the bin's length, in float64."""
    length = len(window)
    edges = np.linspace(0, length, bins + 1)
    result = np.zeros((bins, window.shape[1]))
    for b in range(bins):
        for t in range(length):
            overlap = max(0.0, min(edges[b + 1], t + 1) - max(edges[b], t))
            result[b] += overlap * window[t] / (edges[b + 1] - edges[b])
    return result.ravel()


@given(
    lengths=st.lists(st.integers(1, 23), min_size=1, max_size=5),
    bins=st.integers(1, 12),
    seed=st.integers(0, 2**16),
)
def test_bins_are_the_means_of_equal_parts_whatever_the_length(lengths, bins, seed):
    lengths = np.array(lengths)
    hidden = np.random.default_rng(seed).normal(size=(lengths.sum(), 3))
    found = time_bins(torch.from_numpy(hidden), lengths, bins).numpy()
    windows = np.split(hidden, np.cumsum(lengths)[:-1])
    for one, window in zip(found, windows, strict=True):
        np.testing.assert_allclose(one, bins_by_definition(window, bins), atol=1e-12)
        np.testing.assert_allclose(one.reshape(bins, -1).mean(axis=0), window.mean(axis=0), atol=1e-12)


def test_as_many_bins_as_time_points_are_the_time_points():
    hidden = torch.randn(14, 3)
    assert torch.equal(time_bins(hidden, np.array([7, 7]), 7), hidden.view(2, 21))


@pytest.mark.parametrize("how", [lambda h, n: time_bins(h, n, 4), moments])
def test_readouts_pass_gradients(how):
    hidden = torch.randn(9, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h: how(h, np.array([6, 3])), hidden)


def test_moments_are_means_and_log_deviations():
    hidden = torch.randn(9, 2, dtype=torch.float64)
    found = moments(hidden, np.array([8, 1]))
    expected = torch.cat((hidden[:8].mean(0), hidden[:8].std(0, correction=0).log()))
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=1e-4)
    assert torch.isfinite(found).all()


def test_the_spread_of_the_input_is_that_of_the_bold_as_it_is():
    """Not of volumes that were normalised over networks, in which what all vary by is lost."""
    model, batch = module(), batch_of([9, 4])
    found = SPREAD(model, batch)
    assert found.shape == (2, SPREAD.width(model.config)) == (2, NETWORKS)
    windows = batch.bold.split(batch.lengths.tolist())
    expected = torch.stack([window.std(0, correction=0).log() for window in windows])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert Readout(pooling="spread", layer="input", bins=3).of_variance, "whatever it has no use for"
    both, last = read(model, batch, [Readout(pooling="moments"), Readout(pooling="spread")])
    torch.testing.assert_close(last, both[:, model.config.width :])


@pytest.mark.parametrize("framework", ["csm", "seq-bert", "net-bert", "autoencoder"])
def test_layers_are_the_states_of_the_time_points(framework):
    """Each layer gives one state a time point, and a window alone gives what it gives among others."""
    model, lengths = module(framework=framework), [5, 2, 7]
    known = layers(model)
    assert known == ([0, None] if framework == "autoencoder" else [0, 1, 2, None])
    batch = batch_of(lengths)
    asked = [Readout(pooling="tokens", layer=layer) for layer in known]
    with torch.no_grad():
        found = read(model, batch, asked)
        torch.testing.assert_close(found[0], normed(model.embedding(batch.bold)))
        torch.testing.assert_close(found[-1], model.features(batch, "tokens"))
        alone = read(model, batch_of(lengths[:1]), asked)
    for states, first in zip(found, alone, strict=True):
        assert states.shape == (14, 8)
        torch.testing.assert_close(states[:5], first)
    assert not any(torch.equal(a, b) for a, b in pairwise(found))
    assert not [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]


def normed(states):
    spread = (states.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return (states - states.mean(1, keepdim=True)) / spread


@pytest.mark.parametrize("pooling", ["bins", "last", "tokens"])
def test_all_is_the_normalised_input_the_embedding_and_the_last_states(pooling):
    model, batch = module(), batch_of([4, 6])
    names = ("all", "input", 0, None)
    asked = [Readout(pooling=pooling, bins=3, layer=layer) for layer in names]
    with torch.no_grad():
        every, bold, first, last = read(model, batch, asked)
        tokens = read(model, batch, [Readout(pooling="tokens", layer="input")])[0]
    torch.testing.assert_close(tokens, normed(batch.bold.float()))
    times = asked[0].times
    parts = [one.view(len(one), times, -1) for one in (bold, first, last)]
    torch.testing.assert_close(every, torch.cat(parts, 2).flatten(1))
    assert [one.shape[1] for one in (every, bold, first, last)] == [a.width(model.config) for a in asked]


@pytest.mark.parametrize("pooling", ["bins", "moments", "last", "tokens"])
def test_both_is_the_embedding_and_the_last_states_side_by_side(pooling):
    model, batch = module(), batch_of([4, 6])
    both, first, last = (Readout(pooling=pooling, bins=3, layer=layer) for layer in ("both", 0, None))
    found = read(model, batch, [both, first, last])
    sides = found[0].view(len(found[0]), both.width(model.config) // 16, 2, 8)  # of each bin or moment
    torch.testing.assert_close(sides.unbind(dim=2), tuple(one.view_as(sides[:, :, 0]) for one in found[1:]))
    assert found[0].shape[1] == both.width(model.config) == 2 * first.width(model.config)
    found[0].sum().backward()
    trained = (model.embedding.project.weight, model.transformer.blocks[-1].attention.out.weight)
    assert all(one.grad is not None for one in trained)


def test_the_layer_before_the_last_leads_to_the_last():
    model, batch = module(), batch_of([4, 6])
    with torch.no_grad():
        model.transformer.blocks[2].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        seen = []
        (before,) = read(model, batch, [Readout(pooling="tokens", layer=2)])
    torch.testing.assert_close(before, normed(seen[0]))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"pooling": "max"}, "pooling: got 'max', expected one of bins, moments"),
        ({"bins": 0}, "bins: got 0"),
        ({"bins": 10**9}, "bins: got 1000000000"),
        ({"bins": True}, "bins: got True"),
        ({"layer": -1}, "layer: got -1"),
        ({"layer": "every"}, "layer: got 'every', expected 0 .* or input, both, all"),
    ],
)
def test_readouts_that_cannot_be_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        Readout(**settings)


def test_a_layer_that_the_model_lacks_is_refused():
    with pytest.raises(ValueError, match=r"layer: got 9, expected 0 \(the embedding\) to 2"):
        Readout(layer=9)(module(), batch_of([4]))


def test_what_is_read_is_told_in_words():
    named = [
        Readout(),
        Readout(pooling="mean", layer=2),
        Readout(layer="all"),
        SPREAD,
        Readout(pooling="cls"),
    ]
    assert [one.name for one in named] == [
        "bins of last states",
        "mean of states after block 2",
        "bins of BOLD + embedding + last states",
        "spread of BOLD",
        "cls of the last block",
    ]
    assert read_line({"spread of BOLD": 3}) == "read: spread of BOLD"
    assert read_line({"spread of BOLD": 3, "bins of last states": 1}).endswith(
        "by so many of 4 fits: spread of BOLD (3), bins of last states (1)"
    )
