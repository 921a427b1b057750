"""The values that go into the store are nilearn's."""

import json
import shutil
import tracemalloc
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
from nilearn.image import index_img
from nilearn.interfaces.fmriprep import load_confounds, load_confounds_strategy
from nilearn.maskers import NiftiLabelsMasker, NiftiMapsMasker

from brainflow.cli.prepare_args import Args, settings_of
from brainflow.prepare import (
    CleanSettings,
    Query,
    Rules,
    Settings,
    find_atlas,
    find_runs,
    gather,
    volumes,
)
from brainflow.prepare.confounds import AROMA_IMAGE
from brainflow.prepare.parcels import networks_of
from brainflow.prepare.records import parts_of
from brainflow.prepare.run import jobs_for, prepare_run
from brainflow.storage import BoldStore
from brainflow.storage.normalise import APPLIED, KINDS, normalise
from brainflow.storage.parts import part_path, read_part

PUBLISHED = {"strategy": ("motion", "wm_csf", "global_signal"), "motion": "basic", "wm_csf": "basic"}
CLEANING = {"detrend": True, "standardize": "zscore_sample", "t_r": 2.5}


def prepare(tree, atlases, **clean):
    settings = Settings(clean=CleanSettings(**clean), rules=Rules(min_volumes=20))
    work = tree.root.parent / "work"
    specs = [find_atlas(str(path)) for path in atlases]
    query = Query(description=AROMA_IMAGE if clean.get("confounds") == "aroma" else "preproc")
    jobs = jobs_for(find_runs(tree.root, query), kind="volume", settings=settings, atlases=specs, work=work)
    records = [prepare_run(job) for job in jobs]
    assert [record["reason"] for record in records] == [""] * len(records)
    return records, [
        [SimpleNamespace(**read_part(part_path(parts_of(work, spec.label), record["key"]))) for spec in specs]
        for record in records
    ]


def masked(masker, path, confounds, dropped=0):
    return masker.fit_transform(
        index_img(str(path), slice(dropped, None)),
        confounds=None if confounds is None else confounds.iloc[dropped:],
    )


def fitted(maps, path, confounds, **options):
    """NiftiMapsMasker with maps in float64; with float32 ones it solves in float32, and is off by 1e-4."""
    image = nibabel.load(maps)
    precise = nibabel.Nifti1Image(np.asarray(image.dataobj, np.float64), image.affine)
    return NiftiMapsMasker(precise, **options).fit_transform(str(path), confounds=confounds)


def test_labels_and_maps_in_one_pass_equal_nilearns_maskers(tree, monkeypatch):
    monkeypatch.setattr(volumes, "BLOCK_BYTES", 40 * 20 * 8 * 30)  # several blocks a run
    path = tree.run("01", "objects")
    labels, maps = tree.atlas(), tree.maps()
    records, [[by_label, by_map]] = prepare(tree, [labels, maps])
    confounds, _ = load_confounds(str(path), **PUBLISHED, global_signal="basic")
    assert records[0]["confounds"] == list(confounds.columns)
    assert len(confounds.columns) == 9
    options = {"smoothing_fwhm": 3.0, "high_pass": 0.008, **CLEANING}
    expected = masked(NiftiLabelsMasker(str(labels), **options), path, confounds)
    assert by_label.bold.dtype == np.float32
    assert by_label.bold.shape == (121, 12)
    np.testing.assert_allclose(by_label.bold, expected, atol=1e-5)
    np.testing.assert_allclose(by_map.bold, fitted(maps, path, confounds, **options), atol=1e-5)
    assert networks_of(find_atlas(str(labels))) == [f"stripe {i}" for i in range(1, 13)]


@pytest.mark.parametrize("strategy", ["simple", "scrubbing", "compcor"])
def test_strategies_are_nilearns_with_its_sample_mask(tree, strategy):
    path = tree.run("01", "objects", outliers=2, moved=range(40, 44))
    [record], [[part]] = prepare(tree, [tree.atlas()], confounds=strategy)
    confounds, kept = load_confounds_strategy(str(path), denoise_strategy=strategy)
    assert len(kept) < (118 if strategy == "scrubbing" else 120)
    assert any(name.startswith("cosine") for name in record["confounds"])  # so it is not filtered twice
    masker = NiftiLabelsMasker(
        str(tree.root.parent / "atlas-grid_dseg.nii.gz"), smoothing_fwhm=3.0, **CLEANING
    )
    expected = masker.fit_transform(str(path), confounds=confounds, sample_mask=kept)
    np.testing.assert_allclose(part.bold[kept], expected, atol=1e-5)
    bad = np.ones(121, bool)
    bad[kept] = False
    np.testing.assert_array_equal(part.censor, bad)
    assert part.bold.shape == (121, 12)  # the time axis keeps its spacing
    if strategy == "scrubbing":
        before, after = kept[kept < 40][-1], kept[kept > 43][0]
        lines = [np.interp(41, [before, after], part.bold[[before, after], i]) for i in range(12)]
        np.testing.assert_allclose(part.bold[41], lines, atol=1e-6)


def test_published_defaults_with_non_steady_volumes_are_nilearns(tree):
    path = tree.run("01", "objects", outliers=3)
    _, [[part]] = prepare(tree, [tree.atlas()])
    confounds, kept = load_confounds(str(path), **PUBLISHED, global_signal="basic")
    masker = NiftiLabelsMasker(
        str(tree.root.parent / "atlas-grid_dseg.nii.gz"), smoothing_fwhm=3.0, high_pass=0.008, **CLEANING
    )
    expected = masker.fit_transform(str(path), confounds=confounds, sample_mask=kept)
    np.testing.assert_allclose(part.bold[kept], expected, atol=1e-5)


def test_aroma_takes_the_images_that_aroma_cleaned(tree):
    path = tree.run("01", "objects")
    for file in path.parent.glob("*_desc-preproc_bold*"):
        file.rename(file.with_name(file.name.replace("preproc", AROMA_IMAGE)))
    [record], [[part]] = prepare(tree, [tree.atlas()], confounds="aroma", smoothing_fwhm=None)
    path = path.with_name(path.name.replace("preproc", AROMA_IMAGE))
    confounds, _ = load_confounds_strategy(str(path), denoise_strategy="ica_aroma")
    assert sorted(record["confounds"]) == ["cosine00", "cosine01", "csf", "white_matter"]
    masker = NiftiLabelsMasker(str(tree.root.parent / "atlas-grid_dseg.nii.gz"), **CLEANING)
    np.testing.assert_allclose(part.bold, masked(masker, path, confounds), atol=1e-5)


def test_sample_mask_is_kept_as_censor_bits_and_automatic_dummies_are_dropped(tree):
    tree.run("01", "objects", outliers=3)
    [record], [[part]] = prepare(tree, [tree.atlas()])
    assert (record["volumes"], record["censored"]) == (121, 3)
    np.testing.assert_array_equal(np.flatnonzero(part.censor), [0, 1, 2])
    [record], [[part]] = prepare(tree, [tree.atlas()], dummy_scans=-1)
    assert (record["volumes"], record["dropped"], record["censored"]) == (118, 3, 0)
    assert part.bold.shape == (118, 12)


def test_dummies_across_several_blocks(tree, monkeypatch):
    path = tree.run("01", "objects")
    atlas = tree.atlas()
    monkeypatch.setattr(volumes, "BLOCK_BYTES", 40 * 20 * 8 * 4)
    _, [[part]] = prepare(
        tree, [atlas], confounds="none", high_pass=None, smoothing_fwhm=None, dummy_scans=10
    )
    masker = NiftiLabelsMasker(str(atlas), **CLEANING)
    np.testing.assert_allclose(part.bold, masked(masker, path, None, 10), atol=1e-5)


def test_memory_does_not_grow_with_the_length_of_a_run(tree, monkeypatch):
    monkeypatch.setattr(volumes, "BLOCK_BYTES", 40 * 20 * 8 * 16)
    specs = [find_atlas(str(path)) for path in (tree.atlas(), tree.maps())]
    peaks = []
    for length in (60, 60, 1_200):  # the first one imports and fits the atlases
        path = tree.run("01", "objects", volumes=length)
        image = volumes.open_volume(path)
        tracemalloc.start()
        volumes.extract(image, specs, 3.0, 0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    series = 1_200 * (12 + 5) * 8 * 3  # parts, their concatenation, float64
    assert peaks[2] < 1.3 * peaks[1] + series


def test_an_atlas_on_another_grid_is_resampled_as_nilearn_does(tree):
    path = tree.run("01", "objects")
    image = nibabel.load(tree.atlas())
    finer = np.repeat(np.repeat(np.asarray(image.dataobj), 2, 0), 2, 1)
    affine = image.affine.copy()
    affine[:3, :2] /= 2
    affine[:2, 3] -= np.diag(affine)[:2] / 2
    other = tree.root.parent / "atlas-fine_dseg.nii.gz"
    nibabel.save(nibabel.Nifti1Image(finer, affine), other)
    _, [[part]] = prepare(tree, [other], confounds="none")
    masker = NiftiLabelsMasker(str(other), smoothing_fwhm=3.0, high_pass=0.008, **CLEANING)
    np.testing.assert_allclose(part.bold, masked(masker, path, None), atol=1e-5)
    soft = tree.maps()
    image = nibabel.load(soft)
    nibabel.save(
        nibabel.Nifti1Image(np.repeat(np.asarray(image.dataobj), 2, 0)[:, ::-1].copy(), affine), soft
    )
    affine[1] *= -1
    _, [[part]] = prepare(tree, [soft], confounds="none")
    expected = fitted(soft, path, None, smoothing_fwhm=3.0, high_pass=0.008, **CLEANING)
    np.testing.assert_allclose(part.bold, expected, atol=1e-5)


def test_dependent_maps_get_the_smallest_solution(tree):
    """nilearn divides by rounding errors there; the pseudo-inverse is what least squares means."""
    tree.run("01", "objects")
    soft = tree.maps()
    image = nibabel.load(soft)
    maps = np.asarray(image.dataobj)
    maps = np.concatenate([maps, maps[..., :1]], 3)
    nibabel.save(nibabel.Nifti1Image(maps, image.affine), soft)
    off = {
        "confounds": "none",
        "detrend": False,
        "high_pass": None,
        "smoothing_fwhm": None,
        "normalise": "none",
    }
    _, [[part]] = prepare(tree, [soft], **off)
    flat = maps.reshape(-1, 6).astype(np.float64)
    expected = np.linalg.pinv(flat) @ tree.bold[..., :121].reshape(len(flat), 121)
    np.testing.assert_allclose(part.bold, expected.T, rtol=1e-5)
    np.testing.assert_allclose(part.bold[:, 0], part.bold[:, 5], rtol=1e-6)


def test_nothing_is_done_where_nothing_is_asked_for(tree):
    tree.run("01", "objects", index=3)
    atlas = tree.atlas(labels=1)
    off = {
        "confounds": "none",
        "detrend": False,
        "high_pass": None,
        "smoothing_fwhm": None,
        "normalise": "none",
    }
    _, [[part]] = prepare(tree, [atlas], **off)
    mean = tree.bold[tree.mask][:, 363:484].mean(axis=0)
    np.testing.assert_allclose(part.bold[:, 0], mean, rtol=1e-6)


def test_the_sidecar_wins_over_the_header_and_the_header_over_nothing(tree):
    tree.run("01", "objects", t_r=2.5, sidecar_t_r=2.0)
    path = tree.run("02", "objects", t_r=2.5)
    path.with_name(path.name.replace(".nii.gz", ".json")).unlink()
    tree.run("03", "rest", t_r=1.5)
    shared = tree.fmriprep / "sub-03" / "func"
    for sidecar in shared.glob("*_bold.json"):
        sidecar.unlink()
    (tree.root / "task-rest_bold.json").write_text(json.dumps({"RepetitionTime": 1.5}))
    records, _ = prepare(tree, [tree.atlas()])
    assert [(r["t_r"], r["t_r_source"]) for r in records] == [
        (2.0, "sidecar"),
        (2.5, "header"),
        (1.5, "sidecar"),
    ]
    assert "sidecar says 2 s, header 2.5 s" in records[0]["notes"][0]
    assert records[1]["notes"] == records[2]["notes"] == []


@pytest.mark.parametrize("kind", ["spatial", "gsr"])
def test_normalisation_comes_behind_the_cleaning_and_the_store_says_which(tree, kind, tmp_path):
    tree.run("01", "objects", outliers=3)
    atlas = tree.atlas()
    records, [[clean]] = prepare(tree, [atlas], confounds="none", normalise="none")
    assert clean.censor.any()
    shutil.rmtree(tree.root.parent / "work")
    records, [[part]] = prepare(tree, [atlas], confounds="none", normalise=kind)
    np.testing.assert_allclose(part.bold, normalise(clean.bold, kind, censor=clean.censor), atol=1e-4)
    spec = find_atlas(str(atlas))
    gather.gather(records, spec, tmp_path / "s", work=tree.root.parent / "work")
    store = BoldStore.open(tmp_path / "s")
    assert store.attributes["normalisation"] == APPLIED[kind]
    assert store.attributes["preprocessing"]["clean"]["normalise"] == kind
    with pytest.raises(ValueError, match="normalise: got 'psc', expected one of none"):
        CleanSettings(normalise="psc")


def test_a_run_of_one_parcel_has_nothing_spatial(tree):
    tree.run("01", "objects")
    settings = Settings(clean=CleanSettings(normalise="spatial"), rules=Rules(min_volumes=20))
    [job] = jobs_for(
        find_runs(tree.root, Query()),
        kind="volume",
        settings=settings,
        atlases=[find_atlas(str(tree.atlas(labels=1)))],
        work=tree.root.parent / "work",
    )
    assert prepare_run(job)["reason"].startswith("cleaning: normalise: spatial needs 3 networks")


@pytest.mark.parametrize(
    ("clean", "kind"),
    [({"standardize": True}, "zscore"), ({"standardize": False}, "none"), ({"normalise": "gsr"}, "gsr")],
)
def test_what_earlier_versions_prepared_is_known(clean, kind):
    assert gather.normalised(clean) == kind


def test_the_command_takes_each_kind(tmp_path):
    for kind in KINDS:
        args = Args(bids_dir=tmp_path, output_dir=tmp_path, analysis_level=(), normalise=kind)
        assert settings_of(args).clean.normalise == kind
