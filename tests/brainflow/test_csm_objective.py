from dataclasses import replace

import numpy as np
import pytest
import torch

from brainflow.batch import PackedBatch, Windows
from brainflow.frameworks import CSMConfig, build

CONFIG = CSMConfig(networks=6, width=16, layers=3, heads=2, dropout=0.1, max_positions=16)
LENGTHS = [5, 9, 2]


def make_batch(lengths, networks=6, seed=0, step=0):
    generator = torch.Generator().manual_seed(seed)
    bold = torch.randn(sum(lengths), networks, generator=generator, dtype=torch.float64)
    return PackedBatch.pack(bold, Windows.end_to_end(lengths, t_r=0.72, step=step))


@pytest.fixture
def models():
    torch.manual_seed(0)
    dense = build(CONFIG).double().eval()
    for parameter in dense.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    others = {}
    for masking in ("single", "next"):
        others[masking] = build(replace(CONFIG, masking=masking)).double().eval()
        others[masking].load_state_dict(dense.state_dict())
    return {"dense": dense, **others}


def single_at(model, batch, rows, monkeypatch):
    """Predictions of the single form with chosen masked rows, one a window."""
    monkeypatch.setattr("brainflow.frameworks.csm.drawn_rows", lambda mask, lengths: np.asarray(rows))
    return model.reconstruct(batch, seed=0)[0], model(batch, seed=0).loss


def test_dense_loss_equals_single_position_loss_everywhere(models, monkeypatch):
    batch = make_batch(LENGTHS)
    values, rows = models["dense"].reconstruct(batch, seed=0)
    starts = batch.cu_seqlens[:-1].numpy()
    assert rows.tolist() == [r for r in range(batch.tokens) if r not in starts]
    losses = np.zeros(batch.tokens)
    for i in range(1, max(LENGTHS)):
        chosen = [s + min(i, n - 1) for s, n in zip(starts, LENGTHS, strict=True)]
        single, loss = single_at(models["single"], batch, chosen, monkeypatch)
        for window, row in enumerate(chosen):
            dense = values[rows == row][0]
            error = (dense - batch.bold[row]).abs().mean() - (single[window] - batch.bold[row]).abs().mean()
            assert abs(float(error)) <= 1e-10
            torch.testing.assert_close(dense, single[window], rtol=0, atol=1e-10)
            losses[row] = (single[window] - batch.bold[row]).abs().mean()
        mean = np.mean([losses[row] for row in chosen])
        assert abs(float(loss) - mean) <= 1e-10
    expected = np.mean([losses[s + 1 : s + n].mean() for s, n in zip(starts, LENGTHS, strict=True)])
    # The weights 1 / (L - 1) are float32.
    assert abs(float(models["dense"](batch, seed=0).loss) - expected) <= 1e-7


def test_dense_gradient_is_the_expected_single_gradient(models, monkeypatch):
    batch = make_batch([4, 4])
    models["dense"](batch, seed=0).loss.backward()
    for i in (1, 2, 3):
        _, loss = single_at(models["single"], batch, [i, 4 + i], monkeypatch)
        (loss / 3).backward()
    for (name, a), b in zip(models["dense"].named_parameters(), models["single"].parameters(), strict=True):
        if name != "cls_token":
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize("masking", ["dense", "next"])
def test_later_values_never_change_a_prediction(models, masking):
    batch = make_batch(LENGTHS)
    model = models[masking]
    values, rows = model.reconstruct(batch, seed=0)
    with torch.no_grad():
        for window, length in enumerate(LENGTHS):
            start = int(batch.cu_seqlens[window])
            for i in range(1, length):
                bold = batch.bold.clone()
                bold[start + i : start + length] = 1e3 * torch.randn(length - i, 6, dtype=torch.float64)
                changed, _ = model.reconstruct(replace(batch, bold=bold), seed=0)
                same = (rows < start) | (rows <= start + i) | (rows >= start + length)
                assert torch.equal(changed[same], values[same])
                assert i == length - 1 or not torch.equal(changed[~same], values[~same])


def test_features_of_earlier_time_points_ignore_later_ones(models):
    batch = make_batch([6])
    first = models["dense"].features(batch, "first")
    bold = batch.bold.clone()
    bold[1:] = 7.0
    assert torch.equal(models["dense"].features(replace(batch, bold=bold), "first"), first)
    assert not torch.equal(models["dense"].features(replace(batch, bold=bold), "last"), first)


def test_single_never_reads_the_masked_value_or_later_ones(models):
    batch = make_batch(LENGTHS, step=4)
    values, rows = models["single"].reconstruct(batch, seed=3)
    bold = batch.bold.clone()
    for window, row in enumerate(rows.tolist()):
        bold[row : int(batch.cu_seqlens[window + 1])] = torch.nan
    assert torch.isnan(bold).any()
    again, _ = models["single"].reconstruct(replace(batch, bold=bold), seed=3)
    assert torch.equal(again, values)
    again.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in models["single"].parameters() if p.grad is not None)


def test_masks_follow_seed_and_step(models):
    batch = make_batch([30, 30], step=1)
    model = build(replace(CONFIG, masking="single", max_positions=32)).double().eval()
    draws = {
        (seed, step): tuple(model.reconstruct(replace(batch, step=step), seed=seed)[1].tolist())
        for seed in (0, 1)
        for step in (0, 1, 2)
    }
    assert len(set(draws.values())) > 3
    assert draws[1, 2] == tuple(model.reconstruct(replace(batch, step=2), seed=1)[1].tolist())


def test_windows_of_one_time_point_are_refused(models):
    with pytest.raises(ValueError, match="at least 2"):
        models["dense"](make_batch([3, 1]), seed=0)


def test_next_predicts_from_the_hidden_state_before(models):
    batch = make_batch([4])
    model = models["next"]
    values, rows = model.reconstruct(batch, seed=0)
    cut = make_batch([4])
    cut = replace(
        cut,
        bold=batch.bold[:3],
        times=batch.times[:3],
        cu_seqlens=torch.tensor([0, 3], dtype=torch.int32),
        max_seqlen=3,
        lengths=np.array([3], np.int32),
    )
    assert rows.tolist() == [1, 2, 3]
    torch.testing.assert_close(values[-1:], model.unembedding(model.features(cut, "last")))
