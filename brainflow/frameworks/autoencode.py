"""Autoencoder: encode a window into one vector, decode the window from it (arXiv 2206.11417).

While training, a whole batch is decoded with or without teacher forcing, drawn from (`seed`, `batch.step`).
In evaluation mode the decoder runs freely: what is measured is what the vector holds.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from brainflow.batch import PackedBatch, upload
from brainflow.config import ModelConfig
from brainflow.frameworks.base import Framework, Pooling, StepOutput, at_least_float, pool, whole_loss
from brainflow.models.autoencoder import Decoder, Encoder, Steps, time_major
from brainflow.models.embedding import BoldEmbedding


class Autoencoder(Framework):
    """LSTM sequence-to-sequence autoencoder.

    Parameters
    ----------
    config
        Reads networks, width, layers, dropout, encoding of time, loss, teacher_forcing and chained_states.
    """

    one_draw = True  # teacher forcing

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        c = config
        self.embedding = BoldEmbedding(c)
        self.encoder = Encoder(c.width, c.layers, c.dropout, c.chained_states)
        self.decoder = Decoder(c.width, c.layers, c.dropout, c.chained_states)
        self.unembedding = nn.Linear(c.width, c.networks)

    @property
    def varying(self) -> bool:
        """Teacher forcing of 2022 leaves the pooler out."""
        return self.config.chained_states

    def mask(self, batch: PackedBatch, *, seed: int) -> bool:
        """Draw whether the batch is decoded with teacher forcing; no value is hidden."""
        return _uniform(seed, batch.step) < self.config.teacher_forcing

    def num_targets(self, batch: PackedBatch) -> int:
        """Return the time points: all of them are predicted."""
        return batch.tokens

    def forward(self, batch: PackedBatch, *, seed: int) -> StepOutput:
        """Return the loss over all values of all windows; `seed` decides about teacher forcing."""
        forced = self.training and self.drawn(batch, seed)
        return self._output(batch, self._decoded(batch, forced))

    def reconstruct(self, batch: PackedBatch, *, seed: int) -> tuple[Tensor, Tensor]:
        """Return all values decoded freely, float32 [tokens, networks], and all rows, whatever the `seed`."""
        return self._values(batch, self._decoded(batch, forced=False))

    def score(self, batch: PackedBatch, *, seed: int) -> tuple[StepOutput, Tensor, Tensor]:
        """Return the output, and all values and all rows, from one encoding that is decoded freely."""
        decoded = self._decoded(batch, forced=False)
        return self._output(batch, decoded), *self._values(batch, decoded)

    def _output(self, batch: PackedBatch, decoded: Tensor) -> StepOutput:
        loss = whole_loss(decoded, self.unembedding, batch.bold, self.config.loss)
        return StepOutput(loss=loss, metrics={"reconstruction": loss.detach()})

    def _values(self, batch: PackedBatch, decoded: Tensor) -> tuple[Tensor, Tensor]:
        values = self.unembedding(decoded)
        return at_least_float(values), torch.arange(batch.tokens, device=values.device)

    def features(self, batch: PackedBatch, pooling: Pooling = "cls") -> Tensor:
        """Return one vector a window, [windows, width]: "cls" is the pooled vector that the decoder gets."""
        embedded, steps, sent = self._embedded(batch)
        states, pooled, _ = self.encoder(embedded, steps)
        if pooling == "cls":
            return pooled.index_select(0, sent["ranks"])
        return pool(states.index_select(0, sent["back"]), batch.lengths, pooling)

    def _embedded(self, batch: PackedBatch) -> tuple[Tensor, Steps, dict[str, Tensor]]:
        """Return embedded time points, time-major [tokens, width], their order, and its tensors."""
        order = time_major(batch.lengths)
        names = ("order", "back", "before", "after", "last", "ranks")
        sent = upload(batch.bold.device, **{name: getattr(order, name) for name in names})
        time = self.embedding.clock(batch.times)
        packed = self.embedding.finish(self.embedding(batch.bold), time)
        steps = Steps(
            before=sent["before"], after=sent["after"], last=sent["last"], batch_sizes=order.batch_sizes
        )
        return packed.index_select(0, sent["order"]), steps, sent

    def _decoded(self, batch: PackedBatch, forced: bool) -> Tensor:
        """Return decoded hidden states in packed order, [tokens, width]."""
        embedded, steps, sent = self._embedded(batch)
        _, pooled, ended = self.encoder(embedded, steps)
        if self.config.chained_states:  # teacher forcing of 2022 gives a step the very value that it predicts
            decoded = self.decoder.run_free(pooled, steps, ended, given=embedded if forced else None)
        elif forced:
            nothing = torch.zeros_like(pooled)
            before = torch.cat((embedded, nothing)).index_select(0, sent["before"])
            decoded = self.decoder(pooled, before, steps)
        else:
            decoded = self.decoder.run_free(pooled, steps)
        return decoded.index_select(0, sent["back"])


def _uniform(seed: int, step: int) -> float:
    return float(np.random.default_rng((seed, step)).random())
