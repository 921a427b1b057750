"""The quality page says what is in the store: numbers, places and the paragraph for a paper."""

import json
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest

from brainflow.cli import prepare
from brainflow.prepare import find_atlas
from brainflow.prepare.records import read_before, read_record, write_before
from brainflow.prepare.volumes import mean_and_labels
from brainflow.report import quality
from brainflow.report.quality import methods
from brainflow.report.quality_figures import _name
from brainflow.storage import BoldStore, Segment, StoreWriter


def test_mean_responses_leave_censored_volumes_out(tmp_path):
    rng = np.random.default_rng(0)
    bold = rng.standard_normal((3, 20, 2)).astype(np.float32)
    censor = np.arange(20) == 6
    with StoreWriter.create(tmp_path / "s", networks=2, dtype="float32") as writer:
        for run in range(3):
            segments = [
                Segment(onset=5, length=4, labels={"mental_state": "face"}),
                Segment(onset=12, length=6, labels={"mental_state": "house"} if run else {"other": 1}),
            ]
            writer.append(
                bold[run],
                t_r=2.0,
                dataset="d",
                subject=f"{min(run, 1)}",
                task=f"{run}",
                censor=censor,
                segments=segments if run < 2 else (),
            )
    store = BoldStore.open(tmp_path / "s")
    section = quality._conditions(store)
    assert section.table.rows == [["face", "2", "2", "2", "8.0"], ["house", "1", "1", "1", "12.0"]]
    labels = store.segments.columns["mental_state"].tolist()
    means, read = quality._mean_responses(store, labels, ["house", "face"])
    assert read == 2
    face = bold[:2][:, [5, 7, 8]].reshape(-1, 2).mean(axis=0, dtype=np.float64)
    np.testing.assert_allclose(means, [bold[1, 12:18].mean(axis=0, dtype=np.float64), face], atol=1e-6)


def test_the_atlas_is_drawn_where_its_labels_are(tmp_path):
    """An image on another grid comes to that of the first atlas, and the second atlas, too."""
    fine, coarse = np.diag([1.0, 1, 1, 1]), np.diag([2.0, 2, 2, 1])
    coarse[:3, 3] = 0.5
    one, two = np.zeros((8, 8, 8), np.int16), np.zeros((4, 4, 4), np.int16)
    one[:4], two[3] = 1, 5
    nibabel.save(nibabel.Nifti1Image(one, fine), tmp_path / "atlas-one_dseg.nii.gz")
    nibabel.save(nibabel.Nifti1Image(two, coarse), tmp_path / "atlas-two_dseg.nii.gz")
    bold = np.broadcast_to(np.arange(4.0)[:, None, None, None], (4, 4, 4, 30)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(bold, coarse), tmp_path / "bold.nii.gz")
    atlas = find_atlas(f"{tmp_path}/atlas-one_dseg.nii.gz+{tmp_path}/atlas-two_dseg.nii.gz")
    mean, labels, affine = mean_and_labels(tmp_path / "bold.nii.gz", atlas)
    assert mean.shape == labels.shape == (8, 8, 8)
    assert np.array_equal(affine, fine)
    assert labels[:, 3, 3].tolist() == [1, 1, 1, 1, 0, 0, 6, 0]  # the last lies outside of the coarse grid
    np.testing.assert_allclose(mean[1:7, 3, 3], (np.arange(1, 7) - 0.5) / 2, atol=1e-5)
    soft = np.zeros((8, 8, 8, 3), np.float32)
    soft[0, ..., 0], soft[1, ..., 1], soft[1, ..., 2] = 0.2, 0.3, 0.5
    soft[2, ..., 0], soft[2, ..., 2] = 0.6, 0.4
    nibabel.save(nibabel.Nifti1Image(soft, fine), tmp_path / "atlas-soft_probseg.nii.gz")
    _, labels, _ = mean_and_labels(
        tmp_path / "bold.nii.gz", find_atlas(str(tmp_path / "atlas-soft_probseg.nii.gz"))
    )
    assert labels[:4, 0, 0].tolist() == [1, 3, 1, 0]


def test_series_before_cleaning_are_kept_and_volumes_are_aligned(tree, tmp_path, run_verb):
    tree.run("01", "rest", volumes=90, outliers=3)
    out = tmp_path / "out"
    words = ("participant", "--atlas", tree.atlas(), "--dummy-scans", "-1")
    assert run_verb(prepare, tree.root, out, *words) == 0
    record = read_record(out / "work", "ds-bids_sub-01_task-rest")
    before = read_before(out / "work", "grid", record["key"])
    assert before.shape == (87, 12)
    assert len(record["dvars"]) == len(record["fd"]) == 87
    assert 0.8 <= record["dvars"][0] <= 1.2  # the first row of all, n/a, was dropped
    np.testing.assert_allclose(before.std(axis=0), 1, atol=0.02)
    assert run_verb(prepare, tree.root, out, *words, "--smoothing-fwhm", "9") == 0
    assert not np.array_equal(before, read_before(out / "work", "grid", record["key"]))


def test_what_was_kept_before_cleaning_may_be_lost(tmp_path):
    series = np.column_stack([np.linspace(900, 1100, 40), np.full(40, 7.0)])
    write_before(tmp_path, "a", "key", series)
    before = read_before(tmp_path, "a", "key")
    expected = (series[:, 0] - 1000) / series[:, 0].std()
    np.testing.assert_allclose(before[:, 0], expected, atol=1 / 16 + 1e-6)
    assert not before[:, 1].any()
    [file] = tmp_path.rglob("*.npy")
    file.write_bytes(b"\x93NUMPY damaged")
    assert read_before(tmp_path, "a", "key") is None
    assert read_before(tmp_path, "a", "other") is None


def record(**clean):
    settings = {"detrend": True, "high_pass": 0.008, "low_pass": None, "normalise": "zscore"}
    settings |= {"smoothing_fwhm": 3.0, "dummy_scans": 0} | clean
    recipe = {"kind": "volume", "space": "MNI152NLin2009cAsym", "clean": settings}
    recipe["rules"] = {"min_volumes": 50, "max_mean_fd": None}
    return {"recipe": recipe, "confounds": ["trans_x", "csf"], "censored": 0, "entities": {"sub": "01"}}


def test_the_paragraph_for_a_paper():
    text, works = methods(
        [record()], {"Schaefer400TianS3": 450}, [{"Name": "fMRIPrep", "Version": "25.2.0"}], runs=3
    )
    for part in (
        "in MNI152NLin2009cAsym that were preprocessed by fMRIPrep 25.2.0 were averaged in the 450 parcels",
        "Gaussian kernel of 3 mm",
        "Linear trends were removed; series and confounds were filtered (high-pass at 0.008 Hz, "
        "Butterworth); 2 confounds were regressed out (trans_x, csf).",
        "z-scored within the run",
        "fewer than 50 volumes",
        "1 of 3 runs of 1 participant remained",
    ):
        assert part in text
    assert [work.split(" ")[0] for work in works] == [
        "Gorgolewski",
        "Esteban",
        "Schaefer",
        "Tian",
        "Nilearn",
        "Lindquist",
    ]
    bare = record(detrend=False, high_pass=None, normalise="none", smoothing_fwhm=None, dummy_scans=4)
    bare["confounds"] = []
    text, works = methods([bare], {"mine": 7}, [], runs=1)
    assert "Gaussian" not in text
    assert "regressed" not in text
    assert "The first 4 volumes of each run were dropped." in text
    assert "Time series were not normalised." in text
    assert len(works) == 2
    cosines = record(low_pass=0.1)
    cosines["confounds"] = ["cosine00"]
    assert "filtered (low-pass at 0.1 Hz, Butterworth)" in methods([cosines], {"a": 1}, [], runs=1)[0]


@pytest.mark.parametrize(
    ("names", "marks"),
    [
        (
            ["7Networks_LH_Vis_1", "7Networks_LH_Vis_2", "7Networks_RH_Default_PFC_1"],
            {0.5: "LH_Vis", 2.0: "RH_Default"},
        ),
        ([f"n{i}" for i in range(100)], None),
    ],
)
def test_blocks_of_networks_are_named(names, marks):
    seen = {}
    axis = SimpleNamespace(
        set_ticks=lambda places, texts, fontsize: seen.update(zip(places, texts, strict=True)), axis_name="y"
    )
    _name(axis, names)
    if marks is None:
        assert len(seen) == 40
        assert all(names[int(place)] == name for place, name in seen.items())
    else:
        assert seen == marks


def test_a_lost_image_is_said_and_stops_nothing(tmp_path):
    atlas = SimpleNamespace(label="a", pieces=())
    lost = {"recipe": {"kind": "volume"}, "inputs": [str(tmp_path / "gone.nii.gz")], "key": "k"}
    pictures, notes = quality._outline(lost, atlas)
    assert pictures == []
    assert "gone.nii.gz" in notes[0]
    assert json.dumps(quality._outline({"recipe": {"kind": "cifti"}}, atlas)) == "[[], []]"
