"""What Seq-BERT and Net-BERT share: half windows between special tokens, and whether two belong together.

A sequence is [CLS, first half, SEP, second half, SEP] (or [CLS, window, SEP] where windows do not come in
pairs), token type 0 up to the first SEP and 1 after it. The half windows arrive packed; where each time point
and each special token goes is index arithmetic on the host, and one gather of embedded rows puts them there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brainflow.batch import Ints, PackedBatch, offsets, positions, upload, window_of
from brainflow.frameworks.base import Framework, Pooling, StepOutput, pool
from brainflow.frameworks.configs import BertConfig
from brainflow.kernels.dropout import Dropout
from brainflow.models.embedding import BoldEmbedding
from brainflow.models.transformer import Layout, Transformer, places


@dataclass(frozen=True, kw_only=True)
class Seats:
    """Which seat of the packed sequences a token takes; host arrays.

    Attributes
    ----------
    time_points
        int64 [tokens], seat of each time point of the batch.
    cls, sep
        int64 [sequences] and [windows], seats of the special tokens.
    read
        int64 [tokens], seat whose hidden state predicts a time point: its own, or the next (`late`).
    types
        int64 [seats], 0 in the first half and 1 in the second.
    lengths
        int64 [sequences], seats of each sequence.
    """

    time_points: Ints
    cls: Ints
    sep: Ints
    read: Ints
    types: Ints
    lengths: Ints


def seats(lengths: np.ndarray, halves: int, late: bool = False) -> Seats:
    """Lay `halves` consecutive windows at a time into sequences with special tokens.

    Parameters
    ----------
    lengths
        Host int [windows], time points of each.
    halves
        Windows a sequence, 1 or 2.
    late
        The layout that the BERT models released in 2022 were trained with: CLS after the sequence, token
        types and reading shifted right by one.

    Examples
    --------
    >>> s = seats(np.array([2, 1]), 2)      # CLS a a SEP b SEP
    >>> s.time_points.tolist(), s.cls.tolist(), s.sep.tolist(), s.types.tolist()
    ([1, 2, 4], [0], [3, 5], [0, 0, 0, 0, 1, 1])
    """
    lengths = lengths.astype(np.int64)
    order = np.arange(len(lengths)) % halves
    before = (order == 0) & (not late)
    after = (order == halves - 1) & late
    room = lengths + 1 + before + after
    begin = offsets(room)[:-1] + before
    time_points = np.repeat(begin, lengths) + positions(lengths)
    sequences = room.reshape(-1, halves).sum(1)
    first = offsets(sequences)
    types = np.repeat(order, room)
    if late:
        types = np.roll(types, 1)
        # To a first seat the roll has brought the last type of the sequence before.
        types[first[:-1]] = 0
    return Seats(
        time_points=time_points,
        cls=first[1:] - 1 if late else first[:-1],
        sep=begin + lengths,
        read=time_points + late,
        types=types,
        lengths=sequences,
    )


class BertFramework(Framework):
    """A BERT over half windows with the is-next objective; the masks are the subclasses'.

    Parameters
    ----------
    config
        Reads all of the architecture, loss, mask_rate, mask_span and late_read.
    """

    config: BertConfig

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        c = config
        self.embedding = BoldEmbedding(c)
        self.cls_token = nn.Parameter(torch.randn(c.networks))
        self.sep_token = nn.Parameter(torch.randn(c.networks))
        self.transformer = Transformer("bert", c)
        self.is_next = IsNextHead(c.width, c.dropout)
        self.unembedding = nn.Linear(c.width, c.networks)

    def features(self, batch: PackedBatch, pooling: Pooling = "last") -> Tensor:
        """Return one vector a window, [windows, width]; "cls" is the first token of the sequence.

        Each window is a sequence of its own, also in a batch of pairs.
        """
        seating = seats(batch.lengths, 1, self.config.late_read)
        wanted = offsets(seating.lengths)[:-1] if pooling == "cls" else seating.time_points
        hidden = self.encode(batch, seating, batch.bold, np.arange(batch.tokens), wanted=wanted)
        return hidden if pooling == "cls" else pool(hidden, batch.lengths, pooling)

    def encode(
        self,
        batch: PackedBatch,
        seating: Seats,
        bold: Tensor,
        source: Ints,
        extra: tuple[Tensor, ...] = (),
        wanted: Ints | None = None,
    ) -> Tensor:
        """Return the hidden states of all seats [seats, width], or of those that are wanted.

        Parameters
        ----------
        batch
            Gives the times.
        seating
            From :func:`seats`.
        bold
            [rows, networks], the time points that the encoder may see.
        source
            Host int64 [tokens]: for each time point of the batch its row of `bold`, or rows + i for
            `extra[i]`.
        extra
            Further special tokens, [networks] each.
        wanted
            Host int64 [n], seats whose hidden states are returned, [n, width].
        """
        total = int(seating.lengths.sum())
        # Every token is a row of one table, time points first, so that one gather seats them all.
        content = np.empty(total, np.int64)
        content[seating.time_points] = source
        content[seating.cls] = bold.shape[0] + len(extra)
        content[seating.sep] = bold.shape[0] + len(extra) + 1
        dummy = self.embedding.dummy
        # halves of a pair may have different TRs only if they are of different runs; the first one's counts
        halves = len(batch.lengths) // len(seating.lengths)
        sequence = window_of(seating.lengths) * halves
        sent = upload(
            bold.device,
            content=content,
            points=seating.time_points,
            time=np.full(total, dummy, dummy.dtype),
            positions=places(self.config, positions(seating.lengths), sequence, batch),
            types=seating.types,
            cu=offsets(seating.lengths).astype(np.int32),
            **({} if wanted is None else {"wanted": wanted}),
        )
        special = torch.stack((*extra, self.cls_token, self.sep_token))
        embedded = self.embedding(bold, special).index_select(0, sent["content"])
        time = sent["time"].index_copy(0, sent["points"], self.embedding.clock(batch.times))
        layout = Layout(
            cu_seqlens=sent["cu"],
            max_seqlen=int(seating.lengths.max()),
            positions=sent["positions"],
            token_types=sent["types"],
        )
        return self.transformer(self.embedding.finish(embedded, time), layout, rows=sent.get("wanted"))

    def seating(self, batch: PackedBatch) -> Seats:
        """Return the seats of a training batch: pairs where it has `is_next`, else single windows."""
        return seats(batch.lengths, 1 if batch.is_next is None else 2, self.config.late_read)

    def output(self, batch: PackedBatch, first: Tensor, reconstruction: Tensor) -> StepOutput:
        """Return the step's loss: reconstruction, plus the is-next loss where the batch has pairs.

        Parameters
        ----------
        batch
            The batch.
        first
            [sequences, width], hidden states of the first seats.
        reconstruction
            Scalar.
        """
        metrics = {"reconstruction": reconstruction.detach()}
        if batch.is_next is None:
            return StepOutput(loss=reconstruction, metrics=metrics)
        # The published labels say 1 where the second half does NOT follow.
        labels = 1.0 - batch.is_next if self.config.late_read else batch.is_next
        is_next, accuracy = self.is_next.loss(first, labels)
        metrics.update(is_next=is_next.detach(), is_next_accuracy=accuracy)
        return StepOutput(loss=reconstruction + is_next, metrics=metrics)


class IsNextHead(nn.Module):
    """BERT's pooler (Linear + tanh) and a Linear to one logit, which says if the second half follows."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.pooler = nn.Linear(width, width)
        self.dropout = Dropout(dropout)
        self.output = nn.Linear(width, 1)

    def forward(self, first: Tensor) -> Tensor:
        """Return logits [sequences] of the hidden states of the first tokens, [sequences, width]."""
        return self.output(self.dropout(torch.tanh(self.pooler(first)))).squeeze(-1)

    def loss(self, first: Tensor, is_next: Tensor) -> tuple[Tensor, Tensor]:
        """Return binary cross-entropy and accuracy against `is_next` [sequences], 1 where it follows."""
        logits = self(first).float()
        accuracy = ((logits.detach() > 0) == is_next).mean(dtype=torch.float32)
        return F.binary_cross_entropy_with_logits(logits, is_next), accuracy
