"""The linear path: what it reads, what it is fitted to, and that a model never does much worse than it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from brainflow.batch import PackedBatch, Windows
from brainflow.frameworks import build, model_config
from brainflow.models.linear_path import AROUND, PENALTIES, around, before, everywhere
from brainflow.pretrained.format import load_pretrained, read_config
from brainflow.storage import StoreWriter
from brainflow.training.loop import pretrain
from brainflow.training.metrics import read_metrics
from brainflow.training.step import TrainingStep
from tests.helpers.tiny_training import at_step, curve, tiny

SETTINGS = {
    "networks": 5,
    "width": 16,
    "layers": 1,
    "heads": 2,
    "loss": "mse",
    "positions": "seconds",
    "time_encoding": "none",
    "embedding_norm": False,
    "norm_first": True,
    "linear": True,
}
FRAMEWORKS = {
    "csm": model_config("csm", masking="next", **SETTINGS),
    "seq-bert": model_config("seq-bert", mask_rate=0.3, **SETTINGS),
    "net-bert": model_config("net-bert", mask_rate=0.3, **SETTINGS),
}
AUTOENCODER = model_config("autoencoder", **SETTINGS | {"width": 24})
lengths_and_rows = st.lists(st.integers(2, 9), min_size=1, max_size=4).flatmap(
    lambda lengths: st.tuples(st.just(lengths), st.sets(st.integers(0, sum(lengths) - 1)))
)


def process(time, seed, networks=5):
    """An autoregressive process of order 2 whose noise is shared among networks."""
    rng = np.random.default_rng(seed)
    shared = np.random.default_rng(99)
    one, two = (
        0.5 * np.eye(networks) + 0.15 * shared.normal(size=(networks, networks)),
        -0.3 * np.eye(networks),
    )
    mixing = np.eye(networks) + 0.6 * shared.normal(size=(networks, networks))
    x = np.zeros((time + 50, networks))
    for t in range(2, len(x)):
        x[t] = x[t - 1] @ one + x[t - 2] @ two + rng.normal(size=networks) @ mixing
    return x[50:].astype(np.float32)


def packed(lengths, seed=0, step=0, runs=None):
    bold = torch.from_numpy(process(sum(lengths), seed))
    windows = Windows.end_to_end(lengths, t_r=0.72, step=step)
    if runs is not None:
        windows = replace(windows, runs=np.asarray(runs, np.int32))
    return PackedBatch.pack(bold, windows)


@given(lengths_and_rows)
def test_both_neighbours_are_the_nearest_that_are_seen_within_two(drawn):
    lengths, rows = np.array(drawn[0]), np.array(sorted(drawn[1]), np.int64)
    found = around(lengths, rows)
    window = np.repeat(np.arange(len(lengths)), lengths)
    for row, (past, future), kind in zip(found.rows, found.read, found.kind, strict=True):
        seen = [r for r in range(len(window)) if window[r] == window[row] and r not in drawn[1]]
        assert past == max((r for r in seen if row - 2 <= r < row), default=-1)
        assert future == min((r for r in seen if row < r <= row + 2), default=-1)
        pair = (row - past if past >= 0 else 0, future - row if future >= 0 else 0)
        assert kind == AROUND.index(pair)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_the_fit_sees_every_time_point_with_every_kind_of_neighbourhood(lengths):
    found = everywhere(np.array(lengths))
    window = np.repeat(np.arange(len(lengths)), lengths)
    expected = [
        (row, row - back if back else -1, row + ahead if ahead else -1, kind)
        for kind, (back, ahead) in enumerate(AROUND)
        for row in range(len(window))
        if all(0 <= r < len(window) and window[r] == window[row] for r in (row - back, row + ahead))
    ]
    assert [(*one,) for one in zip(found.rows, *found.read.T, found.kind, strict=True)] == expected


@given(st.lists(st.integers(2, 9), min_size=1, max_size=4))
def test_the_two_time_points_before_are_of_the_same_window(lengths):
    starts = np.cumsum([0, *lengths[:-1]])
    rows = np.setdiff1d(np.arange(sum(lengths)), starts)
    found = before(np.array(lengths), rows)
    for row, (one, two), kind in zip(found.rows, found.read, found.kind, strict=True):
        assert one == row - 1
        assert (two, kind) == ((-1, 1) if row - 1 in starts else (row - 2, 0))


def fitted(framework, count=12):
    torch.manual_seed(0)
    module = build({**FRAMEWORKS, "autoencoder": AUTOENCODER}[framework]).eval()
    for step in range(count):
        batch = packed([40, 60, 50], seed=step, step=step, runs=[step, step, step])
        module.linear_path.collect(replace(batch, mask=module.mask(batch, seed=0)))
    module.linear_path.solve()
    return module


def test_the_path_of_csm_is_the_ridge_of_order_2():
    path = fitted("csm").linear_path
    x = [process(150, step) for step in range(12)]
    inputs, target = [], []
    for run in x:
        for begin, end in ((0, 40), (40, 100), (100, 150)):
            inputs.append(np.concatenate((run[begin + 1 : end - 1], run[begin : end - 2]), 1))
            target.append(run[begin + 2 : end])
    inputs, target = (np.concatenate(part).astype(np.float64) for part in (inputs, target))
    a, b = inputs - inputs.mean(0), target - target.mean(0)
    fits = []
    for penalty in PENALTIES:
        square = a.T @ a / len(a)
        fits.append(
            np.linalg.solve(square + penalty * np.diag(square).mean() * np.eye(10), a.T @ b / len(a)).T
        )
    assert min(np.abs(path.weight[0].numpy() - fit).max() for fit in fits) < 1e-5
    bias = target.mean(0) - path.weight[0].numpy() @ inputs.mean(0)
    np.testing.assert_allclose(path.bias[0], bias, atol=1e-5)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_it_predicts_what_nobody_fitted_it_to_and_only_from_what_is_seen(framework):
    module = fitted(framework)
    batch = packed([50, 70], seed=1000)
    batch = replace(batch, mask=module.mask(batch, seed=1))
    said = module.linear_path(batch)
    module.linear_path.gain.zero_()
    values, rows = module.reconstruct(batch, seed=1)
    torch.testing.assert_close(values, said, equal_nan=True)
    known = ~values.isnan()
    left = ((values - batch.bold[rows])[known] ** 2).mean() / (batch.bold[rows][known] ** 2).mean()
    assert left < 0.8
    if framework == "net-bert":
        hidden = torch.where(known, 1e6, batch.bold)
        other = module.linear_path(replace(batch, bold=hidden))
    else:
        changed = batch.bold.clone()
        changed[rows[-1]] = 1e6  # what is predicted last is read by nobody
        other = module.linear_path(replace(batch, bold=changed))
    torch.testing.assert_close(other, said, equal_nan=True)


def test_networks_are_predicted_by_their_conditional_mean():
    module = fitted("net-bert")
    batch = packed([7, 9], seed=5)
    batch = replace(batch, mask=module.mask(batch, seed=3))
    masked = module._masked(batch).numpy()
    covariance = np.linalg.inv(module.linear_path.precision.double().numpy())
    mean, bold = module.linear_path.mean.double().numpy(), batch.bold.double().numpy()
    said = module.linear_path(batch).numpy()
    assert masked.any()
    assert np.isnan(said[~masked]).all()
    for row in range(len(bold)):
        m, u = masked[row], ~masked[row]
        expected = mean[m] + covariance[np.ix_(m, u)] @ np.linalg.solve(
            covariance[np.ix_(u, u)], (bold[row] - mean)[u]
        )
        np.testing.assert_allclose(said[row, m], expected, atol=2e-5)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_gain_weighs_path_and_network(framework):
    module = fitted(framework)
    batch = packed([20, 30], seed=7)
    module.linear_path.gain.fill_(1.0)
    network = module.reconstruct(batch, seed=0)[0]
    linear = module.linear_path(replace(batch, mask=module.mask(batch, seed=0)))
    module.linear_path.gain.fill_(0.25)
    torch.testing.assert_close(
        module.reconstruct(batch, seed=0)[0], 0.75 * linear + 0.25 * network, equal_nan=True
    )


def test_an_autoencoder_begins_as_principal_components():
    module = fitted("autoencoder")
    batch = packed([30, 4, 17, 30], seed=3)
    path = module.linear_path
    values, rows = module.reconstruct(batch, seed=0)
    torch.testing.assert_close(values, path(batch))
    assert rows.tolist() == list(range(batch.tokens))
    code = module.features(batch, "cls")
    torch.testing.assert_close(code, path.code(batch))
    torch.testing.assert_close(path.code(replace(batch, bold=path(batch))), code, rtol=1e-4, atol=1e-4)
    short = slice(30, 34)  # 4 time points of 5 networks are fewer values than the code has numbers
    torch.testing.assert_close(values[short], batch.bold[short], rtol=1e-4, atol=1e-4)
    loss = module(batch, seed=0).loss
    torch.testing.assert_close(loss, (values - batch.bold).square().mean())


def test_loaded_components_take_the_place_of_those_that_were_used():
    ours, theirs = fitted("autoencoder").linear_path, fitted("autoencoder", count=3).linear_path
    batch = packed([30, 9], seed=3)
    assert not torch.equal(ours.code(batch), theirs.code(batch))
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.code(batch), theirs.code(batch))


def test_the_components_are_nearly_as_good_as_those_of_windows_of_one_length():
    module = fitted("autoencoder")
    train = np.concatenate([process(150, s)[: 150 // 30 * 30].reshape(-1, 150) for s in range(12)])
    test = np.concatenate([process(600, s).reshape(-1, 150) for s in range(50, 60)])
    mean = train.mean(0)
    basis = np.linalg.svd(train - mean, full_matrices=False)[2][:24]
    left = ((test - mean) - (test - mean) @ basis.T @ basis).var()
    batch = PackedBatch.pack(
        torch.from_numpy(test.reshape(-1, 5)), Windows.end_to_end([30] * len(test), t_r=1.0)
    )
    ours = float((module.linear_path(batch) - batch.bold).square().mean())
    assert ours < 1.02 * left
    codes = module.linear_path.code(batch)
    assert 0.5 < float(codes.square().mean()) < 1.5


def test_an_autoencoder_learns_on_top_of_its_components(store, tmp_path):
    config = settings(store, tmp_path / "run", "csm", keep_best=True, steps=30, validate_every=10)
    run = pretrain(replace(config, model=AUTOENCODER), quiet=True)
    last = next(line for line in reversed(read_metrics(run)) if "val_loss" in line)
    assert last["val_share"] in (0.0, 1.0)
    assert last["val_explained_variance"] > last["val_linear_explained_variance"] - 0.01
    assert last["val_network_mse"] != last["val_linear_mse"]
    batch = packed([20], seed=4)
    model = load_pretrained(run)
    assert torch.isfinite(model.reconstruct(batch, seed=0)[0]).all()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("linear") / "store"
    with StoreWriter.create(path, networks=5) as writer:
        for run in range(12):
            writer.append(process(150, run), t_r=0.72, dataset="a", subject=f"{run:02d}")
    return str(path)


def settings(store, out, framework, **train):
    config = tiny(store, out, framework=framework, **train)
    model = replace(FRAMEWORKS[framework], networks=config.model.networks)
    return replace(config, model=model, data=replace(config.data, validation_fraction=0.4, seq_max=40))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_trained_model_is_never_far_below_the_linear_predictor(store, tmp_path, framework):
    run = pretrain(settings(store, tmp_path / "run", framework, keep_best=True), quiet=True)
    lines = [line for line in read_metrics(run) if "val_loss" in line]
    last = lines[-1]
    assert last["val_linear_explained_variance"] > 0.15
    assert last["val_explained_variance"] > last["val_linear_explained_variance"] - 0.01
    assert last["val_network_mse"] > last["val_linear_mse"]  # a few steps of a tiny network
    assert last["val_linear_mse"] <= last["val_ar1_mse"] < last["val_mean_mse"]
    assert last["val_gain_low"] <= last["val_gain"] <= last["val_gain_high"]
    assert 0 <= last["val_share"] <= 1
    model = load_pretrained(run)
    best = min(lines, key=lambda line: line["val_mse"])
    assert float(model.linear_path.gain) == pytest.approx(best["val_share"])
    assert read_config(run)["model"]["linear"] is True


def test_a_resumed_run_has_the_same_path(store, tmp_path, monkeypatch):
    whole = pretrain(settings(store, tmp_path / "whole", "csm"), quiet=True)
    half = settings(store, tmp_path / "half", "csm")

    def stop(step):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainingStep, "__call__", at_step(6, stop))
        with pytest.raises(KeyboardInterrupt):
            pretrain(half, quiet=True)
    pretrain(half, quiet=True)
    assert curve(tmp_path / "half") == curve(whole)
    ours, theirs = (load_pretrained(tmp_path / name).state_dict() for name in ("half", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_without_it_validation_names_the_linear_predictor_all_the_same(store, tmp_path):
    config = settings(store, tmp_path / "run", "csm")
    run = pretrain(replace(config, model=replace(config.model, linear=False)), quiet=True)
    last = next(line for line in reversed(read_metrics(run)) if "val_loss" in line)
    assert last["val_linear_explained_variance"] > 0.15
    assert last["val_linear_mse"] != last["val_mse"]
    assert "val_share" not in last
    assert load_pretrained(run).linear_path is None


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_windows_longer_than_the_position_table_are_read(framework):
    module = build(
        replace(FRAMEWORKS[framework], max_positions=16 if framework != "net-bert" else 600)
    ).eval()
    batch = packed([400], seed=1)
    values, _ = module.reconstruct(batch, seed=0)
    assert torch.isfinite(values[~values.isnan()]).all()


def test_masked_time_points_are_filled_from_neighbours_and_never_from_themselves():
    torch.manual_seed(0)
    module = build(replace(FRAMEWORKS["seq-bert"], mask_fill="neighbours", linear=False)).eval()
    batch = packed([30, 20], seed=2)
    batch = replace(batch, mask=module.mask(batch, seed=0))
    values, rows = module.reconstruct(batch, seed=0)
    hidden = batch.bold.clone()
    hidden[rows] = 1e6
    torch.testing.assert_close(module.reconstruct(replace(batch, bold=hidden), seed=0)[0], values)
    filled = module._filled(batch, rows.numpy()) - module.mask_token
    inside = set(rows.tolist()) - {0, 29, 30, 49}
    alone = [row for row in inside if {row - 1, row + 1}.isdisjoint(rows.tolist())]
    assert alone
    for row in alone:
        mean = (batch.bold[row - 1] + batch.bold[row + 1]) / 2
        torch.testing.assert_close(filled[rows.tolist().index(row)], mean, rtol=1e-4, atol=1e-4)
