"""The estimators keep scikit-learn's rules, take every form of data, and survive saving without pickle."""

import json

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, GroupKFold, KFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import check_estimator

import brainflow
from brainflow.config import ModelConfig
from brainflow.decoding.windows import cut_events
from brainflow.frameworks import build
from brainflow.pretrained.format import save_pretrained

NETWORKS = 10


def make_data(windows=24, time=5, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.array(["cat", "face", "house"])[np.arange(windows) % 3]
    patterns = 2 * rng.normal(size=(3, NETWORKS))
    x = rng.normal(size=(windows, time, NETWORKS)) + patterns[np.arange(windows) % 3][:, None]
    return x.astype(np.float32), labels


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    config = ModelConfig(networks=NETWORKS, width=16, layers=1, heads=2, dropout=0.0)
    folder = tmp_path_factory.mktemp("model")
    save_pretrained(build(config), folder, {"data": {"t_r": [2.0], "parcellation": "ten"}})
    return folder


@pytest.mark.parametrize(
    "estimator", [brainflow.MentalStateDecoder(), brainflow.BoldEncoder(), brainflow.BoldRegressor()]
)
def test_scikit_learn_checks(estimator):
    """None is expected to fail."""
    results = check_estimator(estimator, on_fail=None, expected_failed_checks={})
    assert len(results) > 30
    assert not [(r["check_name"], str(r["exception"])) for r in results if r["status"] == "failed"]


@pytest.mark.parametrize("mode", ["linear", "knn", "mlp", "attentive", "lora", "finetune"])
def test_saved_decoder_says_the_same(checkpoint, tmp_path, mode):
    x, names = make_data()
    decoder = brainflow.MentalStateDecoder(checkpoint, mode=mode, steps=60, lr=5e-3).fit(x, names)
    decoder.save(tmp_path / "d")
    assert {path.suffix for path in (tmp_path / "d").iterdir()} == {".json", ".safetensors"}
    loaded = brainflow.MentalStateDecoder.load(tmp_path / "d")
    np.testing.assert_allclose(loaded.predict_proba(x), decoder.predict_proba(x), atol=1e-6)
    assert loaded.predict(x).tolist() == decoder.predict(x).tolist()
    assert loaded.score(x, names) > 0.8
    assert json.loads((tmp_path / "d" / "config.json").read_text())["data"]["parcellation"] == "ten"


def test_a_decoder_of_variances_is_saved_as_one(checkpoint, tmp_path):
    x, names = make_data(48, time=20)
    x -= x.mean(axis=1, keepdims=True)
    for i in range(48):
        x[i, :, 2 * (i % 3) : 2 * (i % 3) + 2] *= 5
    decoder = brainflow.MentalStateDecoder(checkpoint, allow_mismatch=True).fit(x, names)
    decoder.save(tmp_path / "d")
    section = json.loads((tmp_path / "d" / "config.json").read_text())["decoder"]
    assert (section["pooling"], section["layer"]) == ("spread", "input")
    loaded = brainflow.MentalStateDecoder.load(tmp_path / "d")
    np.testing.assert_array_equal(loaded.predict_proba(x), decoder.predict_proba(x))


def test_pipelines_and_searches(checkpoint):
    x, names = make_data(36)
    groups = np.arange(36) // 6
    decoder = brainflow.MentalStateDecoder(checkpoint)
    scores = cross_val_score(decoder, x, names, groups=groups, cv=GroupKFold(3))
    assert scores.mean() > 0.6
    windows = list(x)  # a list of windows is cut by folds like an array
    assert (
        cross_val_score(decoder, windows, names, groups=groups, cv=GroupKFold(3)).tolist() == scores.tolist()
    )
    search = GridSearchCV(decoder, {"pooling": ["mean", "last"], "mode": ["linear", "knn"]}, cv=2)
    assert search.fit(x, names).best_score_ > 0.6
    both = make_pipeline(brainflow.BoldEncoder(checkpoint), LogisticRegression()).fit(x, names)
    assert both.score(x, names) > 0.8
    assert clone(decoder).get_params() == decoder.get_params()


def test_runs_with_events_and_images_give_what_windows_give(checkpoint):
    nibabel = pytest.importorskip("nibabel")
    from nilearn.maskers import NiftiMasker

    rng = np.random.default_rng(1)
    runs = [rng.normal(size=(30, NETWORKS)).astype(np.float32) for _ in range(3)]
    table = {"onset": [0.0, 16.0, 34.0], "duration": [8.0] * 3, "trial_type": ["a", "b", "a"]}
    windows, names, owner = cut_events(runs, [table] * 3, t_r=2.0, hrf_shift=4.0)
    np.testing.assert_array_equal(windows[0], runs[0][2:6])
    assert owner.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    settings = {"t_r": 2.0, "hrf_shift": 4.0}
    plain = brainflow.MentalStateDecoder(checkpoint, **settings).fit(windows, names, groups=owner)
    by_runs = brainflow.MentalStateDecoder(checkpoint, **settings).fit(runs, [table] * 3)
    expected = plain.predict_proba(windows)
    np.testing.assert_allclose(by_runs.predict_proba(runs, [table] * 3), expected, atol=1e-6)
    shape = (NETWORKS, 1, 1)
    images = [nibabel.Nifti1Image(run.T[:, None, None], np.eye(4)) for run in runs]
    masker = NiftiMasker(nibabel.Nifti1Image(np.ones(shape, np.uint8), np.eye(4)), standardize=None)
    by_images = brainflow.MentalStateDecoder(checkpoint, masker=masker, **settings).fit(images, [table] * 3)
    np.testing.assert_allclose(by_images.predict_proba(images, [table] * 3), expected, atol=1e-5)
    assert by_images.score(images, [table] * 3) == by_runs.score(runs, [table] * 3)


@pytest.mark.parametrize(
    ("events", "says"),
    [
        ([{"onset": [0.0], "duration": [4.0]}], "no column 'trial_type'"),
        ([{"onset": [99.0], "duration": [4.0], "trial_type": ["a"]}], "lies outside its 10 time points"),
        ([], "got 0 tables for 1 run"),
    ],
)
def test_bad_events_are_refused(events, says):
    with pytest.raises(ValueError, match=says):
        cut_events([np.zeros((10, 3))], events, t_r=2.0)


def test_runs_with_events_are_cross_validated(checkpoint):
    rng = np.random.default_rng(1)
    table = {"onset": [0.0, 16.0, 32.0, 48.0], "duration": [8.0] * 4, "trial_type": ["a", "b", "a", "b"]}
    runs = [rng.normal(size=(30, NETWORKS)).astype(np.float32) for _ in range(4)]
    for run in runs:
        run[0:4, 0] += 4
        run[16:20, 0] += 4
    decoder = brainflow.MentalStateDecoder(checkpoint)
    assert cross_val_score(decoder, runs, [table] * 4, cv=KFold(2)).min() > 0.8


def test_data_unlike_the_training_data_are_refused(tmp_path):
    data = {"t_r": [2.0], "parcellation": "ten", "preprocessing": {"standardize": "z-score"}}
    torch.manual_seed(0)
    module = build(ModelConfig(networks=NETWORKS, width=16, layers=1, heads=2))
    folder = save_pretrained(module, tmp_path / "m", {"data": {**data, "network_names": list("abcdefghij")}})
    x, names = windows = make_data()
    with pytest.raises(ValueError, match=r"TR: the model saw 2 s, the data have 3 s"):
        brainflow.MentalStateDecoder(folder, t_r=3.0).fit(x, names)
    with pytest.raises(
        ValueError, match=r"normalisation: the model saw networks with a mean square of about 1"
    ):
        brainflow.BoldEncoder(folder).fit(100 + 30 * x)
    allowed = brainflow.MentalStateDecoder(folder, t_r=3.0, allow_mismatch=True).fit(*windows)
    assert allowed.score(x, names) > 0.5
    fitted = brainflow.MentalStateDecoder(folder).fit(x, names)
    fitted.save(tmp_path / "d")
    for decoder in (fitted, brainflow.MentalStateDecoder.load(tmp_path / "d")):
        with pytest.raises(ValueError, match="normalisation"):
            decoder.predict(500 * x)


def test_order_of_a_maskers_labels_is_checked(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    from nilearn.maskers import NiftiLabelsMasker

    torch.manual_seed(0)
    data = {"network_names": ["left", "right"]}
    folder = save_pretrained(
        build(ModelConfig(networks=2, width=16, layers=1, heads=2)), tmp_path, {"data": data}
    )
    atlas = nibabel.Nifti1Image(np.arange(1, 3, dtype=np.int16).reshape(2, 1, 1), np.eye(4))
    rng = np.random.default_rng(0)
    images = [nibabel.Nifti1Image(rng.normal(size=(2, 1, 1, 12)), np.eye(4)) for _ in range(4)]
    for labels, fits in ((["left", "right"], True), (["right", "left"], False)):
        masker = NiftiLabelsMasker(atlas, labels=labels, standardize=None)
        decoder = brainflow.MentalStateDecoder(folder, masker=masker)
        if fits:
            assert decoder.fit(images, [0, 1, 0, 1]).n_features_in_ == 2
        else:
            with pytest.raises(ValueError, match=r"network names: .*'left', 'right'.*'right', 'left'"):
                decoder.fit(images, [0, 1, 0, 1])


def test_checkpoint_of_other_networks_is_refused(checkpoint):
    with pytest.raises(ValueError, match="got 4 networks, but the checkpoint"):
        brainflow.MentalStateDecoder(checkpoint).fit(np.zeros((4, 5, 4)), [0, 1, 0, 1])


def test_a_single_run_comes_with_its_table(checkpoint):
    pandas = pytest.importorskip("pandas")
    run = np.random.default_rng(0).normal(size=(30, NETWORKS)).astype(np.float32)
    table = pandas.DataFrame({"onset": [0.0, 16.0], "duration": [8.0, 8.0], "trial_type": ["a", "b"]})
    decoder = brainflow.MentalStateDecoder(checkpoint).fit(run, table)
    assert decoder.predict(run, table).shape == (2,)
    assert brainflow.BoldEncoder(checkpoint).fit(run, table).transform(run, table).shape == (2, 16)
    with pytest.raises(ValueError, match="got 'tokens'"):
        brainflow.BoldEncoder(checkpoint, pooling="tokens").fit(run, table)


def make_people(people=40, seed=0):
    """Runs of different lengths whose networks share the more of one signal the older somebody is."""
    rng = np.random.default_rng(seed)
    age = rng.uniform(20, 80, people)
    lengths = rng.integers(60, 130, people)
    runs = [
        one / 40 * rng.normal(size=(length, 1)) + rng.normal(size=(length, NETWORKS))
        for one, length in zip(age, lengths, strict=True)
    ]
    return [((run - run.mean(axis=0)) / run.std(axis=0)).astype(np.float32) for run in runs], age


def test_a_number_is_read_from_runs_of_any_length(checkpoint):
    runs, age = make_people()
    regressor = brainflow.BoldRegressor(checkpoint, random_state=1)
    assert cross_val_score(regressor, runs, age, groups=np.arange(40) // 2, cv=GroupKFold(4)).mean() > 0.3
    regressor.fit(runs, age, groups=np.arange(40) // 2)
    alone = [regressor.predict([run])[0] for run in runs[:5]]
    # the model reads in float32, but its rounding does not depend on who stands beside a run
    np.testing.assert_allclose(regressor.predict(runs[:5]), alone, rtol=1e-12)
    permuted = np.random.default_rng(1).permutation(age)
    assert cross_val_score(regressor, runs, permuted, cv=KFold(4)).mean() < 0.1
    with pytest.raises(ValueError, match="groups: got 3 for 40 runs"):
        regressor.fit(runs, age, groups=[1, 2, 3])
    with pytest.raises(ValueError, match="one window has no time point"):
        regressor.fit([*runs[:3], runs[3][:0]], age[:4])
    with pytest.raises(ValueError, match=r"targets: got NaN or a number of 1e\+100 or more"):
        regressor.fit(runs, age * 1e155)  # whose squared errors would all be infinite


def test_runs_of_a_regressor_are_normalised_as_the_models_were(tmp_path):
    torch.manual_seed(0)
    module = build(ModelConfig(networks=NETWORKS, width=16, layers=1, heads=2, dropout=0.0))
    folder = save_pretrained(
        module, tmp_path / "m", {"data": {"normalisation": "z-scored per run and network"}}
    )
    runs, age = make_people(12)
    plain = brainflow.BoldRegressor(folder).fit(runs, age).predict(runs)
    raw = [100 + 30 * run for run in runs]
    normalised = brainflow.BoldRegressor(folder, normalise=True).fit(raw, age)
    np.testing.assert_allclose(normalised.predict(raw), plain, rtol=1e-3)
