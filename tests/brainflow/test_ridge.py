"""Ridge in closed form: the same as fitting again and again, penalty and scale from people left out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax
from sklearn.linear_model import Ridge as ScikitRidge

from brainflow.decoding import ridge as module
from brainflow.decoding.ridge import BETTER, NEVER, PENALTIES, fit_ridge


def planted(people=6, features=40, signal=1.0, seed=0, classes=3):
    rng = np.random.default_rng(seed)
    labels = np.tile(np.arange(classes), people)
    groups = np.repeat(np.arange(people), classes)
    own = rng.normal(size=(people, features))[groups]
    x = own + signal * rng.normal(size=(classes, features))[labels] + rng.normal(size=(len(labels), features))
    return x, labels, groups


def by_refitting(x, labels, weights, penalty):
    """Weighted ridge on standardised features by scikit-learn, with the penalty in our units."""
    mean = np.average(x, axis=0, weights=weights)
    scaled = (x - mean) / np.sqrt(np.average((x - mean) ** 2, axis=0, weights=weights))
    unit = (weights[:, None] * scaled**2).sum() / len(x)
    fit = ScikitRidge(alpha=penalty * unit, solver="cholesky")
    return fit, scaled


@given(
    wide=st.booleans(), balance=st.booleans(), seed=st.integers(0, 99), penalty=st.sampled_from([0.01, 1.0])
)
def test_left_out_scores_are_those_of_fits_without_the_group(wide, balance, seed, penalty):
    x, labels, groups = planted(features=50 if wide else 5, seed=seed)
    if balance:
        x, labels, groups = (part[3:] if i != 1 else np.append(part[3:-1], 0) for i, part in
                             enumerate((x, labels, groups)))  # fmt: skip
    counts = np.bincount(labels)
    weights = (len(x) / (3 * counts))[labels] if balance else np.ones(len(x))
    fit, scaled = by_refitting(x, labels, weights, penalty)
    onehot, root = np.eye(3)[labels], np.sqrt(weights)[:, None]
    share = np.average(onehot, axis=0, weights=weights)
    ours = module._Decomposition(scaled, onehot - share, root)
    for part in map(np.flatnonzero, module._parts(groups, len(x))):
        (found,) = ours.left_out(np.array([penalty]), part, ours.left(part)) + share
        rest = np.setdiff1d(np.arange(len(x)), part)
        fit.fit(scaled[rest], onehot[rest], sample_weight=weights[rest])
        np.testing.assert_allclose(found, fit.predict(scaled[part]), atol=1e-6)


@pytest.mark.parametrize("features", [5, 60])
@pytest.mark.parametrize("balance", [False, True])
def test_weights_are_those_of_ridge_with_the_chosen_penalty(features, balance):
    x, labels, groups = planted(features=features)
    keep = np.flatnonzero(np.arange(len(x)) % 5 > 0)
    x, labels, groups = x[keep] * 7 + 100, labels[keep], groups[keep]
    ours = fit_ridge(x, labels, classes=3, groups=groups, balance=balance)
    weights = (len(x) / (3 * np.bincount(labels)))[labels] if balance else np.ones(len(x))
    fit, scaled = by_refitting(x, labels, weights, ours.penalty)
    expected = fit.fit(scaled, np.eye(3)[labels], sample_weight=weights).predict(scaled)
    logits = ours.logits(x)
    slope = np.polyfit(expected.ravel(), logits.ravel(), 1)
    np.testing.assert_allclose(np.polyval(slope, expected), logits, atol=1e-6)
    assert ours.penalty in PENALTIES


def test_probabilities_of_new_people_are_as_sure_as_they_are_right():
    """Of people that were not seen the cross-entropy is nearly that of the best scale for them."""
    x, labels, groups = planted(people=200, features=30, signal=0.5)
    seen = groups < 100
    logits = fit_ridge(x[seen], labels[seen], classes=3, groups=groups[seen]).logits(x[~seen])
    rows = np.arange((~seen).sum())

    def loss(factor):
        return -log_softmax(factor * logits, axis=1)[rows, labels[~seen]].mean()

    assert loss(1.0) < min(loss(f) for f in np.geomspace(0.2, 5, 41)) + 0.01
    assert loss(1.0) < np.log(3) - 0.1


def test_people_not_windows_choose_the_penalty():
    """What marks persons, and their labels with them, is of no use for other persons: leave them out."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(8), 20)
    labels = rng.integers(0, 2, 8)[groups] ^ (rng.random(160) < 0.2)
    x = rng.normal(size=(8, 60))[groups] + 0.3 * rng.normal(size=(160, 60))
    by_people = fit_ridge(x, labels, classes=2, groups=groups)
    by_windows = fit_ridge(x, labels, classes=2)
    assert by_windows.loss < 0.6 < by_people.loss
    assert by_people.penalty > by_windows.penalty


def test_one_person_is_judged_by_windows_that_are_left_out():
    x, labels, _ = planted(people=12)
    alone = fit_ridge(x, labels, classes=3, groups=np.zeros(len(x)))
    by_windows = fit_ridge(x, labels, classes=3)
    assert alone.penalty == by_windows.penalty
    assert alone.loss == by_windows.loss < np.log(3)


def test_copies_weigh_as_one_window_and_are_left_out_with_it():
    x, labels, groups = planted(people=8)
    plain = fit_ridge(x, labels, classes=3, groups=groups)
    same = fit_ridge(np.stack([x, x, x]), labels, classes=3, groups=groups)
    assert same.penalty == plain.penalty
    np.testing.assert_allclose(same.loss, plain.loss)
    np.testing.assert_allclose(same.weight, plain.weight, atol=1e-8)
    alone = [fit_ridge(one, labels[:3], classes=3).logits(x) for one in (x[:3], np.stack([x[:3], x[:3]]))]
    np.testing.assert_allclose(*alone, atol=1e-8)


def ordered(people, offset, seed=0):
    """Windows of 4 time points × 5 networks whose classes differ in when networks are active."""
    rng = np.random.default_rng(seed)
    labels, groups = np.tile(np.arange(4), 2 * people), np.repeat(np.arange(people), 8)
    x = rng.normal(size=(len(labels), 4, 5)) + offset * rng.normal(size=(len(labels), 1, 5))
    x[np.arange(len(labels)), labels] += 1
    return x.reshape(len(labels), 20), labels, groups


def test_means_over_time_have_no_weight_where_they_are_noise():
    x, labels, groups = ordered(6, offset=5.0)
    plain, chosen = (fit_ridge(x, labels, classes=4, groups=groups, times=times) for times in (1, 4))
    assert chosen.loss < plain.loss - 0.05
    np.testing.assert_allclose(chosen.weight.reshape(4, 4, 5).mean(axis=1), 0, atol=1e-12)
    moved = x + np.tile(np.arange(5), 4)
    np.testing.assert_allclose(chosen.logits(moved), chosen.logits(x), atol=1e-9)
    new, named, _ = ordered(50, offset=5.0, seed=1)
    hits = [(one.logits(new).argmax(axis=1) == named).mean() for one in (plain, chosen)]
    assert hits[1] > hits[0] + 0.03


def test_many_windows_need_no_such_choice(monkeypatch):
    x, labels, groups = ordered(6, offset=5.0)
    monkeypatch.setattr(module, "ENOUGH", 47)
    plain, asked = (fit_ridge(x, labels, classes=4, groups=groups, times=times) for times in (1, 4))
    np.testing.assert_array_equal(asked.weight, plain.weight)


def quiet(people, seed=0):
    """Windows of 3 time points × 40 networks: 30 loud directions mean nothing, a quiet one tells when."""
    rng = np.random.default_rng(seed)
    mixing = np.linalg.qr(np.random.default_rng(9).normal(size=(40, 40)))[0] * np.r_[[9.0] * 30, [1.0] * 10]
    labels, groups = np.tile(np.arange(3), 2 * people), np.repeat(np.arange(people), 6)
    sources = rng.normal(size=(len(labels), 3, 40))
    sources[np.arange(len(labels)), labels, 39] += 7
    return (sources @ mixing.T).reshape(len(labels), 120), labels, groups


def covariance(x, times):
    return np.cov(x.reshape(len(x) * times, -1).T, bias=True)


def test_quiet_directions_that_tell_are_read_after_whitening():
    x, labels, groups = quiet(6)
    settings = {"classes": 3, "groups": groups, "times": 3}
    known = covariance(quiet(200, seed=1)[0], 3)
    plain, chosen = fit_ridge(x, labels, **settings), fit_ridge(x, labels, covariance=known, **settings)
    assert chosen.whitened
    assert not plain.whitened
    assert chosen.loss < 0.8 * plain.loss
    new, named, _ = quiet(50, seed=2)
    hits = [(one.logits(new).argmax(axis=1) == named).mean() for one in (plain, chosen)]
    assert hits[1] > hits[0] + 0.1
    value, vector = np.linalg.eigh(known)
    at_once = np.kron(np.eye(3), (vector / np.sqrt(value)) @ vector.T)
    other = fit_ridge(x @ at_once, labels, classes=3, groups=groups)
    np.testing.assert_allclose(chosen.logits(new), other.logits(new @ at_once), atol=1e-6)


def test_where_whitened_features_are_read_a_little_better_the_mean_of_both_is_read(monkeypatch):
    x, labels, groups = quiet(6)
    settings = {"classes": 3, "groups": groups, "times": 3}
    known, new = covariance(quiet(200, seed=1)[0], 3), quiet(5, seed=2)[0]

    def found(clearly):
        monkeypatch.setattr(module, "CLEARLY", clearly)
        return fit_ridge(x, labels, covariance=known, **settings)

    plain, whitened = fit_ridge(x, labels, **settings), found(np.inf)
    share = whitened.loss / plain.loss
    mean = found(share - 0.01)
    assert mean.whitened
    np.testing.assert_allclose(mean.logits(new), (plain.logits(new) + whitened.logits(new)) / 2, atol=1e-9)
    assert whitened.loss < mean.loss < plain.loss
    np.testing.assert_array_equal(found(share + 0.01).weight, whitened.weight)


def test_loud_directions_that_tell_are_read_as_they_are():
    x, labels, groups = ordered(6, offset=5.0)
    x = (x.reshape(-1, 4, 5) * [1, 1, 1, 1, 0.2]).reshape(-1, 20)
    rng = np.random.default_rng(3)
    x = np.concatenate([x.reshape(-1, 4, 5), 1e-2 * rng.normal(size=(len(x), 4, 20))], axis=2).reshape(
        -1, 100
    )
    settings = {"classes": 4, "groups": groups, "times": 4}
    plain, asked = fit_ridge(x, labels, **settings), fit_ridge(x, labels, covariance=np.eye(25), **settings)
    np.testing.assert_allclose(asked.weight, plain.weight)
    singular = fit_ridge(x, labels, covariance=np.zeros((25, 25)), **settings)
    assert np.isfinite(singular.weight).all()


def test_sustained_states_are_read_from_the_mean_over_time_alone():
    """Each person's windows differ much from bin to bin, and classes by what all bins share."""
    rng = np.random.default_rng(3)
    labels, groups = np.tile(np.arange(4), 12), np.repeat(np.arange(6), 8)
    pattern = rng.normal(size=(4, 8))
    x = 0.5 * pattern[labels][:, None] + rng.normal(size=(48, 10, 8)) * 2
    train = groups < 4
    found = fit_ridge(x[train].reshape(-1, 80), labels[train], classes=4, groups=groups[train], times=10)
    weight = found.weight.reshape(4, 10, 8)
    np.testing.assert_allclose(weight, np.broadcast_to(weight[:, :1], weight.shape))
    alone = fit_ridge(x[train].mean(axis=1), labels[train], classes=4, groups=groups[train])
    np.testing.assert_allclose(found.logits(x[~train].reshape(-1, 80)), alone.logits(x[~train].mean(axis=1)))
    plain = fit_ridge(x[train].reshape(-1, 80), labels[train], classes=4, groups=groups[train])
    assert found.loss == alone.loss < BETTER * plain.loss


def test_means_over_time_keep_their_weight_where_they_tell():
    x, labels, groups = planted(features=5)
    x = np.tile(x, 4) + np.random.default_rng(1).normal(size=(len(x), 20))
    plain, chosen = (fit_ridge(x, labels, classes=3, groups=groups, times=times) for times in (1, 4))
    np.testing.assert_array_equal(chosen.weight, plain.weight)


def test_only_windows_themselves_are_judged():
    """Copies that tell everything make no left-out window look known."""
    rng = np.random.default_rng(0)
    labels, groups = np.tile(np.arange(3), 8), np.repeat(np.arange(8), 3)
    noise = rng.normal(size=(24, 10))
    fitted = fit_ridge(np.stack([noise, 5 * np.eye(10)[labels]]), labels, classes=3, groups=groups)
    assert fitted.loss > np.log(3) - 0.1


def test_enough_left_out_windows_judge(monkeypatch):
    """Of very many people some say what all do."""
    x, labels, groups = planted(people=60, features=20)
    everybody = fit_ridge(x, labels, classes=3, groups=groups)
    seen, left_out = [], module._Decomposition.left_out
    monkeypatch.setattr(module, "ENOUGH", 30)
    monkeypatch.setattr(
        module._Decomposition, "left_out", lambda self, *args: seen.append(args[1]) or left_out(self, *args)
    )
    some = fit_ridge(x, labels, classes=3, groups=groups)
    judged = np.unique(np.concatenate(seen))
    assert 30 <= len(judged) < 45
    assert (some.logits(x).argmax(axis=1) == everybody.logits(x).argmax(axis=1)).mean() > 0.95


def test_one_window_a_class_has_the_fixed_penalty_and_absent_classes_are_never_named():
    x, labels, _ = planted(people=1)
    alone = fit_ridge(x, labels, classes=5, groups=np.zeros(3))
    assert alone.penalty == module.PENALTY
    assert np.isnan(alone.loss)
    assert (alone.bias[3:] == NEVER).all()
    assert (alone.logits(x).argmax(axis=1) == labels).all()


def test_constant_features_and_constant_data_give_finite_weights():
    x, labels, groups = planted()
    x[:, 3] = 7.3
    ours = fit_ridge(x, labels, classes=3, groups=groups)
    assert (ours.weight[:, 3] == 0).all()
    flat = fit_ridge(np.full((6, 4), 2.5), np.arange(6) % 3, classes=3)
    assert np.isfinite(flat.logits(np.zeros((2, 4)))).all()


def test_what_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="features: got NaN or infinity"):
        fit_ridge(np.array([[np.nan], [1.0]]), np.array([0, 1]), classes=2)
    with pytest.raises(ValueError, match=r"got shape \[2, 1\] for 3 labels"):
        fit_ridge(np.ones((2, 1)), np.array([0, 1, 1]), classes=2)


@pytest.mark.parametrize("features", [5, 60])
def test_penalties_come_at_once_or_one_by_one(features, monkeypatch):
    x, labels, groups = planted(features=features)
    asked, real = [], module._Decomposition._left_out

    def watched(self, penalties, *which):
        asked.append(len(penalties))
        return real(self, penalties, *which)

    monkeypatch.setattr(module._Decomposition, "_left_out", watched)
    at_once = fit_ridge(x, labels, classes=3, groups=groups)
    assert set(asked) == {len(PENALTIES)}
    asked.clear()
    monkeypatch.setattr(module, "AT_ONCE", 30)
    in_parts = fit_ridge(x, labels, classes=3, groups=groups)
    assert max(asked) < len(PENALTIES)
    np.testing.assert_allclose(in_parts.weight, at_once.weight, rtol=1e-9, atol=1e-12)
