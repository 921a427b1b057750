"""One job a participant through submitit, by its local executor."""

import sys

import pytest

import brainflow.cli.prepare as cli
from brainflow.storage import BoldStore, verify


def test_jobs_prepare_what_one_process_does(dataset, tmp_path, run_verb, capsys):
    pytest.importorskip("submitit", reason="submitit is not installed")
    dataset.run("03", "objects", confounds=False)
    words = ["participant", "group", "--atlas", dataset.atlas(), "--no-report"]
    here, jobs = tmp_path / "here", tmp_path / "jobs"
    assert run_verb(cli, dataset.root, here, *words) == 1
    capsys.readouterr()
    assert run_verb(cli, dataset.root, jobs, *words, "--submit", "local") == 1
    printed = capsys.readouterr().out
    assert "7 runs: 0 were ready, 6 prepared, 1 failed" in printed
    assert "no confounds table" in printed
    stores = [next(folder.glob("*.zarr")) for folder in (here, jobs)]
    assert verify(stores[1]).ok
    assert BoldStore.open(stores[0]).snapshot == BoldStore.open(stores[1]).snapshot
    assert len(list((jobs / "work" / "jobs").glob("*_log.out"))) == 3
    assert run_verb(cli, dataset.root, jobs, *words, "--submit", "local", "--participant-label", "01") == 0
    assert "3 runs: 3 were ready, nothing was left to do" in capsys.readouterr().out


def test_without_submitit_the_extra_is_named(dataset, tmp_path, run_verb, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ImportError, match=r"brainflow-fmri\[slurm\]"):
        run_verb(
            cli,
            dataset.root,
            tmp_path / "out",
            "participant",
            "--atlas",
            dataset.atlas(),
            "--submit",
            "local",
        )
