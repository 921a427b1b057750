"""Runs that are killed or told to stop, as processes."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from brainflow.storage import StoreWriter
from brainflow.training.metrics import read_metrics

ARGUMENTS = shlex.split(
    "--device cpu --model.width 16 --model.layers 1 --model.heads 2 --data.batch-size 8 --data.seq-min 6 "
    "--data.seq-max 16 --data.loader host --data.validation-batches 2 --train.lr 1e-2 --train.no-plot"
)
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("kill") / "store"
    rng = np.random.default_rng(0)
    with StoreWriter.create(path, networks=12, dtype="float16", parcellation="none") as writer:
        for run in range(8):
            bold = rng.standard_normal((60, 12)).astype(np.float32)
            writer.append(bold, t_r=2.0, dataset="noise", subject=str(run), session="", task="rest", run="1")
    return str(path)


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_random_moments_and_resumed_bit_for_bit(store, tmp_path, ranks, thorough):
    kills = 30 if thorough else 4
    script = Path(__file__).with_name("soak_pretrain.py")
    steps = shlex.split(
        "--train.steps 24 --train.log-every 1 --train.checkpoint-every 2 --train.validate-every 12"
    )
    done = subprocess.run(
        [
            *(sys.executable, script, store, tmp_path, "--kills", str(kills), "--seed", "2"),
            *("--ranks", str(ranks), "--", *ARGUMENTS, *steps),
        ],
        capture_output=True,
        text=True,
        timeout=590,
        env=ENV,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["kills"] == kills
    assert result["while writing a checkpoint"] >= max(1, kills // 6)
    assert result["lines_compared"] >= 26


def launch(store, run, *more):
    arguments = [
        store,
        "--out",
        str(run),
        *ARGUMENTS,
        "--train.steps",
        "100000",
        "--train.log-every",
        "1",
        *more,
    ]
    return subprocess.Popen(
        [sys.executable, "-m", "brainflow", "pretrain", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENV,
    )


def wait_for_lines(process, run, count):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if len(read_metrics(run)) >= count:
                return
        except FileNotFoundError:
            pass
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    raise AssertionError("no metrics after 60 s")


def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(store, tmp_path):
    run = tmp_path / "run"
    process = launch(store, run, "--json")
    wait_for_lines(process, run, 5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    marker = json.loads((run / "PREEMPTED").read_text())
    assert marker["signal"] == "SIGINT"
    assert (run / "checkpoints" / f"step-{marker['step']:08d}" / "COMPLETE").exists()
    assert read_metrics(run)[-1]["step"] == marker["step"]
    assert json.loads(out) == {"run": str(run), "stopped_by": marker["signal"], "step": marker["step"]}
    assert "the same command continues" in err
    assert "Traceback" not in err
