"""A packed batch gives what its sequences give one by one, forward and backward, in every framework."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from brainflow.batch import PackedBatch, Windows
from brainflow.frameworks import build, framework_names, model_config

HALVES = [5, 3, 2, 7]
CASES = [
    ("csm", {"masking": "dense"}),
    ("csm", {"masking": "single"}),
    ("csm", {"masking": "next"}),
    ("seq-bert", {}),
    ("seq-bert", {"late_read": True}),
    ("net-bert", {}),
    ("net-bert", {"late_read": True}),
    ("autoencoder", {"teacher_forcing": 1.0}),
    ("autoencoder", {"teacher_forcing": 0.0}),
]


def make_batch(lengths, networks=5, pairs=False):
    generator = torch.Generator().manual_seed(1)
    bold = torch.randn(sum(lengths), networks, generator=generator, dtype=torch.float64)
    is_next = np.arange(len(lengths) // 2) % 2 if pairs else None
    return PackedBatch.pack(bold, Windows.end_to_end(lengths, t_r=0.72, step=2, is_next=is_next))


def split(batch, size):
    """The sequences of `size` windows of a batch, as batches, with the rows that each covers."""
    for first in range(0, batch.windows, size):
        begin, end = int(batch.cu_seqlens[first]), int(batch.cu_seqlens[first + size])
        lengths = batch.lengths[first : first + size]
        yield (
            slice(begin, end),
            replace(
                batch,
                bold=batch.bold[begin:end],
                times=batch.times[begin:end],
                cu_seqlens=batch.cu_seqlens[first : first + size + 1] - begin,
                max_seqlen=int(lengths.max()),
                lengths=lengths,
                is_next=None if batch.is_next is None else batch.is_next[first // 2 : first // 2 + 1],
            ),
        )


def make_model(framework, changes):
    torch.manual_seed(0)
    sizes = {"networks": 5, "width": 8, "layers": 2, "heads": 2, "dropout": 0.0, "max_positions": 32}
    rate = {"mask_rate": 0.4} if "bert" in framework else {}
    model = build(model_config(framework, **rate, **sizes, **changes)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def gradients(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize(("framework", "changes"), CASES)
def test_packed_equals_one_by_one(framework, changes, monkeypatch):
    bert = "bert" in framework
    batch = make_batch(HALVES, pairs=bert)
    model = make_model(framework, changes)
    mask = torch.rand(batch.tokens, 5, generator=torch.Generator().manual_seed(3)) < 0.5
    rows = np.flatnonzero(mask[:, 0].numpy())
    if changes.get("masking") == "single":
        rows = batch.cu_seqlens[:-1].numpy() + np.array([3, 1, 1, 6])
    covered = slice(0, batch.tokens)

    def drawn(spec, lengths):
        inside = rows[(rows >= covered.start) & (rows < covered.stop)]
        return inside - covered.start

    # Masks depend on a window's place in the batch; here they are the same ones in both forms.
    for name in ("csm", "seq_bert"):
        monkeypatch.setattr(f"brainflow.frameworks.{name}.drawn_rows", drawn)
    monkeypatch.setattr(
        "brainflow.frameworks.net_bert.mask_tokens",
        lambda x, spec, token, cu_seqlens: masked_by(x, mask[covered], token, cu_seqlens),
    )
    projections = torch.randn(batch.tokens, 5, dtype=torch.float64)

    def score(part):
        values, at = model.reconstruct(part, seed=0)
        weights = projections[covered][at]
        return torch.where(values.isnan(), 0.0, values * weights).sum(), values

    if framework == "net-bert":  # show all values: which are NaN follows the kernel's own mask
        monkeypatch.setattr("brainflow.frameworks.net_bert.MaskSpec", _All)
    total, whole = score(batch)
    total.backward()
    packed = gradients(model)
    parts = []
    for covered, part in split(batch, 2 if bert else 1):  # noqa: B007 (read in drawn and score)
        value, values = score(part)
        value.backward()
        parts.append(values)
    alone = gradients(model)
    torch.testing.assert_close(whole, torch.cat(parts), rtol=0, atol=1e-9)
    assert packed.keys() == alone.keys()
    for name, gradient in packed.items():
        torch.testing.assert_close(gradient, alone[name], rtol=1e-9, atol=1e-9, msg=name)


class _All:
    """Stands in for MaskSpec: everything is predicted."""

    def dense(self, cu_seqlens, networks):
        return torch.ones(int(cu_seqlens[-1]), networks, dtype=torch.bool)

    @classmethod
    def networks(cls, *args, **options):
        return cls()


def masked_by(x, mask, token, cu_seqlens):
    lengths = cu_seqlens.diff().tolist()
    return torch.where(mask, torch.cat([token[:n] for n in lengths]), x)


@pytest.mark.parametrize(("framework", "changes"), CASES)
def test_loss_of_a_batch_is_the_weighted_mean_of_its_sequences(framework, changes, monkeypatch):
    bert = "bert" in framework
    batch = make_batch(HALVES, pairs=bert)
    # With a rate of 1 everything is masked, whichever place a window has.
    model = make_model(framework, changes)
    if bert:
        object.__setattr__(model, "config", replace(model.config, mask_rate=1.0))
    if changes.get("masking") == "single":
        monkeypatch.setattr(
            "brainflow.frameworks.csm.drawn_rows",
            lambda spec, lengths: np.concatenate(([0], np.cumsum(lengths)[:-1])) + np.asarray(lengths) - 1,
        )
    out = model(batch, seed=0)
    out.loss.backward()
    packed = gradients(model)
    parts = list(split(batch, 2 if bert else 1))
    weights = [1 / len(parts)] * len(parts)
    if framework != "csm":
        weights = [part.tokens / batch.tokens for _, part in parts]
    total = 0.0
    for (_, part), weight in zip(parts, weights, strict=True):
        one = model(part, seed=0)
        next_loss = one.metrics.get("is_next", torch.zeros(()))
        total += float(one.metrics["reconstruction"]) * weight + float(next_loss) / len(parts)
        if bert:  # reconstruction and is-next are averaged over different things
            continue
        (one.loss * weight).backward()
    assert float(out.loss.detach()) == pytest.approx(total, abs=1e-7)
    if not bert:
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, packed[name], rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("framework", framework_names())
@pytest.mark.parametrize("pooling", ["last", "mean", "first", "cls"])
def test_features_one_by_one(framework, pooling):
    batch = make_batch(HALVES)
    model = make_model(framework, {}).eval()
    packed = model.features(batch, pooling)
    alone = torch.cat([model.features(part, pooling) for _, part in split(batch, 1)])
    assert packed.shape == (4, 8)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-9)


@pytest.mark.parametrize("framework", framework_names())
def test_evaluation_is_deterministic(framework):
    batch = make_batch(HALVES, pairs="bert" in framework)
    model = make_model(framework, {}).eval()
    assert torch.equal(model(batch, seed=5).loss, model(batch, seed=5).loss)


@pytest.mark.parametrize(("framework", "changes"), CASES)
def test_a_score_is_loss_and_reconstruction_from_one_encoding(framework, changes, monkeypatch):
    batch = make_batch(HALVES, pairs="bert" in framework)
    model = make_model(framework, changes).eval()
    expected = (model(batch, seed=5).loss, *model.reconstruct(batch, seed=5))
    encodings = []
    monkeypatch.setattr(type(model.embedding), "finish", count_calls(encodings, type(model.embedding).finish))
    output, values, rows = model.score(batch, seed=5)
    torch.testing.assert_close((output.loss, values, rows), expected, rtol=0, atol=0, equal_nan=True)
    assert len(encodings) == 1


def count_calls(calls, function):
    def counted(*arguments):
        calls.append(arguments)
        return function(*arguments)

    return counted


@pytest.mark.parametrize("framework", ["seq-bert", "net-bert"])
def test_masked_values_never_reach_the_encoder(framework):
    batch = make_batch(HALVES, pairs=True)
    model = make_model(framework, {}).eval()
    values, rows = model.reconstruct(batch, seed=9)
    bold = batch.bold.clone()
    if framework == "seq-bert":
        bold[rows] = torch.nan
    else:
        bold[~values.isnan()] = torch.nan
    assert bold.isnan().any()
    again, _ = model.reconstruct(replace(batch, bold=bold), seed=9)
    torch.testing.assert_close(again, values, rtol=0, atol=0, equal_nan=True)
    again[~again.isnan()].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_unknown_pooling_is_named():
    with pytest.raises(ValueError, match="pooling: got 'max'"):
        make_model("csm", {}).features(make_batch([4]), "max")


@pytest.mark.parametrize(
    ("framework", "changes"),
    [
        *CASES,
        ("csm", {"layers": 1, "coordinates": True, "time_encoding": "fourier", "positions": "rotary"}),
        ("autoencoder", {"chained_states": True, "teacher_forcing": 0.0, "layers": 1}),
    ],
)
def test_every_parameter_gets_a_gradient_but_those_that_are_said_not_to(framework, changes):
    """Data parallel training waits for a gradient of each parameter that it was not told to leave out."""
    sizes = {"networks": 5, "width": 16, "layers": 2, "heads": 2}
    module = build(model_config(framework, **(sizes | changes))).double()
    module(make_batch(HALVES, pairs="bert" in framework), seed=0).loss.backward()
    without = {name for name, p in module.named_parameters() if p.grad is None}
    untrained = {id(p) for p in module.untrained}
    assert without == {name for name, p in module.named_parameters() if id(p) in untrained}
