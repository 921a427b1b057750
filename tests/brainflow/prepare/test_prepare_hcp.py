"""Folders of the HCP's pipelines: found by name, cleaned by motion, with states from the EV files."""

import nibabel
import numpy as np
import pytest
from nilearn.maskers import NiftiLabelsMasker

import brainflow.cli.prepare as cli
from brainflow.prepare import Query, find_runs, is_hcp
from brainflow.prepare.hcp import read_movement
from brainflow.prepare.records import Unusable
from brainflow.storage import BoldStore

T_R = 0.72
EVS = {"lf": [(11.009, 12.0), (131.712, 12.0)], "t": [(41.0, 12.0)], "cue": [(8.0, 3.0)]}


def movement(volumes, seed):
    motion = np.random.default_rng(seed).normal(size=(volumes, 6)).cumsum(0) * 0.01
    return np.column_stack([motion, np.vstack([np.zeros(6), np.diff(motion, axis=0)])])


def write_run(root, subject, name, bold, affine, *, ending=".nii.gz", evs=None, seed=0):
    folder = root / subject / "MNINonLinear" / "Results" / name
    folder.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(bold, affine)
    image.header.set_zooms((*image.header.get_zooms()[:3], T_R))
    image.header.set_xyzt_units("mm", "sec")
    nibabel.save(image, folder / f"{name}{ending}")
    np.savetxt(folder / "Movement_Regressors.txt", movement(bold.shape[-1], seed), fmt="%12.6f")
    for state, rows in (evs or {}).items():
        (folder / "EVs").mkdir(exist_ok=True)
        lines = [f"{onset}\t{duration}\t1.0" for onset, duration in rows]
        (folder / "EVs" / f"{state}.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def hcp(tree):
    root = tree.root.parent / "HCP1200"
    for i, subject in enumerate(("100307", "100408")):
        bold = tree.bold[..., i * 400 : i * 400 + 300]
        write_run(root, subject, "tfMRI_MOTOR_LR", bold[..., :284], tree.affine, evs=EVS, seed=i)
        write_run(root, subject, "rfMRI_REST1_RL", bold, tree.affine, seed=i + 5)
    (root / "100307" / "MNINonLinear" / "T1w.nii.gz").touch()
    return root


def test_one_command_makes_a_store_with_states(hcp, tree, tmp_path, run_verb):
    atlas = tree.atlas()
    assert is_hcp(hcp)
    assert not is_hcp(tree.root)
    out = tmp_path / "out"
    words = ["--atlas", atlas, "--confounds", "motion", "--smoothing-fwhm", "0"]
    assert run_verb(cli, hcp, out, "participant", "group", *words) == 0
    (path,) = out.glob("*.zarr")
    store = BoldStore.open(path)
    assert store.runs.key.tolist() == [
        f"ds-HCP1200_sub-{sub}_task-{run}"
        for sub in ("100307", "100408")
        for run in ("MOTOR_dir-LR", "REST1_dir-RL")
    ]
    assert np.allclose(store.runs.t_r, T_R)
    first = store.segments.run == 0
    assert store.segments.columns["mental_state"][first].tolist() == ["lf", "t", "lf"]
    assert store.segments.onset[first][0] == int(np.ceil((11.009 + 4 * T_R) / T_R))
    assert set(store.segments.columns["mental_state"][store.segments.run == 1]) == {"rest"}
    image = hcp / "100307" / "MNINonLinear" / "Results" / "tfMRI_MOTOR_LR" / "tfMRI_MOTOR_LR.nii.gz"
    masker = NiftiLabelsMasker(
        atlas, detrend=True, high_pass=0.008, t_r=T_R, standardize="zscore_sample", resampling_target=None
    )
    expected = masker.fit_transform(image, confounds=movement(284, 0)[:, :6].round(6))
    assert np.abs(store.run(0) - expected).max() < 2e-3 * np.abs(expected).max()  # float16


def test_framewise_displacement_is_powers(tmp_path):
    motion = np.zeros((3, 12))
    motion[1, 0], motion[2, 3] = 0.5, 2.0  # mm; degrees
    path = tmp_path / "Movement_Regressors.txt"
    np.savetxt(path, motion)
    values, displacement = read_movement(path, 3)
    assert np.array_equal(values, motion[:, :6])
    assert np.isnan(displacement[0])
    assert displacement[1:] == pytest.approx([0.5, 0.5 + np.deg2rad(2.0) * 50])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 2 3\n4 5 6\n", "shape"),
        ("0 0 0 0 0 0\n", "1, 6"),
        ("0 0 0 0 0 0\n0 0 nan 0 0 0\n", "not a number in 1 of 2"),
        ("a b\n", "table of numbers"),
    ],
)
def test_a_broken_table_of_motion_is_named(tmp_path, text, message):
    path = tmp_path / "Movement_Regressors.txt"
    path.write_text(text)
    with pytest.raises(Unusable, match=message):
        read_movement(path, 2)


def test_confounds_that_the_hcp_does_not_have_fail_with_what_to_do(hcp, tree, tmp_path, run_verb, capsys):
    assert run_verb(cli, hcp, tmp_path / "out", "participant", "--atlas", tree.atlas()) == 1
    assert "take --confounds motion" in capsys.readouterr().out


def test_images_and_subjects_are_chosen(hcp, tree):
    bold = tree.bold[..., :300]
    name = "rfMRI_REST1_7T_PA"
    folder = write_run(hcp, "100408", name, bold, tree.affine, ending="_hp2000_clean.nii.gz")
    query = Query(participants=["100408"], tasks=["REST1"])
    rest, seven = find_runs(hcp, query)[::-1]
    assert (rest.problem, seven.entities) == (
        "",
        {"sub": "100408", "task": "REST1", "acq": "7T", "dir": "PA"},
    )
    assert "_hp2000_clean.nii.gz; choose with --hcp-image" in seven.problem
    (chosen,) = (
        run
        for run in find_runs(hcp, Query(description="hp2000_clean", participants=["100408"]))
        if not run.problem
    )
    assert chosen.images == (folder / f"{name}_hp2000_clean.nii.gz",)
    (folder / f"{name}_Atlas_MSMAll.dtseries.nii").touch()
    (found,) = find_runs(hcp, Query(kind="cifti", description="Atlas_MSMAll"))
    assert found.images[0].name == f"{name}_Atlas_MSMAll.dtseries.nii"
    with pytest.raises(ValueError, match="no GIFTI"):
        find_runs(hcp, Query(kind="gifti"))


def test_an_atlas_in_fmripreps_space_is_refused_unless_allowed(hcp, tree, tmp_path, run_verb, capsys):
    atlas = tree.atlas("atlas-x_space-MNI152NLin2009cAsym_dseg.nii.gz")
    words = [hcp, tmp_path / "out", "participant", "--atlas", atlas, "--dry-run"]
    with pytest.raises(ValueError, match=r"the images in MNI152NLin6Asym.*--allow-space-mismatch"):
        run_verb(cli, *words)
    assert run_verb(cli, *words, "--allow-space-mismatch") == 0
    assert "4 of 4 runs to prepare" in capsys.readouterr().out
