"""The training loop, the same for one process and for many: when to log, validate, save and stop.

A run that was killed and resumed from a checkpoint writes bit-identical losses to one that was never
interrupted (tested on the CPU).
"""

from __future__ import annotations

import gc
import logging
import math
import secrets
import signal
import sys
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from brainflow.batch import upload
from brainflow.config import PretrainConfig
from brainflow.data import make_loader
from brainflow.data.loader import batch_dtype
from brainflow.data.sampler import MicrobatchSampler, WindowSampler
from brainflow.frameworks import build, check_framework, framework_spec
from brainflow.models.linear_path import LinearPath
from brainflow.pretrained.format import DIGESTS, WEIGHTS, load_pretrained, read_config, save_pretrained
from brainflow.pretrained.warm_start import check_initial
from brainflow.storage import BoldStore

from . import checkpoint, parallel
from .compute import describe_compute, settle_precision
from .interrupt import Preempted, StopRequest, mark
from .meters import Clock, Meters, Readback, peak_flops
from .metrics import RunLog
from .optimizer import learning_rate
from .progress import TrainingProgress, make_tracker, pauses
from .run_dir import BEST, CHECKPOINTS, RECONSTRUCTIONS, SPLIT, Resume, exclusive, saved_config
from .setup import (
    begin_together,
    collecting_rarely,
    cut_into_parts,
    device_of,
    fit_to_store,
    give_coordinates,
    largest_batch,
    split_of,
)
from .step import StepNumbers, TrainingStep, derive_seed, rank_parts
from .validation import Validator, closing_loader, draw

BAD_STEPS_IN_A_ROW = 10
COLLECT_EVERY = 1_000  # steps between two runs of Python's garbage collector
_log = logging.getLogger(__name__)


class NotFinite(ValueError):
    """The loss or gradient was NaN or infinite too many times in a row."""


def pretrain(
    config: PretrainConfig,
    *,
    resume: Resume = "auto",
    quiet: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Train a framework on a store.

    Parameters
    ----------
    config
        The run. `model.networks` is taken from the store.
    resume
        "auto" continues from the newest complete checkpoint in `config.out`; "never" deletes what is there.
    quiet
        Show no progress.
    progress
        Called with (steps done, steps) after each step, on the first rank.

    Returns
    -------
    Path
        The run directory: logs, checkpoints and the trained model, for `brainflow.load`.

    Raises
    ------
    ValueError
        If the configuration does not fit the store or the run directory, or a checkpoint is damaged.
    NotFinite
        If `BAD_STEPS_IN_A_ROW` steps in a row had to be skipped; the message names the last batch's runs.
    Preempted
        If a signal asked to stop: a checkpoint has been written and RUN/PREEMPTED says so.
    OSError
        If the disk is full; the last checkpoint is intact.
    ConnectionError
        If another rank died or does not answer; the last checkpoint is intact. (NCCL's watchdog ends this
        process before anything can be said; the same command continues from the last checkpoint, too.)
    """
    ranks = parallel.from_environment()
    check_framework(config)
    device = device_of(config.device, ranks.local)
    store = BoldStore.open(config.store)
    config = fit_to_store(config, store)
    folder = Path(config.out)
    if resume == "auto":
        saved_config(folder)  # damage is named before anything reads it
    config = cut_into_parts(config, folder, ranks.world, resume=resume)
    config = settle_precision(config, folder, device, resume=resume)
    computes = describe_compute(config, device)
    writer = checkpoint.Writer()
    try:
        with parallel.process_group(ranks, device), exclusive(folder) if ranks.first else nullcontext():
            start_from = begin_together(ranks, device, folder, config, snapshot=store.snapshot, resume=resume)
            _log.info("compute: %s", computes)
            if ranks.first and not quiet:
                sys.stderr.write(f"computing on {computes}\n")
            with StopRequest() as stop, closing(writer):
                # Not bound to a name: its tensors must be freed before the process group is destroyed.
                _Run(config, store, folder, start_from, ranks, device, writer).train(
                    stop, quiet=quiet or not ranks.first, told=progress if ranks.first else None
                )
    except RuntimeError as error:
        if not parallel.lost_rank(error):
            raise
        last = checkpoint.latest(folder / CHECKPOINTS)
        raise ConnectionError(
            f"rank {ranks.rank}: another rank died or does not answer; "
            + (f"the last checkpoint, {last.name}, is intact, " if last else "no checkpoint yet, ")
            + "the same command continues; what happened stands in the other rank's output "
            + f"({str(error).splitlines()[0]})"
        ) from error
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
        writer: checkpoint.Writer,
    ) -> None:
        self.config, self.store, self.folder = config, store, folder
        self.ranks, self.device, self.writer = ranks, device, writer
        train = config.train
        if ranks.first:
            self.split = split_of(config, store, folder / SPLIT)
        # A barrier: the others read the file that rank 0 has written.
        ranks.agree(0, device)
        self.split = split_of(config, store, folder / SPLIT)
        # Names the folders of checkpoints under way: what a killed process left there is never mixed in.
        # 62 bits, since it travels as an int64.
        self.attempt = ranks.agree(secrets.randbits(62), device)
        self.sampler = self._sampler("train", train.seed)
        self.parts = rank_parts(train.micro_batches, ranks)
        self.microbatches = [
            self._sampler("train", train.seed, share=number, shares=train.micro_batches)
            for number in self.parts
        ]
        if train.init and start_from is None and ranks.first:
            check_initial(train.init, store)
        self.one_step = TrainingStep(config, ranks, device, fresh=start_from is None)
        if config.model.coordinates:
            give_coordinates(self.one_step.module, store)
        self.step, self.best, self.stale = 0, math.inf, 0
        if start_from is not None:
            self.one_step.restore(start_from)
            state = checkpoint.read_state(start_from)
            self.step, self.best, self.stale = state["step"], float(state["best"]), state["stale"]
            _log.info("resumed from %s", start_from)
        self.peak = peak_flops(device, train.precision) if ranks.first else math.inf
        self.log = RunLog(folder, step=self.step) if ranks.first else None
        self.track = make_tracker(config) if ranks.first else None
        self.validate = Validator(
            store,
            self._sampler("validation", derive_seed(train.seed, "validation")),
            self.sampler,
            batches=config.data.validation_batches,
            device=device,
            ranks=ranks,
            precision=train.precision,
            on_corrupt=config.data.on_corrupt,
            runs=self.split.part("validation", store.runs),
        )
        carried = self.one_step.module.linear_path
        # Otherwise the checkpoint has brought the path along.
        if start_from is None or carried is None:
            fitted = self._fitted_linear("train")
            if carried is not None and fitted is not None:
                carried.load_state_dict(fitted.state_dict())
            self.validate.linear = carried or fitted
        else:
            self.validate.linear = carried

    def _fitted_linear(self, *parts: str) -> LinearPath | None:
        """Return the linear predictor of the framework's targets, fitted to some parts of the split."""
        seed = derive_seed(self.config.train.seed, "linear")
        runs = np.concatenate([self.split.part(part, self.store.runs) for part in parts])
        sampler = self._sampler("train", seed, runs=np.sort(runs))
        return self.validate.fit_linear(self.one_step.module, sampler, seed=seed)

    def _sampler(
        self,
        part: str,
        seed: int,
        *,
        share: int = 0,
        shares: int = 1,
        runs: NDArray[np.int64] | None = None,
    ) -> WindowSampler:
        data = self.config.data
        return WindowSampler(
            self.store.runs,
            runs=self.split.part(part, self.store.runs) if runs is None else runs,
            batch=data.batch_size,
            seq_min=data.seq_min,
            seq_max=data.seq_max,
            seed=seed,
            rank=share,
            world=shares,
            pairs=framework_spec(self.config.model.framework).paired,
            onset=data.onset,
            weights=data.dataset_weights() if part == "train" else None,
        )

    def train(self, stop: StopRequest, *, quiet: bool, told: Callable[[int, int], None] | None) -> None:
        """Run to the last step, then write the release form."""
        config = self.config.train
        readback = Readback()
        if self.step and not quiet:
            sys.stderr.write(f"continuing after step {self.step:,} of {config.steps:,}\n")
        if self.step < config.steps and not self._stale():
            self._rehearse()
        loader = make_loader(  # after the rehearsal: what is free on a GPU then is free
            self.store,
            MicrobatchSampler(self.microbatches),
            kind=self.config.data.loader,
            device=str(self.device),
            # The loader counts microbatches, the run steps.
            start_step=self.step * len(self.parts),
            on_corrupt=self.config.data.on_corrupt,
        )
        _log.info("loader: %s", loader.describe())
        progress = TrainingProgress(config.steps, done=self.step, quiet=quiet, pauses=pauses(self.config))
        first = self.step
        with closing_loader(loader) as batches, progress, collecting_rarely():
            clock = Clock(loader)
            while self.step < config.steps and not self._stale():
                lr = learning_rate(self.step, config)
                numbers = self.one_step(batches, self.step, lr, stop=stop.number is not None)
                self.step += 1
                clock.steps += 1
                progress.advance(self.step)
                if told is not None:
                    told(self.step, config.steps)
                if self.step == first + 1:
                    parallel.shorten_timeout()
                # On all ranks in the same step: whoever collects alone lets the others wait.
                if self.step % COLLECT_EVERY == 0:
                    gc.collect()
                stopping = self._stopping(stop, numbers)
                end = self.step == config.steps
                if self.step % config.log_every == 0 or end:
                    self._push(readback, numbers, lr, clock)
                validate = self.step % config.validate_every == 0 or end
                if validate or stopping or self.step % config.checkpoint_every == 0:
                    # No checkpoint is newer than the log: who resumes from it writes only the lines behind
                    # it.
                    self._report_all(readback, progress, wait=True)
                    if validate:
                        with progress.left.pause("validation"):
                            self._validated(progress)
                        # A signal may have come meanwhile; several ranks would have to agree on it first.
                        stopping = stopping or (self.ranks.world == 1 and stop.number is not None)
                    if stopping or end or self._stale() or self.step % config.checkpoint_every == 0:
                        with progress.left.pause("checkpoint"):
                            self._save()
                    clock.restart()
                    self.one_step.trs = self.one_step.tokens = 0
                else:
                    self._report_all(readback, progress, wait=False)
                if stopping and self.step < config.steps:
                    self._preempted(stop)
            self.writer.wait()
        report = loader.report()
        _log.info("loader: %s", report)
        if report["skipped_windows"]:
            _log.warning(
                "%d windows on damaged chunks were left out; `brainflow verify` lists the damage",
                report["skipped_windows"],
            )
        kept = config.keep_best and (self.folder / BEST / WEIGHTS).exists()
        if not kept:
            self._release(self.folder)
        if self.ranks.first and (kept or self.one_step.module.linear_path is not None):
            self._release_again(self.folder / BEST if kept else self.folder)

    def _rehearse(self) -> None:
        largest = largest_batch(self.microbatches[0], self.store, batch_dtype(self.store))
        self.one_step.rehearse(largest.to(self.device))

    def _stopping(self, stop: StopRequest, numbers: StepNumbers) -> bool:
        """Whether any rank was asked to stop; on GPUs the answer is read every `log_every` steps."""
        if numbers.stop is None or self.ranks.world == 1:
            return stop.number is not None
        # To read it in each step would let the host wait for the GPU.
        if self.device.type == "cuda" and self.step % self.config.train.log_every:
            return False
        return bool(numbers.stop > 0)

    def _preempted(self, stop: StopRequest) -> None:
        self.writer.wait()
        preempted = Preempted(stop.number or signal.SIGTERM, self.step, self.folder)
        if self.ranks.first:
            mark(self.folder, preempted)
        raise preempted

    def _stale(self) -> bool:
        return 0 < self.config.train.patience <= self.stale

    def _push(self, readback: Readback, numbers: StepNumbers, lr: float, clock: Clock) -> None:
        """Send the numbers of the steps since the last line on their way to the host."""
        step = self.one_step
        flops = step.weights.flops(step.tokens, step.trs)
        counts = upload(self.device, counts=np.array([step.trs, step.tokens], np.float64))["counts"]
        step.trs = step.tokens = 0
        read = torch.stack([numbers.norm, *numbers.metrics.values()]).double()
        values = torch.cat([step.meters.read(), self.ranks.sum(counts), read])
        names = (*Meters.NAMES, "trs_per_s", "tokens_per_s", "grad_norm", *numbers.metrics)
        lap = clock.lap()
        lap["mfu"] = flops / lap["lap"] / self.peak
        if self.device.type == "cuda":
            lap["gpu_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        readback.push(values, {"step": self.step, "lr": lr, "names": names, **lap})

    def _report_all(self, readback: Readback, progress: TrainingProgress, *, wait: bool) -> None:
        for numbers, tag in readback.pop(wait=wait):
            self._report(numbers, tag, progress)

    def _report(self, values: list[float], tag: dict[str, Any], progress: TrainingProgress) -> None:
        read = dict(zip(tag.pop("names"), values, strict=True))
        total, good, _, worst, bad_step = (
            read.pop(n) for n in ("total", "good", "bad_row", "worst", "bad_step")
        )
        for name in ("trs_per_s", "tokens_per_s"):
            read[name] /= tag["lap"]
        del tag["lap"]
        line = {"step": tag.pop("step"), "loss": total / good if good else math.nan, "lr": tag.pop("lr")}
        line |= {**read, **tag, "skipped": int(read["skipped"])}
        self._write(line, progress)
        if worst >= BAD_STEPS_IN_A_ROW:
            # A batch follows from its step, so none had to be kept for this message.
            runs = sorted({str(self.store.runs.key[i]) for i in self.sampler.batch(int(bad_step)).runs})
            raise NotFinite(
                f"the loss or its gradient was NaN or infinite in {int(worst)} steps in a row, last in step "
                f"{int(bad_step) + 1}, whose batch reads the runs {', '.join(runs)}. Check them with "
                "`brainflow verify` and `brainflow info`, or begin another run with a lower train.lr or with "
                "train.precision fp32"
            )

    def _write(self, line: dict[str, Any], progress: TrainingProgress) -> None:
        if self.log is not None and self.track is not None:
            self.log.write(line)
            self.track(line)
            progress.show(line)

    def _validated(self, progress: TrainingProgress) -> None:
        with self.one_step.averaged():
            scores, example = self.validate(self.one_step.module)
        self._write({"step": self.step, **scores}, progress)
        if self.ranks.first and self.config.train.plot and example is not None:
            draw(self.folder / RECONSTRUCTIONS / f"step-{self.step:08d}.png", example, self.step)
        # is-next says nothing about the signal: what carries a linear path is judged by what it predicts
        error = scores["val_loss" if self.one_step.module.linear_path is None else "val_mse"]
        if error < self.best:
            self.best, self.stale = error, 0
            self.writer.wait()  # a full disk is first told of where the last checkpoint is known
            self._release(self.folder / BEST)
        else:
            self.stale += 1

    def _save(self) -> None:
        """Copy what this rank has to write to the host, and let a thread write it."""
        self.writer.wait()
        train = self.config.train
        self.writer.save(
            self.folder / CHECKPOINTS,
            self.step,
            checkpoint.owned(self.one_step.tensors(), self.ranks),
            {"torch": torch.__version__, "best": self.best, "stale": self.stale},
            keep=train.keep,
            permanent_every=train.permanent_every,
            ranks=self.ranks,
            attempt=self.attempt,
        )

    def _release_again(self, origin: Path) -> None:
        """Write a released model as the run's, its linear path fitted to the validation runs, too.

        Nothing is measured any more, and of few people each one counts.
        """
        model: Any = load_pretrained(origin)
        if model.linear_path is not None and (fitted := self._fitted_linear("train", "validation")):
            # Fitted where the network had not learnt, so it is not fitted to these runs again.
            fitted.gain.copy_(model.linear_path.gain)
            model.linear_path.load_state_dict(fitted.state_dict())
        known = read_config(origin)
        facts = {name: known[name] for name in known if name not in (DIGESTS, "format", "model")}
        save_pretrained(model, self.folder, facts)

    def _release(self, folder: Path) -> None:
        """Write the weights, averaged if they are, as `brainflow.load` reads them."""
        whole = self.one_step.whole_weights()
        if self.ranks.first:
            # A module of its own: the one that is trained may be sharded.
            module = build(self.config.model)
            module.load_state_dict(whole)
            save_pretrained(module, folder, checkpoint.facts(self.config, self.store, self.split, self.step))
