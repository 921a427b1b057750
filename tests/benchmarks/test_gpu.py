"""What is measured first on a GPU, all of it on the CPU; what fails or hangs costs nothing but itself."""

import json
import time

import gpu_sections
import pytest
import torch

from brainflow.benchmarks import command, gpu


@pytest.mark.thorough
def test_the_dry_run_has_rows_in_every_section(monkeypatch, tmp_path, capsys, thorough):
    """In every one with --thorough, else in those that run no kernel in Triton's interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # the command sets it for its processes
    if not thorough:
        some = {name: gpu.SECTIONS[name] for name in ("steps", "loaders", "pretraining")}
        monkeypatch.setattr(gpu, "SECTIONS", some)
    out = tmp_path / "gpu.json"
    assert command.run(command.Args(suite="gpu", dry=True, json=out)) == 0
    sections, rows = {}, []
    for row in json.loads(out.read_text()):
        if row["metric"] == "section":
            assert row["note"].startswith("complete"), row
            sections[row["case"]], rows = rows, []
        else:
            rows.append(row)
    assert list(sections) == list(gpu.SECTIONS)
    printed = capsys.readouterr().out
    for name, found in sections.items():
        assert [row for row in found if row["metric"] not in ("failed", "not_here")], name
        assert not [row for row in found if row["metric"] == "failed"]
        assert name in printed
    metrics = {row["metric"] for row in sections["steps"]}
    assert metrics >= {"step", "host", "device", "launches", "waits", "mfu", "published_run"}
    if thorough:
        compared = {row["case"].split("/")[0] for row in sections["operators"]}
        wanted = {"masked_loss", "linear_masked_loss", "mask_tokens", "decode_freely", "gather_windows"}
        assert compared >= wanted


def test_what_goes_wrong_is_reported_and_the_rest_goes_on(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # the command sets it for its processes
    sections = {
        "faulty": (gpu_sections.faulty, 60, 1),
        "endless": (gpu_sections.endless, 0, 2),
        "after": (gpu_sections.after, 60, 1),
    }
    monkeypatch.setattr(gpu, "SECTIONS", sections)
    run_section = gpu.run_section

    def with_little_time(name, end, dry, device):
        if name == "endless":  # not dry: in two processes
            return run_section(name, time.monotonic() + 5, False, device)
        return run_section(name, end, dry, device)

    monkeypatch.setattr(gpu, "run_section", with_little_time)
    out = tmp_path / "gpu.json"
    assert command.run(command.Args(suite="gpu", dry=True, json=out)) == 1
    rows = {row["case"]: row for row in json.loads(out.read_text())}
    failed = {
        case.removeprefix("faulty/"): row["note"] for case, row in rows.items() if row["metric"] == "failed"
    }
    assert failed.keys() == {"wrecked", "dies", "raises"}
    assert "wrong result" in failed["wrecked"]
    assert "its process ended, code 9" in failed["dies"]
    assert "RuntimeError: out of something" in failed["raises"]
    assert rows["faulty"]["note"].startswith("complete")
    assert rows["endless"]["note"].startswith("cut: not measured: hangs;")
    assert (rows["right"]["metric"], rows["last"]["value"]) == ("error", 2.0)
    said = capsys.readouterr()
    assert "faulty: wrecked: wrong result" in said.err
    assert "cut: not measured: hangs" in said.out.replace("\n", "")


def test_a_gpu_is_asked_for_unless_it_is_a_dry_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"gpu: torch sees no CUDA device; with --dry"):
        command.run(command.Args(suite="gpu"))
    with pytest.raises(ValueError, match="--quick: got the suite gpu"):
        command.Args(suite="gpu", quick=True)
    with pytest.raises(ValueError, match="--dry: got the suite kernels"):
        command.Args(suite="kernels", dry=True)
