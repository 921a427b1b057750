"""Atlases: by name in the template of the images, resampled and located as nilearn does."""

import gzip
import io
import json
import sys
import zipfile
from importlib.resources import files
from types import ModuleType

import nibabel
import numpy as np
import pandas
import pytest
from nilearn import datasets, plotting
from nilearn.datasets import atlas as nilearn_atlas
from nilearn.image import resample_img
from nilearn.maskers import NiftiLabelsMasker, NiftiMapsMasker
from sklearn.utils import Bunch

from brainflow.cli import atlases
from brainflow.prepare import CleanSettings, extract, find_atlas, named
from brainflow.prepare.atlas import save_atlas, saved_atlas
from brainflow.prepare.parcels import coordinates, networks_of
from brainflow.prepare.surfaces import Dense, labels_of
from brainflow.prepare.surfaces import extract as surface_means
from brainflow.prepare.volumes import trilinear

FMRIPREP = "MNI152NLin2009cAsym"
NILEARNS = "MNI152NLin6Asym"


@pytest.fixture
def templateflow(tmp_path, monkeypatch):
    """TemplateFlow's folder, with a Schaefer atlas and its table as published; no client is installed."""
    home = tmp_path / "templateflow"
    folder = home / f"tpl-{FMRIPREP}"
    folder.mkdir(parents=True)
    stem = f"tpl-{FMRIPREP}_res-02_atlas-Schaefer2018_desc-100Parcels7Networks_dseg"
    save_labels(folder / f"{stem}.nii.gz")
    table = "index\tname\tcolor\n1\t7Networks_LH_Vis_1\t#781283\n2\t7Networks_LH_Vis_2\t#781284\n"
    (folder / f"{stem.replace('_res-02', '')}.tsv").write_text(table)
    monkeypatch.setenv("TEMPLATEFLOW_HOME", str(home))
    find = named.importlib.util.find_spec
    monkeypatch.setattr(
        named.importlib.util, "find_spec", lambda name: None if name == "templateflow" else find(name)
    )
    return folder


def save_labels(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = np.arange(64, dtype=np.int16).reshape(4, 4, 4) % 3
    nibabel.save(nibabel.Nifti1Image(labels, np.eye(4)), path)
    return path


def test_named_atlas_is_taken_in_the_template_of_the_images(templateflow):
    spec = find_atlas("schaefer-100", FMRIPREP)
    assert (spec.label, spec.space, spec.kind) == ("Schaefer100", FMRIPREP, "labels")
    assert spec.paths[0].parent == templateflow
    assert networks_of(spec) == ["7Networks_LH_Vis_1", "7Networks_LH_Vis_2"]
    assert find_atlas("Schaefer_100", FMRIPREP) == spec
    assert find_atlas("mine=schaefer100", FMRIPREP).label == "mine"


def test_nilearns_copy_in_another_template_is_refused(templateflow, monkeypatch):
    monkeypatch.setattr(datasets, "fetch_atlas_difumo", lambda **_: pytest.fail("was downloaded"))
    with pytest.raises(ValueError, match="in MNI152NLin2009cAsym, in which the images are: the extra `bids`"):
        find_atlas("difumo-1024", FMRIPREP)
    (templateflow / f"tpl-{FMRIPREP}_res-02_atlas-DiFuMo_desc-64dimensions_probseg.nii.gz").touch()
    with pytest.raises(ValueError, match="extra `bids`"):  # empty: not downloaded yet
        find_atlas("difumo-64", FMRIPREP)
    with pytest.raises(ValueError, match="expected one of 64, 128, 256, 512, 1024"):
        find_atlas("difumo-65", FMRIPREP)
    with pytest.raises(ValueError, match="is known in MNIColin27, the images are in MNI152NLin2009cAsym"):
        find_atlas("aal", FMRIPREP)
    with pytest.raises(FileNotFoundError, match="brainflow atlases"):
        find_atlas("tiann-s3")


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
    monkeypatch.setattr(named.importlib.util, "find_spec", lambda name: object())
    assert find_atlas("difumo-64", FMRIPREP).kind == "maps"
    wanted = {"atlas": "DiFuMo", "desc": "64dimensions", "suffix": "probseg"}
    assert asked == [
        (FMRIPREP, {**wanted, "resolution": 2, "extension": ".nii.gz"}),
        (FMRIPREP, {**wanted, "extension": ".tsv"}),
    ]

    def offline(*_, **__):
        raise OSError("no route to host")

    api.get = offline
    with pytest.raises(ConnectionError, match=r"TemplateFlow could not download it.*TEMPLATEFLOW_HOME"):
        find_atlas("difumo-128", FMRIPREP)


NAMES = [(name, t) for row in named.catalogue() for name in row["names"] for t in row["templates"]]
UNKNOWN = {(f"tian-s{i}", "fsLR") for i in (1, 2, 4)}
UNKNOWN |= {(f"schaefer-{n}{more}", FMRIPREP) for n in (700, 900) for more in ("", "-17")}
FETCHED = {
    "fetch_atlas_difumo": pandas.DataFrame({"difumo_names": ["a", "b"]}),
    "fetch_atlas_schaefer_2018": [b"Background", b"a", b"b"],
    "fetch_atlas_harvard_oxford": ["Background", "a", "b"],
    "fetch_atlas_aal": ["Background", "a", "b"],
}


def test_every_name_resolves_in_each_of_its_templates(tmp_path, monkeypatch):
    """The network is stood in for: nilearn's functions, TemplateFlow's client, and what URLs answer."""
    image = save_labels(tmp_path / "image.nii.gz")
    for function, labels in FETCHED.items():
        more = {"indices": ["0", "1", "2"]} if function == "fetch_atlas_aal" else {}
        monkeypatch.setattr(
            datasets,
            function,
            lambda labels=labels, more=more, **_: Bunch(maps=str(image), labels=labels, **more),
        )
    dlabel = tmp_path / "image.dlabel.nii"
    save_dlabel(dlabel, ["a", "b"])
    monkeypatch.setenv("TEMPLATEFLOW_HOME", str(tmp_path / "templateflow"))
    monkeypatch.setenv("BRAINFLOW_ATLASES", str(tmp_path / "atlases"))
    api = sys.modules["templateflow.api"] = ModuleType("templateflow.api")

    def get(template, **wanted):
        parts = [f"tpl-{template}", f"res-0{wanted['resolution']}" if "resolution" in wanted else ""]
        parts += [f"{key}-{wanted[key]}" for key in ("atlas", "desc") if key in wanted]
        name = "_".join([part for part in parts if part] + [wanted["suffix"]]) + wanted["extension"]
        assert f"tpl-{template}/{name}" in skeleton
        path = tmp_path / "templateflow" / f"tpl-{template}" / name
        save_labels(path) if path.suffix == ".gz" else path.write_text("index\tname\n1\ta\n2\tb\n")

    def urlopen(url, timeout):
        if url.endswith(".tsv"):
            return io.BytesIO(b"index\tlabel\n1\ta\n2\tb\n")
        if url.endswith(".txt"):
            return io.BytesIO(b"a\nb\n")
        packed = gzip.decompress(image.read_bytes()) if url.endswith("T.nii") else image.read_bytes()
        return io.BytesIO(dlabel.read_bytes() if url.endswith(".dlabel.nii") else packed)

    api.get = get
    monkeypatch.setitem(sys.modules, "templateflow.api", api)
    monkeypatch.setattr(named.urllib.request, "urlopen", urlopen)
    with zipfile.ZipFile(files("templateflow.conf").joinpath("templateflow-skel.zip")) as archive:
        skeleton = set(archive.namelist())
    labels = set()
    for name, template in NAMES:
        if (name, template) in UNKNOWN:
            with pytest.raises(ValueError, match="is known in MNI152NLin6Asym and"):
                find_atlas(name, template)
            continue
        spec = find_atlas(name, template)
        assert (spec.space, spec.kind) == (template, "dlabel" if template == "fsLR" else "labels")
        assert networks_of(spec) == (["1", "2"] if (name, template) == ("a424", NILEARNS) else ["a", "b"]), (
            name
        )
        labels.add((spec.label, template))
    assert len(labels) == len(NAMES) - len(UNKNOWN)  # no two are called the same
    assert find_atlas("schaefer-400+tian-s3", "fsLR").label == "Schaefer400TianS3"

    def offline(url, timeout):
        raise OSError("no route to host")

    monkeypatch.setattr(named.urllib.request, "urlopen", offline)
    assert find_atlas("glasser", NILEARNS).label == "Glasser"  # is kept
    monkeypatch.setenv("BRAINFLOW_ATLASES", str(tmp_path / "elsewhere"))
    with pytest.raises(ConnectionError, match=r"githubusercontent.*set BRAINFLOW_ATLASES"):
        find_atlas("glasser", NILEARNS)
    monkeypatch.setattr(named.urllib.request, "urlopen", lambda *_, **__: io.BytesIO(b"<html>"))
    with pytest.raises(ConnectionError, match="no image"):
        find_atlas("glasser", NILEARNS)


@pytest.mark.parametrize(
    "name", ["difumo-64", "schaefer-100-17", "harvard-oxford-cortl", "harvard-oxford-sub", "aal", "aal-3"]
)
def test_nilearn_takes_the_arguments_of_the_table(name, tmp_path, monkeypatch):
    """All but the download is nilearn's own."""
    monkeypatch.setenv("NILEARN_DATA", str(tmp_path))

    def offline(*_, **__):
        raise TimeoutError

    monkeypatch.setattr(nilearn_atlas, "fetch_files", offline)
    with pytest.raises(ConnectionError, match=r"nilearn could not download it \(TimeoutError"):
        find_atlas(name)


def save_dlabel(path, names):
    """Labels of two vertices of the left and one voxel, one of them background."""
    cifti = nibabel.cifti2
    table = {i: (name, (1, 1, 1, 1)) for i, name in enumerate(["???", *names])}
    cortex = cifti.BrainModelAxis.from_surface([0, 1], 32_492, name="CortexLeft")
    axis = cortex + cifti.BrainModelAxis.from_mask(np.ones((1, 1, 1), bool), name="thalamus_left")
    values = np.array([[1, 2 % (len(names) + 1), 0]], np.float32)
    cifti.Cifti2Image(
        values, cifti.Cifti2Header.from_axes((cifti.LabelAxis(["x"], [table]), axis))
    ).to_filename(path)


@pytest.fixture
def joined(tree):
    """Two label images and maps, on different grids, and the image of a run."""
    first, maps = tree.atlas(labels=7), tree.maps()
    coarse = tree.root.parent / "atlas-coarse_dseg.nii.gz"
    affine = tree.affine @ np.diag([2, 2, 1, 1])
    labels = np.arange(1, 1 + np.prod([-(-n // 2) for n in tree.mask.shape[:2]])).reshape(
        -1, -(-tree.mask.shape[1] // 2), 1
    )
    nibabel.save(nibabel.Nifti1Image((labels // 20).astype(np.int16), affine), coarse)
    return tree.run("01", "rest"), first, coarse, maps


def test_joined_atlases_equal_two_calls_of_nilearn(joined):
    image, first, coarse, maps = joined
    spec = find_atlas(f"{first}+{coarse}+{maps}")
    raw = CleanSettings(detrend=False, high_pass=None, normalise="none", smoothing_fwhm=None)
    got = extract(image, spec, settings=raw)
    expected = [
        masker.fit_transform(str(image))
        for masker in (
            NiftiLabelsMasker(str(first), standardize=None),
            NiftiLabelsMasker(str(coarse), standardize=None),
            NiftiMapsMasker(str(maps), standardize=None, dtype="float64"),
        )
    ]
    scale = got.std(axis=0)
    np.testing.assert_allclose(got / scale, np.hstack(expected) / scale, atol=1e-5, rtol=1e-6)


def test_joined_atlases_keep_names_and_coordinates(joined, tmp_path):
    _, first, coarse, maps = joined
    parts = [find_atlas(str(path)) for path in (first, coarse, maps)]
    spec = find_atlas("all=" + "+".join(map(str, (first, coarse, maps))))
    assert (spec.label, len(spec.paths)) == ("all", 3)
    np.testing.assert_array_equal(coordinates(spec), np.concatenate([coordinates(part) for part in parts]))
    names = networks_of(spec)
    assert names[0] == "grid stripe 1"  # the numbers of the other two clash
    assert names[-1] == "soft 5"
    assert networks_of(find_atlas(f"{first}+{maps}"))[:8] == [*(f"stripe {i}" for i in range(1, 8)), "1"]
    save_atlas(spec, tmp_path)
    assert saved_atlas("all", tmp_path) == spec
    save_dlabel(tmp_path / "x.dlabel.nii", ["a"])
    with pytest.raises(ValueError, match="joins dlabel and volume"):
        find_atlas(f"{first}+{tmp_path / 'x.dlabel.nii'}")
    with pytest.raises(ValueError, match="joins an atlas with itself"):
        find_atlas(f"{first}+{first}")


def test_joined_atlases_of_a_surface(tmp_path):
    one, two = tmp_path / "one.dlabel.nii", tmp_path / "two.dlabel.nii"
    save_dlabel(one, ["a"])
    save_dlabel(two, ["a", "b"])
    points = list(labels_of(find_atlas(str(one)))[0])
    run = Dense(data=np.random.default_rng(0).random((5, 3), np.float32), points=points, t_r=1.0)
    [joined] = surface_means(run, [find_atlas(f"{one}+{two}")], 0)
    np.testing.assert_array_equal(joined, run.data[:, [0, 0, 1]])


def test_the_list_of_names(capsys, run_verb):
    run_verb(atlases)
    text = capsys.readouterr().out
    assert "schaefer-100 … schaefer-1000" in text
    run_verb(atlases, "--json")
    assert json.loads(capsys.readouterr().out)[0]["names"][-1] == "difumo-1024"


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
