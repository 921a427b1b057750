"""The voxels of an image inside a mask, as networks."""

import nibabel
import numpy as np
import pytest

from brainflow.prepare.masker import bold_from_nifti


def test_voxels_of_a_mask_in_its_order(tmp_path):
    data = np.random.default_rng(0).standard_normal((3, 4, 2, 6)).astype(np.float32)
    inside = np.zeros((3, 4, 2), np.uint8)
    inside[1, 2:, 0] = 1
    image = nibabel.Nifti1Image(data, np.eye(4))
    image.header.set_zooms((1, 1, 1, 2500))
    image.header.set_xyzt_units("mm", "msec")
    nibabel.save(image, tmp_path / "a.nii.gz")
    nibabel.save(nibabel.Nifti1Image(inside, np.eye(4)), tmp_path / "m.nii")
    bold, t_r = bold_from_nifti(tmp_path / "a.nii.gz", tmp_path / "m.nii")
    assert np.array_equal(bold, data[1, 2:, 0].T)
    assert t_r == 2.5
    assert bold_from_nifti(tmp_path / "a.nii.gz", tmp_path / "m.nii", t_r=3)[1] == 3.0
    image.header.set_zooms((1, 1, 1, 0))
    nibabel.save(image, tmp_path / "b.nii")
    with pytest.raises(ValueError, match="no repetition time"):
        bold_from_nifti(tmp_path / "b.nii", tmp_path / "m.nii")
    nibabel.save(nibabel.Nifti1Image(inside, 2 * np.eye(4)), tmp_path / "n.nii")
    with pytest.raises(ValueError, match="affine"):
        bold_from_nifti(tmp_path / "a.nii.gz", tmp_path / "n.nii")
    with pytest.raises(ValueError, match="expected"):
        bold_from_nifti(tmp_path / "m.nii", tmp_path / "m.nii")
