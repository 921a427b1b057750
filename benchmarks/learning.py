"""Does every framework learn? Held-out L1 against predicting the mean, on sines and on real BOLD.

Each framework is trained by `brainflow.training` on a store of sines (the published dummy mode) and on the
example recordings (Haxby et al. 2001). The row's value is the L1 of the held-out reconstruction, the ratio
that of the training set's mean ÷ it: above 1 the model is better than the mean. Not part of --quick.

  python -m benchmarks frameworks --only 'learning/*'
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from brainflow.config import DataConfig, ModelConfig, PretrainConfig, TrainConfig
from brainflow.data.synthetic import write_sines
from brainflow.demo import haxby
from brainflow.training.loop import pretrain
from brainflow.training.metrics import read_metrics

from .timing import Row


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is not a default of training."""

    steps: int = 500
    lr: float = 1e-3
    batch: int = 16
    dropout: float = 0.1
    warmup: float = 0.01


LONG: dict[str, Any] = {"batch": 64, "dropout": 0.0, "warmup": 0.1}
"""For those that predict from other time points only; shorter runs stayed at the mean."""
SETTINGS: dict[str, dict[str, Setting]] = {
    "sines": {
        "csm": Setting(steps=1500, **LONG),
        "seq-bert": Setting(steps=1500, **LONG),
        "net-bert": Setting(),
        "autoencoder": Setting(lr=3e-3),
    },
    "haxby": {
        "csm": Setting(steps=300, lr=2e-3),
        "seq-bert": Setting(steps=1000, **LONG),
        "net-bert": Setting(),
        "autoencoder": Setting(lr=3e-3),
    },
}


def measurements(quick: bool, device: str) -> dict[str, Callable[[], list[Row]]]:
    """Return "learning/SIGNAL/FRAMEWORK" → what trains it; nothing if `quick`."""
    if quick:
        return {}
    return {
        f"learning/{signal}/{name}": partial(measure, signal, name, device)
        for signal, frameworks in SETTINGS.items()
        for name in frameworks
    }


def measure(signal: str, framework: Any, device: Any) -> list[Row]:
    """Train one framework on one signal and return the row of its last validation."""
    with tempfile.TemporaryDirectory() as folder:
        store = f"{folder}/store"
        if signal == "sines":
            write_sines(store)
        else:
            haxby.write_store(haxby.read(), store)
        chosen = SETTINGS[signal][framework]
        config = PretrainConfig(
            store=store,
            out=f"{folder}/run",
            device=device,
            model=ModelConfig(framework=framework, width=64, layers=2, heads=2, dropout=chosen.dropout),
            data=DataConfig(batch_size=chosen.batch, loader="host", validation_batches=20),
            train=TrainConfig(
                steps=chosen.steps,
                lr=chosen.lr,
                warmup=chosen.warmup,
                validate_every=chosen.steps,
                checkpoint_every=chosen.steps,
                plot=False,
            ),
        )
        scores = read_metrics(pretrain(config, quiet=True))[-1]
    return [
        Row(
            suite="frameworks",
            case=f"learning/{signal}/{framework}",
            metric="held_out_l1",
            value=scores["val_l1"],
            unit="L1",
            baseline="mean_prediction",
            ratio=scores["val_mean_l1"] / scores["val_l1"],
        )
    ]
