"""Seq-BERT: predict masked time points from both sides, and whether two half windows belong together.

Each time point of a batch is masked, all its networks, with probability `mask_rate` (arXiv 2206.11417); with
`mask_span` whole spans of time points are. Masked time points are not read at all: the mask token's embedded
row takes their seats.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from brainflow.batch import Ints, PackedBatch, offsets, upload
from brainflow.frameworks.base import StepOutput, drawn_rows, whole_loss
from brainflow.frameworks.bert import BertFramework
from brainflow.frameworks.configs import SeqBERTConfig
from brainflow.kernels import MaskSpec
from brainflow.models.embedding import cast_input
from brainflow.models.linear_path import AROUND, LinearPath, NeighbourPath, around, everywhere


class SeqBERT(BertFramework):
    """Masked time points + is-next. See :class:`brainflow.frameworks.bert.BertFramework`."""

    config: SeqBERTConfig

    def __init__(self, config: SeqBERTConfig) -> None:
        super().__init__(config)
        self.mask_token = nn.Parameter(torch.randn(config.networks))
        self.linear_path = self.make_linear() if config.linear else None

    def make_linear(self) -> LinearPath:
        """Return a ridge from the nearest time points on both sides that are not masked."""
        return NeighbourPath(
            self.config.networks,
            lambda batch: around(batch.lengths, batch.mask),
            neighbours=2,
            kinds=len(AROUND),
            learn=lambda batch: everywhere(batch.lengths),
        )

    def mask(self, batch: PackedBatch, *, seed: int) -> Ints:
        """Draw the masked rows, int64 [masked]."""
        c = self.config
        if c.mask_span > 1:
            spec = MaskSpec.spans(c.mask_rate, c.mask_span, seed=seed, offset=batch.step)
        else:
            spec = MaskSpec.time_points(c.mask_rate, seed=seed, offset=batch.step)
        return drawn_rows(spec, batch.lengths)

    def num_targets(self, batch: PackedBatch) -> int:
        """Return the masked rows."""
        return len(batch.mask)

    def forward(self, batch: PackedBatch, *, seed: int) -> StepOutput:
        """Return loss and metrics; (`seed`, `batch.step`) fix the masks."""
        return self._output(batch, *self._predicting(batch, seed))

    def reconstruct(self, batch: PackedBatch, *, seed: int) -> tuple[Tensor, Tensor]:
        """Return predicted values, float32 [masked rows, networks], and their rows of `batch.bold`."""
        _, chosen, rows = self._predicting(batch, seed)
        return self.predicted(self.unembedding(chosen), batch, seed), rows

    def score(self, batch: PackedBatch, *, seed: int) -> tuple[StepOutput, Tensor, Tensor]:
        """Return the output, and the predicted values and their rows, from one encoding."""
        first, chosen, rows = self._predicting(batch, seed)
        values = self.predicted(self.unembedding(chosen), batch, seed)
        return self._output(batch, first, chosen, rows), values, rows

    def _output(self, batch: PackedBatch, first: Tensor, chosen: Tensor, rows: Tensor) -> StepOutput:
        target = batch.bold.index_select(0, rows)
        loss = whole_loss(chosen, self.unembedding, target, self.config.loss)
        return self.output(batch, first, loss)

    def _filled(self, batch: PackedBatch, rows: Ints) -> Tensor:
        """Return the mask token on top of the mean of each masked row's nearest neighbours that are seen."""
        read = around(batch.lengths, rows).read
        share = (read >= 0) / np.maximum((read >= 0).sum(1, keepdims=True), 1)
        # A side without a seen neighbour (-1) reads row 0, with a share of 0.
        sent = upload(batch.bold.device, read=np.maximum(read, 0), share=share[:, :, None].astype(np.float32))
        mean = (batch.bold[sent["read"]] * sent["share"]).sum(1)
        return cast_input(mean, self.mask_token) + self.mask_token

    def _predicting(self, batch: PackedBatch, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the hidden states of the first seats, those that predict, and the rows that they predict."""
        seating = self.seating(batch)
        rows: Ints = self.drawn(batch, seed)
        seen = np.ones(batch.tokens, bool)
        seen[rows] = False
        visible = np.flatnonzero(seen)
        sent = upload(batch.bold.device, visible=visible, rows=rows)
        given = batch.bold.index_select(0, sent["visible"])
        extra: tuple[Tensor, ...] = (self.mask_token,)
        source = np.where(seen, np.cumsum(seen) - 1, len(visible))
        if self.config.mask_fill == "neighbours":
            given, extra = torch.cat((cast_input(given, self.mask_token), self._filled(batch, rows))), ()
            source[rows] = len(visible) + np.arange(len(rows))
        first = offsets(seating.lengths)[:-1]
        wanted = np.concatenate((first, seating.read[rows]))
        hidden = self.encode(batch, seating, given, source, extra, wanted=wanted)
        cls, chosen = hidden.split((len(first), len(rows)))
        return cls, chosen, sent["rows"]
