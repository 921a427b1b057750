"""The race of dense against single-position CSM, for a moment."""

import numpy as np
import pytest

from brainflow.benchmarks import command, time_to_loss
from brainflow.storage import StoreWriter


def test_time_to_loss_trains_both_for_the_same_time(monkeypatch):
    monkeypatch.setattr(time_to_loss, "CHECKS", 2)
    monkeypatch.setattr(time_to_loss, "MODEL", {"width": 8, "layers": 1, "heads": 1})
    monkeypatch.setattr(time_to_loss, "DENSE_STEPS", 3)
    curves = time_to_loss.race(8, "cpu")
    assert [point[2] for point in curves["single"]] == [0, 4, 8]
    single, dense = curves["single"][-1][0], [point[0] for point in curves["dense"]]
    assert dense[-1] >= single
    assert [point[2] for point in curves["dense"]] == [3 * i for i in range(len(dense))]
    assert curves["single"][0][1] == curves["dense"][0][1], "the same weights at first"


def test_on_a_store_of_ones_own(monkeypatch, tmp_path):
    monkeypatch.setattr(time_to_loss, "CHECKS", 2)
    monkeypatch.setattr(time_to_loss, "MODEL", {"width": 8, "layers": 1, "heads": 1})
    monkeypatch.setattr(time_to_loss, "STORE_STEPS", 4)
    rng = np.random.default_rng(0)
    with StoreWriter.create(str(tmp_path / "store"), networks=5) as writer:
        for run in "abc":
            writer.append(
                rng.normal(size=(80, 5)).astype("float32"),
                t_r=2.0,
                dataset="d",
                subject=run,
                task="rest",
                run="1",
            )
    args = command.Args(
        suite="frameworks", time_to_loss=True, store=str(tmp_path / "store"), threads=1,
        history=tmp_path / "history.jsonl", json=tmp_path / "rows.json",
    )  # fmt: skip
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert command.run(args) == 0
    curves = (tmp_path / "brainflow" / "csm_time_to_loss.csv").read_text()
    assert "single" in curves
    assert "dense" in curves
    assert "frameworks" in (tmp_path / "rows.json").read_text()
    with pytest.raises(ValueError, match="--store: got a store without --time-to-loss"):
        command.Args(suite="frameworks", store="store")


def test_the_losses_do_not_depend_on_the_clock(monkeypatch):
    monkeypatch.setattr(time_to_loss, "CHECKS", 2)
    monkeypatch.setattr(time_to_loss, "MODEL", {"width": 8, "layers": 1, "heads": 1, "dropout": 0.5})
    monkeypatch.setattr(time_to_loss, "DENSE_STEPS", 1)
    first = time_to_loss.race(8, "cpu")
    monkeypatch.setattr(time_to_loss, "CHECKS", 4)  # now dense has its turns at other times
    second = time_to_loss.race(8, "cpu")
    for name in ("single", "dense"):
        losses = [{step: loss for _, loss, step in curves[name]} for curves in (first, second)]
        shared = losses[0].keys() & losses[1].keys()
        assert len(shared) > 1
        assert all(losses[0][step] == losses[1][step] for step in shared)
