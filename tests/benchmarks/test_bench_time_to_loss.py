"""The race of dense against single-position CSM, for a moment."""

from brainflow.benchmarks import time_to_loss


def test_time_to_loss_trains_both_for_the_same_time(monkeypatch):
    monkeypatch.setattr(time_to_loss, "CHECKS", 2)
    monkeypatch.setattr(time_to_loss, "MODEL", {"width": 8, "layers": 1, "heads": 1})
    curves = time_to_loss.race(0.4, "cpu")
    assert set(curves) == {"single", "dense"}
    for curve in curves.values():
        assert len(curve) == 3
        assert curve[-1][0] >= 0.4
        assert curve[-1][2] > 0
    assert curves["single"][0][1] == curves["dense"][0][1], "the same weights at first"
