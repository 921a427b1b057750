"""What a person sees: a bar in a terminal, plain lines elsewhere."""

import io
import sys

import pytest

from brainflow.config import DataConfig, PretrainConfig, TrainConfig
from brainflow.training import progress
from brainflow.training.metrics import verdict
from brainflow.training.progress import TrainingProgress

TRAINING = {
    "step": 10,
    "loss": 0.75,
    "lr": 1e-3,
    "trs_per_s": 1234.4,
    "tokens_per_s": 2468.8,
    "steps_per_s": 0.5,
    "data_wait": 0.012,
    "mfu": 0.41,
    "gpu_memory_gib": 61.25,
    "skipped": 3,
}
VALIDATION = {
    "step": 10,
    "val_loss": 0.8,
    "val_mse": 0.75,
    "val_mean_mse": 1.0,
    "val_last_mse": 0.9,
    "val_linear_mse": 0.6,
    "val_explained_variance": 0.25,
    "val_correlation": 0.5,
}
SHOWN = ("loss 0.7500", "lr 1.00e-03", "1,234 TRs/s", "2,469 tokens/s", "data-wait 1.2 %", "MFU 41 %")


class Terminal(io.StringIO):
    def isatty(self):
        return True


class FakeClock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(progress, "PLAIN_EVERY", 0.0)


def test_plain_lines_hold_everything_and_no_control_codes(monkeypatch, quick):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    clock = FakeClock()
    with TrainingProgress(100, clock=clock) as shown:
        for step in range(1, 11):
            clock.now += 2.0
            shown.advance(step)
        shown.show(TRAINING)
        shown.show(VALIDATION)
    first, second = out.getvalue().splitlines()
    assert first.startswith("step 10/100")
    assert all(text in first for text in (*SHOWN, "GPU 61.2 GiB", "skipped 3", "ETA 0:03:00"))
    assert "explained variance 0.250 (best linear 0.400, last value 0.100, the mean 0)" in second
    assert "correlation 0.500" in second
    assert "\x1b" not in out.getvalue()


def test_plain_lines_are_few(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    with TrainingProgress(100) as shown:
        for step in range(50):
            shown.show({**TRAINING, "step": step})
    assert len(out.getvalue().splitlines()) == 1


def test_a_terminal_gets_a_bar_with_the_time_left(monkeypatch):
    out = Terminal()
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setenv("TERM", "xterm")
    with TrainingProgress(100, done=5) as shown:
        shown.advance(10)
        shown.show(TRAINING)
        shown.show(VALIDATION)
    text = out.getvalue()
    assert "\x1b" in text
    assert all(part in text for part in SHOWN)
    assert "10/100" in text
    assert "validation loss 0.8000" in text


def test_a_run_says_what_interrupts_it(tmp_path):
    """A validation of 4 batches is expected to take as long as 2 steps, until the first one is over."""
    config = PretrainConfig(
        store="store",
        out=str(tmp_path),
        data=DataConfig(validation_batches=4),
        train=TrainConfig(steps=100, validate_every=50, checkpoint_every=25),
    )
    clock = FakeClock()
    shown = TrainingProgress(100, quiet=True, pauses=progress.pauses(config), clock=clock)
    for step in range(1, 51):
        clock.now += 2.0
        shown.advance(step)
    assert shown.left.seconds() == pytest.approx(50 * 2.0 + 2 * (2 * 2.0))
    with shown.left.pause("validation"):
        clock.now += 10.0
    with shown.left.pause("checkpoint"):
        clock.now += 1.0
    assert shown.left.seconds() == pytest.approx(50 * 2.0 + 1 * 10.0 + 2 * 1.0)


def test_quiet_is_quiet(monkeypatch):
    out = Terminal()
    monkeypatch.setattr(sys, "stderr", out)
    with TrainingProgress(100, quiet=True) as shown:
        shown.show(TRAINING)
        shown.show(VALIDATION)
    assert out.getvalue() == ""


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"val_mse": 0.999}, "predicts the mean"),
        ({"val_mse": 0.5, "val_network_mse": 1.0}, "explains nothing by itself"),
        ({"val_mse": 0.7, "val_linear_mse": 0.6}, "a ridge predicts better (explained variance 0.400)"),
        ({"val_mse": 0.6, "val_linear_mse": 0.6, "val_network_mse": 0.8}, ""),
        ({}, ""),
    ],
)
def test_a_model_that_learned_nothing_is_called_so(line, said):
    assert said in verdict({"val_mean_mse": 1.0, **line})
    assert bool(said) == bool(verdict({"val_mean_mse": 1.0, **line}))
