"""The linear path: the best linear predictor of what a framework predicts, beside its network.

BOLD of regions is close to linear (Nozari et al. 2023, doi:10.1038/s41551-023-01117-y), so a network that has
to find the linear part by itself predicts worse than a ridge. The path is that ridge, fitted in closed form
on the training runs. What the model predicts is (1 - gain) · linear + gain · network, where `gain` is fitted
on held-out runs. The network itself still learns the whole target: one that only learns what the path leaves
over has states that decode worse than raw data, because what decodes is what the path would take away.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from brainflow.batch import Ints, PackedBatch, offsets, positions, upload, window_of

# With decades, and two halves of the runs, the paths of CSM and Net-BERT explained .469 and .491 of four
# people, with these and four parts .487 and .507.
PENALTIES = tuple(float(p) for p in 10.0 ** np.arange(-4.0, 0.6, 0.5))
"""Penalties that are tried, in units of the mean variance of an input."""
PARTS = 4
"""Parts that the runs are dealt into, by their ids; each is predicted from the others to choose a penalty."""
# Beyond any row, and small enough that sums with it stay in int64.
FAR = 1 << 40
AROUND = ((1, 1), (1, 2), (2, 1), (2, 2), (1, 0), (0, 1), (2, 0), (0, 2), (0, 0))
"""Time points back to, and ahead to, the two that predict a masked one, by kind; 0: nothing on that side."""
HIDDEN = 5
"""Every so-manieth network is hidden at a time to choose the penalty of a covariance."""
FREQUENCIES = 64
"""Frequencies at which the variance of a pattern is known, from 0 to half a cycle a time point."""


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """Which time points a linear predictor reads; host arrays.

    Attributes
    ----------
    rows
        int64 [targets], rows of the batch that are predicted.
    read
        int64 [targets, k], rows that predict them; -1: there is none, and the mean stands for it.
    kind
        int64 [targets], which of the path's predictors that is.
    """

    rows: Ints
    read: Ints
    kind: Ints


Look = Callable[[PackedBatch], Neighbours]


class LinearPath(nn.Module, ABC):
    """A linear predictor of a framework's targets.

    Attributes
    ----------
    gain
        Share of the network in what the model predicts, 0-d; 1 until it is fitted.
    divisible
        Whether any share makes sense, or only all or nothing.
    """

    gain: Tensor
    divisible: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gain", torch.ones(()))

    @abstractmethod
    def collect(self, batch: PackedBatch) -> None:
        """Add a batch that carries its mask to the sums of which the predictor is fitted."""

    @abstractmethod
    def solve(self) -> None:
        """Fit the predictor to what was collected, and forget that."""

    @abstractmethod
    def forward(self, batch: PackedBatch) -> Tensor:
        """Return predictions of a batch that carries its mask, float32 [rows, networks].

        The rows are those of :meth:`brainflow.frameworks.base.Framework.reconstruct`.
        """

    def blend(self, values: Tensor, batch: PackedBatch) -> Tensor:
        """Return what the model predicts of what its network does, [rows, networks]."""
        return torch.lerp(self(batch).to(values.dtype), values, self.gain.to(values.dtype))


def _exactly(batch: PackedBatch) -> AbstractContextManager[Any]:
    """Keep autocast away: a least-squares fit is not to be rounded to 8 bits."""
    return torch.autocast(batch.bold.device.type, enabled=False)


class NeighbourPath(LinearPath):
    """Ridge from neighbouring time points, with a predictor for each kind of neighbourhood.

    Parameters
    ----------
    networks
        Networks.
    look
        Tells the neighbours of a batch's targets.
    learn
        Tells which neighbourhoods of a batch the path is fitted to; those of its targets by default.
    neighbours
        Time points that predict one.
    kinds
        Kinds of neighbourhoods.
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self, networks: int, look: Look, *, neighbours: int, kinds: int, learn: Look | None = None
    ) -> None:
        super().__init__()
        self.look, self.learn = look, learn or look
        self.register_buffer("weight", torch.zeros(kinds, networks, neighbours * networks))
        self.register_buffer("bias", torch.zeros(kinds, networks))
        self._sums: list[list[_Sums]] = []  # of each kind, by part

    def _inputs(self, batch: PackedBatch, found: Neighbours) -> tuple[Tensor, Tensor, list[tuple[int, Ints]]]:
        """Return the neighbours' values [targets, k · networks], the targets' rows, and who is of a kind."""
        # Row -1 would be read as the last one: row 0 is read instead, and cleared by `has`.
        sent = upload(batch.bold.device, read=np.maximum(found.read, 0), rows=found.rows, has=found.read >= 0)
        values = batch.bold.to(self.bias.dtype)[sent["read"]] * sent["has"][:, :, None]
        kinds = [(kind, np.flatnonzero(found.kind == kind)) for kind in range(len(self.weight))]
        return values.flatten(1), sent["rows"], [(kind, who) for kind, who in kinds if len(who)]

    def collect(self, batch: PackedBatch) -> None:
        """Add a batch to the sums of its runs' parts."""
        found = self.learn(batch)
        inputs, rows, kinds = self._inputs(batch, found)
        if not self._sums:
            size = inputs.shape[1], batch.bold.shape[1]
            self._sums = [[_Sums(*size, inputs.device) for _ in range(PARTS)] for _ in self.weight]
        target = batch.bold[rows]
        # Whole runs: a fit judged by other windows of its own runs would want too small a penalty.
        part = (batch.runs % PARTS)[window_of(batch.lengths)[found.rows]]
        for kind, who in kinds:
            for one in np.unique(part[who]):
                chosen = upload(inputs.device, who=who[part[who] == one])["who"]
                self._sums[kind][one].add(inputs[chosen], target[chosen])

    def solve(self) -> None:
        """Fit each kind; its penalty is what predicts parts of the runs best that were left out."""
        for kind, parts in enumerate(self._sums):
            self.weight[kind], self.bias[kind] = _ridge(parts)
        self._sums = []

    def forward(self, batch: PackedBatch) -> Tensor:
        """Return predictions, float32 [targets, networks]."""
        with _exactly(batch):
            inputs, rows, kinds = self._inputs(batch, self.look(batch))
            result = inputs.new_zeros(len(rows), self.bias.shape[1])
            for kind, who in kinds:
                chosen = upload(inputs.device, who=who)["who"]
                said = torch.addmm(self.bias[kind], inputs[chosen], self.weight[kind].t())
                result.index_copy_(0, chosen, said)
            return result


class _Sums:
    """Sums of products of inputs and targets, float64."""

    def __init__(self, inputs: int, targets: int, device: torch.device) -> None:
        zeros: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.count = 0
        self.x, self.y = torch.zeros(inputs, **zeros), torch.zeros(targets, **zeros)
        self.xx, self.xy = torch.zeros(inputs, inputs, **zeros), torch.zeros(inputs, targets, **zeros)
        self.yy = torch.zeros(targets, **zeros)

    def add(self, x: Tensor, y: Tensor) -> None:
        # Sums of parts are taken away from the total again, which would leave rounding errors in float32.
        x, y = x.double(), y.double()
        self.count += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xx.addmm_(x.t(), x)
        self.xy.addmm_(x.t(), y)
        self.yy += y.square().sum(0)

    def changed_by(self, other: _Sums, sign: int = 1) -> _Sums:
        """Return these sums with those of `other` added, or (-1) taken away."""
        total = _Sums(len(self.x), len(self.y), self.x.device)
        for name in ("count", "x", "y", "xx", "xy", "yy"):
            setattr(total, name, getattr(self, name) + sign * getattr(other, name))
        return total

    def covariance(self) -> Tensor:
        """Return that of the inputs, [inputs, inputs]."""
        mean = self.x / self.count
        return self.xx / self.count - torch.outer(mean, mean)

    def fit(self, penalty: float) -> tuple[Tensor, Tensor]:
        """Return weights [inputs, targets] and offsets [targets] of a ridge with free offsets."""
        mean_x, mean_y = self.x / self.count, self.y / self.count
        square = self.xx / self.count - torch.outer(mean_x, mean_x)
        # Inputs that do not vary would leave a singular system.
        unit = square.diagonal().mean().clamp_min(1e-12)
        square.diagonal().add_(penalty * unit)
        weight = torch.linalg.solve(square, self.xy / self.count - torch.outer(mean_x, mean_y))
        return weight, mean_y - mean_x @ weight

    def error(self, weight: Tensor, bias: Tensor) -> float:
        """Return the summed squared error of a predictor on what the sums are of."""
        # From the sums: another penalty reads no data again.
        said = (weight * (self.xx @ weight)).sum() + 2 * bias @ (self.x @ weight) + self.count * bias @ bias
        return float(self.yy.sum() - 2 * ((weight * self.xy).sum() + bias @ self.y) + said)


def _left_out(parts: list[_Sums]) -> tuple[_Sums, list[tuple[_Sums, _Sums]]]:
    """Return the sums of all parts, and for each part that says something those without it and its own."""
    total = parts[0]
    for part in parts[1:]:
        total = total.changed_by(part)
    # By subtraction: a pass over the data for each part would read them `PARTS` times.
    pairs = [(total.changed_by(part, -1), part) for part in parts if part.count]
    return total, [(fit, judge) for fit, judge in pairs if fit.count > 1]


def _best(errors: Callable[[float], float], pairs: list[tuple[_Sums, _Sums]]) -> float:
    """Return the penalty with the least error, the largest where nothing can be left out."""
    return min(PENALTIES, key=errors) if pairs else PENALTIES[-1]


def _ridge(parts: list[_Sums]) -> tuple[Tensor, Tensor]:
    """Return weights [targets, inputs] and offsets; the mean where there is next to nothing to fit to."""
    total, pairs = _left_out(parts)
    if total.count < 2:
        return torch.zeros_like(total.xy.t()), torch.zeros_like(total.y)
    penalty = _best(lambda p: sum(judge.error(*fit.fit(p)) for fit, judge in pairs), pairs)
    weight, bias = total.fit(penalty)
    return weight.t(), bias


class NetworkPath(LinearPath):
    """Masked networks from the others of the same time point: the conditional mean of a normal distribution.

    With the precision K of the networks and the networks m that are masked, that is
    mean_m - K_mm^-1 K_mu (x_u - mean_u), so one small system is solved for each different mask.

    Parameters
    ----------
    networks
        Networks.
    masked
        Returns the masked values of a batch that carries its mask, bool [tokens, networks].
    """

    precision: Tensor
    mean: Tensor

    def __init__(self, networks: int, masked: Callable[[PackedBatch], Tensor]) -> None:
        super().__init__()
        self.masked = masked
        self.register_buffer("precision", torch.eye(networks))
        self.register_buffer("mean", torch.zeros(networks))
        self._sums: list[_Sums] = []

    def collect(self, batch: PackedBatch) -> None:
        """Add a batch to the sums of its runs' parts."""
        if not self._sums:
            self._sums = [_Sums(batch.bold.shape[1], 0, batch.bold.device) for _ in range(PARTS)]
        part = (batch.runs % PARTS)[window_of(batch.lengths)]
        for one in np.unique(part):
            values = batch.bold[upload(batch.bold.device, who=np.flatnonzero(part == one))["who"]]
            # Without targets: the inputs' covariance is all that is asked for.
            self._sums[one].add(values, values[:, :0])

    def solve(self) -> None:
        """Fit mean and precision; the penalty is what predicts hidden networks of left-out runs best."""
        total, pairs = _left_out(self._sums)
        known = [(fit.covariance(), judge.covariance() * judge.count) for fit, judge in pairs]
        penalty = _best(
            lambda p: sum(_hidden_error(_penalised(fit, p), judge) for fit, judge in known), pairs
        )
        self.precision.copy_(torch.linalg.inv(_penalised(total.covariance(), penalty)))
        self.mean.copy_(total.x / total.count)
        self._sums = []

    def forward(self, batch: PackedBatch) -> Tensor:
        """Return predictions, float32 [tokens, networks]; NaN where a network was not masked."""
        with _exactly(batch):
            return self._conditional(batch.bold.to(self.mean.dtype) - self.mean, self.masked(batch))

    def _conditional(self, centred: Tensor, masked: Tensor) -> Tensor:
        result = torch.full_like(centred, torch.nan)
        patterns, which = torch.unique(masked, dim=0, return_inverse=True)
        for number, pattern in enumerate(patterns):
            hidden, seen = pattern.nonzero()[:, 0], (~pattern).nonzero()[:, 0]
            rows = (which == number).nonzero()[:, 0]
            if not len(hidden):
                continue
            pull = centred[rows][:, seen] @ self.precision[seen][:, hidden]
            said = -torch.linalg.solve(self.precision[hidden][:, hidden], pull.t()).t() + self.mean[hidden]
            result[rows[:, None], hidden] = said
        return result


def _penalised(covariance: Tensor, penalty: float) -> Tensor:
    # As in `_Sums.fit`: what does not vary has no inverse.
    unit = covariance.diagonal().mean().clamp_min(1e-12)
    return covariance + penalty * unit * torch.eye(
        len(covariance), dtype=covariance.dtype, device=covariance.device
    )


def _hidden_error(covariance: Tensor, judge: Tensor) -> float:
    """Return the squared error of networks that are hidden in turn, on data with the covariance `judge`."""
    total, place = 0.0, torch.arange(len(covariance), device=covariance.device) % HIDDEN
    for turn in range(min(HIDDEN, len(covariance))):
        hidden, seen = place == turn, place != turn
        if not seen.any():
            continue
        weight = torch.linalg.solve(covariance[seen][:, seen], covariance[seen][:, hidden])
        cross = judge[seen][:, hidden]
        said = (weight * (judge[seen][:, seen] @ weight)).sum()
        total += float(judge[hidden][:, hidden].diagonal().sum() - 2 * (weight * cross).sum() + said)
    return total


@dataclass(frozen=True)
class _Waves:
    """The orthonormal cosine transforms (DCT-II) of a batch's windows.

    `matrices` [windows, longest, longest] are, in a window's own waves and time points, its transform, and
    arbitrary elsewhere. `seats` [tokens] are the time points' rows in windows padded to the longest. `place`,
    `scale` and `inverse` [windows, numbers] are the (wave, pattern) pairs of the windows' codes, their
    deviations and 1 / these, both 0 where a window has fewer values than a code has numbers.
    """

    seats: Tensor
    matrices: Tensor
    place: Tensor
    scale: Tensor
    inverse: Tensor


class PrincipalPath(LinearPath):
    """Windows by their principal components: as many numbers a window as a vector has.

    The components of a stationary process are, but for the ends of a window, waves in time times patterns
    over networks. So they are that here: patterns are the eigenvectors of the networks' covariance, waves
    those of the discrete cosine transform (DCT-II), and of all pairs the ones are kept which have the most
    variance at a window's length. One fit serves windows of every length.

    Parameters
    ----------
    networks
        Networks.
    numbers
        Numbers of a window's code; each has variance 1.
    """

    divisible = False  # a mean of two reconstructions would need the numbers of both
    mean: Tensor
    patterns: Tensor
    spectrum: Tensor

    def __init__(self, networks: int, numbers: int) -> None:
        super().__init__()
        self.numbers = numbers
        self.register_buffer("mean", torch.zeros(networks))
        self.register_buffer("patterns", torch.eye(networks))
        self.register_buffer("spectrum", torch.ones(FREQUENCIES, networks))
        self._batches: list[PackedBatch] = []
        self._known: dict[Any, Any] = {}
        self._latest: tuple[Any, _Waves] | None = None

    def collect(self, batch: PackedBatch) -> None:
        """Keep a batch: variances over time can be summed when the patterns are known."""
        # A copy: the loader uses its buffers again.
        self._batches.append(replace(batch, bold=batch.bold.clone()))

    def solve(self) -> None:
        """Fit mean, patterns and their variance by frequency."""
        networks = len(self.mean)
        sums = _Sums(networks, 0, self.mean.device)
        for batch in self._batches:
            sums.add(batch.bold, batch.bold[:, :0])
        mean = sums.x / sums.count
        self.mean.copy_(mean)
        # `eigh` gives the pattern of least variance first.
        self.patterns.copy_(torch.linalg.eigh(sums.xx / sums.count - torch.outer(mean, mean))[1].flip(1))
        power = torch.zeros(FREQUENCIES, networks, dtype=torch.float64, device=self.mean.device)
        count = power.new_zeros(FREQUENCIES)
        for batch in self._batches:
            frequency = np.concatenate([_frequency(length) for length in batch.lengths.tolist()])
            place = torch.from_numpy(frequency).to(power.device)
            waves = self._waves(batch)
            values = self._transformed(batch, waves).flatten(0, 1).index_select(0, waves.seats)
            power.index_add_(0, place, values.double().square())
            count += torch.bincount(place, minlength=FREQUENCIES)
        seen = count > 0  # a frequency that no window has is as rare as the rarest that one has
        power[seen] /= count[seen, None]
        power[~seen] = power[seen].amin(0)
        self.spectrum.copy_(power)
        self._batches = []

    def code(self, batch: PackedBatch) -> Tensor:
        """Return the windows' codes, [windows, numbers]; with zeros where a window has fewer values."""
        with _exactly(batch):
            waves = self._waves(batch)
            of = self._transformed(batch, waves).flatten(1).gather(1, waves.place)
            return of * waves.inverse

    def expand(self, code: Tensor, batch: PackedBatch) -> Tensor:
        """Return the windows of some codes, [tokens, networks]; differentiable."""
        with _exactly(batch):
            waves = self._waves(batch)
            size = len(code), batch.max_seqlen, len(self.mean)
            values = code.to(waves.scale.dtype) * waves.scale
            full = values.new_zeros(size).flatten(1).scatter_add(1, waves.place, values)
            back = torch.bmm(waves.matrices.transpose(1, 2), full.view(size)).flatten(0, 1)
            return torch.addmm(self.mean, back.index_select(0, waves.seats), self.patterns.t())

    def forward(self, batch: PackedBatch) -> Tensor:
        """Return what is left of a batch's windows in their codes, [tokens, networks]."""
        return self.expand(self.code(batch), batch)

    def blend(self, values: Tensor, batch: PackedBatch) -> Tensor:
        """Return the network's reconstruction, or with a gain of 0 that of the components."""
        # Not an `if`: it would have to wait for the device's gain.
        return torch.where(self.gain > 0.5, values, self(batch).to(values.dtype))

    def _once(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """Return what is computed once for a length: each step of a training needs it, on the device."""
        key = (*key, self.mean.device, self.mean.dtype)
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def _transformed(self, batch: PackedBatch, waves: _Waves) -> Tensor:
        """Return the windows' values by wave and pattern, [windows, longest, networks]."""
        projected = (batch.bold.to(self.mean.dtype) - self.mean) @ self.patterns
        size = batch.windows, batch.max_seqlen, len(self.mean)
        values = projected.new_zeros(size).flatten(0, 1).index_copy_(0, waves.seats, projected)
        return torch.bmm(waves.matrices, values.view(size))

    def _waves(self, batch: PackedBatch) -> _Waves:
        """Return the waves of a batch's windows; those of the latest batch are kept."""
        key = batch.lengths.tobytes(), self.mean.device, self.mean.dtype, self.spectrum._version
        # `forward` asks twice, in `code` and in `expand`.
        if self._latest is None or self._latest[0] != key:
            self._latest = key, self._new_waves(batch)
        return self._latest[1]

    def _new_waves(self, batch: PackedBatch) -> _Waves:
        # A window has few waves of its own length; a product of all windows of all lengths at once takes
        # them from a table of cosines of multiples of half a step: cos(pi / L (t + 1/2) f), m = (2t + 1) f.
        longest = batch.max_seqlen
        lengths, which = np.unique(batch.lengths, return_inverse=True)
        time, wave = np.arange(longest), np.arange(longest)[:, None]
        sent = upload(
            self.mean.device,
            which=which,
            multiples=((2 * time + 1) * wave).astype(np.int32),
            turns=(4 * lengths[:, None, None]).astype(np.int32),
            begin=(2 * lengths * (lengths - 1))[:, None, None].astype(np.int32),
            seats=longest * window_of(batch.lengths) + positions(batch.lengths),
        )
        # A power of two, so that few tables are made for batches of any length.
        size = 1 << (longest - 1).bit_length()
        cosines = self._once(("cosines", size), lambda: torch.from_numpy(_cosines(size)).to(self.mean))
        entry = sent["multiples"] % sent["turns"] + sent["begin"]
        matrices = cosines.index_select(0, entry.flatten()).view(entry.shape)
        matrices[:, 0].mul_(0.5**0.5)  # orthonormal
        # a fit or loaded weights raise the version
        known = [
            self._once(("components", length, self.spectrum._version), partial(self._largest, length))
            for length in lengths.tolist()
        ]
        place, scale, inverse = (
            torch.stack(part).index_select(0, sent["which"]) for part in zip(*known, strict=True)
        )
        return _Waves(sent["seats"], matrices.index_select(0, sent["which"]), place, scale, inverse)

    def _largest(self, length: int) -> tuple[Tensor, ...]:
        """Return the (wave, pattern) pairs of a window's code, their deviations and 1 / these."""
        variance = self.spectrum[torch.from_numpy(_frequency(length)).to(self.mean.device)].flatten()
        top, place = variance.topk(min(self.numbers, len(variance)))
        missing = (0, self.numbers - len(top))
        # A pattern that does not vary must not make 1 / scale infinite.
        scale = top.sqrt().clamp_min(1e-6)
        return tuple(nn.functional.pad(x, missing) for x in (place, scale, 1.0 / scale))


def _cosines(longest: int) -> np.ndarray:
    """Return sqrt(2 / L) · cos(pi m / (2 L)) for all m < 4 L, one L after the other from 1 to `longest`."""
    lengths = np.repeat(np.arange(1, longest + 1), 4 * np.arange(1, longest + 1))
    return np.sqrt(2.0 / lengths) * np.cos(np.pi / (2.0 * lengths) * positions(4 * np.arange(1, longest + 1)))


def _frequency(length: int) -> Ints:
    """Return the row of the spectrum of each wave of a window."""
    return np.arange(length) * FREQUENCIES // length


def before(lengths: np.ndarray, rows: Ints) -> Neighbours:
    """Return the two time points before each of `rows`, none of which is the first of its window.

    Kind 0 has both; kind 1, the second time point of a window, has one.
    """
    second = positions(lengths)[rows] == 1
    return Neighbours(
        rows=rows,
        read=np.stack((rows - 1, np.where(second, -1, rows - 2)), 1),
        kind=second.astype(np.int64),
    )


def around(lengths: np.ndarray, rows: Ints) -> Neighbours:
    """Return the nearest time points on both sides of each of `rows` that are not among them.

    The kind is that of `AROUND`. Of neighbours further away than 2 nothing is read; what has none nearer is
    predicted by the mean.
    """
    tokens = int(np.sum(lengths))
    seen = np.ones(tokens, bool)
    seen[rows] = False
    number = np.arange(tokens)
    # These run on over the borders of windows; the next lines cut them there.
    past = np.maximum.accumulate(np.where(seen, number, -FAR))[rows]
    future = np.minimum.accumulate(np.where(seen, number, FAR)[::-1])[::-1][rows]
    bounds, window = offsets(lengths), window_of(lengths)[rows]
    back = np.where((past >= bounds[window]) & (past >= rows - 2), rows - past, 0)
    ahead = np.where((future < bounds[window + 1]) & (future <= rows + 2), future - rows, 0)
    kind = np.empty(len(rows), np.int64)
    for i, pair in enumerate(AROUND):
        kind[(back == pair[0]) & (ahead == pair[1])] = i
    read = np.stack((np.where(back > 0, rows - back, -1), np.where(ahead > 0, rows + ahead, -1)), 1)
    return Neighbours(rows=rows, read=read, kind=kind)


def everywhere(lengths: np.ndarray) -> Neighbours:
    """Return every time point with neighbours of each kind of `AROUND` that its window has."""
    number, room = np.arange(int(np.sum(lengths))), np.repeat(lengths, lengths)
    place, found = positions(lengths), []
    for kind, (back, ahead) in enumerate(AROUND):
        rows = number[(place >= back) & (place + ahead < room)]
        sides = [rows + by if by else np.full(len(rows), -1) for by in (-back, ahead)]
        found.append((rows, np.stack(sides, 1), np.full(len(rows), kind)))
    rows, read, kinds = (np.concatenate(part) for part in zip(*found, strict=True))
    return Neighbours(rows=rows, read=read, kind=kinds)
