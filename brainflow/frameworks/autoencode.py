"""Autoencoder: encode a window into one vector, decode the window from it (arXiv 2206.11417).

While training, a whole batch is decoded with or without teacher forcing, drawn from (`seed`, `batch.step`).
In evaluation mode the decoder runs freely: what is measured is what the vector holds.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brainflow.batch import PackedBatch, upload
from brainflow.frameworks.base import Framework, Pooling, StepOutput, at_least_float, pool, whole_loss
from brainflow.frameworks.configs import AutoencoderConfig
from brainflow.models.autoencoder import Decoder, Encoder, Steps, time_major
from brainflow.models.embedding import BoldEmbedding
from brainflow.models.linear_path import PrincipalPath

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": F.l1_loss,
    "mse": F.mse_loss,
    "huber": F.huber_loss,
}


class Autoencoder(Framework):
    """LSTM sequence-to-sequence autoencoder.

    Parameters
    ----------
    config
        Reads networks, width, layers, dropout, encoding of time, loss, teacher_forcing and chained_states.
    """

    one_draw = True  # teacher forcing

    config: AutoencoderConfig

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        c = config
        self.embedding = BoldEmbedding(c)
        self.encoder = Encoder(c.width, c.layers, c.dropout, c.chained_states)
        self.decoder = Decoder(c.width, c.layers, c.dropout, c.chained_states)
        self.unembedding = nn.Linear(c.width, c.networks)
        self.linear_path: PrincipalPath | None = self.make_linear() if c.linear else None
        if self.linear_path is not None:  # begins as the principal components
            for part in (self.encoder.pooler, self.unembedding):
                nn.init.zeros_(part.weight)
                nn.init.zeros_(part.bias)

    def make_linear(self) -> PrincipalPath:
        """Return principal components, as many as the vector of a window has numbers.

        With it the encoder adds to the components' code, and the decoder to what they reconstruct from it.
        """
        return PrincipalPath(self.config.networks, self.config.width)

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
        return self._output(batch, *self._decoded(batch, forced))

    def reconstruct(self, batch: PackedBatch, *, seed: int) -> tuple[Tensor, Tensor]:
        """Return all values decoded freely, float32 [tokens, networks], and all rows, whatever the `seed`."""
        return self._values(batch, seed, *self._decoded(batch, forced=False))

    def score(self, batch: PackedBatch, *, seed: int) -> tuple[StepOutput, Tensor, Tensor]:
        """Return the output, and all values and all rows, from one encoding that is decoded freely."""
        decoded = self._decoded(batch, forced=False)
        return self._output(batch, *decoded), *self._values(batch, seed, *decoded)

    def _output(self, batch: PackedBatch, decoded: Tensor, linear: Tensor | None) -> StepOutput:
        if linear is None:
            loss = whole_loss(decoded, self.unembedding, batch.bold, self.config.loss)
        else:
            values = at_least_float(self.unembedding(decoded)) + linear
            loss = LOSSES[self.config.loss](values, batch.bold.to(values.dtype))
        return StepOutput(loss=loss, metrics={"reconstruction": loss.detach()})

    def _values(
        self, batch: PackedBatch, seed: int, decoded: Tensor, linear: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        values = at_least_float(self.unembedding(decoded))
        values = values if linear is None else values + linear
        return self.predicted(values, batch, seed), torch.arange(batch.tokens, device=values.device)

    def features(self, batch: PackedBatch, pooling: Pooling = "cls") -> Tensor:
        """Return one vector a window, [windows, width]: "cls" is the pooled vector that the decoder gets."""
        embedded, steps, sent = self._embedded(batch)
        states, pooled, _ = self.encoder(embedded, steps)
        if pooling == "cls":
            return self._coded(batch, pooled, sent).index_select(0, sent["ranks"])
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

    def _coded(self, batch: PackedBatch, pooled: Tensor, sent: dict[str, Tensor]) -> Tensor:
        """Return the windows' vectors, [windows, width] by rank: what was pooled, on top of the code."""
        if self.linear_path is None:
            return pooled
        code = torch.empty_like(pooled).index_copy_(
            0, sent["ranks"], self.linear_path.code(batch).to(pooled.dtype)
        )
        return pooled + code

    def _decoded(self, batch: PackedBatch, forced: bool) -> tuple[Tensor, Tensor | None]:
        """Return decoded hidden states [tokens, width] and what components reconstruct [tokens, networks]."""
        embedded, steps, sent = self._embedded(batch)
        _, pooled, ended = self.encoder(embedded, steps)
        pooled = self._coded(batch, pooled, sent)
        linear = None
        if self.linear_path is not None:
            linear = self.linear_path.expand(pooled.index_select(0, sent["ranks"]), batch)
        if self.config.chained_states:  # teacher forcing of 2022 gives a step the very value that it predicts
            decoded = self.decoder.run_free(pooled, steps, ended, given=embedded if forced else None)
        elif forced:
            # Rows behind the last token: what a window's first time point has before it.
            nothing = torch.zeros_like(pooled)
            before = torch.cat((embedded, nothing)).index_select(0, sent["before"])
            decoded = self.decoder(pooled, before, steps)
        else:
            decoded = self.decoder.run_free(pooled, steps)
        return decoded.index_select(0, sent["back"]), linear


def _uniform(seed: int, step: int) -> float:
    return float(np.random.default_rng((seed, step)).random())
