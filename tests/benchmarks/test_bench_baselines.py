"""A package that a baseline needs: there, not there, or there and broken."""

import pytest

from brainflow.benchmarks.baselines.loaders import missing


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", ""),
        ("import no_such_package_either", "cannot be imported (No module named 'no_such_package_either')"),
        ("raise RuntimeError('another torch')", "cannot be imported (RuntimeError: another torch)"),
    ],
)
def test_a_package_that_does_not_import_is_named_with_its_reason(tmp_path, monkeypatch, text, reason):
    name = f"package_{abs(hash(text))}"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert missing(name) == reason


@pytest.mark.parametrize("module", ["no_such_package", "no_such_package.part", "numpy.no_such_part"])
def test_a_package_that_is_not_there_is_not_installed(module):
    assert missing(module) == "is not installed"
