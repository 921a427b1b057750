"""Train, kill with SIGKILL at random moments, resume, and compare with a run that was never disturbed.

`python tests/brainflow/soak_pretrain.py STORE FOLDER --kills 30 --ranks 2 -- --train.steps 200` prints one
JSON object: how many runs were completed, their steps, the kills and where they hit, the metrics lines that
were compared bit for bit. With two ranks one of them, or both, are killed. `--seconds 600` soaks 10 minutes.
Children are forked from this process, so that torch is imported once.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed.fsdp

from brainflow.cli.main import main
from brainflow.training import loop  # noqa: F401 - imported before forking
from brainflow.training.metrics import TIMING, read_metrics

GIVE_UP = 20.0  # seconds that a rank may take to notice that another one is gone


def start(arguments: list[str], ranks: int, log: Path) -> list[int]:
    """Fork the processes of one `brainflow pretrain` and return their ids."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            if ranks > 1:
                who = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks}
                os.environ.update({k: str(v) for k, v in who.items()})
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            os._exit(main(["pretrain", *arguments]))
        children.append(child)
    return children


def ended(child: int, *, wait: float) -> int | None:
    """Return the exit code of a child that ends within `wait` seconds, else None."""
    deadline = time.monotonic() + wait
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.001)


def finish(children: list[int], log: Path) -> None:
    """Wait for all ranks; they must have succeeded."""
    codes = [ended(child, wait=600) for child in children]
    assert codes == [0] * len(children), f"exit codes {codes}:\n{log.read_text()[-3000:]}"


def curve(folder: Path) -> list[dict]:
    """Return the metrics lines of a run without timings."""
    return [{k: v for k, v in line.items() if k not in TIMING} for line in read_metrics(folder)]


def disturb(
    arguments: list[str], run: Path, ranks: int, after: float, rng: np.random.Generator
) -> str | None:
    """Start the run and kill it `after` seconds (every third time in the middle of writing a checkpoint).

    Returns where the kill hit, or None if the run was done before.
    """
    log = run.with_suffix(".log")
    children = start([*arguments, "--out", str(run)], ranks, log)
    aim = rng.random() < 1 / 3
    deadline = time.monotonic() + after
    while time.monotonic() < deadline or aim:
        code = ended(children[0], wait=0.001)
        if code is not None:
            assert code == 0, log.read_text()[-3000:]
            finish(children[1:], log)
            return None
        if aim and time.monotonic() >= deadline and list((run / "checkpoints").glob("*.tmp")):
            break
    victims = children if ranks == 1 or rng.random() < 0.5 else [children[rng.integers(ranks)]]
    for child in victims:
        os.kill(child, signal.SIGKILL)
    writing = list((run / "checkpoints").glob("*.tmp"))
    for child in children:
        if child not in victims and ended(child, wait=GIVE_UP) is None:
            os.kill(child, signal.SIGKILL)  # as torchrun and SLURM do
            os.waitpid(child, 0)
        elif child in victims:
            os.waitpid(child, 0)
    return "while writing a checkpoint" if writing else "elsewhere"


def soak(
    store: str, folder: Path, *, kills: int, seconds: float, seed: int, ranks: int, arguments: list[str]
) -> dict:
    """Kill until `kills` kills are done or `seconds` are over, over as many runs as that takes."""
    rng = np.random.default_rng(seed)
    whole = folder / "whole"
    arguments = [store, *arguments]
    began = time.monotonic()
    finish(start([*arguments, "--out", str(whole)], ranks, folder / "whole.log"), folder / "whole.log")
    duration = time.monotonic() - began
    expected = curve(whole)
    hits = {"while writing a checkpoint": 0, "elsewhere": 0}
    runs = 0
    while sum(hits.values()) < kills and time.monotonic() - began < seconds:
        run = folder / f"run-{runs}"
        while sum(hits.values()) < kills and time.monotonic() - began < seconds:
            hit = disturb(arguments, run, ranks, rng.uniform(0.02, 0.8) * duration, rng)
            if hit is None:
                break
            hits[hit] += 1
        log = run.with_suffix(".log")
        finish(start([*arguments, "--out", str(run)], ranks, log), log)
        runs += 1
        assert curve(run) == expected, f"{run} differs from {whole}"
        assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
        shutil.rmtree(run)
        log.unlink()
    return {
        "ranks": ranks,
        "runs": runs,
        "steps": runs * expected[-1]["step"],
        "kills": sum(hits.values()),
        **hits,
        "lines_compared": runs * len(expected),
        "seconds": round(time.monotonic() - began, 1),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1)
    split = sys.argv.index("--")
    print(json.dumps(soak(**vars(parser.parse_args(sys.argv[1:split])), arguments=sys.argv[split + 1 :])))
