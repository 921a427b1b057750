"""The index finds what a BIDS dataset holds, without a database."""

import json
from pathlib import Path

import pytest
import tyro

from brainflow.cli.prepare_args import Args, query_of
from brainflow.prepare import Query, find_runs
from brainflow.prepare.bids import dataset_name
from brainflow.prepare.files import parse_name

NAME = "{}_task-rest_run-{}_space-{}_desc-preproc_bold{}"
SPACE = "MNI152NLin2009cAsym"


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


@pytest.fixture
def dataset(tmp_path):
    root = tmp_path / "ds000001"
    for sub in ("01", "02"):
        for ses in ("a", "b"):
            stem = f"sub-{sub}_ses-{ses}"
            func = root / "derivatives" / "fmriprep-20.2.3" / f"sub-{sub}" / f"ses-{ses}" / "func"
            for run in "12":
                touch(func / NAME.format(stem, run, SPACE, ".nii.gz"))
                touch(func / NAME.format(stem, run, SPACE, ".json"))
                touch(func / f"{stem}_task-rest_run-{run}_space-fsLR_den-91k_bold.dtseries.nii")
                touch(func / f"{stem}_task-rest_run-{run}_desc-confounds_timeseries.tsv")
                for hemi in "LR":
                    touch(func / f"{stem}_task-rest_run-{run}_hemi-{hemi}_space-fsaverage5_bold.func.gii")
            touch(root / f"sub-{sub}" / f"ses-{ses}" / "func" / f"{stem}_task-rest_run-1_events.tsv")
    touch(root / "task-rest_events.tsv")
    touch(root / "task-rest_bold.json")
    return root


def test_runs_with_all_their_files(dataset):
    runs = find_runs(dataset, Query())
    assert [run.key for run in runs] == [
        f"ds-ds000001_sub-{sub}_ses-{ses}_task-rest_run-{run}"
        for sub in ("01", "02")
        for ses in "ab"
        for run in "12"
    ]
    first, second = runs[:2]
    assert first.entities == {"sub": "01", "ses": "a", "task": "rest", "run": "1"}
    assert first.confounds.name == "sub-01_ses-a_task-rest_run-1_desc-confounds_timeseries.tsv"
    assert [path.name for path in first.events] == ["sub-01_ses-a_task-rest_run-1_events.tsv"]
    assert [path.name for path in second.events] == ["task-rest_events.tsv"]  # inherited
    assert [path.suffix for path in first.sidecars] == [".json", ".json"]
    assert first.sidecars[0].name.startswith("sub-01_ses-a_task-rest_run-1_space")
    assert first.sidecars[1].name == "task-rest_bold.json"


@pytest.mark.parametrize(
    ("query", "count", "ending"),
    [
        (Query(participants=["02"]), 4, ".nii.gz"),
        (Query(sessions=["b"], participants=["01"]), 2, ".nii.gz"),
        (Query(tasks=["motor"]), 0, ""),
        (Query(space="T1w"), 0, ""),
        (Query(kind="cifti"), 8, ".dtseries.nii"),
        (Query(kind="gifti"), 8, ".func.gii"),
    ],
)
def test_queries(dataset, query, count, ending):
    runs = find_runs(dataset, query)
    assert len(runs) == count
    assert all(path.name.endswith(ending) for run in runs for path in run.images)
    assert {len(run.images) for run in runs} <= {2 if query.kind == "gifti" else 1}


def test_derivatives_may_be_the_dataset_or_lie_elsewhere(dataset, tmp_path):
    moved = tmp_path / "elsewhere"
    (dataset / "derivatives" / "fmriprep-20.2.3").rename(moved)
    assert find_runs(dataset, Query()) == []
    assert len(find_runs(moved, Query())) == 8
    assert find_runs(moved, Query())[0].events == ()
    assert find_runs(dataset, Query(), derivatives=[moved])[0].events != ()


def test_side_files_of_a_participant_apply_to_all_of_its_runs(dataset):
    touch(dataset / "sub-01" / "sub-01_task-rest_events.tsv")
    touch(dataset / "sub-01" / "ses-a" / "sub-01_ses-a_bold.json")
    runs = find_runs(dataset, Query())
    assert [run.events[0].name for run in runs[:2]] == [
        "sub-01_ses-a_task-rest_run-1_events.tsv",  # the most specific one
        "sub-01_task-rest_events.tsv",
    ]
    assert [path.name for path in runs[1].sidecars[1:]] == ["sub-01_ses-a_bold.json", "task-rest_bold.json"]
    assert [path.name for path in runs[2].sidecars[1:]] == ["task-rest_bold.json"]  # session b


def test_links_to_folders_end_and_find_nothing_twice(dataset, tmp_path):
    (dataset / "derivatives" / "latest").symlink_to(dataset / "derivatives" / "fmriprep-20.2.3")
    (dataset / "sub-01" / "up").symlink_to(tmp_path)
    moved = tmp_path / "elsewhere"
    (dataset / "sub-02").rename(moved)
    (moved / "loop").symlink_to(moved)
    (dataset / "sub-02").symlink_to(moved)  # as DataLad and clusters link data
    runs = find_runs(dataset, Query())
    assert [run.problem for run in runs] == [""] * 8
    assert runs[4].events[0].name == "sub-02_ses-a_task-rest_run-1_events.tsv"


def test_several_resolutions_must_be_chosen_between(dataset):
    func = dataset / "derivatives" / "fmriprep-20.2.3" / "sub-01" / "ses-a" / "func"
    touch(func / f"sub-01_ses-a_task-rest_run-1_space-{SPACE}_res-2_desc-preproc_bold.nii.gz")
    problems = [run.problem for run in find_runs(dataset, Query())]
    assert "choose with --res" in problems[0]
    assert set(problems[1:]) == {""}
    [run] = find_runs(dataset, Query(resolution="2"))
    assert run.problem == ""
    native = find_runs(dataset, Query(resolution="native"))
    assert [run.problem for run in native] == [""] * 8
    assert "res-2" not in native[0].images[0].name


def test_cohorts_of_a_template_are_chosen_between(dataset):
    func = dataset / "derivatives" / "fmriprep-20.2.3" / "sub-01" / "func"
    for cohort in "12":
        touch(func / f"sub-01_task-rest_space-MNIInfant_cohort-{cohort}_desc-preproc_bold.nii.gz")
    [run] = find_runs(dataset, Query(space="MNIInfant"))
    assert "choose with --res (native for none) or --space" in run.problem
    [run] = find_runs(dataset, Query(space="MNIInfant:cohort-2"))
    assert (run.space, run.problem) == ("MNIInfant:cohort-2", "")
    assert "cohort-2" in run.images[0].name


@pytest.mark.parametrize(
    ("bold", "count"),
    [
        ({}, 8),
        ({"datatype": "func", "suffix": "bold", "session": "a"}, 4),
        ({"subject": ["01", "02"], "run": 1}, 4),  # 1 is 01
        ({"run": ["02"], "acquisition": None}, 4),
        ({"acquisition": "*"}, 0),
        ({"run": None}, 0),
    ],
)
def test_a_filter_file_chooses_runs(dataset, tmp_path, bold, count):
    path = tmp_path / "filter.json"
    path.write_text(json.dumps({"t1w": {"session": "b"}, "bold": bold}))
    words = [str(dataset), "out", "participant", "--bids-filter-file", str(path)]
    args = tyro.cli(Args, args=words)
    assert len(find_runs(dataset, query_of(args))) == count


@pytest.mark.parametrize(
    "text", ['{"bold": {"color": "red"}}', '{"bold": {"run": [true]}}', '{"bold": [1]}', "[", "3"]
)
def test_a_wrong_filter_file_is_refused(tmp_path, text):
    path = tmp_path / "filter.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"bids_filter_file: .*filter\.json: "):
        query_of(tyro.cli(Args, args=["in", "out", "participant", "--bids-filter-file", str(path)]))


def test_a_missing_hemisphere_is_a_problem(dataset):
    next(dataset.rglob("*hemi-R*")).unlink()
    assert (
        sum("one GIFTI file a hemisphere" in run.problem for run in find_runs(dataset, Query(kind="gifti")))
        == 1
    )


def test_names():
    assert parse_name(Path("readme.txt")) is not None
    assert parse_name(Path("sub-01_task-rest")) is None
    assert parse_name(Path("sub-01_junk_bold.nii.gz")) is None
    assert parse_name(Path("sub-1.5_task-rest_bold.dtseries.nii")).entities["sub"] == "1.5"
    assert dataset_name(Path("/data/ds000030/derivatives/fmriprep")) == "ds000030"
    assert dataset_name(Path("/data/my set")) == "myset"


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such directory"):
        find_runs(tmp_path / "nothing", Query())


def test_ten_thousand_files(tmp_path):
    for sub in range(250):
        func = tmp_path / "derivatives" / "fmriprep" / f"sub-{sub:03d}" / "func"
        func.mkdir(parents=True)
        for run in range(10):
            stem = f"sub-{sub:03d}"
            (func / NAME.format(stem, run, SPACE, ".nii.gz")).touch()
            (func / NAME.format(stem, run, SPACE, ".json")).touch()
            (func / f"{stem}_task-rest_run-{run}_desc-confounds_timeseries.tsv").touch()
            (func / f"{stem}_task-rest_run-{run}_desc-confounds_timeseries.json").touch()
    runs = find_runs(tmp_path, Query())
    assert len(runs) == 2_500
    assert all(run.confounds and len(run.sidecars) == 1 for run in runs)
