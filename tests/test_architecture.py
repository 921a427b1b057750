"""The rules of the house that a tool does not check for us."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from brainflow import kernels

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path
    for package in ("kernels", "storage", "benchmarks", "brainflow")
    for path in ROOT.joinpath(package).rglob("*.py")
    if not (
        path.parts[len(ROOT.parts)] == "brainflow"
        and path.parts[len(ROOT.parts) + 1] in ("kernels", "storage", "benchmarks")
    )
)


def test_sources_are_found():
    assert len(SOURCES) > 40


def test_there_is_no_package_under_tests():
    assert list(ROOT.joinpath("tests").rglob("__init__.py")) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_torch_load_never_unpickles(path):
    for call in re.finditer(r"torch\.load\(([^()]|\([^()]*\))*\)", path.read_text()):
        assert "weights_only=True" in call.group(), f"{path}: {call.group()}"


def test_import_contracts():
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_import_is_hidden_from_the_contracts():
    hidden = re.compile(r"import_module\(\s*f?\"brainflow\.")
    assert [str(path) for path in SOURCES if hidden.search(path.read_text())] == []


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("brainflow", {"torch", "numpy", "zarr", "tyro"}),
        ("brainflow.config", {"torch", "numpy", "zarr"}),
        (
            "brainflow.storage",
            {"torch", "triton", "nvidia", "nilearn", "nibabel", "pandas", "brainflow.prepare"},
        ),
        ("brainflow.kernels", {"zarr", "numcodecs", "nvidia", "tyro", "rich", "brainflow.storage"}),
    ],
)
def test_what_an_import_brings(module, forbidden):
    code = f"import sys, {module}; print('\\n'.join(sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert forbidden.isdisjoint(loaded)


def test_transformers_does_not_take_our_kernels_folder_for_its_package():
    code = (
        "import torch, brainflow.kernels as k\n"
        "from transformers import BertModel, GPT2Model\n"
        "import kernels\n"
        "assert not hasattr(kernels, 'masked_loss')\n"
        "print(float(k.masked_loss(torch.zeros(2, 3), torch.ones(2, 3), k.MaskSpec.all_valid())))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1.0"]


@pytest.mark.parametrize(
    "statement",
    [
        "import storage",
        "import storage.layout",
        "import kernels.masks",
        "from kernels.loss import cpu",
        "import benchmarks",
        "import benchmarks.timing",
    ],
)
def test_a_bare_name_is_refused_with_what_to_write(statement):
    done = subprocess.run([sys.executable, "-c", statement], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "write `from brainflow." in done.stderr.splitlines()[-1]


def test_the_folder_of_benchmarks_is_a_command():
    command = [sys.executable, "-m", "benchmarks", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "brainflow bench" in done.stdout
    command[2:] = ["benchmarks.timing"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "write `from brainflow." in done.stderr.splitlines()[-1]


def test_an_operator_is_not_also_the_name_of_a_package():
    packages = [name for name in kernels.__all__ if importlib.util.find_spec(f"brainflow.kernels.{name}")]
    assert packages == []


def test_a_checkout_without_links_and_a_folder_shared_with_the_other_brainflow_say_so(tmp_path):
    package = tmp_path / "brainflow"
    package.mkdir()
    (package / "__init__.py").write_text((ROOT / "brainflow/__init__.py").read_text())
    (package / "kernels").write_text("../kernels")  # what git leaves where there are no symbolic links

    def said() -> str:
        command = [sys.executable, "-c", "import brainflow"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stderr

    assert "core.symlinks=true" in said().splitlines()[-1]
    (package / "kernels").unlink()
    (package / "kernels").mkdir()
    assert said() == ""
    (package / "board_shim.py").touch()
    assert "pip uninstall brainflow" in said().splitlines()[-1]
