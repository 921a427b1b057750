"""Train, kill with SIGKILL at random moments, resume, and compare with a run that was never disturbed.

`python tests/brainflow/soak_pretrain.py STORE FOLDER --kills 30 --seed 1 -- --train.steps 200 …` prints one
JSON object.
Children are forked from this process, so that torch is imported once.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch

from brainflow.cli.main import main
from brainflow.training import loop  # noqa: F401 - imported before forking
from brainflow.training.metrics import TIMING, read_metrics


def start(arguments: list[str]) -> int:
    """Fork a process that runs `brainflow pretrain` and return its id."""
    child = os.fork()
    if child == 0:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        os._exit(main(["pretrain", *arguments]))
    return child


def curve(folder: Path) -> list[dict]:
    """Return the metrics lines of a run without timings."""
    return [{k: v for k, v in line.items() if k not in TIMING} for line in read_metrics(folder)]


def soak(store: str, folder: Path, *, kills: int, seconds: float, seed: int, arguments: list[str]) -> dict:
    """Kill until `kills` processes have died or `seconds` are over, over as many runs as that takes."""
    rng = np.random.default_rng(seed)
    whole = folder / "whole"
    began = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(start([store, "--out", str(whole), *arguments]), 0)[1]) == 0
    duration = time.monotonic() - began
    expected = curve(whole)
    killed = runs = compared = 0
    phases: dict[str, int] = {"writing a checkpoint": 0, "elsewhere": 0}
    while killed < kills and time.monotonic() - began < seconds:
        run = folder / f"run-{runs}"
        while True:
            child = start([store, "--out", str(run), *arguments])
            deadline = time.monotonic() + rng.uniform(0.02, 0.7) * duration
            done = 0
            while time.monotonic() < deadline and not done:
                time.sleep(0.001)
                done, status = os.waitpid(child, os.WNOHANG)
            if not done and killed < kills:
                os.kill(child, signal.SIGKILL)
                killed += 1
                _, status = os.waitpid(child, 0)
                aside = list((run / "checkpoints").glob("*.tmp"))
                phases["writing a checkpoint" if aside else "elsewhere"] += 1
                continue
            if not done:
                _, status = os.waitpid(child, 0)
            assert os.waitstatus_to_exitcode(status) == 0
            break
        runs += 1
        compared += len(expected)
        assert curve(run) == expected, f"{run} differs from {whole}"
        assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    return {
        "runs": runs,
        "kills": killed,
        "lines_compared": compared,
        "seconds": time.monotonic() - began,
        **phases,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--seed", type=int, default=0)
    split = sys.argv.index("--")
    print(json.dumps(soak(**vars(parser.parse_args(sys.argv[1:split])), arguments=sys.argv[split + 1 :])))
