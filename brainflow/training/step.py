"""One optimizer step: what is trained, how a batch becomes an update, and which tensors that leaves.

The step asks nothing of the device. The batch of a step is cut into `train.micro_batches` contiguous
microbatches, some for each rank. Masks and dropout of a microbatch are drawn from (seed, step, microbatch),
whichever rank computes it: one process that accumulates four, two ranks with two and four ranks with one have
the same loss, dropout included.

A framework's loss is a mean over its targets, of which microbatches have different numbers. So the gradient
of a microbatch counts by its targets; the is-next loss of the BERTs, a mean over pairs, by its windows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from brainflow.batch import PackedBatch, upload
from brainflow.config import PretrainConfig
from brainflow.frameworks import build
from brainflow.frameworks.base import Framework, freeze
from brainflow.models.transformer import Transformer
from brainflow.pretrained.warm_start import load_initial
from brainflow.training import checkpoint, parallel

from .compute import allow_tf32, compiles
from .meters import Meters, matrix_weights
from .optimizer import (
    LossScale,
    MovingAverage,
    allocate_state,
    autocast,
    guarded_step,
    make_optimizer,
    optimizer_tensors,
)


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
        *,
        fresh: bool = True,
    ) -> None:
        self.config, self.ranks, self.device = config, ranks, device
        train = config.train
        self.parts = rank_parts(train.micro_batches, ranks)
        # The same weights on every rank, whatever was drawn before.
        torch.manual_seed(derive_seed(train.seed, "weights"))
        allow_tf32(train.precision == "tf32")
        self.module = build(config.model)
        if not isinstance(self.module, Framework):
            raise ValueError(
                f"model.framework: {config.model.framework} builds a {type(self.module).__name__}, expected "
                "a subclass of brainflow.frameworks.base.Framework"
            )
        # While the weights are whole: below they may become shards.
        if train.init and fresh:
            load_initial(self.module, train.init)
        freeze(self.module, train.freeze)
        # A parameter without any gradient would make DDP look for such ones, which stops the GPU once a step.
        for parameter in self.module.untrained:
            parameter.requires_grad_(False)
        if not any(p.requires_grad for p in self.module.parameters()):
            raise ValueError(f"train.freeze: got {train.freeze}, which leaves nothing to train")
        # Only now: drawn on the CPU, the weights are the same whatever the device.
        self.module.to(device)
        self.weights = matrix_weights(self.module)
        self.trs = self.tokens = 0
        self._count_tokens()
        self._pair_gradient = PairGradient(self.module)
        self._mask_seed = derive_seed(train.seed, "masks")
        if compiles(train.compile, device):
            for part in self.module.modules():
                if isinstance(part, Transformer):
                    # Dynamic, since every batch has another number of tokens.
                    for block in part.blocks:
                        block.compile(dynamic=True)
        self.model = parallel.spread(self.module, ranks, train.parallel, device, train.precision)
        # Behind `spread`, because FSDP replaces the parameters by their shards.
        self.optimizer = make_optimizer(self.module, train)
        self.scale = LossScale(device) if train.precision == "fp16" else None
        self.ema = MovingAverage(self.module, train.ema) if train.ema else None
        self.meters = Meters(device)

    def __call__(self, batches: Iterator[PackedBatch], step: int, lr: float, *, stop: bool) -> StepNumbers:
        """Take optimizer step `step` (0-based) over the next batches of this rank, one a microbatch."""
        train = self.config.train
        microbatches = [self._fetch(batches, number) for number in self.parts]
        several = train.micro_batches > 1
        weights: list[LossWeight | None] = [None]  # the only microbatch is all of the step
        if several:
            weights = [*loss_weights(self.module, microbatches, self._total)]
        sums: dict[str, Tensor] = {}
        losses = []
        for number, batch, weight in zip(self.parts, microbatches, weights, strict=True):
            # torch has one generator a device: without a seed of its own, what a microbatch drops would
            # depend on whatever else has drawn from it, and on which rank computes it.
            seed_dropout(self._part_seed("dropout", step, number), self.device)
            loss, metrics = self._backward(batch, number, weight)
            losses.append(loss)
            found = {**metrics, "loss": loss} if weight is None else weight.weigh(loss, metrics)
            sums |= {name: sums[name] + value if name in sums else value for name, value in found.items()}
        total, metrics, asked = sums.pop("loss"), sums, None
        if several:
            total, metrics, asked = self._over_ranks(total, metrics, losses, stop)
        # Before clipping: the limit is meant for the gradients as they are.
        if self.scale is not None:
            self.scale.unscale(self.module)
        norm = parallel.whole(nn.utils.clip_grad_norm_(self.module.parameters(), train.clip))
        # Whether the step counts is decided on the device: to ask would stop it.
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
            # A step holds the BOLD of all its microbatches at once.
            others = [batch.bold.clone() for _ in self.parts[1:]]
            # As the last part, in whose backward pass gradients are exchanged between ranks.
            self._backward(batch, self.parts[-1], None)
            del others
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
        # Every rank raises, not only the one that found it: the others would wait in the next collective.
        count = torch.tensor([float(len(damaged))], device=self.device)
        if self.ranks.sum(count) > 0:
            raise ValueError(
                f"checkpoint: {path} is damaged (wrong checksum of {', '.join(damaged) or 'a file'}); "
                "delete it to continue from the one before"
            )
        names = [name for name in checkpoint.names(path) if name.startswith("optimizer.")]
        # AdamW has no state before its first step, and what is read needs a place to go.
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
        """Return the seed of a microbatch's masks."""
        # The first one's is the seed itself, as in a step that is not cut.
        if part == 0 or self.module.one_draw:
            return self._mask_seed
        return derive_seed(self._mask_seed, "part", part)

    def _fetch(self, batches: Iterator[PackedBatch], number: int) -> PackedBatch:
        """Return the next batch with its mask; it stays valid until the end of the step."""
        batch = next(batches)
        if number != self.parts[-1] and self.device.type == "cpu":
            # A loader on the CPU reads later batches into the same buffers.
            batch = replace(batch, bold=batch.bold.clone())
        return replace(batch, mask=self.module.mask(batch, seed=self.mask_seed(number)))

    def _backward(
        self, batch: PackedBatch, number: int, weight: LossWeight | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Add a microbatch's gradient; return its loss and metrics, detached."""
        train = self.config.train
        self.trs += batch.tokens
        self._pair_gradient.scale = None if weight is None else weight.windows / weight.targets
        with parallel.accumulating(self.model, last=number == self.parts[-1]):
            with autocast(self.device, train.precision):
                out = self.model(batch, seed=self.mask_seed(number))
            # Gradients of ranks are averaged, but weights are shares of the whole step: `world` undoes the
            # mean.
            loss = out.loss if weight is None else out.loss * (weight.targets * self.ranks.world)
            (loss if self.scale is None else loss * self.scale.values[0]).backward()
        return out.loss.detach(), out.metrics

    def _over_ranks(
        self, total: Tensor, metrics: dict[str, Tensor], losses: list[Tensor], stop: bool
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Sum a step's numbers over ranks in one collective, in which the wish to stop travels, too."""
        of_parts = torch.zeros(self.config.train.micro_batches, dtype=torch.float64, device=self.device)
        # Each rank fills in its own places and leaves zeros, so the sum holds every microbatch's loss:
        # their largest comes out of a collective that only adds.
        of_parts[self.parts[0] : self.parts[-1] + 1] = torch.stack(losses).double()
        asked = torch.full((1,), float(stop), dtype=torch.float64, device=self.device)
        sums = self.ranks.sum(torch.cat([torch.stack([total, *metrics.values()]).double(), asked, of_parts]))
        metrics = dict(zip(metrics, sums[1:], strict=False))
        count = 1 + len(metrics)
        metrics["loss_max"] = sums[count + 1 :].max()
        return sums[0], metrics, sums[count]

    def _total(self, counts: Tensor) -> Tensor:
        # By `upload`: a plain copy from pageable memory would wait for the stream.
        return self.ranks.sum(upload(self.device, counts=counts.numpy())["counts"])

    def _part_seed(self, purpose: str, step: int, part: int) -> int:
        # As with masks: the first part draws what a step draws that is not cut.
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


def derive_seed(seed: int, *parts: int | str) -> int:
    """Return a 63-bit seed for one purpose, such as the dropout of one step."""
    # Hashed: seed + step would give two purposes, or two seeds, the same numbers.
    text = ":".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def rank_parts(parts: int, ranks: parallel.Ranks) -> range:
    """Return the numbers of the parts of a batch that this rank computes."""
    each = parts // ranks.world
    return range(ranks.rank * each, (ranks.rank + 1) * each)


def seed_dropout(seed: int, device: torch.device) -> None:
    """Seed the generator that dropout draws from (torch.manual_seed would seed every backend, each step)."""
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


class LossWeight(NamedTuple):
    """What share of a step a microbatch has; float32, 0-d, on the device."""

    targets: Tensor
    windows: Tensor

    def weigh(self, loss: Tensor, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what a microbatch adds to the step's loss (`loss`) and metrics."""
        reconstruction = metrics.get("reconstruction", loss)
        weighed = {
            name: metric * (self.targets if name == "reconstruction" else self.windows)
            for name, metric in metrics.items()
        }
        return weighed | {"loss": self.targets * reconstruction + self.windows * (loss - reconstruction)}


def loss_weights(
    module: Framework, batches: Sequence[PackedBatch], total: Callable[[Tensor], Tensor]
) -> list[LossWeight]:
    """Return the weights of this rank's microbatches.

    Parameters
    ----------
    module
        Counts the targets.
    batches
        The microbatches of this rank, with their masks.
    total
        Sums counts, float64 [2], over all ranks; the one collective.
    """
    # At least 1: a step in which nothing is masked must not divide by 0.
    counts = [(max(1, module.num_targets(batch)), batch.windows) for batch in batches]
    summed = total(torch.tensor(counts, dtype=torch.float64).sum(dim=0))
    return [
        LossWeight((targets / summed[0]).float(), (windows / summed[1]).float())
        for targets, windows in counts
    ]


class PairGradient:
    """Scales the gradient of the is-next loss against that of the reconstruction.

    A backward pass weighs the whole loss by targets; at the logits of the head `is_next` its gradient is put
    right. (Two backward passes, or a second weighted sum, would round differently.) None leaves it as it is.
    """

    def __init__(self, module: nn.Module) -> None:
        self.scale: Tensor | None = None
        head = getattr(module, "is_next", None)
        if isinstance(head, nn.Module):
            head.register_forward_hook(self._hook)

    def _hook(self, head: nn.Module, given: Any, logits: Tensor) -> None:
        scale = self.scale
        if scale is not None and logits.requires_grad:
            logits.register_hook(lambda gradient: gradient * scale.to(gradient.dtype))
