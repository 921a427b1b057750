"""Causal sequence modelling: predict a masked time point from the time points before it (arXiv 2206.11417).

Three forms of one objective:

``single``
    As published: one position i of a window is drawn uniformly from [1, L), its values are replaced by
    the mask token, everything after it is cut off, and the model predicts the values at i.
``dense``
    The same for every i ≥ 1 in one pass. Time points run causally as usual. A second stream holds one
    mask token for each of them, with its position and time; its queries attend to the keys of the
    time points before i and to their own. What a mask token at i sees is exactly what it would see in
    ``single``, so the loss at i is the same number. Each i weighs 1 / (L - 1): the mean over windows of the
    mean over positions, which is the expectation of ``single``'s loss.
``next``
    No mask token: the hidden state at i - 1 predicts the values at i.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from brainflow.batch import Ints, PackedBatch, offsets, positions, upload, window_of
from brainflow.frameworks.base import (
    Framework,
    Pooling,
    StepOutput,
    drawn_rows,
    pool,
    whole_loss,
)
from brainflow.frameworks.configs import CSMConfig
from brainflow.kernels import MaskSpec, linear_masked_loss
from brainflow.models.embedding import BoldEmbedding
from brainflow.models.linear_path import LinearPath, NeighbourPath, Neighbours, before
from brainflow.models.transformer import Layout, Transformer, places


class CSM(Framework):
    """Causal sequence modelling with a GPT-2 transformer.

    Parameters
    ----------
    config
        Reads all of the architecture, loss and masking.
    """

    config: CSMConfig

    def __init__(self, config: CSMConfig) -> None:
        super().__init__()
        self.config = config
        c = config
        self.embedding = BoldEmbedding(c)
        self.mask_token = nn.Parameter(torch.randn(c.networks))
        self.cls_token = nn.Parameter(torch.randn(c.networks))
        self.transformer = Transformer("gpt", c)
        self.unembedding = nn.Linear(c.width, c.networks)
        self.linear_path = self.make_linear() if c.linear else None

    def make_linear(self) -> LinearPath:
        """Return a ridge from the two time points before (an autoregressive model of order 2)."""
        return NeighbourPath(self.config.networks, self._before, neighbours=2, kinds=2)

    def _before(self, batch: PackedBatch) -> Neighbours:
        drawn = self.config.masking == "single"
        return before(batch.lengths, batch.mask if drawn else np.flatnonzero(positions(batch.lengths)))

    @property
    def untrained(self) -> tuple[nn.Parameter, ...]:
        """The CLS token, which decoding appends; predicting the next time point has no mask token either."""
        return (self.cls_token, self.mask_token) if self.config.masking == "next" else (self.cls_token,)

    def mask(self, batch: PackedBatch, *, seed: int) -> Ints | None:
        """Draw the masked row of each window for `single`, int64 [windows]; the other forms draw nothing."""
        if self.config.masking != "single":
            return None
        return drawn_rows(MaskSpec.position(seed=seed, offset=batch.step), batch.lengths)

    def num_targets(self, batch: PackedBatch) -> int:
        """Return the windows: each weighs the same, however many of its time points are predicted."""
        return batch.windows

    def forward(self, batch: PackedBatch, *, seed: int) -> StepOutput:
        """Return the loss of one batch.

        Parameters
        ----------
        batch
            Windows of at least 2 time points.
        seed
            Seed of the masks; (`seed`, `batch.step`) fixes them.
        """
        return self._output(batch, *self._predicting(batch, seed))

    def reconstruct(self, batch: PackedBatch, *, seed: int) -> tuple[Tensor, Tensor]:
        """Return predicted values, float32 [masked rows, networks], and their rows of `batch.bold`."""
        return self._values(batch, seed, *self._predicting(batch, seed))

    def score(self, batch: PackedBatch, *, seed: int) -> tuple[StepOutput, Tensor, Tensor]:
        """Return the output, and the predicted values and their rows, from one encoding."""
        found = self._predicting(batch, seed)
        return self._output(batch, *found), *self._values(batch, seed, *found)

    def _output(self, batch: PackedBatch, hidden: Tensor, rows: Tensor, weights: Tensor | None) -> StepOutput:
        weight, bias, kind = self.unembedding.weight, self.unembedding.bias, self.config.loss
        if weights is None:
            loss = whole_loss(hidden, self.unembedding, batch.bold.index_select(0, rows), kind)
        else:
            loss = linear_masked_loss(
                hidden, weight, bias, batch.bold, None, loss=kind, rows=rows, row_weights=weights,
                cu_seqlens=batch.cu_seqlens,
            )  # fmt: skip
        return StepOutput(loss=loss, metrics={"reconstruction": loss.detach()})

    def _values(
        self, batch: PackedBatch, seed: int, hidden: Tensor, rows: Tensor, weights: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        chosen = hidden if weights is None else hidden.index_select(0, rows)
        return self.predicted(self.unembedding(chosen), batch, seed), rows

    def features(self, batch: PackedBatch, pooling: Pooling = "last") -> Tensor:
        """Return one vector a window, [windows, width], from the hidden states of the time points.

        "cls" appends the CLS token after the last time point, as the published decoding does.
        """
        lengths = batch.lengths.astype(np.int64)
        if pooling != "cls":
            return pool(self._time_points(batch, lengths, None), lengths, pooling)
        longer = lengths + 1
        content = np.empty(longer.sum(), np.int64)
        last = offsets(longer)[1:] - 1
        body = np.ones(len(content), bool)
        body[last] = False
        content[body], content[last] = np.arange(lengths.sum()), lengths.sum()
        return pool(self._time_points(batch, longer, content), longer, "last")

    def _predicting(self, batch: PackedBatch, seed: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the hidden states that predict, the rows of the batch that they predict, their weights.

        One hidden state a window and no weights for `single`; else a hidden state for every token of the
        batch, of which `rows` count, by their weights.
        """
        if batch.lengths.min() < 2:
            raise ValueError(
                "batch: got a window of 1 time point; CSM predicts a time point from those before it, so "
                "every window needs at least 2 (raise data.seq_min)"
            )
        if self.config.masking == "single":
            return self._single(batch, seed)
        lengths = batch.lengths.astype(np.int64)
        place = positions(lengths)
        rows = np.flatnonzero(place)
        weights = (1.0 / (lengths - 1)).astype(np.float32)[window_of(lengths)[rows]]
        where = places(self.config, place, window_of(lengths), batch)
        sent = upload(batch.bold.device, positions=where, rows=rows, weights=weights)
        layout = Layout(cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen, positions=sent["positions"])
        time = self.embedding.clock(batch.times)
        if self.config.masking == "next":
            x = self.embedding.finish(self.embedding(batch.bold), time)
            # Beside the time point that it predicts. What rolls over a window's border comes to stand at a
            # first time point, which is no target.
            hidden = self.transformer(x, layout).roll(1, 0)
        else:
            # The token goes through the projection as one more time point. Expanded, not repeated: mask
            # tokens differ by position and time only, which `finish` adds.
            embedded = self.embedding(batch.bold, self.mask_token[None])
            both = torch.stack((embedded[:-1], embedded[-1:].expand(len(place), -1)))
            hidden = self.transformer(self.embedding.finish(both, time), layout, two_streams=True)
        return hidden, sent["rows"], sent["weights"]

    def _single(self, batch: PackedBatch, seed: int) -> tuple[Tensor, Tensor, None]:
        """Windows cut after one masked position each; the values at and after it are never read."""
        rows: Ints = self.drawn(batch, seed)
        starts = offsets(batch.lengths)[:-1]
        cut = rows - starts + 1  # the masked position is the last that is kept
        place, last = positions(cut), offsets(cut)[1:] - 1
        source = place + np.repeat(starts, cut)
        # Only what is seen is projected: NaN at a masked position or after it changes nothing.
        visible = np.delete(source, last)
        content = np.empty(len(source), np.int64)
        seen = np.ones(len(source), bool)
        seen[last] = False
        # Row len(visible) is the mask token's, appended once for all windows.
        content[seen], content[last] = np.arange(len(visible)), len(visible)
        sent = upload(
            batch.bold.device,
            positions=places(self.config, place, window_of(cut), batch),
            cu=offsets(cut).astype(np.int32),
            source=source,
            visible=visible,
            content=content,
            last=last,
            rows=rows,
        )
        embedded = self.embedding(batch.bold.index_select(0, sent["visible"]), self.mask_token[None])
        time = self.embedding.clock(batch.times).index_select(0, sent["source"])
        x = self.embedding.finish(embedded.index_select(0, sent["content"]), time)
        layout = Layout(cu_seqlens=sent["cu"], max_seqlen=int(cut.max()), positions=sent["positions"])
        return self.transformer(x, layout, rows=sent["last"]), sent["rows"], None

    def _time_points(self, batch: PackedBatch, lengths: np.ndarray, content: np.ndarray | None) -> Tensor:
        """Return hidden states of the causal stream; `content` places the CLS token, row `tokens`."""
        time = self.embedding.clock(batch.times)
        if content is None:
            where = places(self.config, positions(lengths), window_of(lengths), batch)
            sent = upload(batch.bold.device, positions=where)
            layout = Layout(
                cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen, positions=sent["positions"]
            )
            return self.transformer(self.embedding.finish(self.embedding(batch.bold), time), layout)
        sent = upload(
            batch.bold.device,
            positions=places(self.config, positions(lengths), window_of(lengths), batch),
            cu=offsets(lengths).astype(np.int32),
            content=content,
        )
        time = torch.cat((time, time.new_full((1,), self.embedding.dummy.item()))).index_select(
            0, sent["content"]
        )
        embedded = self.embedding(batch.bold, self.cls_token[None]).index_select(0, sent["content"])
        layout = Layout(cu_seqlens=sent["cu"], max_seqlen=batch.max_seqlen + 1, positions=sent["positions"])
        return self.transformer(self.embedding.finish(embedded, time), layout)
