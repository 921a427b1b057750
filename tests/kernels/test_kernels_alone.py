"""The package by itself: the README's example runs, and the tests pass where nothing else can be imported."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

import brainflow.kernels
from brainflow.kernels.dispatch import constant_to_compiler

TESTS = Path(__file__).parent
PACKAGE = Path(brainflow.kernels.__file__).parent
BLOCKED = ["zarr", "numcodecs", "nvidia.dali"]
BLOCKED += [f"brainflow.{name}" for name in ("storage", "data", "models", "frameworks", "training", "cli")]
SCRIPT = """
import sys, pytest
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name in BLOCKED or any(name.startswith(b + ".") for b in BLOCKED):
            raise ImportError(name + " is blocked")
BLOCKED = {blocked!r}
sys.meta_path.insert(0, Blocker())
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *{arguments!r}]))
"""


def test_the_example_of_the_readme_learns():
    (code,) = re.findall(r"```python\n(.*?)```", (PACKAGE / "README.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    losses = names["losses"]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_passes_where_the_rest_cannot_be_imported():
    arguments = [str(TESTS), "-k", "definition or example_of_the_readme or fake_tensors"]  # collects all
    script = SCRIPT.format(blocked=BLOCKED, arguments=arguments)
    command = [sys.executable, "-c", script]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # zarr installs a pytest plugin
    environment.pop("PYTEST_ADDOPTS", None)  # may name an option of a plugin
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    passed = re.search(r"(\d+) passed, (\d+) deselected", result.stdout)
    assert passed, result.stdout[-3000:]
    assert int(passed[1]) >= 4
    assert int(passed[2]) > 150


def test_to_import_it_does_not_import_dynamo():
    code = "import sys, brainflow.kernels; sys.exit('torch._dynamo.symbolic_convert' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_a_constant_is_marked_as_by_torch():
    def ours(): ...

    def theirs(): ...

    constant_to_compiler(ours)
    torch.compiler.assume_constant_result(theirs)
    assert vars(ours) == vars(theirs) != {}


def test_neither_package_nor_tests_import_anything_else():
    allowed = {
        "torch",
        "triton",
        "flash_attn",
    } | sys.stdlib_module_names
    for_tests = allowed | {
        "numpy",
        "pytest",
        "hypothesis",
        "kernel_checks",
        "ptx",
        "ptx_launch",
        "ptx_memory",
    }
    for path in [*PACKAGE.rglob("*.py"), *TESTS.rglob("*.py")]:
        allowed_here = for_tests if TESTS in path.parents else allowed
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in names:
                fine = (
                    name.split(".")[0] in allowed_here
                    or name.startswith("brainflow.kernels")
                    or name == "brainflow"
                )
                assert fine, f"{path.name} imports {name}"
