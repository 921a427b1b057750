"""`brainflow prepare` as people and clusters run it: one command, killed workers, any order."""

import csv
import html
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tyro
from browser import assert_shown
from nilearn.interfaces.fmriprep import load_confounds
from nilearn.maskers import NiftiLabelsMasker

import brainflow
from brainflow.cli import prepare
from brainflow.cli.main import main
from brainflow.decoding.task import stored_shift
from brainflow.prepare import Query, Settings, find_atlas, find_runs
from brainflow.prepare.pool import prepare_runs
from brainflow.prepare.run import jobs_for, prepare_run
from brainflow.storage import BoldStore, verify

SPACE = "MNI152NLin2009cAsym"
fork = multiprocessing.get_context("fork")


def command(module, *words):
    """Run a verb with words of a command line, in this process."""
    return module.run(tyro.cli(module.Args, args=[str(word) for word in words]))


def content(store):
    """Every byte of a store, by path."""
    files = (path for path in sorted(store.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(store)): path.read_bytes() for path in files}


def jobs(tree, work):
    atlas = find_atlas(str(tree.root.parent / "atlas-grid_dseg.nii.gz"))
    return jobs_for(
        find_runs(tree.root, Query()), kind="volume", settings=Settings(), atlases=[atlas], work=work
    )


def words(tree, output, *levels):
    return [tree.root, output, *levels, "--atlas", tree.root.parent / "atlas-grid_dseg.nii.gz"]


def store_of(output):
    return output / "ds-bids_atlas-grid.zarr"


BROKEN = {  # one participant each
    "03": "cannot be read; the file is truncated or damaged",
    "04": "no confounds table",
    "05": "column csf is not a number in 121 of 121 rows",
    "06": "RepetitionTime is -2, expected a positive number",
    "07": "has shape (40, 20, 1), expected a 4-D image",
    "08": "the image is sheared (a fault of fMRIPrep 20.2.0)",
    "09": "short run: 30 volumes, fewer than 50",
}


def break_runs(tree):
    truncated = tree.run("03", "objects")
    truncated.write_bytes(truncated.read_bytes()[:30_000])
    tree.run("04", "objects", confounds=False)
    tree.run("05", "objects")
    tree.blank_column("05", "csf")
    tree.run("06", "objects", sidecar_t_r=-2)
    tree.run("07", "objects", data=tree.bold[..., 0])
    sheared = tree.affine.copy()
    sheared[0, 1] = 0.3
    tree.run("08", "objects", affine=sheared)
    tree.run("09", "objects", volumes=30)


def test_one_command(dataset, tmp_path):
    """A tree with one broken file of each kind: good runs are in the store, the others have their reason."""
    out = tmp_path / "out"
    break_runs(dataset)
    options = ["--atlas", dataset.maps(), "stripes=" + str(dataset.atlas()), "--dtype", "float32"]
    line = [sys.executable, "-m", "brainflow", "prepare", dataset.root, out, "participant", "group"]
    done = subprocess.run(
        [*map(str, line), *map(str, options), "--n_procs", "2"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "13 runs: 0 were ready, 6 prepared, 2 excluded, 5 failed" in done.stdout
    assert "13/13 (0:00:00 left)" in done.stderr
    table = done.stdout[done.stdout.index("status ") :]
    report = html.unescape((out / "report.html").read_text())
    rows = (out / "runs.tsv").read_text()
    for sub, reason in BROKEN.items():
        [line] = [line for line in table.splitlines() if f"sub-{sub}_task-objects" in line]
        assert line.startswith("excluded" if sub in ("08", "09") else "failed")
        assert all(reason in text for text in (line, report, rows)), reason
    assert len(rows.splitlines()) == 14
    for label, networks in (("soft", 5), ("stripes", 12)):
        path = out / f"ds-bids_atlas-{label}.zarr"
        assert verify(path).ok
        store = BoldStore.open(path)
        assert store.networks == networks
        assert store.runs.key.tolist() == sorted(store.runs.key.tolist())
        assert store.runs.t_r.tolist() == [2.5, 2.5, 2.0] * 2
        assert store.runs.session.tolist() == ["a", "b", "b"] * 2
        assert np.asarray(store.attributes["network_coordinates"]).shape == (networks, 3)
    assert store.attributes["network_names"][0] == "stripe 1"
    recipe = store.attributes["preprocessing"]
    assert (recipe["space"], recipe["clean"]["smoothing_fwhm"]) == (SPACE, 3.0)
    assert stored_shift(store.attributes) == 3.0
    assert len(recipe["confound_columns"]) == 9
    image = next(dataset.fmriprep.rglob("sub-02_ses-b_task-rest*bold.nii.gz"))
    chosen, _ = load_confounds(str(image), ("motion", "wm_csf", "global_signal"), "basic", wm_csf="basic")
    masker = NiftiLabelsMasker(
        dataset.atlas(),
        smoothing_fwhm=3,
        detrend=True,
        standardize="zscore_sample",
        high_pass=0.008,
        t_r=2.0,
    )
    expected = masker.fit_transform(image, confounds=chosen)
    np.testing.assert_allclose(store.run(5), expected, atol=1e-5)
    # 3 s of haemodynamic lag: the block at 0 s begins at volume 2 (of 2.5 s)
    segments = store.segments
    assert segments.columns["mental_state"].tolist() == ["face", "house", "cat"] * 4
    assert (segments.onset[0], segments.length[0]) == (2, 9)
    assert_described(out)
    assert "data:image/png;base64," in report
    assert "http://" not in report.replace("http://www.w3.org", "")
    for fact in ("temporal SNR", "Carpet plot", "Framewise displacement", "Correlation of networks"):
        assert fact in report, fact
    for fact in (
        "Borders of the networks",
        "before cleaning and after cleaning",
        "preprocessed by fMRIPrep 25",
    ):
        assert fact in report, fact
    assert_shown(out / "report.html", tmp_path)


def assert_described(out):
    """As BIDS 1.11.1 has it: versions, sources, and links by which the URIs of runs.tsv lead to files."""
    description = json.loads((out / "dataset_description.json").read_text())
    assert (description["BIDSVersion"], description["DatasetType"]) == ("1.11.1", "derivative")
    ours, fmriprep = description["GeneratedBy"]
    assert (ours["Name"], ours["Version"]) == ("brainflow", brainflow.__version__)
    assert fmriprep == {"Name": "fMRIPrep", "Version": "25.2.0"}
    assert description["SourceDatasets"] == [{"DOI": "doi:10.18112/openneuro.ds000105.v3.0.0"}]
    assert "*.zarr/" in (out / ".bidsignore").read_text().splitlines()
    with open(out / "runs.tsv", newline="") as file:
        sources = [uri for row in csv.DictReader(file, delimiter="\t") for uri in row["sources"].split("; ")]
    assert len(sources) == 13 * 3 - 1 + 4  # image, sidecar, confounds, which one lacks; events of the task
    for uri in sources:
        scheme, name, path = uri.split(":", 2)
        assert scheme == "bids"
        assert (out / description["DatasetLinks"][name] / path).is_file()


def test_options_of_other_bids_apps(kept, tmp_path, capsys):
    assert main(["prepare", "--version"]) == 0
    assert capsys.readouterr().out == f"brainflow {brainflow.__version__}\n"
    options = ("--skip_bids_validator", "--session-label", "b", "--dry-run", "--nprocs", "8", "--mem_mb")
    line = words(kept, tmp_path / "out", "participant")
    assert command(prepare, *line, *options, "1000") == 0
    planned = capsys.readouterr().out
    assert "4 of 4 runs to prepare" in planned
    processes, gigabytes = map(float, re.search(r"(\d+) processes of at most ([\d.]+) GB", planned).groups())
    assert 1 <= processes < 8
    assert processes * gigabytes <= 1 + 0.05 * processes  # printed to 0.1 GB
    with pytest.raises(ValueError, match="mem_mb: got 100, expected at least"):
        command(prepare, *line, *options, "100")
    assert not (tmp_path / "out").exists()


def test_a_missing_dataset_is_named_before_an_atlas_is_fetched(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such directory"):
        command(prepare, tmp_path / "absent", tmp_path / "out", "participant", "--atlas", "no-such-atlas")


def test_runs_whose_job_vanished_are_reported_at_the_group_level(dataset, tmp_path, capsys):
    out = tmp_path / "out"
    assert command(prepare, *words(dataset, out, "participant"), "--participant-label", "01") == 0
    assert command(prepare, dataset.root, out, "group", "--no-report") == 1
    printed = capsys.readouterr().out
    assert "ds-bids_sub-02_ses-a_task-objects  was not prepared; run the participant level" in printed
    assert len(BoldStore.open(store_of(out)).runs.key) == 3
    assert len((out / "runs.tsv").read_text().splitlines()) == 7
    options = ("--no-report", "--participant-label", "sub-01")
    assert command(prepare, dataset.root, out, "group", *options) == 0
    before = content(out)
    assert command(prepare, dataset.root, out, "group", "--dry-run") == 1
    assert "6 runs: 3 prepared, 3 failed; nothing was gathered" in capsys.readouterr().out
    assert content(out) == before


def test_if_nothing_can_be_prepared_the_reasons_are_still_printed(tree, tmp_path, capsys):
    tree.atlas()
    tree.run("01", "objects", confounds=False)
    with pytest.raises(ValueError, match="no run was prepared"):
        command(prepare, *words(tree, tmp_path / "out", "participant", "group"))
    assert "no confounds table" in capsys.readouterr().out


def test_images_of_two_spaces_do_not_go_into_one_store(dataset, tmp_path):
    out = tmp_path / "out"
    for path in (dataset.fmriprep / "sub-02").rglob("*space*"):
        path.rename(path.with_name(path.name.replace(SPACE, "MNI152NLin6Asym")))
    assert command(prepare, *words(dataset, out, "participant")) == 0
    assert command(prepare, *words(dataset, out, "participant"), "--space", "MNI152NLin6Asym") == 0
    with pytest.raises(ValueError, match="were prepared with different space"):
        command(prepare, dataset.root, out, "group")


def test_resume_repeats_only_what_changed(dataset, tmp_path, capsys):
    out = tmp_path / "out"
    command(prepare, *words(dataset, out, "participant"), "--dry-run")
    printed = capsys.readouterr().out
    assert "6 of 6 runs to prepare" in printed
    assert "GB" in printed
    assert not out.exists()
    assert command(prepare, *words(dataset, out, "participant"), "--participant-label", "sub-01") == 0
    assert "3 runs: 0 were ready, 3 prepared" in capsys.readouterr().out
    assert command(prepare, *words(dataset, out, "participant"), "--task_id", "task-objects") == 0
    assert "4 runs: 2 were ready, 2 prepared" in capsys.readouterr().out
    dataset.run("01", "rest", ses="b", index=7, t_r=2.0)
    assert command(prepare, *words(dataset, out, "participant")) == 0
    assert "6 runs: 4 were ready, 2 prepared" in capsys.readouterr().out
    command(prepare, *words(dataset, out, "participant"), "--participant-label", "02", "--high-pass", "0.01")
    with pytest.raises(ValueError, match="prepared with different clean"):
        command(prepare, dataset.root, out, "group")
    with pytest.raises(ValueError, match="no runs of 99"):
        command(prepare, *words(dataset, out, "participant"), "--participant-label", "01", "99")


@pytest.fixture(scope="module")
def calm(kept, tmp_path_factory):
    """Bytes of the store of an undisturbed run, and the seconds that one of its runs took."""
    out = tmp_path_factory.mktemp("calm")
    begin = time.perf_counter()
    assert command(prepare, *words(kept, out, "participant")) == 0
    seconds = (time.perf_counter() - begin) / 6
    assert command(prepare, *words(kept, out, "group"), "--no-report") == 0
    return content(store_of(out)), seconds


def test_killed_at_random_instants_the_store_has_the_same_bytes(kept, calm, tmp_path):
    expected, seconds = calm
    out, rng, kills = tmp_path / "killed", np.random.default_rng(0), 0
    todo = jobs(kept, (out / "work").absolute())
    for _ in range(100):
        left = [job for job in todo if not job.is_done()]
        if not left:
            break
        worker = fork.Process(target=lambda left=left: [prepare_run(job) for job in left])
        worker.start()
        worker.join(rng.uniform(0.1, 2.5) * seconds)
        if worker.is_alive():
            os.kill(worker.pid, signal.SIGKILL)
            kills += 1
        worker.join()
    assert kills >= 2
    assert command(prepare, *words(kept, out, "participant", "group"), "--no-report") == 0
    assert content(store_of(out)) == expected


def test_participants_in_processes_of_their_own_in_any_order(kept, calm, tmp_path):
    out = tmp_path / "apart"
    for label in ("02", "01"):
        options = (prepare, *words(kept, out, "participant"), "--participant-label", label)
        worker = fork.Process(target=command, args=options)
        worker.start()
        worker.join()
        assert worker.exitcode == 0
    # the group level knows the atlas from the participant level
    assert command(prepare, kept.root, out, "group", "--no-report") == 0
    assert content(store_of(out)) == calm[0]


def test_a_killed_worker_fails_its_run_and_the_others_go_on(kept, calm, tmp_path):
    out = tmp_path / "out"
    records, killed = [], False
    for record in prepare_runs(jobs(kept, (out / "work").absolute()), 2):
        records.append(record)
        if not killed:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            killed = True
    assert len(records) == 6
    reasons = [record["reason"] for record in records if record["status"] == "failed"]
    assert len(reasons) <= 1  # none, if it was killed while it started
    assert all("killed by signal 9" in reason for reason in reasons)
    assert command(prepare, *words(kept, out, "participant", "group"), "--no-report") == 0
    assert content(store_of(out)) == calm[0]


def test_slurm_script_runs_one_participant_a_task(dataset, tmp_path):
    script, out = tmp_path / "prepare.sh", tmp_path / "out"
    options = ("--smoothing-fwhm", "5", "--no-detrend", "--task-id", "objects", "--slurm", script)
    assert command(prepare, *words(dataset, out, "participant"), *options) == 0
    text = script.read_text()
    assert "#SBATCH --array=0-1" in text
    assert "--dependency=afterany:$job" in text
    fake = tmp_path / "bin" / "brainflow"
    fake.parent.mkdir()
    fake.write_text('#!/bin/bash\nshift\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    for task, label in enumerate(("01", "02")):
        environment = {"PATH": f"{fake.parent}:/usr/bin:/bin", "SLURM_ARRAY_TASK_ID": str(task)}
        done = subprocess.run([script], env=environment, capture_output=True, text=True, check=True)
        args = tyro.cli(prepare.Args, args=done.stdout.splitlines())
        assert args.participant_label == (label,)
        assert (args.smoothing_fwhm, args.detrend, args.task_id) == (5.0, False, ("objects",))
        assert args.analysis_level == ("participant",)
        assert (args.bids_dir, args.output_dir) == (dataset.root, out)
    assert not out.exists()


def test_wrong_words_are_refused(dataset, tmp_path):
    with pytest.raises(ValueError, match="nprocs: got 0"):
        command(prepare, *words(dataset, tmp_path / "o", "participant"), "--nprocs", "0")
    with pytest.raises(ValueError, match="atlas: none was given"):
        command(prepare, dataset.root, tmp_path / "o", "participant")
    with pytest.raises(ValueError, match="holds no volume runs in T1w"):
        command(prepare, *words(dataset, tmp_path / "o", "participant"), "--space", "T1w")
    with pytest.raises(FileNotFoundError, match="run the participant level first"):
        command(prepare, dataset.root, tmp_path / "o", "group")
    with pytest.raises(ValueError, match="high_pass: got -1"):
        command(prepare, *words(dataset, tmp_path / "o", "participant"), "--high-pass", "-1")
