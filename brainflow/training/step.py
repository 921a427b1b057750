"""One optimizer step: what is trained, how a batch becomes an update, and which tensors that leaves.

The step asks nothing of the device. What it draws (masks, dropout) is a function of (seed, step, part), and
the parts count by the values that they predict, so the update is the same whoever computes a part.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from brainflow.batch import PackedBatch, upload
from brainflow.config import PretrainConfig
from brainflow.data.sampler import MicrobatchSampler
from brainflow.frameworks import Framework, build
from brainflow.models.transformer import Transformer
from brainflow.pretrained.warm_start import freeze, load_initial

from . import checkpoint, parallel
from .compute import allow_tf32, autocast
from .flops import matrix_weights
from .meters import Meters
from .optimizer import (
    LossScale,
    MovingAverage,
    allocate_state,
    guarded_step,
    make_optimizer,
    optimizer_tensors,
)
from .setup import derive_seed, rank_parts, seed_dropout
from .shares import PairGradient, Share, part_shares


@dataclass(frozen=True)
class StepNumbers:
    """What a step leaves on the device.

    Attributes
    ----------
    norm
        Gradient norm before clipping, 0-d.
    metrics
        Name → 0-d, over all ranks.
    stop
        How many ranks want to stop, 0-d; None on one rank.
    """

    norm: Tensor
    metrics: dict[str, Tensor]
    stop: Tensor | None = None


class TrainingStep:
    """Model, optimizer and all that belongs to them.

    Parameters
    ----------
    config
        The run, `train.micro_batches` settled.
    sampler
        The parts of this rank as they are read, without damaged windows if these are skipped; apart from the
        loader's, which a thread may be using.
    fresh
        Whether the run begins here: then `train.init` is read.

    Attributes
    ----------
    module
        The framework; under FSDP its parameters are sharded.
    trs, tokens
        Time points that this rank has read, and tokens (special and mask tokens included) that its
        transformer has run, since they were last set to 0.
    """

    def __init__(
        self,
        config: PretrainConfig,
        ranks: parallel.Ranks,
        device: torch.device,
        sampler: MicrobatchSampler,
        *,
        fresh: bool = True,
    ) -> None:
        self.config, self.ranks, self.device, self.sampler = config, ranks, device, sampler
        train = config.train
        self.parts = rank_parts(train.micro_batches, ranks)
        torch.manual_seed(derive_seed(train.seed, "weights"))
        allow_tf32(train.precision == "tf32")
        self.module: nn.Module = build(config.model)
        if train.init and fresh:
            load_initial(self.module, train.init)
        freeze(self.module, train.freeze)
        for parameter in cast(Framework, self.module).untrained:
            parameter.requires_grad_(False)
        if not any(p.requires_grad for p in self.module.parameters()):
            raise ValueError(f"train.freeze: got {train.freeze}, which leaves nothing to train")
        self.module.to(device)
        self.weights = matrix_weights(self.module)
        self.trs = self.tokens = 0
        self._count_tokens()
        self._pair_gradient = PairGradient(self.module)
        self._mask_seed = derive_seed(train.seed, "masks")
        if train.compile:
            for part in self.module.modules():
                if isinstance(part, Transformer):
                    for block in part.blocks:
                        block.compile(dynamic=True)
        self.model = parallel.spread(self.module, ranks, train.parallel, device)
        self.optimizer = make_optimizer(self.module, train)
        self.scale = LossScale(device) if train.precision == "fp16" else None
        self.ema = MovingAverage(self.module, train.ema) if train.ema else None
        self.meters = Meters(device)

    def __call__(self, batches: Iterator[PackedBatch], step: int, lr: float, *, stop: bool) -> StepNumbers:
        """Take optimizer step `step` (0-based) over the next batches of this rank, one a part."""
        train = self.config.train
        seeds = [self.mask_seed(number) for number in self.parts]
        shares = part_shares(
            self.module, self.sampler.samplers, seeds, step, parts=train.micro_batches, total=self._total
        )
        total: Tensor | None = None
        metrics: dict[str, Tensor] = {}
        losses = []
        for number, seed, share in zip(self.parts, seeds, shares, strict=True):
            batch = next(batches)
            seed_dropout(self._part_seed("dropout", step, number), self.device)
            last = number == self.parts[-1]
            loss, reported = self._backward(batch, seed, share, last=last)
            losses.append(loss)
            if share is None:
                total, metrics = loss, reported
                continue
            reconstruction = reported["reconstruction"]
            value = share.values * reconstruction + share.pairs * (loss - reconstruction)
            total = value if total is None else total + value
            for name, metric in reported.items():
                weighed = metric * (share.values if name == "reconstruction" else share.pairs)
                metrics[name] = metrics[name] + weighed if name in metrics else weighed
        assert total is not None
        asked = None
        if train.micro_batches > 1:
            total, metrics, asked = self._over_ranks(total, metrics, losses, stop)
        if self.scale is not None:
            self.scale.unscale(self.module)
        norm = parallel.whole(nn.utils.clip_grad_norm_(self.module.parameters(), train.clip))
        bad = self.meters.update(total, norm, step)
        guarded_step(self.optimizer, lr, bad)
        if self.scale is not None:
            self.scale.update(bad)
        if self.ema is not None:
            self.ema.update(self.module, bad)
        return StepNumbers(norm, metrics, asked)

    def rehearse(self, batch: PackedBatch) -> None:
        """Run the largest batch that can come, forward and backward, and forget it.

        What does not fit into memory, does not compile or does not reach the other ranks shows before step 1.

        Raises
        ------
        ValueError
            If the GPU's memory does not hold it.
        """
        try:
            self._backward(batch, 0, None, last=True)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"data.batch_size: {batch.windows} windows of up to {batch.max_seqlen} time points a part do "
                "not fit into the GPU's memory; raise train.micro_batches, lower data.batch_size or set "
                f"model.recompute ({error})"
            ) from error
        self.optimizer.zero_grad(set_to_none=True)
        self.trs = self.tokens = 0

    def averaged(self) -> AbstractContextManager[None]:
        """Return a context in which the module has its averaged weights, if there are any."""
        return self.ema.swapped(self.module) if self.ema else nullcontext()

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors that a checkpoint holds, by name; sharded ones as DTensors."""
        groups = {
            "model": self.module.state_dict(),
            "optimizer": optimizer_tensors(self.module, self.optimizer),
            "meters": {"values": self.meters.values},
            "ema": self.ema.values if self.ema else {},
            "scale": {"values": self.scale.values} if self.scale else {},
        }
        return {f"{group}.{name}": value for group, named in groups.items() for name, value in named.items()}

    def restore(self, path: Path) -> None:
        """Fill everything from a checkpoint, whatever ranks and layout wrote it.

        Raises
        ------
        ValueError
            If the checkpoint is damaged or belongs to another model.
        """
        damaged = checkpoint.damaged(path, self.ranks)
        count = torch.tensor([float(len(damaged))], device=self.device)
        if self.ranks.sum(count) > 0:
            raise ValueError(
                f"checkpoint: {path} is damaged (wrong checksum of {', '.join(damaged) or 'a file'}); "
                "delete it to continue from the one before"
            )
        names = [name for name in checkpoint.names(path) if name.startswith("optimizer.")]
        allocate_state(self.module, self.optimizer, [name.removeprefix("optimizer.") for name in names])
        checkpoint.read_into(path, self.tensors())

    def whole_weights(self) -> dict[str, Tensor]:
        """Return the released weights, whole and on the CPU, on rank 0 only; all ranks have to call it."""
        weights = {}
        with self.averaged():
            for name, value in self.module.state_dict().items():
                full = parallel.whole(value.detach())
                if self.ranks.first:
                    weights[name] = full.to("cpu", copy=True)  # a view would follow the swap back
        return weights

    def mask_seed(self, part: int) -> int:
        """Return the seed of a part's masks; the autoencoder's draws one number for the whole batch."""
        if part == 0 or self.config.model.framework == "autoencoder":
            return self._mask_seed
        return derive_seed(self._mask_seed, "part", part)

    def _backward(
        self, batch: PackedBatch, seed: int, share: Share | None, *, last: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Add a part's gradient; return its loss and metrics, detached."""
        train = self.config.train
        self.trs += batch.tokens
        self._pair_gradient.scale = None if share is None else share.pairs / share.values
        with parallel.accumulating(self.model, last=last):
            with autocast(self.device, train.precision):
                out = self.model(batch, seed=seed)
            loss = out.loss if share is None else out.loss * (share.values * self.ranks.world)
            (loss if self.scale is None else loss * self.scale.values[0]).backward()
        return out.loss.detach(), out.metrics

    def _over_ranks(
        self, total: Tensor, metrics: dict[str, Tensor], losses: list[Tensor], stop: bool
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Sum a step's numbers over ranks in one collective, in which the wish to stop travels, too."""
        of_parts = torch.zeros(self.config.train.micro_batches, dtype=torch.float64, device=self.device)
        of_parts[self.parts[0] : self.parts[-1] + 1] = torch.stack(losses).double()
        asked = torch.full((1,), float(stop), dtype=torch.float64, device=self.device)
        sums = self.ranks.sum(torch.cat([torch.stack([total, *metrics.values()]).double(), asked, of_parts]))
        metrics = dict(zip(metrics, sums[1:], strict=False))
        count = 1 + len(metrics)
        metrics["loss_max"] = sums[count + 1 :].max()
        return sums[0], metrics, sums[count]

    def _total(self, counts: Tensor) -> Tensor:
        return self.ranks.sum(upload(self.device, counts=counts.numpy())["counts"])

    def _part_seed(self, purpose: str, step: int, part: int) -> int:
        return derive_seed(self.config.train.seed, purpose, step, *([part] if part else []))

    def _count_tokens(self) -> None:
        transformers = [part for part in self.module.modules() if isinstance(part, Transformer)]

        def count(module: nn.Module, given: tuple[Any, ...]) -> None:
            if module.training:
                self.tokens += given[0].shape[:-1].numel()

        for part in transformers:
            part.register_forward_pre_hook(count)
        if not transformers:  # LSTMs read a token a time point

            def count_batch(module: nn.Module, given: tuple[Any, ...]) -> None:
                if module.training:
                    self.tokens += given[0].tokens

            self.module.register_forward_pre_hook(count_batch)
