"""Atlases: by name in the template of the images, resampled and located as nilearn does."""

import sys
from types import ModuleType

import nibabel
import numpy as np
import pytest
from nilearn import datasets, plotting
from nilearn.image import resample_img
from sklearn.utils import Bunch

from brainflow.prepare import atlas, find_atlas
from brainflow.prepare.parcels import coordinates, networks_of
from brainflow.prepare.volumes import trilinear

FMRIPREP = "MNI152NLin2009cAsym"


@pytest.fixture
def templateflow(tmp_path, monkeypatch):
    """TemplateFlow's folder, with a Schaefer atlas and its table as published; no client is installed."""
    home = tmp_path / "templateflow"
    folder = home / f"tpl-{FMRIPREP}"
    folder.mkdir(parents=True)
    labels = np.arange(64, dtype=np.int16).reshape(4, 4, 4) % 3
    stem = f"tpl-{FMRIPREP}_res-02_atlas-Schaefer2018_desc-100Parcels7Networks_dseg"
    nibabel.save(nibabel.Nifti1Image(labels, np.eye(4)), folder / f"{stem}.nii.gz")
    table = "index\tname\tcolor\n1\t7Networks_LH_Vis_1\t#781283\n2\t7Networks_LH_Vis_2\t#781284\n"
    (folder / f"{stem.replace('_res-02', '')}.tsv").write_text(table)
    monkeypatch.setenv("TEMPLATEFLOW_HOME", str(home))
    find = atlas.importlib.util.find_spec
    monkeypatch.setattr(
        atlas.importlib.util, "find_spec", lambda name: None if name == "templateflow" else find(name)
    )
    return folder


def test_named_atlas_is_taken_in_the_template_of_the_images(templateflow):
    spec = find_atlas("schaefer-100", FMRIPREP)
    assert (spec.label, spec.space, spec.kind) == ("Schaefer100", FMRIPREP, "labels")
    assert spec.paths[0].parent == templateflow
    assert networks_of(spec) == ["7Networks_LH_Vis_1", "7Networks_LH_Vis_2"]


def test_nilearns_copy_in_another_template_is_refused(templateflow, monkeypatch):
    monkeypatch.setattr(datasets, "fetch_atlas_difumo", lambda **_: pytest.fail("was downloaded"))
    with pytest.raises(ValueError, match="in MNI152NLin6Asym, the images are in MNI152NLin2009cAsym"):
        find_atlas("difumo-1024", FMRIPREP)
    (templateflow / f"tpl-{FMRIPREP}_res-02_atlas-DiFuMo_desc-64dimensions_probseg.nii.gz").touch()
    with pytest.raises(ValueError, match="extra `bids`"):  # empty: not downloaded yet
        find_atlas("difumo-64", FMRIPREP)
    with pytest.raises(ValueError, match="expected one of 64, 128, 256, 512, 1024"):
        find_atlas("difumo-65", FMRIPREP)


def test_templateflows_client_downloads(templateflow, monkeypatch):
    asked = []

    def get(template, **wanted):
        asked.append((template, wanted))
        name = f"tpl-{template}_res-02_atlas-DiFuMo_desc-64dimensions_probseg.nii.gz"
        maps = np.random.default_rng(0).random((3, 3, 3, 64))
        nibabel.save(nibabel.Nifti1Image(maps, np.eye(4)), templateflow / name)

    api = ModuleType("templateflow.api")
    api.get = get
    monkeypatch.setitem(sys.modules, "templateflow", ModuleType("templateflow"))
    monkeypatch.setitem(sys.modules, "templateflow.api", api)
    monkeypatch.setattr(atlas.importlib.util, "find_spec", lambda name: object())
    assert find_atlas("difumo-64", FMRIPREP).kind == "maps"
    wanted = {"atlas": "DiFuMo", "desc": "64dimensions", "suffix": "probseg", "extension": ".nii.gz"}
    assert asked[0] == (FMRIPREP, {**wanted, "resolution": 2})

    def offline(*_, **__):
        raise OSError("no route to host")

    api.get = offline
    with pytest.raises(ConnectionError, match=r"TemplateFlow could not download it.*TEMPLATEFLOW_HOME"):
        find_atlas("difumo-128", FMRIPREP)


@pytest.mark.parametrize("seed", range(12))
def test_linear_resampling_is_nilearns(seed):
    rng = np.random.default_rng(seed)
    source, target = (tuple(int(n) for n in rng.integers(1, 9, 3)) for _ in range(2))
    affines = []
    for shape in (source, target):
        affine = np.diag([*rng.uniform(1, 4, 3) * rng.choice([-1, 1], 3), 1])
        if seed % 3 == 0:
            affine[:3, :3] @= np.linalg.qr(rng.normal(size=(3, 3)))[0]
        affine[:3, 3] = rng.normal(size=3) - affine[:3, :3] @ (np.array(shape) - 1) / 2  # they overlap
        affines.append(affine)
    if seed % 4 == 1:
        affines[1] = affines[0].copy()
        affines[1][:3, 3] += affines[0][:3, :3] @ rng.integers(-1, 2, 3)  # whole voxels
    data = rng.normal(size=source)
    image = nibabel.Nifti1Image(data, affines[0])
    expected = resample_img(image, target_affine=affines[1], target_shape=target, interpolation="linear")
    weights = trilinear(source, affines[0], target, affines[1])
    got = (data.reshape(-1, order="F") @ weights).reshape(target, order="F")
    np.testing.assert_allclose(got, expected.get_fdata(), atol=1e-12)


@pytest.mark.parametrize("flip", [1, -1])
def test_coordinates_are_nilearns(tmp_path, flip):
    rng = np.random.default_rng(0)
    affine = np.diag([2.0 * flip, 2, 2, 1])
    affine[:3, 3] = (-20 * flip, -14, -12)
    labels = np.zeros((20, 14, 12), np.int16)
    for value in (2, 5, 9, 40):
        corner = rng.integers(0, (15, 9, 7))
        labels[tuple(slice(c, c + 5) for c in corner)] = value
    labels[8:12, 2:5, 2:5] = 50  # on both sides of the midline
    path = tmp_path / "atlas-l_dseg.nii.gz"
    nibabel.save(nibabel.Nifti1Image(labels, affine), path)
    expected = plotting.find_parcellation_cut_coords(str(path))
    np.testing.assert_allclose(coordinates(find_atlas(str(path))), expected, atol=1e-9)
    maps = np.zeros((20, 14, 12, 5), np.float32)
    for i in range(5):
        corner = rng.integers(0, (12, 6, 4))
        maps[(*(slice(c, c + 8) for c in corner), i)] = rng.gamma(0.5, size=(8, 8, 8)) - 0.1
    path = tmp_path / "atlas-m_probseg.nii.gz"
    nibabel.save(nibabel.Nifti1Image(maps, affine), path)
    expected = plotting.find_probabilistic_atlas_cut_coords(str(path))
    np.testing.assert_allclose(coordinates(find_atlas(str(path))), expected, atol=1e-6)


def test_nilearns_copy_serves_images_in_its_template(templateflow, tmp_path, monkeypatch):
    path = tmp_path / "schaefer.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.arange(8, dtype=np.int16).reshape(2, 2, 2) % 2, np.eye(4)), path)
    found = {"maps": str(path), "labels": [b"Background", b"7Networks_LH_Vis_1"]}
    bunch = Bunch(**found, template="MNI152NLin6Asym")
    monkeypatch.setattr(datasets, "fetch_atlas_schaefer_2018", lambda **_: bunch)
    for template in ("MNI152NLin6Asym", ""):
        spec = find_atlas("schaefer-100", template)
        assert (spec.label, spec.space) == ("Schaefer100", "MNI152NLin6Asym")
        assert networks_of(spec) == ["7Networks_LH_Vis_1"]
