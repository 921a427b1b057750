"""How long training waits for data: a store, the default loader, real training steps one after another."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from brainflow.config import ModelConfig
from brainflow.data import make_loader
from brainflow.data.sampler import WindowSampler
from brainflow.frameworks import FRAMEWORKS, build
from brainflow.storage import BoldStore, StoreWriter

from .timing import Row, Timing
from .training_step import train_step

NETWORKS, RUNS, TIME_POINTS = 1024, 16, 600


def measurements(quick: bool, device: str) -> dict[str, Callable[[], list[Row]]]:
    """Return a name → what measures each framework's wait, the model's sizes as in `frameworks`."""
    return {
        f"data_wait/{name}": partial(_wait, name, *((16, 4) if quick else (64, 25)), device)
        for name in FRAMEWORKS
    }


def _wait(framework: Any, windows: int, steps: int, device: str) -> list[Row]:
    torch.manual_seed(0)
    config = ModelConfig(framework=framework, networks=NETWORKS, width=256, layers=4, heads=4)
    step = train_step(build(config).to(device))
    with tempfile.TemporaryDirectory(prefix="brainflow-bench-") as folder:
        store = _random_store(Path(folder, "store"))
        sampler = WindowSampler(store.runs, batch=windows, pairs="bert" in framework)
        loader = make_loader(store, sampler, device=device)
        waits: list[float] = []
        began = 0.0
        for number in range(steps + 2):
            if number == 2:  # two steps to warm up
                _finish(device)
                waits, began = [], time.perf_counter()
            asked = time.perf_counter()
            batch = next(loader)
            waits.append(time.perf_counter() - asked)
            step(batch)
        _finish(device)
        whole = time.perf_counter() - began
        del loader, batch
    wait = Timing(seconds=tuple(waits))
    return [
        Row(
            suite="frameworks", case=framework, metric="data_wait", value=100 * sum(waits) / whole, unit="%",
            p20=wait.p20, p50=wait.p50, p80=wait.p80,
        )
    ]  # fmt: skip


def _random_store(path: Path) -> BoldStore:
    random = np.random.default_rng(0)
    with StoreWriter.create(path, networks=NETWORKS, dtype="float16", parcellation="noise") as writer:
        for i in range(RUNS):
            bold = random.standard_normal((TIME_POINTS, NETWORKS), np.float32)
            writer.append(bold, t_r=0.72, dataset="bench", subject=f"{i:02d}", task="rest", run="1")
    return BoldStore.open(path)


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
