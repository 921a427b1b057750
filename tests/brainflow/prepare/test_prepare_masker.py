"""From Python: images and an atlas or a fitted masker to arrays and stores."""

import nibabel
import numpy as np
import pytest
from nilearn.maskers import NiftiLabelsMasker

from brainflow.prepare import CleanSettings, extract, store_from_masker
from brainflow.storage import verify
from brainflow.storage.normalise import APPLIED, normalise


@pytest.fixture
def images(tree):
    return [tree.run("01", "objects", run=str(i), index=i) for i in (0, 1)]


def test_image_and_atlas(tree, images):
    atlas = tree.atlas()
    masker = NiftiLabelsMasker(
        str(atlas), smoothing_fwhm=3, detrend=True, standardize="zscore_sample", high_pass=0.008, t_r=2.5
    )
    confounds = np.random.default_rng(0).normal(size=(121, 3))
    expected = masker.fit_transform(str(images[0]), confounds=confounds)
    values = extract(images[0], str(atlas), confounds=confounds)
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, expected, atol=1e-5)
    np.testing.assert_allclose(extract(images[0], masker, confounds=confounds), expected, atol=1e-5)
    several = extract(
        [nibabel.load(path) for path in images], str(atlas), settings=CleanSettings(dummy_scans=3)
    )
    assert [run.shape for run in several] == [(118, 12)] * 2


def test_store_from_a_masker(tree, images, tmp_path):
    masker = NiftiLabelsMasker(str(tree.atlas()), standardize="zscore_sample").fit()
    store = store_from_masker(
        tmp_path / "masked.zarr",
        masker,
        images,
        dataset="haxby",
        subjects=["01", "01"],
        entities=[{"task": "objects"}] * 2,
    )
    assert verify(tmp_path / "masked.zarr").ok
    assert store.runs.key.tolist() == [f"ds-haxby_sub-01_task-objects_run-{i}" for i in (1, 2)]
    assert store.runs.t_r.tolist() == [2.5, 2.5]
    assert store.attributes["preprocessing"]["standardize"] == "zscore_sample"
    np.testing.assert_allclose(store.run(1), masker.transform(str(images[1])), atol=4e-3)


def test_what_does_not_fit_is_refused(tree, images, tmp_path):
    atlas = str(tree.atlas())
    with pytest.raises(ValueError, match="confounds: got 1 for 2 images"):
        extract(images, atlas, confounds=[np.zeros((121, 1))])
    with pytest.raises(ValueError, match="120 rows for 121 volumes"):
        extract(images[0], atlas, confounds=np.zeros((120, 1)))
    masker = NiftiLabelsMasker(atlas).fit()
    with pytest.raises(ValueError, match="a masker has its own"):
        extract(images[0], masker, settings=CleanSettings())
    with pytest.raises(ValueError, match="subjects: got 1 for 2 images"):
        store_from_masker(tmp_path / "x.zarr", masker, images, dataset="d", subjects=["1"])
    no_time = nibabel.Nifti1Image(tree.bold[..., :60], tree.affine)
    with pytest.raises(ValueError, match="pass t_r="):
        extract(no_time, atlas)


def test_a_masker_without_global_signal_regression_can_be_followed_by_ours(tree, images, tmp_path):
    masker = NiftiLabelsMasker(str(tree.atlas()), standardize=None).fit()
    options = {"dataset": "haxby", "subjects": ["01", "01"], "dtype": "float32"}
    store = store_from_masker(tmp_path / "s", masker, images, normalise="gsr", **options)
    assert store.attributes["normalisation"] == APPLIED["gsr"]
    np.testing.assert_array_equal(store.run(1), normalise(masker.transform(str(images[1])), "gsr"))
    raw = store_from_masker(tmp_path / "raw", masker, images, **options)
    assert raw.attributes["normalisation"] == ""
