"""Attributions find the networks that carry a planted signal, and come back onto the brain."""

import nibabel
import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

import brainflow
from brainflow.decoding.attribution import attribute, average
from brainflow.decoding.windows import ArrayWindows
from brainflow.report.brain import glass_brain, interactive, make_masker, on_surface, to_image

NETWORKS, TIME, PLANTED, CLASSES = 27, 6, 4, 3


@pytest.fixture(scope="module")
def planted():
    """Three classes; each raises four networks of its own in the second half of its windows."""
    rng = np.random.default_rng(0)
    labels = np.arange(240) % CLASSES
    carriers = rng.permutation(NETWORKS)[: CLASSES * PLANTED].reshape(CLASSES, PLANTED)
    windows = rng.normal(size=(240, TIME, NETWORKS)).astype(np.float32)
    for window, label in zip(windows, labels, strict=True):
        window[TIME // 2 :, carriers[label]] += 1.0
    return windows, labels, carriers


@pytest.fixture(scope="module")
def decoder(planted):
    windows, labels, _ = planted
    settings = {"published": True, "steps": 150, "lr": 2e-3, "pooling": "mean"}
    return brainflow.MentalStateDecoder(mode="finetune", **settings).fit(windows[:180], labels[:180])


@pytest.mark.parametrize("method", ["integrated-gradients", "occlusion"])
def test_attributions_find_the_planted_networks(planted, decoder, method):
    windows, labels, carriers = planted
    held_out, named = list(windows[180:]), labels[180:]
    values = attribute(decoder.decoder_, held_out, named, t_r=2.0, method=method)
    mean = average(values, named, groups=np.arange(60) // 6, classes=("a", "b", "c"))
    assert mean.mean.shape == (CLASSES, TIME, NETWORKS)
    for label in range(CLASSES):
        truth = np.isin(np.arange(NETWORKS), carriers[label])
        assert roc_auc_score(truth, mean.network_mean[label]) >= 0.95
    if method == "integrated-gradients":
        carried = np.abs(mean.mean[0][:, carriers[0]]).sum(axis=1)
        assert carried[TIME // 2 :].sum() > 3 * carried[: TIME // 2].sum()


def test_integrated_gradients_sum_to_the_change_of_the_logit(planted, decoder):
    windows, labels, _ = planted
    pair = [windows[0], windows[1][:4]]
    value = attribute(decoder.decoder_, pair, labels[:2], t_r=2.0)
    assert [v.shape for v in value] == [(TIME, NETWORKS), (4, NETWORKS)]
    other = attribute(decoder.decoder_, pair[:1], (labels[:1] + 1) % CLASSES, t_r=2.0)[0]
    chances = decoder.predict_proba(np.stack([windows[0], 0 * windows[0]])).astype(np.float64)
    odds = np.log(chances[:, labels[0]] / chances[:, (labels[0] + 1) % CLASSES])
    gap = odds[0] - odds[1]  # of two logits, what softmax tells is their difference
    assert (value[0] - other).sum() == pytest.approx(gap, abs=0.05 * abs(gap) + 0.05)


def test_uncertainty_is_over_groups():
    values = [np.full((2, 3), v, np.float32) for v in (1, 3, 5, 7)]
    result = average(values, np.zeros(4, int), groups=np.array(["x", "x", "y", "y"]), classes=("a", "b"))
    assert result.mean[0] == pytest.approx(np.full((2, 3), 4.0))
    assert result.error[0] == pytest.approx(np.full((2, 3), 2.0))  # of the group means 2 and 6
    assert np.isnan(result.mean[1]).all()
    assert result.groups.tolist() == [2, 0]
    assert result.network_mean[0] == pytest.approx(np.full(3, 8.0))  # two time points
    assert result.network_error[0] == pytest.approx(np.full(3, 4.0))
    assert np.isnan(result.network_error[1]).all()


def test_maps_come_back_to_the_voxels_they_are_from(tmp_path):
    affine = np.diag([20.0, 20.0, 20.0, 1.0])
    affine[:3, 3] = (-30, -60, -20)
    mask = nibabel.Nifti1Image(np.ones((3, 3, 3), np.uint8), affine)
    nibabel.save(mask, tmp_path / "mask.nii.gz")
    masker = make_masker(mask=str(tmp_path / "mask.nii.gz"))
    values = np.linspace(-1, 1, NETWORKS)
    image = to_image(values, masker)
    np.testing.assert_allclose(masker.transform(image).ravel(), values, atol=1e-6)
    assert glass_brain(image, title="planted").startswith(b"\x89PNG")
    assert on_surface(image, title="planted").startswith(b"\x89PNG")
    html = interactive(image)
    assert "<script" in html
    assert 'src="http' not in html
    with pytest.raises(ValueError, match="has 27 networks, but there are values of 5"):
        to_image(np.zeros(5), masker)
    with pytest.raises(ValueError, match="expected exactly one"):
        make_masker()


def test_a_mask_that_is_no_image_is_named(tmp_path):
    (tmp_path / "mask.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"mask: got .*mask\.txt, expected a NIfTI image"):
        make_masker(mask=str(tmp_path / "mask.txt"))


def test_occlusion_sums_to_the_fall_of_the_logit(planted, decoder):
    windows, labels, _ = planted
    (value,) = attribute(decoder.decoder_, [windows[0]], labels[:1], t_r=2.0, method="occlusion")
    blank = windows[0].copy()
    blank[:, 3] = 0
    source = ArrayWindows([windows[0], blank], t_r=2.0)
    with (
        torch.no_grad(),
        source.loader(np.arange(2), batch=2, shuffle=False, seed=0, device=torch.device("cpu")) as batches,
    ):
        logits = decoder.decoder_(next(batches))[:, labels[0]]
    assert value[:, 3].sum() == pytest.approx(float(logits[0] - logits[1]), abs=1e-4)


def test_an_unknown_method_is_refused(planted, decoder):
    with pytest.raises(ValueError, match="got 'guess'"):
        attribute(decoder.decoder_, [planted[0][0]], np.zeros(1, int), t_r=2.0, method="guess")
