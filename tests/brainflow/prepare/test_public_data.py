"""Recipes for public data: each command as it is printed, on a small copy of the published layout."""

import io
import json
import os
import pickle  # noqa: TID251  the tests write what was released
import re
import shlex
import subprocess
import tarfile
from glob import glob
from pathlib import Path

import cloud
import nibabel
import numpy as np
import pytest
from nibabel.cifti2 import BrainModelAxis, LabelAxis, SeriesAxis

from brainflow.cli.main import main
from brainflow.cli.recipes import RECIPES
from brainflow.storage import BoldStore


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working directory, and a mirror of what is published."""
    cloud.install(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("MIRROR", str(tmp_path / "mirror"))
    monkeypatch.setenv("TEMPLATEFLOW_HOME", str(tmp_path / "templateflow"))
    monkeypatch.setenv("BRAINFLOW_ATLASES", str(tmp_path / "atlases"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def follow(name, *options):
    """Type the commands of a recipe; return the codes of brainflow's, and the store that is trained on.

    The last command, the pretraining, is run if there are options for it.
    """
    codes = []
    *commands, train = RECIPES[name].commands
    for command in commands:
        if not command.startswith("brainflow "):
            subprocess.run(["sh", "-c", command], check=True)
            continue
        words = [path for word in shlex.split(command)[1:] for path in (sorted(glob(word)) or [word])]
        codes.append(main(words))
    words = shlex.split(train)[1:]
    assert words[0] == "pretrain"
    if options:
        codes.append(main([*words, *options]))
    return codes, BoldStore.open(words[1])


def save_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def noise(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def publish_fbert(mirror, recordings, owner):
    folder = mirror / "Marraffini-Giovanni" / "fbert-corpus"
    folder.mkdir(parents=True)
    windows = noise(len(owner), 6, 80)
    np.save(folder / "windows.npy", windows)
    np.save(folder / "window_to_recording.npy", np.array(owner, np.int32))
    np.save(folder / "teachers.npy", noise(len(recordings), 4))
    save_json(folder / "recordings.json", recordings)
    save_json(folder / "licenses.json", {"ds000030": "CC0", "ds001": "PDDL"})
    return windows


def test_fbert_corpus(place, capsys):
    recordings = [
        "ds000030/sub-10159/sub-10159_task-bart",
        "ds001/sub-01/sub-01_task-rest",
        "ds001/sub-02/sub-02_task-rest",
        "ds001/sub-02/sub-02_task-mixed",
        "ds001/sub-02/sub-02_task-lost",
    ]
    windows = publish_fbert(place / "mirror", recordings, [1, 0, 1, 2, 0, 0, 3, 4])
    raw = place / "mirror" / "openneuro.org"
    save_json(raw / "ds000030" / "task-bart_bold.json", {"RepetitionTime": 2})
    save_json(raw / "ds001" / "task-rest_bold.json", {"RepetitionTime": 1.5})
    func = raw / "ds001" / "sub-02" / "func"
    save_json(func / "sub-02_task-rest_run-1_bold.json", {"RepetitionTime": 0.8})
    for run, seconds in ((1, 2.0), (2, 3.0)):
        save_json(func / f"sub-02_task-mixed_run-{run}_bold.json", {"RepetitionTime": seconds})
    (func / "sub-02_task-rest_run-1_bold.nii.gz").touch()
    codes, store = follow("fbert-corpus", "--preset", "tiny", "--train.steps", "1", "--device", "cpu")
    assert codes == [1, 0]
    assert list(Path("run").rglob("model.safetensors"))
    assert not list(Path.cwd().rglob("*.nii.gz"))
    assert not Path("fbert-corpus/teachers.npy").exists()
    said = capsys.readouterr().out
    assert "task-mixed: its sidecars have several repetition times: 2, 3 s" in said
    assert "task-lost: no _bold.json below sidecars/ds001 describes it" in said
    assert dict(zip(store.runs.key.tolist(), store.runs.t_r.tolist(), strict=True)) == {
        "ds-ds000030_sub-10159_task-bart_chunk-001": 2.0,
        "ds-ds000030_sub-10159_task-bart_chunk-002": 2.0,
        "ds-ds000030_sub-10159_task-bart_chunk-003": 2.0,
        "ds-ds001_sub-01_task-rest_chunk-001": 1.5,
        "ds-ds001_sub-01_task-rest_chunk-002": 1.5,
        "ds-ds001_sub-02_task-rest_chunk-001": 0.8,
    }
    for run, window in enumerate((1, 4, 5, 0, 2, 3)):
        np.testing.assert_array_equal(store.run(run), windows[window].T.astype(np.float16))
    assert store.attributes["provenance"]["licences"] == {"ds000030": "CC0", "ds001": "PDDL"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("windows", np.zeros((2, 480), np.float32), r"shape \[2, 480\] of float32, expected \[windows, reg"),
        ("windows", np.array([{}]), "cannot be read as .npy"),
        ("window_to_recording", np.array([0, 1]), r"expected \[2\] of int|holds 0 to 1, expected 0 to 0"),
        ("window_to_recording", np.array([0, -1]), "holds -1 to 0, expected 0 to 0"),
        ("window_to_recording", np.array([0]), r"shape \[1\] of int64, expected \[2\] of integers"),
        ("recordings", ["a", "a"], "has a recording twice"),
        ("licenses", [], "expected a licence for each data set"),
    ],
)
def test_a_damaged_corpus_is_refused_before_anything_is_written(place, capsys, name, content, message):
    publish_fbert(place / "mirror", ["ds001/sub-01/sub-01_task-rest"], [0, 0])
    folder = place / "mirror" / "Marraffini-Giovanni" / "fbert-corpus"
    if isinstance(content, np.ndarray):
        np.save(folder / f"{name}.npy", content)
    else:
        save_json(folder / f"{name}.json", content)
    (place / "sidecars").mkdir()
    assert main(["ingest", "fbert", str(folder), "store", "--sidecars", str(place / "sidecars")]) == 1
    assert re.search(f"{name}.*({message})", capsys.readouterr().err)
    assert not Path("store").exists()


def save_labels(path, labels, affine):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(labels.astype(np.int16), affine), path)


def test_openneuro_fmriprep(place, tree):
    space = "MNI152NLin2009cAsym"
    for sub in ("01", "02"):
        tree.run(sub, "flanker", events=[(20, 10, "congruent"), (60, 10, "incongruent")])
    (tree.fmriprep / "sub-01" / "func" / "sub-01_task-flanker_space-T1w_desc-preproc_bold.nii.gz").touch()
    derived = place / "mirror" / "openneuro-derivatives" / "fmriprep" / "ds000102-fmriprep"
    derived.parent.mkdir(parents=True)
    tree.fmriprep.rename(derived)
    (place / "mirror" / "openneuro.org").mkdir()
    tree.root.rename(place / "mirror" / "openneuro.org" / "ds000102")
    half = np.arange(tree.mask.size).reshape(tree.mask.shape) % 2
    schaefer = f"tpl-{space}_res-02_atlas-Schaefer2018_desc-400Parcels7Networks_dseg.nii.gz"
    save_labels(place / "templateflow" / f"tpl-{space}" / schaefer, tree.mask * (1 + half), tree.affine)
    other = np.zeros(tree.mask.shape, int)
    other[tuple(np.argwhere(~tree.mask)[0])] = 1
    save_labels(place / "atlases" / "Tian_Subcortex_S3_3T_2009cAsym.nii.gz", other, tree.affine)
    (place / "atlases" / "Tian_Subcortex_S3_3T_2009cAsym.txt").write_text("HIP-rh\n")
    codes, store = follow("openneuro-fmriprep")
    assert codes == [0]
    assert not list(Path("ds000102").rglob("*T1w*"))
    assert (len(store.runs), store.networks) == (2, 3)
    assert store.segments.columns["mental_state"].tolist() == ["congruent", "incongruent"] * 2


def save_dlabel(path, models, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {0: ("???", (0, 0, 0, 0))} | {int(v): (f"{path.name[:9]} {v}", (1, 0, 0, 1)) for v in set(values)}
    axis = LabelAxis(["parcels"], [table])
    nibabel.save(nibabel.Cifti2Image(np.float32([values]), header=(axis, models)), path)


def test_hcp_young_adult(place):
    cortex = BrainModelAxis.from_surface(np.arange(60), 32_492, "CORTEX_LEFT")
    thalamus = BrainModelAxis.from_mask(np.ones((2, 3, 1), bool), "THALAMUS_LEFT", np.eye(4))
    results = place / "mirror/hcp-openaccess/HCP_1200/100307/MNINonLinear/Results"
    for name, volumes in (("tfMRI_MOTOR_LR", 284), ("rfMRI_REST1_RL", 120)):
        (results / name / "EVs").mkdir(parents=True)
        axis = SeriesAxis(0, 0.72, volumes, unit="SECOND")
        image = nibabel.Cifti2Image(noise(volumes, 66), header=(axis, cortex + thalamus))
        nibabel.save(image, results / name / f"{name}_Atlas_MSMAll.dtseries.nii")
        (results / name / f"{name}_Atlas_MSMAll_hp2000_clean.dtseries.nii").touch()
        (results / name / f"{name}.nii.gz").touch()
        np.savetxt(results / name / "Movement_Regressors.txt", noise(volumes, 12))
    (results / "tfMRI_MOTOR_LR" / "EVs" / "lf.txt").write_text("11.009\t12.0\t1.0\n")
    atlases = place / "atlases"
    schaefer = "tpl-fsLR_den-32k_atlas-Schaefer2018_desc-400Parcels7Networks_dseg.dlabel.nii"
    save_dlabel(atlases / schaefer, cortex, [1] * 30 + [2] * 30)
    save_dlabel(atlases / "atlas-Tian_space-fsLR_den-32k_dseg.dlabel.nii", thalamus, [1] * 6)
    codes, store = follow("hcp-ya")
    assert codes == [0]
    assert not list(Path("HCP1200").rglob("*clean*")) + list(Path("HCP1200").rglob("*.nii.gz"))
    assert store.runs.key.tolist() == [
        f"ds-HCP1200_sub-100307_task-{run}" for run in ("MOTOR_dir-LR", "REST1_dir-RL")
    ]
    assert store.networks == 3
    assert set(store.segments.columns["mental_state"]) == {"lf", "rest"}
    for image in Path("HCP1200").rglob("*.nii"):  # to make room for the next subject
        image.unlink()
    assert main(["prepare", "HCP1200", "out", "group", "--no-report"]) == 0
    assert BoldStore.open(store.path).runs.key.tolist() == store.runs.key.tolist()


def tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, value in members.items():
            info = tarfile.TarInfo(name)
            data = value if isinstance(value, bytes) else pickle.dumps(value)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))


def test_learning_from_brains(place):
    data = place / "mirror/github.com/athms/learning-from-brains/data"
    for sub in ("01", "02", "03"):
        key = f"ds-ds000003_sub-{sub}_task-rhymejudgment"
        tar(
            data / "upstream" / "ds000003" / f"{key}.tar",
            {f"{key}.bold.pyd": noise(60, 4), f"{key}.t_r.pyd": 2.0},
        )
    for sub in range(31):
        key, members = f"ds-HCP_sub-{sub}_task-MOTOR_run-1", {}
        for trial in (1, 2):
            sample = f"{key}_sample_{trial:03d}"
            members |= {f"{sample}.bold.pyd": noise(12, 4), f"{sample}.t_r.pyd": 0.72}
            members |= {f"{sample}.label_across_tasks.pyd": trial, f"{sample}.mental_state": b"lf"}
        tar(data / "downstream" / "HCP" / f"{key}.tar", members)
    codes, store = follow("learning-from-brains")
    assert codes == [0, 0]
    assert len(store.runs) == 3
    assert BoldStore.open("hcp").segments.columns["label_across_tasks"].tolist() == [1, 2] * 31
    assert Path("split.json").is_file()


NAMES = ["LH_Vis_1", "LH_Vis_2", "Thalamus"]


def publish_xcpd(
    folder,
    sub,
    bold,
    *,
    task="rest",
    run="",
    space="fsLR_den-91k",
    atlas="4S456Parcels",
    outliers=None,
    cifti=False,
):
    """One run as XCP-D writes it; n/a for NaN."""
    func = folder / f"sub-{sub}" / "ses-1" / "func"
    func.mkdir(parents=True, exist_ok=True)
    name = f"sub-{sub}_ses-1_task-{task}" + (f"_run-{run}" if run else "")
    where, _, den = space.partition("_")
    stem = f"{name}_space-{where}_atlas-{atlas}" + (f"_{den}" if den else "") + "_stat-mean_timeseries"
    if cifti:
        empty = [np.zeros((0, 3), int)] * len(NAMES)
        parcels = nibabel.cifti2.ParcelsAxis(
            NAMES, empty, [{}] * len(NAMES), np.eye(4), (1, 1, 1), nvertices={}
        )
        header = (SeriesAxis(0, 0.8, len(bold), unit="SECOND"), parcels)
        nibabel.save(nibabel.Cifti2Image(bold, header=header), func / f"{stem}.ptseries.nii")
    else:
        rows = ["\t".join("n/a" if np.isnan(v) else str(v) for v in row) for row in bold]
        (func / f"{stem}.tsv").write_text("\n".join(["\t".join(NAMES), *rows, ""]))
        save_json(func / f"{stem}.json", {"RepetitionTime": 0.8, "SkullStripped": True})
    if outliers is not None:
        (func / f"{name}_outliers.tsv").write_text(
            "\n".join(["framewise_displacement", *map(str, outliers), ""])
        )
    return func / stem


def test_xcpd(place, capsys):
    folder, bold = Path("xcp_d"), noise(60, 3)
    marks = np.isin(np.arange(60), (0, 10, 11)).astype(int)
    ramp = np.arange(60)[:, None] * [1.0, -2.0, 0.5] + 3  # which interpolation gives back, but for its ends
    publish_xcpd(folder, "01", bold, run="1", outliers=marks)
    publish_xcpd(folder, "01", bold[::-1], run="2", cifti=True)
    publish_xcpd(folder, "01", np.vstack([bold, bold]))  # --combine-runs
    publish_xcpd(folder, "02", np.where([[0, 1, 0]], np.nan, bold))
    publish_xcpd(folder, "03", ramp[marks == 0], outliers=marks)
    publish_xcpd(folder, "03", bold, atlas="Tian")
    codes, store = follow("xcpd")
    assert codes == [0]
    said = capsys.readouterr().out
    assert "NOTE ds-xcpd_sub-01_ses-1_task-rest: XCP-D joined it from runs" in said
    assert "NOTE ds-xcpd_sub-02_ses-1_task-rest: 1 of 3 parcels are empty and became 0 (LH_Vis_2)" in said
    assert "NOTE ds-xcpd_sub-03_ses-1_task-rest: 3 removed volumes were put back" in said
    names = (
        "01_ses-1_task-rest_run-1",
        "01_ses-1_task-rest_run-2",
        "02_ses-1_task-rest",
        "03_ses-1_task-rest",
    )
    assert store.runs.key.tolist() == [f"ds-xcpd_sub-{name}" for name in names]
    assert np.allclose(store.runs.t_r, 0.8)
    assert store.attributes["network_names"] == NAMES
    assert store.attributes["parcellation"] == "4S456Parcels"
    expected = (bold - bold.mean(0)) / bold.std(0, ddof=1)
    np.testing.assert_allclose(store.run(1), expected[::-1], atol=4e-3)
    assert not store.run(2)[:, 1].any()
    for run in (0, 3):
        np.testing.assert_array_equal(store.runs.censor(run), marks == 1)
    line = np.diff(store.run(3).astype(float)[1:], axis=0)
    np.testing.assert_allclose(line, np.broadcast_to(line.mean(0), line.shape), atol=4e-3)


def test_what_xcpd_left_unclear_is_refused(place, capsys):
    folder, bold = Path("xcp_d"), noise(60, 3)
    assert main(["ingest", "xcpd", "nowhere", "store"]) == 1
    publish_xcpd(folder, "01", bold, outliers=[0] * 50)
    publish_xcpd(folder, "02", np.where(np.arange(180).reshape(60, 3) == 7, np.nan, bold))
    stem = publish_xcpd(folder, "03", bold)
    stem.with_name(f"{stem.name}.json").unlink()
    stem = publish_xcpd(folder, "04", bold)
    stem.with_name(f"{stem.name}.tsv").write_text("a\tb\n1\t2\n")
    publish_xcpd(folder, "05", bold, outliers=[2] * 60)
    assert main(["ingest", "xcpd", "xcp_d", "store"]) == 1
    said = capsys.readouterr().out
    for sub, reason in (
        ("01", "has 60 volumes, but its outliers.tsv 50, of which 50 were kept"),
        ("02", "not finite"),
        ("03", "no repetition time"),
        ("04", "has other parcels than the first run (2 of them)"),
        ("05", "holds 2, expected 0 and 1"),
    ):
        [line] = [line for line in said.splitlines() if f"FAILED xcp_d/sub-{sub}/" in line]
        assert reason in line
    assert not Path("store").exists()
    publish_xcpd(folder, "06", bold, atlas="Tian")
    publish_xcpd(folder, "06", bold, space="MNI152NLin6Asym")
    for words, reason in (
        ((), "atlas: got none, expected one of 4S456Parcels, Tian"),
        (("--atlas", "Gordon"), "atlas: got 'Gordon', expected one of 4S456Parcels, Tian"),
        (("--atlas", "4S456Parcels"), "space: got none, expected one of MNI152NLin6Asym, fsLR"),
    ):
        assert main(["ingest", "xcpd", "xcp_d", "store", *words]) == 1
        assert reason in capsys.readouterr().err


def test_recipes_are_described(capsys):
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    page = (Path(__file__).parents[3] / "docs" / "public-data.md").read_text()
    for name, recipe in RECIPES.items():
        assert name in listed
        assert main(["recipes", name]) == 0
        said = capsys.readouterr().out
        assert recipe.licence in said
        for command in recipe.commands:
            assert command in said
            assert command in page
    assert main(["recipes", "fbert-corpus", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fbert-corpus"]["download"] == 106_397 * 450 * 80 * 4
    assert main(["recipes", "hcp"]) == 2
    assert "did you mean hcp-ya?" in capsys.readouterr().err
