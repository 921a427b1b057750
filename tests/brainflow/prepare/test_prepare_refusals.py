"""One broken file of each kind: the reason is recorded, the other runs go on."""

import json

import nibabel
import numpy as np
import pytest

from brainflow.prepare import Query, Rules, Settings, find_atlas, find_runs
from brainflow.prepare.run import jobs_for, prepare_run


def record_of(tree, **rules):
    settings = Settings(rules=Rules(**rules))
    [run] = find_runs(tree.root, Query())
    atlas = find_atlas(str(tree.atlas()))
    [job] = jobs_for([run], kind="volume", settings=settings, atlases=[atlas], work=tree.root.parent / "work")
    return prepare_run(job)


def truncated(tree):
    path = tree.run("01", "objects")
    path.write_bytes(path.read_bytes()[:30_000])


def empty(tree):
    tree.run("01", "objects").write_bytes(b"")


def no_confounds(tree):
    tree.run("01", "objects", confounds=False)


def nan_column(tree):
    tree.run("01", "objects")
    tree.blank_column("01", "csf")


def missing_column(tree):
    tree.run("01", "objects")
    [table] = tree.root.rglob("*confounds_timeseries.tsv")
    table.write_text(table.read_text().replace("trans_x\t", "moved_x\t", 1))


def short_table(tree):
    tree.run("01", "objects")
    [table] = tree.root.rglob("*confounds_timeseries.tsv")
    table.write_text("\n".join(table.read_text().splitlines()[:-3]) + "\n")


def wrong_t_r(tree):
    tree.run("01", "objects", sidecar_t_r=-2)


def no_t_r(tree):
    path = tree.run("01", "objects", t_r=0)
    path.with_name(path.name.replace(".nii.gz", ".json")).write_text(json.dumps({"SkullStripped": True}))


def three_dimensions(tree):
    tree.run("01", "objects", data=tree.bold[..., 0])


def foreign_atlas(tree):
    affine = tree.affine.copy()
    affine[0, 3] += 90
    tree.run("01", "objects", affine=affine)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (truncated, "truncated or damaged"),
        (empty, "cannot be opened"),
        (no_confounds, "no confounds table"),
        (nan_column, "column csf is not a number in 121 of 121 rows"),
        (missing_column, "trans_x"),
        (short_table, "has 118 rows for 121 volumes"),
        (wrong_t_r, "RepetitionTime is -2, expected a positive number"),
        (no_t_r, "neither a JSON sidecar nor the image header"),
        (three_dimensions, "expected a 4-D image"),
        (foreign_atlas, "labels are not in the image (stripe"),
    ],
)
def test_a_broken_file_fails_with_its_reason(tree, spoil, reason):
    spoil(tree)
    record = record_of(tree)
    assert record["status"] == "failed"
    assert reason in record["reason"]
    assert not list((tree.root.parent / "work").rglob("*.npz"))


def test_a_sheared_image_is_excluded_unless_allowed(tree):
    affine = tree.affine.copy()
    affine[0, 1] = 0.3
    tree.run("01", "objects", affine=affine)
    record = record_of(tree)
    assert (record["status"], record["reason"]) == (
        "excluded",
        "the image is sheared (a fault of fMRIPrep 20.2.0)",
    )
    atlas = tree.atlas()
    nibabel.save(nibabel.Nifti1Image(np.asarray(nibabel.load(atlas).dataobj), affine), atlas)
    [run] = find_runs(tree.root, Query())
    settings = Settings(rules=Rules(allow_sheared=True))
    [job] = jobs_for(
        [run],
        kind="volume",
        settings=settings,
        atlases=[find_atlas(str(atlas))],
        work=tree.root.parent / "w2",
    )
    # nilearn itself smooths along the axes and refuses nothing; the run goes in
    assert prepare_run(job)["status"] == "done"


@pytest.mark.parametrize(("version", "status"), [("20.2.0", "excluded"), ("20.2.1", "done")])
def test_a_sheared_image_of_the_scanner_excludes_what_fmriprep_20_2_0_made_of_it(tree, version, status):
    tree.run("01", "objects")
    description = {"GeneratedBy": [{"Name": "fMRIPrep", "Version": version}]}
    (tree.fmriprep / "dataset_description.json").write_text(json.dumps(description))
    affine = tree.affine.copy()
    affine[0, 1] = 0.3
    raw = tree.func("01", derived=False) / "sub-01_task-objects_bold.nii.gz"
    nibabel.save(nibabel.Nifti1Image(tree.bold[..., :3], affine), raw)
    record = record_of(tree)
    assert record["status"] == status
    assert ("the scanner's image is sheared" in record["reason"]) == (status == "excluded")
    assert record_of(tree, allow_sheared=True)["status"] == "done"
    raw.write_bytes(b"")
    record = record_of(tree)
    if status == "excluded":
        assert "cannot be opened to see whether it is sheared" in record["reason"]
    else:
        assert record["status"] == "done"


def test_a_run_that_is_mostly_censored_is_short(tree):
    tree.run("01", "objects", outliers=80)
    record = record_of(tree)
    assert record["status"] == "excluded"
    assert record["reason"] == "short run: 41 volumes that are not censored (of 121), fewer than 50"


@pytest.mark.parametrize(
    ("rules", "run", "reason"),
    [
        ({"min_volumes": 60}, {"volumes": 59}, "short run: 59 volumes, fewer than 60"),
        ({"max_mean_fd": 0.5}, {"fd": 0.8}, "motion: mean framewise displacement 0.8"),
    ],
)
def test_rules_exclude(tree, rules, run, reason):
    tree.run("01", "objects", **run)
    record = record_of(tree, **rules)
    assert record["status"] == "excluded"
    assert record["reason"].startswith(reason)
    assert record_of(tree, min_volumes=10)["status"] == "done"


def test_an_atlas_in_another_template_is_refused(tree):
    from brainflow.prepare.atlas import check_space

    atlas = find_atlas(str(tree.atlas("atlas-x_space-MNI152NLin6Asym_dseg.nii.gz")))
    with pytest.raises(ValueError, match="is in MNI152NLin6Asym, the images in MNI152NLin2009cAsym"):
        check_space(atlas, "MNI152NLin2009cAsym")


@pytest.mark.parametrize("rules", [{"min_volumes": 1}, {"max_mean_fd": 0.0}])
def test_rules_that_make_no_sense_are_refused(rules):
    with pytest.raises(ValueError, match=next(iter(rules))):
        Rules(**rules)


def test_a_named_atlas_without_internet_says_what_to_do(monkeypatch):
    from nilearn import datasets

    def offline(**_):
        raise OSError("no route to host")

    monkeypatch.setattr(datasets, "fetch_atlas_difumo", offline)
    with pytest.raises(ConnectionError, match=r"difumo-64.*NILEARN_DATA"):
        find_atlas("difumo-64")
    with pytest.raises(FileNotFoundError, match="not a name"):
        find_atlas("nosuchatlas")
