"""Folds never hold one run or subject on both sides; baselines decode what there is to decode."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brainflow.decoding.baselines import flatten, predict_folds
from brainflow.decoding.scores import score
from brainflow.decoding.splits import Fold, check_folds, make_folds

CLASSES = ("face", "house")


def _design(subjects: int, runs: int, each: int):
    """Return (runs, subjects, labels) of a balanced design."""
    subject = np.repeat([f"d/{i}" for i in range(subjects)], runs * each)
    run = np.array([f"{s}-{r}" for s in range(subjects) for r in range(runs) for _ in range(each)])
    labels = np.tile(np.arange(each) % 2, subjects * runs).astype(np.int64)
    return run, subject, labels


@settings(max_examples=40, deadline=None)
@given(
    subjects=st.integers(1, 5), runs=st.integers(1, 4), split=st.sampled_from(["run", "subject", "k-fold"])
)
def test_no_fold_leaks_a_group(subjects, runs, split):
    run, subject, labels = _design(subjects, runs, each=4)
    groups = run if split == "run" or (split == "k-fold" and subjects == 1) else subject
    name = {"run": "leave-one-run-out", "subject": "leave-one-subject-out"}.get(split, split)
    if len(np.unique(groups)) < 2:
        with pytest.raises(ValueError, match="needs at least 2"):
            make_folds(name, runs=run, subjects=subject, labels=labels, classes=CLASSES, folds=2)
        return
    folds = make_folds(name, runs=run, subjects=subject, labels=labels, classes=CLASSES, folds=2)
    tested = np.concatenate([fold.test for fold in folds])
    assert sorted(tested) == list(range(len(labels)))
    for fold in folds:
        assert not set(groups[fold.train]) & set(groups[fold.test])
        assert len(fold.train) + len(fold.test) == len(labels)


def test_a_planted_subject_leak_is_caught():
    subject = np.array(["d/1", "d/1", "d/2", "d/2"])
    leaky = [
        Fold(name="even", train=np.array([1, 3]), test=np.array([0, 2])),
        Fold(name="odd", train=np.array([0, 2]), test=np.array([1, 3])),
    ]
    with pytest.raises(ValueError, match=r"fold of even the subjects \['d/1', 'd/2'\]"):
        check_folds(leaky, subject, unit="subject")


def test_a_window_that_is_never_tested_is_caught():
    fold = Fold(name="a", train=np.array([1]), test=np.array([0]))
    with pytest.raises(ValueError, match="1 window is never tested"):
        check_folds([fold], np.array(["x", "y"]))


def test_a_class_of_one_run_alone_is_refused_by_name():
    run, subject, labels = _design(1, 3, each=4)
    labels[-1] = 2
    with pytest.raises(ValueError, match=r"\['cat'\] stand in run 0-2 alone"):
        make_folds("leave-one-run-out", runs=run, subjects=subject, labels=labels, classes=(*CLASSES, "cat"))


def _planted(strength: float, seed: int = 0):
    """12 runs of 8 windows of 5 time points × 20 networks; 4 classes, each with a pattern of its own."""
    rng = np.random.default_rng(seed)
    labels = np.tile(np.arange(8) % 4, 12)
    patterns = rng.normal(size=(4, 20))
    bold = rng.normal(size=(96, 5, 20)) + strength * patterns[labels][:, None]
    runs = np.repeat([f"r{i:02d}" for i in range(12)], 8)
    folds = make_folds(
        "leave-one-run-out", runs=runs, subjects=np.zeros(96), labels=labels, classes=tuple("abcd")
    )
    features = flatten(bold.reshape(-1, 20), np.full(96, 5))
    return features, labels, runs, folds


@pytest.mark.parametrize("name", ["logistic", "ridge"])
def test_a_planted_signal_is_decoded_and_permuted_labels_are_not(name):
    features, labels, runs, folds = _planted(strength=0.5)
    named, _ = predict_folds(name, features, labels, folds, classes=4)
    seen = score(labels, named, groups=runs, classes=4)
    assert seen.accuracy.low > 0.5
    assert seen.permutation_p < 0.01
    rng = np.random.default_rng(5)
    shuffled = np.concatenate([rng.permutation(part) for part in np.split(labels, 12)])
    named, _ = predict_folds(name, features, shuffled, folds, classes=4)
    none = score(shuffled, named, groups=runs, classes=4)
    assert none.accuracy.low < 0.25 < none.accuracy.high
    assert none.permutation_p > 0.05


def test_windows_of_unequal_length_become_time_bins():
    bold = np.arange(10, dtype=np.float32).reshape(5, 2)
    second = [(4 + 6 / 2) / 1.5, (5 + 7 / 2) / 1.5, (6 / 2 + 8) / 1.5, (7 / 2 + 9) / 1.5]
    assert np.allclose(flatten(bold, np.array([2, 3])), [[0, 1, 2, 3], second])
    assert flatten(bold[:4], np.array([2, 2])).shape == (2, 4)
    with pytest.raises(ValueError, match="got a sum of 4"):
        flatten(bold, np.array([2, 2]))
