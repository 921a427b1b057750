"""Exported files have XCP-D's names; nilearn, pandas and nibabel read the values back from them."""

import json

import nibabel
import numpy as np
import pandas
import pytest
from nilearn.interfaces.bids import get_bids_files, parse_bids_filename
from nilearn.maskers import NiftiLabelsMasker

from brainflow.cli import export
from brainflow.prepare.xcpd import ingest_xcpd
from brainflow.storage import BoldStore, StoreWriter


@pytest.fixture
def store(tmp_path):
    path, rng = tmp_path / "store.zarr", np.random.default_rng(0)
    with StoreWriter.create(
        path, networks=12, parcellation="grid", network_names=[f"n {i}" for i in range(12)]
    ) as w:
        for sub, ses, run in (("01", "a", "1"), ("01", "b", "1"), ("02", "", "2")):
            key = f"ds-x_sub-{sub}_" + (f"ses-{ses}_" if ses else "") + f"task-rest_acq-fast_run-{run}"
            bold = rng.normal(size=(30, 12)).astype(np.float32)
            w.append(bold, t_r=0.72, dataset="x", subject=sub, session=ses, task="rest", run=run, key=key)
    return path


def test_tsv(store, tmp_path, run_verb):
    out = tmp_path / "xcp"
    assert run_verb(export, store, out, "--space", "MNI152NLin2009cAsym") == 0
    name = "sub-01_ses-a_task-rest_acq-fast_run-1_space-MNI152NLin2009cAsym_atlas-grid_stat-mean_timeseries"
    path = out / "sub-01" / "ses-a" / "func" / f"{name}.tsv"
    table = pandas.read_csv(path, sep="\t", dtype=np.float32)
    assert table.columns.tolist() == [f"n {i}" for i in range(12)]
    np.testing.assert_array_equal(table.to_numpy(), BoldStore.open(store).run(0).astype(np.float32))
    sidecar = json.loads((path.parent / f"{name}.json").read_text())
    assert sidecar["RepetitionTime"] == 0.72
    [source] = sidecar["Sources"]
    _, link, file = source.split(":")
    links = json.loads((out / "dataset_description.json").read_text())["DatasetLinks"]
    assert (out / links[link] / file).resolve() == store
    found = get_bids_files(str(out), file_tag="timeseries", file_type="tsv", sub_folder=True)
    assert len(found) == 2  # nilearn looks for sessions in all participants or in none
    assert parse_bids_filename(found[0])["entities"]["atlas"] == "grid"


def test_the_cohort_of_a_template_is_an_entity_of_the_name(store, tmp_path, run_verb):
    words = ("--space", "MNIInfant:cohort-2", "--participant-label", "02")
    assert run_verb(export, store, tmp_path / "xcp", *words) == 0
    [path] = (tmp_path / "xcp").rglob("*.tsv")
    assert "_space-MNIInfant_cohort-2_atlas-grid_" in path.name


@pytest.mark.parametrize("form", ["tsv", "ptseries"])
def test_what_is_exported_can_be_ingested_again(store, tmp_path, run_verb, form):
    out, back = tmp_path / "xcp", tmp_path / "back.zarr"
    assert run_verb(export, store, out, "--format", form) == 0
    assert ingest_xcpd(out, back, dataset="x").ok
    first, second = BoldStore.open(store), BoldStore.open(back)
    assert second.runs.key.tolist() == first.runs.key.tolist()
    assert second.runs.t_r.tolist() == first.runs.t_r.tolist()
    assert second.attributes["network_names"] == first.attributes["network_names"]
    for run in range(3):
        np.testing.assert_array_equal(second.run(run), first.run(run))


def test_ptseries_with_and_without_geometry(store, tree, tmp_path, run_verb):
    atlas = tree.atlas()
    bold = BoldStore.open(store).run(2).astype(np.float32)
    for options in ((), ("--geometry", atlas)):
        out = tmp_path / f"cifti{len(options)}"
        assert (
            run_verb(export, store, out, "--format", "ptseries", "--participant-label", "sub-02", *options)
            == 0
        )
        [path] = out.rglob("*.ptseries.nii")
        assert path.name == "sub-02_task-rest_acq-fast_run-2_atlas-grid_stat-mean_timeseries.ptseries.nii"
        image = nibabel.load(path)
        series, parcels = (image.header.get_axis(i) for i in (0, 1))
        assert (series.step, series.unit, parcels.name.tolist()) == (
            0.72,
            "SECOND",
            [f"n {i}" for i in range(12)],
        )
        np.testing.assert_array_equal(image.get_fdata(dtype=np.float32), bold)
    labels = np.asarray(nibabel.load(atlas).dataobj)
    for i in range(12):
        np.testing.assert_array_equal(parcels.voxels[i], np.argwhere(labels == i + 1))
    # the volume that the parcels describe goes back through nilearn to the same series
    volume = np.zeros((*labels.shape, 30), np.float32)
    for i in range(12):
        volume[tuple(parcels.voxels[i].T)] = bold[:, i]
    back = NiftiLabelsMasker(str(atlas), standardize=None).fit_transform(
        nibabel.Nifti1Image(volume, parcels.affine)
    )
    np.testing.assert_allclose(back, bold, atol=1e-6)


def test_refusals(store, tree, tmp_path, run_verb):
    with pytest.raises(ValueError, match="none of 09 is in the store"):
        run_verb(export, store, tmp_path / "out", "--participant-label", "09")
    other = tree.atlas("atlas-other_dseg.nii.gz", labels=5)
    with pytest.raises(ValueError, match="has 5 labels, the store 12 networks"):
        run_verb(export, store, tmp_path / "out", "--format", "ptseries", "--geometry", other)
