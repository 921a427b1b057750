"""Options of the transformer and the embedding: each does what its name says, without graph breaks."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from brainflow.batch import PackedBatch, Windows
from brainflow.config import ModelConfig
from brainflow.frameworks import build
from brainflow.models.embedding import BoldEmbedding
from brainflow.models.transformer import Layout, Transformer, rotate, rotation

SIZE = {"networks": 5, "width": 16, "layers": 2, "heads": 2, "dropout": 0.0, "max_positions": 16}
MODERN = {
    "positions": "rotary", "norm": "rms", "activation": "swiglu", "time_encoding": "fourier",
    "coordinates": True,
}  # fmt: skip
LENGTHS = np.array([5, 3, 2, 7])


def layout_of(lengths, shift=0):
    bounds = np.concatenate(([0], np.cumsum(lengths)))
    return Layout(
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        max_seqlen=int(max(lengths)),
        positions=torch.cat([torch.arange(n) for n in lengths]) + shift,
    )


def make_batch(lengths=LENGTHS, pairs=False, t_r=0.72):
    generator = torch.Generator().manual_seed(1)
    bold = torch.randn(sum(lengths), 5, generator=generator, dtype=torch.float64)
    is_next = np.array([1.0, 0.0]) if pairs else None
    return PackedBatch.pack(bold, Windows.end_to_end(lengths, t_r=t_r, step=2, is_next=is_next))


def make_model(framework="csm", **changes):
    torch.manual_seed(0)
    model = build(ModelConfig(framework=framework, **{**SIZE, **changes})).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    if model.config.coordinates:
        model.embedding.set_coordinates(np.random.default_rng(0).uniform(-60, 60, (5, 3)))
    return model


def alone(batch, window):
    begin, end = batch.cu_seqlens[window : window + 2].tolist()
    return replace(
        batch,
        bold=batch.bold[begin:end],
        times=batch.times[begin:end],
        cu_seqlens=torch.tensor([0, end - begin], dtype=torch.int32),
        max_seqlen=end - begin,
        lengths=batch.lengths[window : window + 1],
    )


@pytest.mark.parametrize("framework", ["csm", "seq-bert", "net-bert"])
def test_packed_equals_one_by_one_with_every_option(framework):
    batch, model = make_batch(), make_model(framework, **MODERN).eval()
    for pooling in ("last", "mean", "cls"):
        packed = model.features(batch, pooling)
        single = torch.cat([model.features(alone(batch, i), pooling) for i in range(4)])
        torch.testing.assert_close(packed, single, rtol=0, atol=1e-9)


def test_dense_equals_single_with_every_option(monkeypatch):
    batch, model = make_batch(), make_model(**MODERN).eval()
    single = build(replace(model.config, masking="single")).double().eval()
    single.load_state_dict(model.state_dict())
    values, rows = model.reconstruct(batch, seed=0)
    starts = batch.cu_seqlens[:-1].numpy()
    for i in range(1, 7):
        chosen = starts + np.minimum(i, LENGTHS - 1)
        monkeypatch.setattr("brainflow.frameworks.csm.drawn_rows", lambda mask, lengths, c=chosen: c)
        expected, _ = single.reconstruct(batch, seed=0)
        dense = torch.stack([values[rows == row][0] for row in chosen])
        torch.testing.assert_close(dense, expected, rtol=0, atol=1e-10)


def test_rotary_states_depend_on_distances_alone():
    config = ModelConfig(**SIZE, positions="rotary")
    model = Transformer("bert", config).double().eval()
    assert model.positions is None
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(7, 16, dtype=torch.float64)
    here = model(x, layout_of([7]))
    torch.testing.assert_close(model(x, layout_of([7], shift=1000)), here, rtol=0, atol=1e-9)
    assert not torch.allclose(model(x.flip(0), layout_of([7])).flip(0), here, atol=1e-3)
    model(torch.randn(40, 16, dtype=torch.float64), layout_of([40]))  # longer than max_positions


def test_a_rotation_is_the_product_with_complex_numbers(monkeypatch):
    qkv, places = torch.randn(6, 3, 2, 8, dtype=torch.float64, requires_grad=True), torch.arange(3.0, 9.0)
    angle = places.double()[:, None] * 10_000.0 ** -(torch.arange(4.0, dtype=torch.float64) / 4)
    turn = rotation(places.double(), 8, torch.float64)
    turned = rotate(qkv, turn)
    expected = (
        torch.complex(*qkv[:, :2].chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)[:, None, None]
    )
    torch.testing.assert_close(torch.complex(*turned[:, :2].chunk(2, -1)), expected)
    assert torch.equal(turned[:, 2], qkv[:, 2])
    assert torch.autograd.gradcheck(lambda x: rotate(x, turn), qkv)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(rotate(qkv, turn), turned)


def test_swiglu_has_as_many_weights_and_rms_norm_no_bias():
    plain, gated = (Transformer("gpt", ModelConfig(width=96, layers=1, heads=2, activation=a)) for a in
                    ("published", "swiglu"))  # fmt: skip
    counts = [
        sum(p.numel() for p in t.blocks[0].feedforward.parameters() if p.dim() == 2) for t in (plain, gated)
    ]
    assert counts[0] == counts[1]
    rms = Transformer("gpt", ModelConfig(width=16, layers=1, heads=2, norm="rms"))
    assert all(isinstance(m, nn.RMSNorm) for n, m in rms.named_modules() if "norm" in n)
    with pytest.raises(ValueError, match=r"model\.positions: got rotary with 3 values a head"):
        ModelConfig(width=6, heads=2, positions="rotary")


@pytest.mark.parametrize("style", ["gpt", "bert"])
def test_wanted_rows_are_those_of_the_whole(style):
    model = Transformer(style, ModelConfig(**SIZE)).double()
    x, rows = torch.randn(17, 16, dtype=torch.float64, requires_grad=True), torch.tensor([16, 0, 3, 3])
    whole, part = model(x, layout_of(LENGTHS))[rows], model(x, layout_of(LENGTHS), rows=rows)
    torch.testing.assert_close(part, whole, rtol=0, atol=1e-12)
    weights, inputs = torch.randn_like(part), [x, *model.parameters()]
    ours = torch.autograd.grad((part * weights).sum(), inputs)
    for a, b in zip(ours, torch.autograd.grad((whole * weights).sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_waves_tell_any_time_apart_and_special_tokens_have_their_own():
    embedding = BoldEmbedding(ModelConfig(**SIZE, time_encoding="fourier"))
    seconds = torch.tensor([0.0, 0.1, 0.72, 2.5, 299.0, 5000.0, float(embedding.dummy)])
    encoded = embedding.time(embedding.clock(seconds))
    assert torch.pdist(encoded).min() > 0
    assert torch.equal(encoded[-1], embedding.time.special)
    table = BoldEmbedding(ModelConfig(**SIZE))
    assert table.clock(seconds[:2]).tolist() == [0, 0]  # the table knows 0.2 s


def test_coordinates_act_like_input_weights_that_depend_on_place():
    plain = BoldEmbedding(ModelConfig(**SIZE))
    placed = BoldEmbedding(ModelConfig(**SIZE, coordinates=True))
    placed.load_state_dict(plain.state_dict(), strict=False)
    bold = torch.randn(3, 5)
    places = np.array([[0, 0, 0], [0, 0, 0], [40, 0, 0], [0, 40, 0], [0, 0, 40.0]])
    placed.set_coordinates(places)
    torch.testing.assert_close(placed(bold), plain(bold))  # begins as the model without coordinates
    nn.init.normal_(placed.place.weight)
    weights = placed.place(placed.places)
    assert torch.equal(weights[0], weights[1])
    assert torch.pdist(weights[1:]).min() > 0.1
    plain.project.weight.data += weights.t()
    torch.testing.assert_close(placed(bold), plain(bold), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"model\.coordinates off"):
        plain.set_coordinates(places)


@pytest.mark.parametrize(
    ("style", "streams", "recompute", "options"),
    [("gpt", 2, False, {}), ("gpt", 2, True, MODERN), ("bert", 1, False, {})],
)
def test_compiles_without_graph_breaks(style, streams, recompute, options):
    torch._dynamo.reset()
    model = Transformer(style, ModelConfig(**{**SIZE, "layers": 1}, recompute=recompute, **options))
    compiled = torch.compile(model, backend="eager", fullgraph=True)  # the graph is what is asked about
    x = torch.randn(*((2,) if streams == 2 else ()), 17, 16)
    layout, rows = layout_of(LENGTHS), torch.tensor([3, 0])
    outs = [m(x, layout, two_streams=streams == 2, rows=rows) for m in (model, compiled)]
    torch.testing.assert_close(*outs)
    outs[1].sum().backward()
    assert all(p.grad is not None for p in model.blocks[-1].parameters())


@pytest.mark.parametrize("framework", ["csm", "seq-bert"])
def test_compiled_blocks_are_traced_once_for_batches_of_all_sizes(framework):
    """The graphs of the first batch serve 50 more, unbroken, and give the same losses."""
    seen, rng = [], np.random.default_rng(0)
    model = build(ModelConfig(**{**SIZE, "layers": 3, "max_positions": 128}, framework=framework)).train()
    plain = deepcopy(model)
    torch._dynamo.reset()
    for block in model.transformer.blocks:
        # Traced as on a GPU, but run by torch: compiling C++ takes a minute.
        block.compile(dynamic=True, fullgraph=True, backend=lambda graph, _: seen.append(graph) or graph)
    for step in range(51):
        lengths = rng.integers(2, 50, size=rng.integers(2, 6) * 2)
        nexts = rng.integers(0, 2, len(lengths) // 2).astype(np.float32) if framework == "seq-bert" else None
        windows = Windows.end_to_end(lengths, t_r=2.0, step=step, is_next=nexts)
        batch = PackedBatch.pack(torch.randn(int(lengths.sum()), 5), windows)
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            loss = model(batch, seed=0).loss
        torch.testing.assert_close(loss, plain(batch, seed=0).loss, rtol=1e-5, atol=0)
    assert 0 < len(seen) <= 3
