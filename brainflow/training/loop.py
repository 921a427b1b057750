"""The training loop, the same for one process and for many.

The step asks nothing of the device: losses are summed there and read back a few steps later. What a step
draws (windows, masks, dropout) is a function of (seed, step), so a run that was killed and resumed from a
checkpoint writes bit-identical losses to one that was never interrupted (tested on the CPU).
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import logging
import math
import signal
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from brainflow.config import PretrainConfig
from brainflow.data import make_loader
from brainflow.data.sampler import WindowSampler
from brainflow.frameworks import build
from brainflow.models.pretrained import save_pretrained
from brainflow.models.transformer import Transformer
from brainflow.storage import BoldStore

from . import checkpoint, parallel
from .interrupt import Preempted, StopRequest, mark
from .meters import Clock, Meters, Readback
from .metrics import RunLog
from .optimizer import (
    LossScale,
    MovingAverage,
    guarded_step,
    learning_rate,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
)
from .progress import TrainingProgress
from .release import facts
from .run_dir import BEST, CHECKPOINTS, SPLIT, Resume, exclusive
from .setup import (
    begin_together,
    collecting_rarely,
    cut_into_parts,
    derive_seed,
    device_of,
    fit_to_store,
    rank_parts,
    seed_dropout,
    split_of,
)
from .shares import PairGradient, PartSampler, part_shares
from .trackers import make_tracker
from .validation import Validator, closing_loader

BAD_STEPS_IN_A_ROW = 10
COLLECT_EVERY = 1_000  # steps between two runs of Python's garbage collector
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
    ranks = parallel.from_environment()
    device = device_of(config.device, ranks.local)
    store = BoldStore.open(config.store)
    config = fit_to_store(config, store)
    folder = Path(config.out)
    config = cut_into_parts(config, folder, ranks.world, resume=resume)
    with parallel.process_group(ranks, device), exclusive(folder) if ranks.first else nullcontext():
        start_from = begin_together(ranks, device, folder, config, snapshot=store.snapshot, resume=resume)
        with StopRequest() as stop:
            run = _Run(config, store, folder, start_from, ranks, device)
            try:
                run.train(stop, quiet=quiet or not ranks.first)
            finally:
                run.writer.join()  # a checkpoint that was begun is finished, whatever went wrong
    return folder


class _Run:
    """Everything that lives as long as the training."""

    def __init__(
        self,
        config: PretrainConfig,
        store: BoldStore,
        folder: Path,
        start_from: Path | None,
        ranks: parallel.Ranks,
        device: torch.device,
    ) -> None:
        self.config, self.store, self.folder = config, store, folder
        self.ranks, self.device = ranks, device
        train = config.train
        if ranks.first:
            self.split = split_of(config, store, folder / SPLIT)
        ranks.agree(0, device)
        self.split = split_of(config, store, folder / SPLIT)
        self.parts = rank_parts(train.micro_batches, ranks)
        self.sampler = self._sampler("train", train.seed)
        held_out = self._sampler("validation", derive_seed(train.seed, "validation"))
        torch.manual_seed(derive_seed(train.seed, "weights"))
        if train.precision == "tf32":
            torch.set_float32_matmul_precision("high")
        self.module: nn.Module = build(config.model).to(device)
        self.pair_gradient = PairGradient(self.module)
        self.scale = LossScale(device) if train.precision == "fp16" else None
        self.meters = Meters(device)
        self.mask_seed = derive_seed(train.seed, "masks")
        self.step, self.tokens = 0, 0
        self.best, self.stale = math.inf, 0
        self.flag = torch.zeros(1, device=device)
        self.writer = checkpoint.Writer()
        tensors = self._restore(start_from) if start_from is not None else None
        if train.compile:
            for part in self.module.modules():
                if isinstance(part, Transformer):
                    for block in part.blocks:
                        block.compile(dynamic=True)
        self.model = parallel.spread(self.module, ranks, train.parallel, device)
        self.optimizer = make_optimizer(self.module, train)
        self.ema = MovingAverage(self.module, train.ema) if train.ema else None
        if tensors is not None:
            load_optimizer_tensors(self.module, self.optimizer, tensors["optimizer"])
            for name, value in tensors.get("ema", {}).items():
                self.ema.values[name] = parallel.like(value, self.ema.values[name])  # type: ignore[union-attr]
        self.log = RunLog(folder, step=self.step) if ranks.first else None
        self.track = make_tracker(config) if ranks.first else None
        self.validate = Validator(
            store, held_out, self.sampler, batches=config.data.validation_batches, device=device
        )

    def _sampler(self, part: str, seed: int, *, share: int = 0, shares: int = 1) -> WindowSampler:
        data = self.config.data
        return WindowSampler(
            self.store.runs,
            runs=self.split.part(part, self.store.runs),
            batch=data.batch_size,
            seq_min=data.seq_min,
            seq_max=data.seq_max,
            seed=seed,
            rank=share,
            world=shares,
            pairs=self.config.model.framework in PAIRED,
        )

    def _part_sampler(self) -> PartSampler:
        seed, shares = self.config.train.seed, self.config.train.micro_batches
        return PartSampler([self._sampler("train", seed, share=i, shares=shares) for i in self.parts])

    def train(self, stop: StopRequest, *, quiet: bool) -> None:
        """Run to the last step, then write the release form."""
        config, parts = self.config.train, len(self.parts)
        readback = Readback()
        self.counted = self._part_sampler()  # apart from the loader's, which a thread may be reading
        loader = make_loader(
            self.store,
            self._part_sampler(),
            kind=self.config.data.loader,
            device=str(self.device),
            start_step=self.step * parts,
        )
        progress = TrainingProgress(config.steps, done=self.step, quiet=quiet)
        first = self.step
        with closing_loader(loader) as batches, progress, collecting_rarely():
            clock = Clock(loader)
            while self.step < config.steps and not self._stale():
                lr = learning_rate(self.step, config)
                batch = [next(batches)] if parts == 1 else itertools.islice(batches, parts)
                norm, reported = self._one_step(batch, lr)
                self.step += 1
                clock.count(self.tokens)
                if self.step == first + 1:
                    parallel.shorten_timeout()
                if self.step % COLLECT_EVERY == 0:
                    gc.collect()
                stopping = self._stopping(stop)
                end = self.step == config.steps
                if self.step % config.log_every == 0 or end:
                    names = (*Meters.NAMES, "grad_norm", *reported)
                    values = torch.cat([self.meters.read(), torch.stack([norm, *reported.values()]).double()])
                    readback.push(values, {"step": self.step, "lr": lr, "names": names, **clock.lap()})
                validate = self.step % config.validate_every == 0 or end
                if validate or stopping or end or self.step % config.checkpoint_every == 0:
                    self._report_all(readback, progress, wait=True)
                    if validate:
                        self._validated(progress)
                        stopping = stopping or (self.ranks.world == 1 and stop.number is not None)
                    if stopping or end or self._stale() or self.step % config.checkpoint_every == 0:
                        self._save()
                    clock.restart()
                else:
                    self._report_all(readback, progress, wait=False)
                if stopping and self.step < config.steps:
                    self.writer.wait()
                    preempted = Preempted(stop.number or signal.SIGTERM, self.step, self.folder)
                    if self.ranks.first:
                        mark(self.folder, preempted)
                    raise preempted
            self.writer.wait()
        self._release(self.folder)

    def _stopping(self, stop: StopRequest) -> bool:
        """Whether any rank was asked to stop; on GPUs the answer is read every `log_every` steps."""
        if self.ranks.world == 1:
            return stop.number is not None
        self.flag += stop.number is not None
        if self.device.type == "cuda" and self.step % self.config.train.log_every:
            return False
        return bool(self.ranks.sum(self.flag) > 0)

    def _stale(self) -> bool:
        return 0 < self.config.train.patience <= self.stale

    def _report_all(self, readback: Readback, progress: TrainingProgress, *, wait: bool) -> None:
        for numbers, tag in readback.pop(wait=wait):
            self._report(numbers, tag, progress)

    def _validated(self, progress: TrainingProgress) -> None:
        with self.ema.swapped(self.module) if self.ema else nullcontext():
            scores = self.validate(self.module)
        self._write({"step": self.step, **scores}, progress)
        if scores["val_loss"] < self.best:
            self.best, self.stale = scores["val_loss"], 0
            self.writer.wait()  # a full disk is first told of where the last checkpoint is known
            self._release(self.folder / BEST)
        else:
            self.stale += 1

    def _one_step(self, batch: Iterable[Any], lr: float) -> tuple[Tensor, dict[str, Tensor]]:
        config, step, model = self.config.train, self.step, self.model
        seeds = [self._mask_seed(number) for number in self.parts]
        shares = part_shares(
            self.module, self.counted.samplers, seeds, step, parts=config.micro_batches, total=self._total
        )
        total: Tensor | None = None
        reported: dict[str, Tensor] = {}
        self.tokens = 0
        for part, (number, share) in enumerate(zip(self.parts, shares, strict=True)):
            data = next(iter(batch)) if isinstance(batch, list) else next(batch)  # type: ignore[call-overload]
            if data.step != step:
                data = dataclasses.replace(data, step=step)
            self.tokens += data.tokens
            seed_dropout(self._part_seed("dropout", step, number), self.device)
            self.pair_gradient.scale = None if share is None else 1 / (config.micro_batches * share)
            last = part == len(self.parts) - 1
            with parallel.accumulating(model, last=last):
                with torch.autocast(
                    self.device.type, dtype=_HALF.get(config.precision), enabled=config.precision in _HALF
                ):
                    out = model(data, seed=seeds[part])
                loss = out.loss if share is None else out.loss * (share * self.ranks.world)
                (loss if self.scale is None else loss * self.scale.values[0]).backward()
            if share is None:
                total, reported = out.loss.detach(), out.metrics
                continue
            pairs = 1 / config.micro_batches
            reconstruction = out.metrics["reconstruction"]
            value = share * reconstruction + pairs * (out.loss.detach() - reconstruction)
            total = value if total is None else total + value
            for name, metric in out.metrics.items():
                weighed = metric * (share if name == "reconstruction" else pairs)
                reported[name] = reported[name] + weighed if name in reported else weighed
        if self.ranks.world > 1:
            sums = self.ranks.sum(torch.stack([total, *reported.values()]).double())  # type: ignore[list-item]
            total = sums[0]
            reported = dict(zip(reported, sums[1:], strict=True))
        if self.scale is not None:
            self.scale.unscale(self.module)
        norm = parallel.whole(nn.utils.clip_grad_norm_(self.module.parameters(), config.clip))
        bad = self.meters.update(total, norm, step)  # type: ignore[arg-type]
        guarded_step(self.optimizer, lr, bad)
        if self.scale is not None:
            self.scale.update(bad)
        if self.ema is not None:
            self.ema.update(self.module, bad)
        return norm, reported

    def _total(self, counts: Tensor) -> Tensor:
        return self.ranks.sum(counts.to(self.device))

    def _part_seed(self, purpose: str, step: int, part: int) -> int:
        return derive_seed(self.config.train.seed, purpose, step, *([part] if part else []))

    def _mask_seed(self, part: int) -> int:
        """Return the seed of a part's masks; the autoencoder's draws one number for the whole batch."""
        if part == 0 or self.config.model.framework == "autoencoder":
            return self.mask_seed
        return derive_seed(self.mask_seed, "part", part)

    def _write(self, line: dict[str, Any], progress: TrainingProgress) -> None:
        if self.log is not None and self.track is not None:
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
        """Copy everything to the host, every rank its part, and let rank 0 write it in the background."""
        self.writer.wait()
        groups = {
            "model": self.module.state_dict(),
            "optimizer": optimizer_tensors(self.module, self.optimizer),
            "meters": {"values": self.meters.values},
            **({"ema": self.ema.values} if self.ema else {}),
            **({"scale": {"values": self.scale.values}} if self.scale else {}),
        }
        copies: dict[str, dict[str, Tensor]] = {}
        for group, tensors in groups.items():
            copies[group] = {}
            for name, value in tensors.items():
                full = parallel.whole(value.detach())
                if self.ranks.first:
                    copies[group][name] = full.to("cpu", copy=True)
        if self.ranks.first:
            state = {"torch": torch.__version__, "best": self.best, "stale": self.stale}
            train, root = self.config.train, self.folder / CHECKPOINTS
            self.writer.save(
                root, self.step, copies, state, keep=train.keep, permanent_every=train.permanent_every
            )

    def _restore(self, path: Path) -> dict[str, dict[str, Tensor]]:
        tensors, state = checkpoint.load(path)
        self.module.load_state_dict(tensors["model"])
        self.meters.values = tensors["meters"]["values"].to(self.device)
        if self.scale is not None:
            self.scale.values = tensors["scale"]["values"].to(self.device)
        self.step, self.best, self.stale = int(state["step"]), float(state["best"]), int(state["stale"])
        _log.info("resumed from %s", path)
        return tensors

    def _release(self, folder: Path) -> None:
        """Write the weights, averaged if they are, as `brainflow.load` reads them."""
        with self.ema.swapped(self.module) if self.ema else nullcontext():
            whole = {
                k: parallel.whole(v.detach()).to("cpu", copy=True)  # a view would follow the swap back
                for k, v in self.module.state_dict().items()
            }
        if self.ranks.first:
            module = build(self.config.model)
            module.load_state_dict(whole)
            save_pretrained(module, folder, facts(self.config, self.store, self.split, self.step))


_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
