"""Validation on fixed held-out windows, beside predictions that need no network.

Keys of a validation line:

- `val_loss`: the framework's own objective, and `val_<name>` for whatever else it reports;
- `val_l1`, `val_mse`: error of the model's reconstruction, every masked value counting the same (with
  `model.linear` that of the mean of linear path and network);
- `val_mean_l1`, `val_mean_mse`: error of the training set's mean of each network, on the same masked values;
- `val_last_l1`, `val_last_mse`: error of repeating the time point before (for the first time point of a
  window, which has none, the training set's mean);
- `val_ar1_l1`, `val_ar1_mse`: error of each network's autoregression on its time point before;
- `val_linear_l1`, `val_linear_mse`: error of the best linear predictor of the same values from what the
  network may see, a ridge fitted on the training runs (where the framework has one);
- `val_network_l1`, `val_network_mse`: error of the network alone, with `model.linear`, and `val_share`, its
  share in the reconstruction, which was fitted on other windows of the held-out runs;
- `val_explained_variance`: 1 - val_mse / val_mean_mse, and `val_linear_explained_variance` of the linear
  predictor;
- `val_gain`: the difference of these two, with the ends of its 95 % interval over held-out subjects,
  `val_gain_low` and `val_gain_high` (bootstrap; absent with one subject);
- `val_network_correlation`: Pearson correlation of predicted and true values of each network, a list in the
  store's order of networks (None where one of them does not vary), and `val_correlation`, its mean;
- `val_by_dataset`: for each dataset the L1, MSE and explained variance as above, without the prefix.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from brainflow.batch import Windows, positions, upload
from brainflow.data import make_loader
from brainflow.files import own_folder
from brainflow.models.linear_path import LinearPath
from brainflow.storage import BoldStore
from brainflow.storage.files import replacing

from .optimizer import autocast
from .parallel import Ranks

# Masks of validation are drawn with a seed of their own, the same at every validation of every run.
MASK_SEED = 20_220_611
_GUESSES = ("", "mean_", "last_", "ar1_", "linear_", "network_")
SHARE_BATCHES = 4  # held-out batches, beside those of validation, that fit the network's share
LINEAR_TOKENS = 200_000  # training time points that the linear predictor is fitted to, at most
LINEAR_PASSES = 10  # and at most so many times the training set: masks differ each time
RESAMPLED = 1_000
SHOWN = 4  # networks drawn as curves
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Example:
    """One held-out window, float32 [time, networks], and its reconstruction, NaN where nothing was masked."""

    seconds: np.ndarray
    bold: np.ndarray
    prediction: np.ndarray


@dataclass
class _RankSlice:
    """Every `world`-th batch of a sampler from the `rank`-th on; the last one again where none is left."""

    sampler: Any
    batches: int
    ranks: Ranks
    first: int = 0
    steps: int | None = None

    def number(self, step: int) -> int:
        return self.first + min(step * self.ranks.world + self.ranks.rank, self.batches - 1)

    def counts(self, step: int) -> bool:
        return step * self.ranks.world + self.ranks.rank < self.batches

    @property
    def windows_per_batch(self) -> int:
        return int(self.sampler.windows_per_batch)

    @property
    def max_tokens(self) -> int:
        return int(self.sampler.max_tokens)

    def batch(self, step: int) -> Windows:
        found: Windows = self.sampler.batch(self.number(step))
        return found


class Validator:
    """Measures a module on the first `batches` batches of a held-out sampler, shared among the ranks.

    Parameters
    ----------
    store
        Store of both samplers.
    held_out
        Sampler over the validation runs.
    training
        Sampler over the training runs; its first `batches` batches give the mean and the autoregression.
    batches
        Batches of each.
    device
        Where the module lives.
    ranks
        Who shares the work; alone if absent.
    precision
        `train.precision`, in which the module runs.
    on_corrupt
        `data.on_corrupt`: whether damaged windows are left out.
    runs
        Ids of the held-out runs, int64; all if None.
    """

    def __init__(
        self,
        store: BoldStore,
        held_out: Any,
        training: Any,
        *,
        batches: int,
        device: torch.device,
        ranks: Ranks | None = None,
        precision: str = "fp32",
        on_corrupt: Literal["error", "skip"] = "error",
        runs: np.ndarray | None = None,
    ) -> None:
        self.precision, self.on_corrupt = precision, on_corrupt
        self.store, self.batches, self.device, self.ranks = store, batches, device, ranks or Ranks()
        self.held_out = _RankSlice(held_out, batches, self.ranks)
        self.share_batches = _RankSlice(held_out, SHARE_BATCHES, self.ranks, first=batches)
        self._subject, self._dataset, self.datasets = _subjects(store, runs)
        self.linear: LinearPath | None = None
        networks = store.networks
        sums = torch.zeros(5 * networks + 2, dtype=torch.float64, device=device)
        for batch, counts in self._draw(_RankSlice(training, batches, self.ranks)):
            if counts:
                bold = batch.bold.double()
                # Time points that have one before them in their window.
                later = upload(device, rows=np.flatnonzero(positions(batch.lengths)))["rows"]
                now, before = bold[later], bold[later - 1]
                parts = (bold, now * before, before * before, now, before)
                sums += torch.cat([*(part.sum(0) for part in parts), sums.new_tensor([len(bold), len(now)])])
        self.ranks.sum(sums)
        (total, product, square, now, before), (tokens, pairs) = sums[:-2].view(5, networks), sums[-2:]
        mean = total / tokens
        # Of a network that is 0 throughout the slope is then 0, not NaN.
        spread = (square - 2 * mean * before + pairs * mean**2).clamp_min(1e-12)
        self.mean = mean.float()
        self.ar1 = ((product - mean * (now + before) + pairs * mean**2) / spread).float()

    def fit_linear(self, module: Any, sampler: Any, *, seed: int) -> LinearPath | None:
        """Return the linear predictor of a framework's targets, fitted; None if it has none.

        Every rank reads the same batches and comes to the same predictor.

        Parameters
        ----------
        module
            The framework.
        sampler
            Sampler of the windows that are fitted to, not shared among ranks.
        seed
            Draws the masks.
        """
        linear: LinearPath | None = module.make_linear()
        if linear is None:
            return None
        linear.to(self.device)
        most = min(LINEAR_TOKENS, LINEAR_PASSES * int(np.sum(self.store.runs.length)))
        tokens = 0
        alone = _RankSlice(sampler, int(1e9), Ranks())  # without an end: the loop below stops
        with closing_loader(self._loader(alone)) as batches:
            while tokens < most:
                batch = next(batches)
                linear.collect(replace(batch, mask=module.mask(batch, seed=seed)))
                tokens += batch.tokens
        linear.solve()
        return linear

    @torch.no_grad()
    def __call__(self, module: Any) -> tuple[dict[str, Any], Example | None]:
        """Return the metrics, equal on all ranks, and on rank 0 an example; the module keeps its mode.

        A module with a linear path is given the share that the network has in its predictions from now on.
        """
        was_training = module.training
        module.eval()
        carried = getattr(module, "linear_path", None)
        if carried is not None:
            carried.gain.fill_(1.0)  # what `score` returns is then the network's own
        share = self._share(module) if carried is not None else torch.ones((), device=self.device)
        reported: dict[str, Tensor] = {}
        networks, example = self.store.networks, None
        guesses = len(_GUESSES)
        errors = torch.zeros(len(self._dataset), guesses, 2, dtype=torch.float64, device=self.device)
        values = torch.zeros(len(self._dataset), dtype=torch.float64, device=self.device)
        moments = torch.zeros(6, networks, dtype=torch.float64, device=self.device)
        windows = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch, counts in self._draw(self.held_out):
            batch, out, prediction, rows = self._score(module, batch)
            for name, value in {"loss": out.loss, **out.metrics}.items():
                before = reported.setdefault(name, torch.zeros_like(value, dtype=torch.float64))
                if counts:
                    reported[name] = before + value.double() * batch.windows
            if not counts:  # a sharded module has to be called by all ranks
                continue
            windows += batch.windows
            bold = batch.bold.float()
            target = bold[rows]
            given = prediction.isnan()  # values of a row that were not masked, as in Net-BERT
            of_tokens = np.repeat(self._subject[batch.runs], batch.lengths)
            subject = upload(self.device, of_tokens=of_tokens)["of_tokens"][rows]
            last = self._last(bold, rows, batch.cu_seqlens)
            # Where there is none, the mean stands in, and `_has` leaves its figures out.
            linear = self.mean if self.linear is None else self.linear(batch)
            blend = prediction if carried is None else torch.lerp(linear, prediction, share)
            guessed = (blend, self.mean, last, self.mean + self.ar1 * (last - self.mean), linear, prediction)
            for i, guess in enumerate(guessed):
                errors[:, i].index_add_(0, subject, _error_sums((guess - target).masked_fill(given, 0)))
            values.index_add_(0, subject, (~given).sum(dim=1).double())
            moments += _moments(blend.masked_fill(given, 0), target.masked_fill(given, 0), ~given)
            if example is None and self.ranks.first:
                example = _example(batch, blend, rows)
        module.train(was_training)
        if carried is not None:
            carried.gain.copy_(share)
        # One collective for all of it.
        sums = [errors, values, moments, torch.stack([windows, *reported.values()])]
        total = self.ranks.sum(torch.cat([part.flatten() for part in sums]))
        parts = total.split([part.numel() for part in sums])
        errors, values, moments = (part.view(s.shape) for part, s in zip(parts[:3], sums[:3], strict=True))
        counted = parts[3].tolist()
        result: dict[str, Any] = {
            f"val_{name}": value / counted[0] for name, value in zip(reported, counted[1:], strict=True)
        }
        shown = [name for name in _GUESSES if self._has(name, carried is not None)]
        result |= {f"val_{n}": value for n, value in _scores(errors.sum(0), values.sum(), shown).items()}
        if carried is not None:
            result["val_share"] = float(share)
        if self.linear is not None:
            result |= _gain(errors, values)
        correlations = _correlations(moments)
        known = [c for c in correlations if c is not None]
        result["val_correlation"] = sum(known) / len(known) if known else math.nan
        result["val_network_correlation"] = correlations
        of_datasets = upload(self.device, of=self._dataset)["of"]
        count = len(self.datasets)
        errors = errors.new_zeros(count, guesses, 2).index_add(0, of_datasets, errors)
        values = values.new_zeros(count).index_add(0, of_datasets, values)
        result["val_by_dataset"] = {
            str(name): _scores(errors[i], values[i], shown)
            for i, name in enumerate(self.datasets)
            if values[i] > 0
        }
        return result, example

    def _has(self, guess: str, carried: bool) -> bool:
        """Whether a guess is another one than those before it."""
        return {"linear_": self.linear is not None, "network_": carried}.get(guess, True)

    def _score(self, module: Any, batch: Any) -> tuple[Any, Any, Tensor, Tensor]:
        """Return the batch with its mask, the output, the predictions in float32 and their rows."""
        if hasattr(module, "mask"):
            batch = replace(batch, mask=module.mask(batch, seed=MASK_SEED))
        with autocast(self.device, self.precision):
            out, prediction, rows = module.score(batch, seed=MASK_SEED)
        return batch, out, prediction.float(), rows

    def _share(self, module: Any) -> Tensor:
        """Return the share of the network that predicts held-out runs best, on windows of their own, 0-d."""
        # One for all networks: one for each would be fitted to the few people who are held out.
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for batch, counts in self._draw(self.share_batches):
            batch, _, network, rows = self._score(module, batch)
            if counts and self.linear is not None:
                linear = self.linear(batch)
                # What was not masked is NaN in the predictions, and adds nothing.
                step = (network - linear).nan_to_num().double()
                left = (batch.bold.float()[rows] - linear).nan_to_num()
                sums += torch.stack([(step * left).sum(), step.square().sum()])
        # Least squares: Σ (network − linear) · (target − linear) / Σ (network − linear)².
        along, square = self.ranks.sum(sums)
        share = (along / square.clamp_min(1e-12)).clamp(0.0, 1.0).float()
        return share if module.linear_path.divisible else share.round()

    def _loader(self, part: _RankSlice) -> Any:
        return make_loader(self.store, part, kind="host", device=str(self.device), on_corrupt=self.on_corrupt)

    def _draw(self, part: _RankSlice) -> Iterator[tuple[Any, bool]]:
        with closing_loader(self._loader(part)) as batches:
            for step in range(-(-part.batches // self.ranks.world)):
                yield next(batches), part.counts(step)

    def _last(self, bold: Tensor, rows: Tensor, cu_seqlens: Tensor) -> Tensor:
        first = torch.isin(rows, cu_seqlens[:-1].to(rows.dtype))
        return torch.where(first[:, None], self.mean, bold[(rows - 1).clamp(min=0)])


@contextmanager
def closing_loader(loader: Any) -> Iterator[Any]:
    """Yield an iterator over `loader` and close the loader at the end."""
    try:
        yield iter(loader)
    finally:
        loader.close()


def _subjects(store: BoldStore, runs: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the held-out subject of each run, the dataset of each of them, and the datasets' names.

    Runs that are not held out have -1.
    """
    names = np.asarray(store.runs.dataset)
    runs = np.arange(len(names)) if runs is None else np.asarray(runs)
    datasets, dataset = np.unique(names[runs], return_inverse=True)
    people = np.unique(np.asarray(store.runs.subject)[runs], return_inverse=True)[1]
    # A person is one of a dataset: labels of subjects come again in others.
    both, subject = np.unique(np.stack((dataset, people)), axis=1, return_inverse=True)
    of_run = np.full(len(names), -1, np.int64)
    of_run[runs] = subject.ravel()
    return of_run, both[0], datasets


def _scores(errors: Tensor, values: Tensor, shown: Sequence[str]) -> dict[str, float]:
    """Return L1, MSE of the guesses that are shown and the explained variances from sums [guesses, 2]."""
    of = dict(zip(_GUESSES, (errors / values).tolist(), strict=True))
    scores = {f"{name}{kind}": of[name][i] for name in shown for i, kind in enumerate(("l1", "mse"))}
    variance = scores["mean_mse"]
    for name in ("", "linear_"):
        if name in shown:
            explained = 1 - scores[f"{name}mse"] / variance if variance > 0 else math.nan
            scores[f"{name}explained_variance"] = explained
    return scores


def _gain(errors: Tensor, values: Tensor) -> dict[str, float]:
    """Return how much more variance than the linear predictor the model explains, and the interval of that.

    Parameters
    ----------
    errors
        Sums [subjects, guesses, 2].
    values
        Predicted values of each subject, [subjects].
    """
    square = errors[values > 0, :, 1].cpu().numpy()
    model, mean, linear = (square[:, _GUESSES.index(name)] for name in ("", "mean_", "linear_"))
    if not mean.sum() > 0:
        return {}
    found = {"val_gain": float((linear.sum() - model.sum()) / mean.sum())}
    if len(square) > 1:
        # The same draws at every validation, so that intervals differ by what was learnt.
        draws = np.random.default_rng(0).integers(0, len(square), (RESAMPLED, len(square)))
        gains = (linear - model)[draws].sum(1) / np.maximum(mean[draws].sum(1), 1e-300)
        found["val_gain_low"], found["val_gain_high"] = map(float, np.quantile(gains, (0.025, 0.975)))
    return found


def _error_sums(error: Tensor) -> Tensor:
    """Return [rows, 2]: sum |error|, sum error² of each row, float64."""
    return torch.stack([error.abs().double().sum(1), error.double().square().sum(1)], dim=1)


def _moments(x: Tensor, y: Tensor, counts: Tensor) -> Tensor:
    """Return [6, networks], float64: sums of 1, x, y, x², y², xy."""
    x, y = x.double(), y.double()
    return torch.stack([part.sum(0) for part in (counts.double(), x, y, x * x, y * y, x * y)])


def _correlations(moments: Tensor) -> list[float | None]:
    """Return Pearson correlations from :func:`_moments`; None where one side does not vary."""
    n, x, y, xx, yy, xy = moments.cpu().numpy()
    with np.errstate(invalid="ignore", divide="ignore"):
        var_x, var_y = xx - x * x / n, yy - y * y / n
        r = (xy - x * y / n) / np.sqrt(var_x * var_y)
    # Of a constant, rounding leaves a variance of about 1e-16 of the mean square.
    varies = (var_x > 1e-12 * xx) & (var_y > 1e-12 * yy)
    return [float(np.clip(value, -1, 1)) if ok else None for value, ok in zip(r, varies, strict=True)]


def _example(batch: Any, prediction: Tensor, rows: Tensor) -> Example:
    """Return the longest window of a batch."""
    window = int(np.argmax(batch.lengths))
    begin = int(batch.lengths[:window].sum())
    length = int(batch.lengths[window])
    whole = prediction.new_full((batch.tokens, prediction.shape[1]), math.nan)
    whole[rows] = prediction
    part = slice(begin, begin + length)
    return Example(
        seconds=batch.times[part].cpu().numpy(),
        bold=batch.bold[part].float().cpu().numpy(),
        prediction=whole[part].cpu().numpy(),
    )


def draw(path: Path, example: Example, step: int) -> bool:
    """Draw one window: all networks as images, a few as curves.

    Returns
    -------
    bool
        False where matplotlib (extra `report`) is not installed: a run does not end for want of a picture.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        _log.info("no reconstruction plots: pip install 'brainflow-fmri[report]'")
        return False
    seconds, bold, prediction = example.seconds, example.bold, example.prediction
    # Without pyplot, which keeps each figure until it is closed, and may want a display.
    figure = Figure(figsize=(10, 6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"step {step}: a held-out window, masked values and their reconstruction")
    grid = figure.add_gridspec(SHOWN, 2, width_ratios=(1, 1.4))
    limit = float(np.nanpercentile(np.abs(bold), 99)) or 1.0
    half = SHOWN // 2
    for i, (image, title) in enumerate(((bold, "BOLD"), (prediction, "reconstruction (white: not masked)"))):
        axes = figure.add_subplot(grid[i * half : (i + 1) * half, 0])
        axes.imshow(image.T, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        axes.set(title=title, xlabel="time points", ylabel="networks")
    # The networks with the most masked values, spread over the store's order.
    masked = np.isfinite(prediction).sum(0)
    best = np.flatnonzero(masked == masked.max())
    for i, network in enumerate(best[np.linspace(0, len(best) - 1, SHOWN).round().astype(int)]):
        axes = figure.add_subplot(grid[i, 1])
        axes.plot(seconds, bold[:, network], color="0.4", lw=1, label="BOLD")
        axes.plot(seconds, prediction[:, network], "o-", color="C3", ms=3, lw=1, label="reconstruction")
        axes.set_ylabel(f"network {network}", fontsize=8)
        if i == 0:
            axes.legend(loc="upper right", fontsize=7)
        if i == SHOWN - 1:
            axes.set_xlabel("seconds")
    own_folder(path.parent)
    with replacing(path) as file:
        figure.savefig(file, dpi=80, format="png")
    return True
