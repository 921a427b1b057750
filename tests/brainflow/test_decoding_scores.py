"""Scores against hand calculations; intervals and permutation tests against what they promise."""

import numpy as np
import pytest

from brainflow.decoding.scores import paired_difference, permutation_p, score

LABELS = np.array([0, 0, 0, 1, 1, 2], dtype=np.int64)
NAMED = np.array([0, 0, 1, 1, 2, 2], dtype=np.int64)
GROUPS = np.array(["a", "a", "b", "b", "c", "c"])


def test_scores_equal_the_hand_calculation():
    scores = score(LABELS, NAMED, groups=GROUPS, classes=3)
    assert scores.confusion.tolist() == [[2, 1, 0], [0, 1, 1], [0, 0, 1]]
    assert scores.accuracy.value == pytest.approx(4 / 6)
    assert scores.balanced_accuracy.value == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert scores.macro_f1.value == pytest.approx((4 / 5 + 1 / 2 + 2 / 3) / 3)
    assert scores.chance == pytest.approx(3 / 6)
    assert scores.per_group == {"a": 1.0, "b": 0.5, "c": 0.5}


def test_scores_equal_those_of_scikit_learn():
    from sklearn import metrics

    rng = np.random.default_rng(0)
    labels, named = rng.integers(0, 5, 200), rng.integers(0, 5, 200)
    scores = score(labels, named, groups=np.arange(200) % 7, classes=5)
    assert scores.accuracy.value == pytest.approx(metrics.accuracy_score(labels, named))
    assert scores.balanced_accuracy.value == pytest.approx(metrics.balanced_accuracy_score(labels, named))
    assert scores.macro_f1.value == pytest.approx(metrics.f1_score(labels, named, average="macro"))
    assert (scores.confusion == metrics.confusion_matrix(labels, named)).all()


def test_one_group_has_no_interval():
    scores = score(LABELS, NAMED, groups=np.zeros(6), classes=3)
    assert np.isnan(scores.accuracy.low)
    assert scores.to_dict()["accuracy"]["low"] is None


def test_interval_covers_the_true_accuracy_about_as_often_as_it_promises():
    """12 groups of 8 windows whose own accuracies vary; 200 experiments."""
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        hit = rng.random((12, 8)) < rng.beta(6, 4, size=(12, 1))
        labels = rng.integers(0, 8, hit.size)
        named = np.where(hit.ravel(), labels, (labels + 1) % 8)
        interval = score(
            labels, named, groups=np.repeat(np.arange(12), 8), classes=8, resamples=400, permutations=1
        ).accuracy
        covered += interval.low <= 0.6 <= interval.high
    assert 0.90 <= covered / 200 <= 1.0


def test_permutation_p_is_small_for_signal_and_uniform_without():
    rng = np.random.default_rng(2)
    groups = np.repeat(np.arange(10), 8)
    labels = np.tile(np.arange(8), 10)
    assert permutation_p(labels, labels, groups=groups) == pytest.approx(1 / 1001)
    drawn = [
        permutation_p(labels, rng.integers(0, 8, 80), groups=groups, permutations=99, seed=i)
        for i in range(200)
    ]
    assert 0.4 < np.mean(drawn) < 0.7
    assert np.mean(np.array(drawn) <= 0.05) < 0.10


def test_paired_difference_sees_what_two_intervals_hide():
    rng = np.random.default_rng(3)
    groups = np.repeat(np.arange(12), 8)
    labels = rng.integers(0, 8, 96)
    hard = np.repeat(rng.random(12) < 0.5, 8)
    worse = np.where(hard, (labels + 1) % 8, labels)
    better = np.where(np.arange(96) % 8 == 0, labels, worse)
    gain = paired_difference(labels, better, worse, groups=groups, classes=8)
    assert gain.value == pytest.approx((better == labels).mean() - (worse == labels).mean())
    assert gain.low >= 0
    same = paired_difference(labels, worse, worse, groups=groups, classes=8)
    assert (same.value, same.low, same.high) == (0, 0, 0)


@pytest.mark.parametrize(
    ("labels", "named", "says"),
    [
        (LABELS[:5], NAMED, "lengths 5, 6, 6"),
        (LABELS, NAMED + 1, r"predictions: got classes from 1 to 3, expected 0 to 2"),
        (LABELS - 1, NAMED, r"labels: got classes from -1"),
    ],
)
def test_bad_input_is_refused(labels, named, says):
    with pytest.raises(ValueError, match=says):
        score(labels, named, groups=GROUPS, classes=3)
