"""Validation: the model and the two baselines are scored on the same masked values."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from brainflow.training.parallel import Ranks
from brainflow.training.validation import Validator, _RankSlice


@dataclass
class Output:
    loss: torch.Tensor
    metrics: dict


@dataclass
class Batch:
    bold: torch.Tensor
    cu_seqlens: torch.Tensor
    lengths: np.ndarray
    runs: np.ndarray
    step: int = 0
    windows: int = 2

    @property
    def tokens(self):
        return len(self.bold)

    @property
    def times(self):
        return torch.arange(self.tokens)


class Guess(torch.nn.Module):
    """Predicts every time point but a window's first by a rule instead of a model."""

    def __init__(self, rule):
        super().__init__()
        self.rule = rule

    def score(self, batch, *, seed):
        rows = torch.from_numpy(np.setdiff1d(np.arange(batch.tokens), batch.cu_seqlens[:-1].numpy()))
        output = Output(torch.tensor(float(batch.windows)), {"reconstruction": torch.tensor(2.0)})
        return output, self.rule(batch, rows), rows


@pytest.fixture
def validator(monkeypatch):
    # Two batches of two windows with known values, so that the scores can be worked out here.
    rng = np.random.default_rng(0)
    lengths = np.array([4, 7, 3, 5], np.int32)
    bold = torch.from_numpy(rng.standard_normal((19, 3)).astype(np.float32) + np.array([0, 1, 2], np.float32))

    def loader(store, sampler, *, kind, device, on_corrupt):
        batches = []
        for i in (0, 2):
            rows = slice(int(lengths[:i].sum()), int(lengths[: i + 2].sum()))
            cu = torch.tensor([0, lengths[i], lengths[i] + lengths[i + 1]], dtype=torch.int32)
            part = bold[rows]
            batches.append(Batch(part, cu, lengths[i : i + 2], np.array([0, 1])))

        class Loader:
            def __iter__(self):
                return iter(batches)

            def close(self):
                pass

        return Loader()

    monkeypatch.setattr("brainflow.training.validation.make_loader", loader)
    runs = SimpleNamespace(dataset=np.array(["a", "b"]), subject=np.array(["1", "1"]))
    store = SimpleNamespace(networks=3, runs=runs)
    made = Validator(store, None, None, batches=2, device=torch.device("cpu"))
    return made, bold, lengths


def test_the_mean_is_the_training_sets(validator):
    made, bold, _ = validator
    torch.testing.assert_close(made.mean, bold.mean(dim=0))


def test_repeating_the_last_value_scores_as_its_baseline(validator):
    made, _, _ = validator
    module = Guess(lambda batch, rows: batch.bold[rows - 1]).train()
    scores, _ = made(module)
    assert scores["val_l1"] == scores["val_last_l1"]
    assert scores["val_mse"] == scores["val_last_mse"]
    assert scores["val_l1"] != scores["val_mean_l1"]
    assert scores["val_loss"] == scores["val_reconstruction"] == 2.0
    assert module.training


def test_predicting_the_mean_explains_nothing(validator):
    made, bold, lengths = validator
    scores, _ = made(Guess(lambda batch, rows: made.mean.expand(len(rows), -1)))
    assert scores["val_explained_variance"] == 0.0
    first = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    target = np.delete(bold.numpy(), first, axis=0)
    assert scores["val_mean_l1"] == pytest.approx(np.abs(target - made.mean.numpy()).mean(), rel=1e-6)


def test_a_perfect_model(validator):
    made, _, _ = validator
    scores, _ = made(Guess(lambda batch, rows: batch.bold[rows]))
    assert (scores["val_l1"], scores["val_explained_variance"]) == (0.0, 1.0)


def test_values_that_were_given_do_not_count(validator):
    made, _, _ = validator

    def only_network_1(batch, rows):
        prediction = batch.bold[rows - 1].clone()
        prediction[:, [0, 2]] = torch.nan
        return prediction

    scores, _ = made(Guess(only_network_1))
    everything, _ = made(Guess(lambda batch, rows: batch.bold[rows - 1]))
    assert scores["val_l1"] == scores["val_last_l1"]
    assert scores["val_last_l1"] != everything["val_last_l1"]


def test_each_dataset_and_each_network_is_scored_apart(validator):
    made, bold, lengths = validator

    def guess(batch, rows):
        # Right in network 0, the opposite in network 1, always the same in network 2.
        target = batch.bold[rows]
        return torch.stack([target[:, 0], -target[:, 1], torch.full_like(target[:, 2], 0.5)], dim=1)

    scores, example = made(Guess(guess))
    assert scores["val_network_correlation"] == [pytest.approx(1.0), pytest.approx(-1.0), None]
    assert scores["val_correlation"] == pytest.approx(0.0)
    assert scores["val_by_dataset"].keys() == {"a", "b"}
    # Of each batch the first window is from dataset a, the second from b; its first time point is no target.
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    for name, windows in (("a", (0, 2)), ("b", (1, 3))):
        rows = np.concatenate([np.arange(bounds[i] + 1, bounds[i + 1]) for i in windows])
        target = bold.numpy()[rows]
        error = np.stack([0 * target[:, 0], 2 * target[:, 1], target[:, 2] - 0.5])
        found = scores["val_by_dataset"][name]
        assert found["l1"] == pytest.approx(np.abs(error).mean(), rel=1e-6)
        assert found["mse"] == pytest.approx((error**2).mean(), rel=1e-6)
        variance = ((target - made.mean.numpy()) ** 2).mean()
        assert found["explained_variance"] == pytest.approx(1 - (error**2).mean() / variance, rel=1e-5)
    assert example.bold.shape == example.prediction.shape == (7, 3)  # the longest window of the first batch
    assert np.isnan(example.prediction[0]).all()
    assert np.isfinite(example.prediction[1:]).all()


@pytest.mark.parametrize(("batches", "world"), [(2, 1), (5, 2), (3, 4), (1, 3)])
def test_the_ranks_share_all_batches_and_each_counts_once(batches, world):
    rounds = -(-batches // world)
    shares = [_RankSlice(None, batches, Ranks(rank=rank, world=world)) for rank in range(world)]
    counted = [s.number(step) for s in shares for step in range(rounds) if s.counts(step)]
    assert sorted(counted) == list(range(batches))
    assert all(0 <= s.number(step) < batches for s in shares for step in range(rounds))
