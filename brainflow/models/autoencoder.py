"""LSTM encoder and decoder over packed windows (Hochreiter & Schmidhuber 1997; sizes as arXiv 2206.11417).

LSTMs read time-major: all first time points, then all second ones, windows sorted from long to short, so that
step t is a prefix of the windows. :func:`time_major` computes that order on the host; there is no padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from brainflow.batch import Ints, offsets, positions, window_of
from brainflow.kernels import feedback
from brainflow.kernels.dropout import Dropout
from brainflow.models.recurrence import Gathered, Left, LSTMPass, LSTMStep
from brainflow.models.transformer import cast_all


@dataclass(frozen=True, kw_only=True)
class TimeMajor:
    """The time-major order of packed windows; host arrays.

    Attributes
    ----------
    order
        int64 [tokens], packed row of each time-major row.
    back
        int64 [tokens], time-major row of each packed row.
    before, after
        int64 [tokens], time-major row of the time point before (after) each time-major row; where there is
        none, `tokens` + rank of the window.
    last
        int64 [windows], time-major row of each window's last time point, by rank.
    ranks
        int64 [windows], rank of each window.
    batch_sizes
        int64 [steps], windows that are still running at each step.
    """

    order: Ints
    back: Ints
    before: Ints
    after: Ints
    last: Ints
    ranks: Ints
    batch_sizes: Ints


def time_major(lengths: np.ndarray) -> TimeMajor:
    """Return the order in which LSTMs read windows of these lengths, host int [windows].

    Examples
    --------
    >>> t = time_major(np.array([1, 3]))    # packed rows: a0 | b0 b1 b2; the longer window has rank 0
    >>> t.order.tolist(), t.batch_sizes.tolist(), t.before.tolist(), t.after.tolist()
    ([1, 0, 2, 3], [2, 1, 1], [4, 5, 0, 2], [2, 5, 3, 4])
    """
    lengths = lengths.astype(np.int64)
    tokens = int(lengths.sum())
    # Stable, so that the order of equally long windows is not NumPy's to choose.
    windows = np.argsort(-lengths, kind="stable")
    ranks = np.empty_like(windows)
    ranks[windows] = np.arange(len(windows))
    batch_sizes = len(lengths) - np.searchsorted(np.sort(lengths), np.arange(lengths.max()), side="right")
    place, rank = positions(lengths), ranks[window_of(lengths)]
    back = offsets(batch_sizes)[place] + rank
    order = np.empty(tokens, np.int64)
    order[back] = np.arange(tokens)
    final = place == np.repeat(lengths, lengths) - 1
    # `roll` crosses the borders of windows, just where the other side is taken.
    before = np.where(place > 0, np.roll(back, 1), tokens + rank)
    after = np.where(final, tokens + rank, np.roll(back, -1))
    return TimeMajor(
        order=order,
        back=back,
        before=before[order],
        after=after[order],
        last=back[final][windows],
        ranks=ranks,
        batch_sizes=batch_sizes,
    )


@dataclass(frozen=True, kw_only=True)
class Steps:
    """What the LSTMs need of a :class:`TimeMajor`: index tensors on the model's device, sizes on the host."""

    before: Tensor
    after: Tensor
    last: Tensor
    batch_sizes: Ints


States = tuple[Tensor, Tensor]


def run_lstm(lstm: nn.LSTM, x: Tensor, steps: Steps, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Run one LSTM layer over all steps, by cuDNN on CUDA and by :class:`LSTMPass` on the CPU.

    Parameters
    ----------
    lstm
        One layer; its weights are used.
    x
        [tokens, width], time-major.
    steps
        The order.
    start
        [windows, width] by rank, hidden states before the first step; None: zeros.

    Returns
    -------
    tuple
        Hidden states [tokens, directions, width] and final ones [windows, directions, width].
    """
    directions, size = 2 if lstm.bidirectional else 1, (len(steps.last), lstm.hidden_size)
    if x.is_cuda:
        zeros = x.new_zeros(directions, *size)
        state = zeros if start is None else start.expand(directions, -1, -1).contiguous()
        out, (final, _) = run_packed(lstm, x, steps, (state, zeros))
        return out, final.transpose(0, 1)
    first = x.new_zeros(size) if start is None else start
    sizes = tuple(steps.batch_sizes.tolist())
    runs, finals = [], []
    for name, previous, end in (("", steps.before, steps.last), ("_reverse", steps.after, None))[:directions]:
        weights = [getattr(lstm, f"{kind}_l0{name}") for kind in ("weight_ih", "weight_hh")]
        # PyTorch has two biases for cuDNN's sake; only their sum counts.
        bias = getattr(lstm, f"bias_ih_l0{name}") + getattr(lstm, f"bias_hh_l0{name}")
        hidden = LSTMPass.apply(x, *weights, bias, first, previous, sizes, end is None)
        runs.append(hidden)
        # Read from its end a window ends at its first time point: these are the first rows, by rank.
        finals.append(hidden[: len(first)] if end is None else hidden.index_select(0, end))
    return torch.stack(runs, 1), torch.stack(finals, 1)


def run_packed(lstm: nn.LSTM, x: Tensor, steps: Steps, state: States) -> tuple[Tensor, States]:
    """Run PyTorch's own packed LSTM from hidden and cell states [directions, windows, width] by rank.

    Returns
    -------
    tuple
        Hidden states [tokens, directions, width], and the states that it ended with.
    """
    out, ended = lstm(PackedSequence(x, torch.from_numpy(steps.batch_sizes)), state)
    return out.data.unflatten(1, (state[0].shape[0], -1)), ended


class Encoder(nn.Module):
    """Bidirectional LSTMs, directions averaged, residual + LayerNorm between layers, and a pooler.

    Parameters
    ----------
    width, layers
        Hidden width, LSTM layers.
    dropout
        Probability after each LayerNorm and before the pooler.
    chained
        Whether a layer starts from the states that the one below it ended with, not from zeros.
    """

    def __init__(self, width: int, layers: int, dropout: float, chained: bool = False) -> None:
        super().__init__()
        self.chained = chained
        self.lstms = nn.ModuleList(nn.LSTM(width, width, bidirectional=True) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers - 1))
        self.pooler = nn.Linear(width, width)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, steps: Steps) -> tuple[Tensor, Tensor, Tensor]:
        """Return time-major states [tokens, width], pooled vectors and final states [windows, width] by rank.

        Parameters
        ----------
        x
            [tokens, width], time-major.
        steps
            The order.
        """
        state = (x.new_zeros(2, len(steps.last), x.shape[1]),) * 2
        for layer, lstm in enumerate(self.lstms):
            # Only PyTorch's own starts from cells, too; those of `LSTMPass` start at 0.
            if self.chained:
                out, state = run_packed(cast(nn.LSTM, lstm), x, steps, state)
                final = state[0].transpose(0, 1)
            else:
                out, final = run_lstm(cast(nn.LSTM, lstm), x, steps)
            out = out.mean(1)
            last = layer == len(self.lstms) - 1
            x = out if last else self.dropout(self.norms[layer](x + out))
        ended = final.mean(1)
        return x, torch.tanh(self.pooler(self.dropout(ended))), ended


class Decoder(nn.Module):
    """Unidirectional LSTMs that start from the pooled vector and read the value before each time point.

    That value is the true one, embedded, under teacher forcing, and else the decoder's own output before; a
    row of zeros stands before the first. Every layer starts with the pooled vector as its hidden state.

    `chained`, the decoder of 2022: at every step a layer goes on from the states of the layer below it and
    the first from those of the last; it starts from the encoder's final states and reads the pooled vector.
    """

    def __init__(self, width: int, layers: int, dropout: float, chained: bool = False) -> None:
        super().__init__()
        self.chained = chained
        self.lstms = nn.ModuleList(nn.LSTM(width, width) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers - 1))
        self.output = nn.Linear(width, width)
        self.dropout = Dropout(dropout)

    def forward(self, pooled: Tensor, before: Tensor, steps: Steps) -> Tensor:
        """Return outputs [tokens, width], time-major, under teacher forcing: one pass over all steps a layer.

        Parameters
        ----------
        pooled
            [windows, width] by rank.
        before
            [tokens, width], time-major: embedded value before each time point.
        steps
            The order.
        """
        x = before
        for layer, lstm in enumerate(self.lstms):
            out = run_lstm(cast(nn.LSTM, lstm), x, steps, pooled)[0][:, 0]
            last = layer == len(self.lstms) - 1
            x = out if last else self.dropout(self.norms[layer](x + out))
        return self.output(self.dropout(x))

    def run_free(
        self, pooled: Tensor, steps: Steps, ended: Tensor | None = None, given: Tensor | None = None
    ) -> Tensor:
        """Return outputs as :meth:`forward` does, each step reading the output of the step before.

        Parameters
        ----------
        pooled, steps
            As there.
        ended
            [windows, width] by rank, the encoder's final states; for `chained` only.
        given
            [tokens, width], time-major: what each step reads instead of the output before.
        """
        # The kernels add up in float32, and know no chained states.
        if pooled.is_cuda and feedback.HAS_TRITON and pooled.dtype != torch.float64 and not self.chained:
            return self._run_free_fused(pooled, steps)
        slots = [0] * len(self.lstms) if self.chained else list(range(len(self.lstms)))
        hidden = [pooled if ended is None else ended] * len(self.lstms)
        cells = [torch.zeros_like(pooled)] * len(self.lstms)
        gathered = [Left() for _ in self.lstms]
        weights = [
            _gathered(cast(nn.LSTM, lstm), left) for lstm, left in zip(self.lstms, gathered, strict=True)
        ]
        fed, outputs = pooled if self.chained else torch.zeros_like(pooled), []
        inputs = None if given is None else given.split(steps.batch_sizes.tolist())
        for step, running in enumerate(steps.batch_sizes.tolist()):
            x = fed[:running] if inputs is None else inputs[step]
            for i, (slot, (weight, bias)) in enumerate(zip(slots, weights, strict=True)):
                state = hidden[slot][:running], cells[slot][:running]
                h, cells[slot] = LSTMStep.apply(x, *state, weight, bias, gathered[i])
                hidden[slot] = h
                last = i == len(weights) - 1
                x = h if last else self.dropout(self.norms[i](x + h))
            fed = self.output(self.dropout(x))
            outputs.append(fed)
        return torch.cat(outputs)

    def _run_free_fused(self, pooled: Tensor, steps: Steps) -> Tensor:
        """Return what :meth:`run_free` does, by a kernel a layer and step."""
        kind = pooled.device.type
        half = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if half else pooled.dtype
        # All of dropout's factors at once, from the module's own generator: what it makes of ones.
        keep = self.dropout(pooled.new_ones(len(self.lstms), len(steps.before), pooled.shape[1], dtype=dtype))
        norms = [cast(nn.LayerNorm, norm) for norm in self.norms]
        layers: list[Tensor] = []
        with torch.autocast(kind, enabled=False):
            for lstm in self.lstms:
                inputs, recurrent, bias_ih, bias_hh = cast(nn.LSTM, lstm).all_weights[0]
                layers += inputs, recurrent, bias_ih + bias_hh
            # The projection becomes part of the lowest layer's weights, so that no step waits for it.
            first_bias = layers[2]
            layers[2] = torch.addmv(first_bias, layers[0], self.output.bias)
            layers[0] = layers[0] @ self.output.weight
            flat = self.output.weight, self.output.bias, first_bias, *layers
            out, out_bias, first_bias, *low = cast_all(flat, dtype)
            hidden = feedback.decode_freely(
                tuple(steps.batch_sizes.tolist()),
                steps.before,
                norms[0].eps if norms else 0.0,
                pooled.to(dtype),
                first_bias,
                out,
                out_bias,
                keep,
                [(low[i], low[i + 1], low[i + 2]) for i in range(0, len(low), 3)],
                [(norm.weight, norm.bias) for norm in norms],
            )
        return cast(Tensor, self.output(hidden * keep[-1]))


def _gathered(lstm: nn.LSTM, left: Left) -> tuple[Tensor, Tensor]:
    weight_ih, weight_hh, bias_ih, bias_hh = (cast(Tensor, weight) for weight in lstm.all_weights[0])
    return Gathered.apply(torch.cat((weight_ih, weight_hh), 1), bias_ih + bias_hh, left)
