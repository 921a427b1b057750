"""From images to a decoder: write a store, verify it, pretrain, decode, and keep what a report shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from brainflow.config import DataConfig, ModelConfig, PretrainConfig, TrainConfig
from brainflow.data.splits import Split
from brainflow.decoding.adapt import adapt
from brainflow.decoding.fit import NAMES, AdaptConfig, Mode
from brainflow.decoding.result import Result, baselines, difference, write_results
from brainflow.decoding.scores import Interval
from brainflow.decoding.task import DecodingTask, TaskConfig, load_task
from brainflow.demo import haxby
from brainflow.pretrained.format import load_pretrained
from brainflow.report.reconstruction import Reconstruction, reconstruct
from brainflow.storage import BoldStore, verify
from brainflow.training.loop import pretrain
from brainflow.training.metrics import read_metrics
from brainflow.training.run_dir import SPLIT

HRF_SHIFT = 5.0
"""Seconds from a picture to the BOLD response it is decoded from: where the canonical response peaks."""
ADAPTATIONS: tuple[tuple[Mode, bool], ...] = (
    ("knn", False),
    ("linear", True),
    ("linear", False),
    ("mlp", False),
    ("attentive", False),
    ("lora", False),
    ("finetune", True),
    ("finetune", False),
)
"""Ways to adapt and whether from fresh weights; the last is the one whose results are written."""
PICTURE_WINDOW = 49
"""Time points of the windows whose reconstruction is measured: the longest that pretraining draws."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What the demo does. Sizes are small so that two CPU cores suffice; nothing is tuned to the data."""

    out: Path
    """Folder for everything that the demo writes."""
    seed: int = 0
    """Seeds weights, data order, dropout and resampling."""
    threads: int = 1
    """CPU threads of torch: with one, the figures do not depend on the number of cores. Another number may
    change the last digits."""
    pretrain_steps: int = 300
    """Optimizer steps of pretraining."""
    adapt_steps: int | None = None
    """Optimizer steps of adaptation, in each fold; by default as `adapt` takes."""
    width: int = 128
    """Hidden width of the model."""


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """Everything that the demo's table and page show.

    Attributes
    ----------
    data
        The example data.
    chunks
        Chunks of the store that were verified.
    metrics
        Lines of the pretraining's `metrics.jsonl`.
    held_out
        Keys of the runs that pretraining only validated on.
    reconstruction
        What the model predicts of these runs.
    task
        The decoding task.
    decoders
        Results, baselines first; the last is the fine-tuned pretrained model.
    gain
        Accuracy of fine-tuning from pretrained minus from fresh weights.
    gain_unseen
        The same on `held_out` alone, as (pretrained, fresh) accuracies.
    """

    config: DemoConfig
    data: haxby.Haxby
    chunks: int
    metrics: list[dict[str, Any]]
    held_out: tuple[str, ...]
    reconstruction: Reconstruction
    task: DecodingTask
    decoders: list[Result]
    gain: Interval
    gain_unseen: tuple[float, float]

    @property
    def validation(self) -> dict[str, Any]:
        """The last validation line of pretraining."""
        return next(line for line in reversed(self.metrics) if "val_loss" in line)


def run_demo(config: DemoConfig, *, say: Callable[[str], None], quiet: bool = False) -> DemoResult:
    """Run the whole demo; everything it writes is under `config.out`.

    Parameters
    ----------
    config
        What to do.
    say
        Called with a line before each stage.
    quiet
        Show no progress of the pretraining.

    Raises
    ------
    RuntimeError
        If the store that was just written does not verify.
    """
    torch.set_num_threads(config.threads)
    store_path, run_folder = config.out / "store", config.out / "run"
    say("reading real fMRI: Haxby et al. 2001, one participant, 12 runs")
    data = haxby.read()
    haxby.write_store(data, str(store_path))
    report = verify(str(store_path))
    if not report.ok:
        raise RuntimeError(f"the store just written is damaged: {'; '.join(report.errors)}")
    store = BoldStore.open(str(store_path))
    say(f"store written, {report.chunks} chunks verified: {len(store.runs)} runs, {store.networks} networks")

    say(f"pretraining: causal sequence modelling, {config.pretrain_steps} steps, labels not used")
    pretrain(pretrain_config(config), resume="never", quiet=quiet)
    held_out = Split.load(run_folder / SPLIT).parts["validation"]
    reconstruction = reconstruct(store, load_pretrained(run_folder), held_out, length=PICTURE_WINDOW)

    task = load_task(store, TaskConfig(target=haxby.TARGET, split="leave-one-run-out", hrf_shift=HRF_SHIFT))
    say(f"decoding {len(task.classes)} conditions, each run left out once: classifiers without a model")
    decoders = baselines(task)
    adaptation = AdaptConfig(steps=config.adapt_steps, seed=config.seed)
    for mode, scratch in ADAPTATIONS:
        say(f"decoding by {NAMES[mode]} on {'fresh' if scratch else 'pretrained'} weights")
        asked = replace(adaptation, mode=mode, scratch=scratch)
        decoders.append(adapt(task, run_folder, asked, device="cpu"))
    fresh, pretrained = decoders[-2], decoders[-1]
    write_results(task, pretrained, decoders[:-1], config.out / "decoding")
    return DemoResult(
        config=config,
        data=data,
        chunks=report.chunks,
        metrics=read_metrics(run_folder),
        held_out=held_out,
        reconstruction=reconstruction,
        task=task,
        decoders=decoders,
        gain=difference(task, pretrained, fresh),
        gain_unseen=(_accuracy_in(task, pretrained, held_out), _accuracy_in(task, fresh, held_out)),
    )


def pretrain_config(config: DemoConfig) -> PretrainConfig:
    """Return the demo's pretraining: published objective and learning rate, a small model."""
    steps = config.pretrain_steps
    return PretrainConfig(
        store=str(config.out / "store"),
        out=str(config.out / "run"),
        model=ModelConfig(framework="csm", masking="dense", width=config.width, layers=2, heads=4),
        data=DataConfig(batch_size=16, validation_batches=4),
        train=TrainConfig(
            steps=steps,
            lr=5e-4,
            seed=config.seed,
            validate_every=max(1, steps // 16),
            checkpoint_every=steps,
        ),
        device="cpu",
    )


def _accuracy_in(task: DecodingTask, result: Result, runs: tuple[str, ...]) -> float:
    """Return a decoder's accuracy over the windows of some runs."""
    mine = np.isin(task.runs, runs)
    return float((result.predictions[..., mine] == task.labels[mine]).mean())
