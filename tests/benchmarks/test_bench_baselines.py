"""A package that a baseline needs: there, not there, or there and broken."""

import pytest

from brainflow.benchmarks.baselines.loaders import missing


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", ""),
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("raise RuntimeError('another torch')", "RuntimeError: another torch"),
    ],
)
def test_a_package_that_does_not_import_is_named_with_its_reason(tmp_path, monkeypatch, text, reason):
    name = f"package_{abs(hash(text))}"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert missing(name) == (reason and f"cannot be imported ({reason})")


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("no_such_package", "no_such_package"),
        ("no_such_package.part", "no_such_package"),
        ("numpy.no_such_part", "numpy.no_such_part"),
    ],
)
def test_a_package_that_is_not_there_is_named(module, absent):
    assert missing(module) == f"cannot be imported (ModuleNotFoundError: No module named '{absent}')"
