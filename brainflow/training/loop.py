"""The training loop: one process, one device.

The step asks nothing of the device: losses are summed there and read back a few steps later. What a step
draws (windows, masks, dropout) is a function of (seed, step), so a run that was killed and resumed from a
checkpoint writes bit-identical losses to one that was never interrupted (tested on the CPU).
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from brainflow.config import PretrainConfig
from brainflow.data import make_loader
from brainflow.data.sampler import WindowSampler
from brainflow.data.splits import Split, split_runs
from brainflow.frameworks import build
from brainflow.models.pretrained import save_pretrained
from brainflow.storage import BoldStore

from . import checkpoint
from .interrupt import Preempted, StopRequest, mark
from .meters import Clock, Meters, Readback
from .metrics import RunLog
from .optimizer import guarded_step, learning_rate, load_optimizer_tensors, make_optimizer, optimizer_tensors
from .progress import TrainingProgress
from .release import facts
from .run_dir import CHECKPOINTS, SPLIT, Resume, begin, exclusive
from .trackers import make_tracker
from .validation import Validator, closing_loader

BAD_STEPS_IN_A_ROW = 10
PAIRED = (
    "seq-bert",
    "net-bert",
)  # frameworks that read two halves of a window and say whether they belong together
_log = logging.getLogger(__name__)


class NotFinite(ValueError):
    """The loss or gradient was NaN or infinite too many times in a row."""


def pretrain(config: PretrainConfig, *, resume: Resume = "auto", quiet: bool = False) -> Path:
    """Train a framework on a store.

    Parameters
    ----------
    config
        The run. `model.networks` is taken from the store.
    resume
        "auto" continues from the newest complete checkpoint in `config.out`; "never" deletes what is there.
    quiet
        Show no progress.

    Returns
    -------
    Path
        The run directory: logs, checkpoints and the trained model, for `brainflow.load`.

    Raises
    ------
    ValueError
        If the configuration does not fit the store or the run directory.
    NotFinite
        If `BAD_STEPS_IN_A_ROW` steps in a row had to be skipped; the message names the last batch's runs.
    Preempted
        If SIGTERM, SIGUSR1 or Ctrl-C came: a checkpoint has been written and RUN/PREEMPTED says so.
    OSError
        If the disk is full; the last checkpoint is intact.
    """
    store = BoldStore.open(config.store)
    config = fit_to_store(config, store)
    folder = Path(config.out)
    with exclusive(folder):
        start_from = begin(folder, config, snapshot=store.snapshot, resume=resume)
        with StopRequest() as stop:
            _Run(config, store, folder, start_from).train(stop, quiet=quiet)
    return folder


def fit_to_store(config: PretrainConfig, store: BoldStore) -> PretrainConfig:
    """Return the configuration with the store's number of networks.

    Raises
    ------
    ValueError
        If another number was asked for.
    """
    default = type(config.model)().networks
    if config.model.networks not in (default, store.networks):
        raise ValueError(
            f"model.networks: got {config.model.networks}, but the store has {store.networks}; leave it out"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, networks=store.networks))


def derive_seed(seed: int, *parts: int | str) -> int:
    """Return a 63-bit seed for one purpose, such as the dropout of one step."""
    text = ":".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


class _Run:
    """Everything that lives as long as the training."""

    def __init__(
        self, config: PretrainConfig, store: BoldStore, folder: Path, start_from: Path | None
    ) -> None:
        self.config, self.store, self.folder = config, store, folder
        train = config.train
        self.device = _device(config.device)
        self.split = _split(config, store, folder / SPLIT)
        self.sampler = self._sampler("train", train.seed)
        held_out = self._sampler("validation", derive_seed(train.seed, "validation"))
        torch.manual_seed(derive_seed(train.seed, "weights"))
        self.module: nn.Module = build(config.model).to(self.device)
        self.optimizer = make_optimizer(self.module, train)
        self.meters = Meters(self.device)
        self.mask_seed = derive_seed(train.seed, "masks")
        self.step = 0
        if start_from is not None:
            self._restore(start_from)
        self.log = RunLog(folder, step=self.step)
        self.track = make_tracker(config)
        self.validate = Validator(
            store, held_out, self.sampler, batches=config.data.validation_batches, device=self.device
        )

    def _sampler(self, part: str, seed: int) -> WindowSampler:
        data = self.config.data
        return WindowSampler(
            self.store.runs,
            runs=self.split.part(part, self.store.runs),
            batch=data.batch_size,
            seq_min=data.seq_min,
            seq_max=data.seq_max,
            seed=seed,
            pairs=self.config.model.framework in PAIRED,
        )

    def train(self, stop: StopRequest, *, quiet: bool) -> None:
        """Run to the last step, then write the release form."""
        config = self.config.train
        readback = Readback()
        loader = make_loader(
            self.store,
            self.sampler,
            kind=self.config.data.loader,
            device=str(self.device),
            start_step=self.step,
        )
        progress = TrainingProgress(config.steps, done=self.step, quiet=quiet)
        with closing_loader(loader) as batches, progress:
            clock = Clock(loader)
            for batch in itertools.islice(batches, config.steps - self.step):
                lr = learning_rate(self.step, config)
                norm, reported = self._one_step(batch, lr)
                self.step += 1
                clock.count(batch.tokens)
                if self.step % config.log_every == 0 or self.step == config.steps:
                    names = (*Meters.NAMES, "grad_norm", *reported)
                    values = torch.cat([self.meters.read(), torch.stack([norm, *reported.values()]).double()])
                    readback.push(values, {"step": self.step, "lr": lr, "names": names, **clock.lap()})
                validate = self.step % config.validate_every == 0 or self.step == config.steps
                save = self.step % config.checkpoint_every == 0 or self.step == config.steps
                stopping = stop.number is not None
                for numbers, tag in readback.pop(wait=validate or save or stopping):
                    self._report(numbers, tag, progress)
                if validate:
                    self._write({"step": self.step, **self.validate(self.module)}, progress)
                    clock.restart()
                if save or stopping:
                    self._save()
                    clock.restart()
                if stopping and self.step < config.steps:
                    preempted = Preempted(stop.number or 0, self.step, self.folder)
                    mark(self.folder, preempted)
                    raise preempted
        save_pretrained(self.module, self.folder, facts(self.config, self.store, self.split, self.step))

    def _one_step(self, batch: Any, lr: float) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config.train
        _seed_dropout(derive_seed(config.seed, "dropout", self.step), self.device)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16"):
            out = self.module(batch, seed=self.mask_seed)
        out.loss.backward()
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), config.clip)
        guarded_step(self.optimizer, lr, self.meters.update(out.loss.detach(), norm, self.step))
        return norm, out.metrics

    def _write(self, line: dict[str, Any], progress: TrainingProgress) -> None:
        self.log.write(line)
        self.track(line)
        progress.show(line)

    def _report(self, values: list[float], tag: dict[str, Any], progress: TrainingProgress) -> None:
        read = dict(zip(tag.pop("names"), values, strict=True))
        total, good, _, worst, bad_step = (
            read.pop(n) for n in ("total", "good", "bad_row", "worst", "bad_step")
        )
        line = {
            "step": tag.pop("step"),
            "loss": total / good if good else math.nan,
            "lr": tag.pop("lr"),
            **read,
            **tag,
        }
        line["skipped"] = int(line["skipped"])
        self._write(line, progress)
        if worst >= BAD_STEPS_IN_A_ROW:
            runs = sorted({str(self.store.runs.key[i]) for i in self.sampler.batch(int(bad_step)).runs})
            raise NotFinite(
                f"the loss or its gradient was NaN or infinite in {int(worst)} steps in a row, last in step "
                f"{int(bad_step) + 1}, whose batch reads the runs {', '.join(runs)}. Check them with "
                "`brainflow verify` and `brainflow info`, or begin another run with a lower train.lr or with "
                "train.precision fp32"
            )

    def _save(self) -> None:
        tensors = {
            "model": self.module.state_dict(),
            "optimizer": optimizer_tensors(self.module, self.optimizer),
            "meters": {"values": self.meters.values},
        }
        root = self.folder / CHECKPOINTS
        checkpoint.save(root, self.step, tensors, {"torch": torch.__version__}, keep=self.config.train.keep)

    def _restore(self, path: Path) -> None:
        tensors, state = checkpoint.load(path)
        self.module.load_state_dict(tensors["model"])
        load_optimizer_tensors(self.module, self.optimizer, tensors["optimizer"])
        self.meters.values = tensors["meters"]["values"].to(self.device)
        self.step = int(state["step"])
        _log.info("resumed from %s", path)


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: got cuda, but torch sees no CUDA device; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _split(config: PretrainConfig, store: BoldStore, path: Path) -> Split:
    """Read the run's split, or make and save it."""
    if path.exists():
        return Split.load(path, snapshot=store.snapshot)
    split = split_runs(
        store.runs,
        sizes={"validation": config.data.validation_fraction},
        seed=config.train.seed,
        snapshot=store.snapshot,
    )
    split.save(path)
    return split


def _seed_dropout(seed: int, device: torch.device) -> None:
    """Seed the generator that dropout draws from (torch.manual_seed would seed every backend, each step)."""
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
