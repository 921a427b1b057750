"""From BOLD to hidden states: Linear + LayerNorm on each time point, plus an encoding of its time."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brainflow.config import ModelConfig
from brainflow.kernels.dropout import Dropout

WAVES = 32
PLACE_WAVES = 8
LONGEST_MM = 400.0


class BoldEmbedding(nn.Module):
    """Linear + LayerNorm + dropout on each time point, plus a TR embedding (arXiv 2206.11417).

    Special tokens live in input space: they are rows of `networks` values and pass through the same Linear +
    LayerNorm. Times are handed on as `clock` codes, which special tokens have one of their own of: `dummy`.

    Parameters
    ----------
    config
        Reads networks, width, dropout, max_seconds, time_resolution, time_encoding, embedding_norm and
        coordinates.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config
        self.project = nn.Linear(c.networks, c.width)
        self.norm = nn.LayerNorm(c.width) if c.embedding_norm else nn.Identity()
        self.dropout = Dropout(c.dropout)
        encodings: dict[str, type[SecondsTable | SecondsWaves | NoSeconds]]
        encodings = {"table": SecondsTable, "fourier": SecondsWaves, "none": NoSeconds}
        self.time = encodings[c.time_encoding](c.width, c.max_seconds, c.time_resolution)
        self.place: nn.Linear | None = None
        if c.coordinates:
            self.place = nn.Linear(6 * PLACE_WAVES, c.width, bias=False)
            nn.init.zeros_(self.place.weight)  # begins as the model without coordinates
            self.register_buffer("places", torch.zeros(c.networks, 6 * PLACE_WAVES))

    @property
    def dummy(self) -> np.generic:
        """Clock code of special tokens."""
        return self.time.dummy

    def clock(self, times: Tensor) -> Tensor:
        """Return the clock codes [tokens] of `times` [tokens] in seconds."""
        return self.time.code(times)

    def set_coordinates(self, coordinates: np.ndarray) -> None:
        """Say where the networks are, [networks, 3] in mm; sines and cosines of that go with the weights.

        Raises
        ------
        ValueError
            If the model has no use for coordinates or another number of networks.
        """
        if self.place is None:
            raise ValueError("coordinates: the model has model.coordinates off, expected it on")
        places = self.get_buffer("places")
        if np.shape(coordinates) != (len(places), 3):
            raise ValueError(
                f"coordinates: got shape {list(np.shape(coordinates))}, expected [{len(places)}, 3] in mm"
            )
        waves = 2 * math.pi / LONGEST_MM * 2.0 ** (np.arange(PLACE_WAVES) / 2)
        angle = (np.asarray(coordinates, np.float64)[:, :, None] * waves).reshape(len(places), -1)
        places.copy_(torch.from_numpy(np.concatenate((np.sin(angle), np.cos(angle)), 1)))

    def forward(self, bold: Tensor, special: Tensor | None = None) -> Tensor:
        """Return Linear (+ LayerNorm) of `bold` [tokens, networks] and, below it, of `special` [k, networks].

        `bold` may be of any floating type: it is cast here, once. It gets no gradient. Dropout and the
        encoding of time follow in :meth:`finish`, when every token stands where it belongs.
        """
        weight, bias = self.project.weight, self.project.bias
        if self.place is not None:
            weight = weight + self.place(self.get_buffer("places")).t()
        hidden = F.linear(cast_input(bold, self.project.weight), weight, bias)
        if special is not None:
            hidden = torch.cat((hidden, F.linear(special, weight, bias)))
        return self.norm(hidden)

    def finish(self, hidden: Tensor, clock: Tensor) -> Tensor:
        """Return dropout(`hidden`) [..., tokens, width] plus the encoding of the clock codes [tokens]."""
        return self.dropout(hidden) + self.time(clock)


class SecondsTable(nn.Embedding):
    """A row for each `resolution` seconds up to `longest`; the last row is that of special tokens.

    Later times share the last row but one.
    """

    def __init__(self, width: int, longest: float, resolution: float) -> None:
        super().__init__(round(longest / resolution) + 1, width)
        self.resolution = resolution
        nn.init.normal_(self.weight, std=0.02)

    @property
    def dummy(self) -> np.generic:
        """Row of special tokens."""
        return np.int64(self.num_embeddings - 1)

    def code(self, times: Tensor) -> Tensor:
        """Return rows, int64 [tokens], of `times` in seconds."""
        return (times / self.resolution).round_().clamp_(0, self.num_embeddings - 2).long()


class SecondsWaves(nn.Module):
    """A learned projection of sines and cosines of the seconds, whatever the TR.

    Periods rise geometrically from 2 · `resolution` to 4 · `longest` seconds. Special tokens have a vector
    of their own.
    """

    def __init__(self, width: int, longest: float, resolution: float) -> None:
        super().__init__()
        periods = torch.from_numpy(np.geomspace(2 * resolution, 4 * longest, WAVES))
        # Follows from the settings, so it is no part of the weights.
        self.register_buffer("speeds", (2 * math.pi / periods).float(), persistent=False)
        self.project = nn.Linear(2 * WAVES, width)
        self.special = nn.Parameter(torch.zeros(width))
        # A sine and a cosine squared are 1, so with 32 pairs an encoding has the table's deviation of 0.02.
        nn.init.normal_(self.project.weight, std=0.02 / math.sqrt(WAVES))

    @property
    def dummy(self) -> np.generic:
        """Seconds of special tokens, which are no time."""
        return np.float32(-1.0)

    def code(self, times: Tensor) -> Tensor:
        """Return `times`, float32 [tokens]."""
        return times.float()

    def forward(self, seconds: Tensor) -> Tensor:
        """Return the encoding, [tokens, width]."""
        angle = seconds[:, None] * self.get_buffer("speeds")
        waves = torch.cat((angle.sin(), angle.cos()), 1).to(self.project.weight.dtype)
        return torch.where(seconds[:, None] < 0, self.special, self.project(waves))


class NoSeconds(nn.Module):
    """No encoding: positions that count seconds say it already."""

    def __init__(self, width: int, longest: float, resolution: float) -> None:
        super().__init__()

    @property
    def dummy(self) -> np.generic:
        """Time of special tokens, which nothing reads."""
        return np.float32(0.0)

    def code(self, times: Tensor) -> Tensor:
        """Return `times`, float32 [tokens]."""
        return times

    def forward(self, seconds: Tensor) -> Tensor:
        """Return zeros that broadcast to the tokens, [tokens, 1]."""
        return torch.zeros_like(seconds)[:, None]


def cast_input(bold: Tensor, weight: Tensor) -> Tensor:
    """Return `bold` in the element type that a product with `weight` runs in.

    Under autocast that is autocast's, also for a store of float16: gradients of what is put into it must not
    get that type's narrow range. float64 stays, as in PyTorch's own rule.
    """
    kind = bold.device.type
    if not torch.is_autocast_enabled(kind):
        return bold.to(weight.dtype)
    return bold if bold.dtype == torch.float64 else bold.to(torch.get_autocast_dtype(kind))
