"""Net-BERT: predict masked networks from the others, and whether two half windows belong together.

Each network is masked with probability `mask_rate` over the whole sequence, both halves (arXiv 2206.11417);
with `mask_span` over that many time points at a time. The mask token is one learned scalar per position.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from brainflow.batch import PackedBatch, offsets, upload
from brainflow.frameworks.base import StepOutput
from brainflow.frameworks.bert import BertFramework
from brainflow.frameworks.configs import NetBERTConfig
from brainflow.kernels import MaskSpec, linear_masked_loss, mask_tokens
from brainflow.models.embedding import cast_input
from brainflow.models.linear_path import LinearPath, NetworkPath


class NetBERT(BertFramework):
    """Masked networks + is-next. See :class:`brainflow.frameworks.bert.BertFramework`."""

    config: NetBERTConfig

    def __init__(self, config: NetBERTConfig) -> None:
        super().__init__(config)
        self.mask_token = nn.Parameter(torch.randn(config.max_positions, 1))
        self.linear_path = self.make_linear() if config.linear else None

    def make_linear(self) -> LinearPath:
        """Return the conditional mean of masked networks, given the others of the same time point."""
        return NetworkPath(self.config.networks, self._masked)

    def _masked(self, batch: PackedBatch) -> Tensor:
        """Return which values of a batch that carries its mask are masked, bool [tokens, networks]."""
        bounds = upload(batch.bold.device, cu=self._bounds(batch))["cu"]
        masked: Tensor = batch.mask.dense(bounds, self.config.networks)
        return masked

    def mask(self, batch: PackedBatch, *, seed: int) -> MaskSpec:
        """Return the mask, which the kernels draw where they need it."""
        c = self.config
        if c.mask_span > 0:
            return MaskSpec.tubes(c.mask_rate, c.mask_span, seed=seed, offset=batch.step)
        return MaskSpec.networks(c.mask_rate, seed=seed, offset=batch.step)

    def num_targets(self, batch: PackedBatch) -> int:
        """Return the masked values, counted on the host."""
        mask, bounds = batch.mask, self._bounds(batch)
        if self.config.mask_span > 0:
            return int(mask.dense(torch.from_numpy(bounds), self.config.networks).sum())
        # The same networks over the whole sequence: one time point of each sequence tells how many.
        ones = torch.arange(len(bounds), dtype=torch.int32)
        count = mask.dense(ones, self.config.networks).sum(dim=1).numpy()
        return int(count @ np.diff(bounds))

    def _bounds(self, batch: PackedBatch) -> NDArray[np.int32]:
        """Return the offsets of the sequences, both halves of a pair together."""
        return offsets(batch.lengths)[:: 1 if batch.is_next is None else 2].astype(np.int32)

    def forward(self, batch: PackedBatch, *, seed: int) -> StepOutput:
        """Return loss and metrics; (`seed`, `batch.step`) fix the masks."""
        return self._output(batch, seed, *self._predicting(batch, seed))

    def reconstruct(self, batch: PackedBatch, *, seed: int) -> tuple[Tensor, Tensor]:
        """Return predicted values and their rows of `batch.bold`.

        The values are float32 [tokens, networks], NaN where a network was not masked: those were given, not
        predicted. The rows are all tokens.
        """
        _, read, cu_seqlens = self._predicting(batch, seed)
        return self._values(batch, seed, read, cu_seqlens)

    def score(self, batch: PackedBatch, *, seed: int) -> tuple[StepOutput, Tensor, Tensor]:
        """Return the output, and the predicted values and their rows, from one encoding."""
        first, read, cu_seqlens = self._predicting(batch, seed)
        output = self._output(batch, seed, first, read, cu_seqlens)
        return output, *self._values(batch, seed, read, cu_seqlens)

    def _output(
        self, batch: PackedBatch, seed: int, first: Tensor, read: Tensor, cu_seqlens: Tensor
    ) -> StepOutput:
        loss = linear_masked_loss(
            read,
            self.unembedding.weight,
            self.unembedding.bias,
            batch.bold,
            self.drawn(batch, seed),
            loss=self.config.loss,
            cu_seqlens=cu_seqlens,
        )
        return self.output(batch, first, loss)

    def _values(
        self, batch: PackedBatch, seed: int, read: Tensor, cu_seqlens: Tensor
    ) -> tuple[Tensor, Tensor]:
        masked = self.drawn(batch, seed).dense(cu_seqlens, self.config.networks)
        values = self.predicted(self.unembedding(read), batch, seed).masked_fill(~masked, torch.nan)
        return values, torch.arange(batch.tokens, device=values.device)

    def _predicting(self, batch: PackedBatch, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the hidden states of the first seats, those that predict, the offsets of the sequences."""
        seating = self.seating(batch)
        sent = upload(batch.bold.device, cu=self._bounds(batch))
        bold = mask_tokens(
            cast_input(batch.bold, self.mask_token),
            self.drawn(batch, seed),
            self.mask_token,
            cu_seqlens=sent["cu"],
        )
        # The last block computes only what is read: the first seats, for is-next, and the time points.
        first = offsets(seating.lengths)[:-1]
        wanted = np.concatenate((first, seating.read))
        hidden = self.encode(batch, seating, bold, np.arange(batch.tokens), wanted=wanted)
        cls, read = hidden.split((len(first), batch.tokens))
        return cls, read, sent["cu"]
