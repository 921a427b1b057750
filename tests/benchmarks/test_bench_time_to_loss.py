"""The race of dense against single-position CSM, for a moment."""

from brainflow.benchmarks import time_to_loss


def test_time_to_loss_trains_both_for_the_same_time(monkeypatch):
    monkeypatch.setattr(time_to_loss, "CHECKS", 2)
    monkeypatch.setattr(time_to_loss, "MODEL", {"width": 8, "layers": 1, "heads": 1})
    monkeypatch.setattr(time_to_loss, "DENSE_STEPS", 3)
    curves = time_to_loss.race(8, "cpu")
    assert [point[2] for point in curves["single"]] == [0, 4, 8]
    single, dense = curves["single"][-1][0], [point[0] for point in curves["dense"]]
    assert dense[-1] >= single > dense[-2]
    assert [point[2] for point in curves["dense"]] == [3 * i for i in range(len(dense))]
    assert curves["single"][0][1] == curves["dense"][0][1], "the same weights at first"


def test_the_losses_do_not_depend_on_the_clock(monkeypatch):
    monkeypatch.setattr(time_to_loss, "CHECKS", 2)
    monkeypatch.setattr(time_to_loss, "MODEL", {"width": 8, "layers": 1, "heads": 1})
    first, second = (time_to_loss.race(4, "cpu") for _ in range(2))
    for name in ("single", "dense"):
        losses = [[point[1] for point in curves[name]] for curves in (first, second)]
        assert all(a == b for a, b in zip(*losses, strict=False))
