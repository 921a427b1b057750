"""`python setup.py build_kernels`: PTX, cubin and a manifest, without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]


def build(out, *arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "setup.py", "-q", "build_kernels", "--out", str(out), *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False
    )


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs a checkout")
def test_writes_loadable_files_and_a_manifest(tmp_path):
    result = build(tmp_path, "--arch", "90", "--only", "gather_windows.fp32.fp32.plain")
    assert result.returncode == 0, result.stderr[-3000:]
    (entry,) = json.loads((tmp_path / "manifest.json").read_text())
    assert entry["name"] == "gather_windows.fp32.fp32.plain"
    assert entry["arch"] == 90
    assert entry["spills"] == 0
    assert entry["stores"] == {"out": {"128": 8}}
    for key in ("signature", "num_warps", "shared", "registers", "loads", "constants"):
        assert key in entry
    ptx = (tmp_path / entry["ptx"]).read_text()
    assert f".entry {entry['entry']}(" in ptx
    assert ".target sm_90a" in ptx
    assert (tmp_path / entry["cubin"]).read_bytes()[:4] == b"\x7fELF"


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs a checkout")
def test_refuses_an_unreadable_architecture(tmp_path):
    result = build(tmp_path, "--arch", "hopper")
    assert result.returncode != 0
    assert "--arch: got 'hopper', expected numbers like 80,90,100" in result.stderr
