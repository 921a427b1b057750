"""Whatever call of a commit fails, wherever Ctrl-C comes: the store is at the old or the new generation."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

HELPERS = Path(__file__).parents[1] / "helpers"


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    """A library that disturbs calls which change the disk."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler (cc)")
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, HELPERS / "faults.c"], check=True)
    return library


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize("operation", ["create", "append", "overwrite", "overwrite-nfs", "ingest", "gather"])
def test_every_call_of_a_commit_may_fail_or_be_interrupted(operation, faults, thorough):
    environment = {**os.environ, "LD_PRELOAD": str(faults), "OMP_NUM_THREADS": "1"}
    memory = (
        "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    )  # thousands of flushes take minutes on a disk
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        command = [
            sys.executable,
            str(HELPERS / "commit_faults.py"),
            operation,
            folder,
            "1" if thorough else "4",
        ]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["broken"] == []
    assert sum(found["trials"].values()) > (400 if thorough else 100), "each column of the index has calls"
    assert max(found["trials"].values()) - min(found["trials"].values()) <= (0 if thorough else 1)
    assert 0 < found["old"] < found["ended"], "some were disturbed before the commit and some behind it"
