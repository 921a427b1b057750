"""What is installed is one package, `brainflow`, beside transformers, and a file for Brainmarks."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built by way of the sdist, from what git would check out plus what is new."""
    out = tmp_path_factory.mktemp("dist")
    # Without isolation: the test must not need a package index.
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)],
        check=True,
        capture_output=True,
    )
    return next(out.glob("*.whl"))


def test_top_level_names(wheel):
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"brainflow", "brainmarks"}


def test_nothing_but_one_file_lies_in_the_namespace_of_brainmarks(wheel):
    """An `__init__.py` would make it ours: theirs would not be found any more, or be deleted with it."""
    names = [name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("brainmarks/")]
    assert names == ["brainmarks/models/brainflow_fmri.py"]


def test_every_source_file_is_in_the_wheel(wheel):
    packed = set(zipfile.ZipFile(wheel).namelist())
    for package in ("kernels", "storage", "benchmarks"):
        for path in ROOT.joinpath(package).rglob("*.py"):
            assert f"brainflow/{path.relative_to(ROOT)}" in packed
    assert "brainflow/demo_data/haxby2001/bold.nii.gz" in packed
    assert {"pieman24.npz", "LICENSE-DATA"} <= {
        name.rpartition("/")[2] for name in packed if name.startswith("brainflow/demo_data/pieman/")
    }
    shipped = "brainflow/pretrained/shipped/story-small/"
    assert {shipped + name for name in ("config.json", "model.safetensors", "README.md")} <= packed
    assert len([name for name in packed if name.endswith("licenses/LICENSE")]) == 1
    assert len([name for name in packed if name.endswith("LICENSE-DATA") and "dist-info" in name]) == 2
    assert {"brainflow/benchmarks/floors.json", "brainflow/prepare/atlases.toml"} <= packed


def test_the_wheel_imports_beside_transformers(wheel, tmp_path):
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--no-deps",
            "--no-index",
            "--target",
            str(tmp_path),
            str(wheel),
        ],
        check=True,
        capture_output=True,
    )
    code = (
        "import brainflow.kernels, brainflow.storage\n"
        "from transformers import BertModel, GPT2Model\n"
        "print(brainflow.kernels.__file__, GPT2Model.__name__, BertModel.__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout
