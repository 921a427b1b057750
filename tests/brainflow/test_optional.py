"""Optional dependencies: who asks, what is missing and which extra brings it."""

import sys

import pytest

from brainflow.optional import need, requires


def test_what_is_there_is_given():
    assert need("json.decoder", "a test", "bids") is sys.modules["json.decoder"]


def test_a_missing_package_is_named_with_its_extra():
    expected = r"a test needs no_such_package, which is not installed; pip install 'brainflow-fmri\[bids\]'"
    with pytest.raises(ImportError, match=expected):
        need("no_such_package.part", "a test", "bids")
    with pytest.raises(ImportError, match=expected), requires("a test", "bids"):
        import no_such_package  # noqa: F401


def test_a_package_that_fails_to_load_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("from json import no_such_name")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"needs json, which cannot be imported .*no_such_name"):
        need("broken_package", "a test", "bids")
