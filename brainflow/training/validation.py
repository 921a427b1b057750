"""Validation on fixed held-out windows, beside two predictions that need no model.

Keys of a validation line:

- `val_loss`: the framework's own objective, and `val_<name>` for whatever else it reports;
- `val_l1`, `val_mse`: error of the model's reconstruction, every masked value counting the same;
- `val_mean_l1`, `val_mean_mse`: error of the training set's mean of each network, on the same masked values;
- `val_last_l1`, `val_last_mse`: error of repeating the time point before (for the first time point of a
  window, which has none, the training set's mean);
- `val_explained_variance`: 1 - val_mse / val_mean_mse;
- `val_network_correlation`: Pearson correlation of predicted and true values of each network, a list in the
  store's order of networks (None where one of them does not vary), and `val_correlation`, its mean;
- `val_by_dataset`: for each dataset the L1, MSE and explained variance as above, without the prefix.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from brainflow.batch import Windows, upload
from brainflow.data import make_loader
from brainflow.files import own_folder
from brainflow.storage import BoldStore
from brainflow.storage.files import replacing

from .compute import autocast
from .parallel import Ranks

# Masks of validation are drawn with a seed of their own, the same at every validation of every run.
MASK_SEED = 20_220_611
_GUESSES = ("", "mean_", "last_")
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
    steps: int | None = None

    def number(self, step: int) -> int:
        return min(step * self.ranks.world + self.ranks.rank, self.batches - 1)

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
        Sampler over the training runs; its first `batches` batches give the mean prediction.
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
    ) -> None:
        self.precision, self.on_corrupt = precision, on_corrupt
        self.store, self.batches, self.device, self.ranks = store, batches, device, ranks or Ranks()
        self.held_out = _RankSlice(held_out, batches, self.ranks)
        self.datasets, self._dataset = np.unique(np.asarray(store.runs.dataset), return_inverse=True)
        sums = torch.zeros(store.networks + 1, dtype=torch.float64, device=device)
        for batch, counts in self._draw(_RankSlice(training, batches, self.ranks)):
            if counts:
                sums[:-1] += batch.bold.double().sum(dim=0)
                sums[-1] += batch.tokens
        self.ranks.sum(sums)
        self.mean = (sums[:-1] / sums[-1]).float()

    @torch.no_grad()
    def __call__(self, module: Any) -> tuple[dict[str, Any], Example | None]:
        """Return the metrics, equal on all ranks, and on rank 0 an example; the module keeps its mode."""
        was_training = module.training
        module.eval()
        reported: dict[str, Tensor] = {}
        networks, example = self.store.networks, None
        errors = torch.zeros(len(self.datasets), len(_GUESSES), 2, dtype=torch.float64, device=self.device)
        values = torch.zeros(len(self.datasets), dtype=torch.float64, device=self.device)
        moments = torch.zeros(6, networks, dtype=torch.float64, device=self.device)
        windows = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch, counts in self._draw(self.held_out):
            with autocast(self.device, self.precision):
                out, prediction, rows = module.score(batch, seed=MASK_SEED)
            for name, value in {"loss": out.loss, **out.metrics}.items():
                before = reported.setdefault(name, torch.zeros_like(value, dtype=torch.float64))
                if counts:
                    reported[name] = before + value.double() * batch.windows
            if not counts:  # a sharded module has to be called by all ranks
                continue
            windows += batch.windows
            bold, prediction = batch.bold.float(), prediction.float()
            target = bold[rows]
            given = prediction.isnan()  # values of a row that were not masked, as in Net-BERT
            of_tokens = np.repeat(self._dataset[batch.runs], batch.lengths)
            dataset = upload(self.device, of_tokens=of_tokens)["of_tokens"][rows]
            last = self._last(bold, rows, batch.cu_seqlens)
            for i, guess in enumerate((prediction, self.mean.expand_as(target), last)):
                errors[:, i].index_add_(0, dataset, _error_sums((guess - target).masked_fill(given, 0)))
            values.index_add_(0, dataset, (~given).sum(dim=1).double())
            moments += _moments(prediction.masked_fill(given, 0), target.masked_fill(given, 0), ~given)
            if example is None and self.ranks.first:
                example = _example(batch, prediction, rows)
        module.train(was_training)
        sums = [errors, values, moments, torch.stack([windows, *reported.values()])]
        total = self.ranks.sum(torch.cat([part.flatten() for part in sums]))
        parts = total.split([part.numel() for part in sums])
        errors, values, moments = (part.view(s.shape) for part, s in zip(parts[:3], sums[:3], strict=True))
        counted = parts[3].tolist()
        result: dict[str, Any] = {
            f"val_{name}": value / counted[0] for name, value in zip(reported, counted[1:], strict=True)
        }
        result |= {f"val_{name}": value for name, value in _scores(errors.sum(0), values.sum()).items()}
        correlations = _correlations(moments)
        known = [c for c in correlations if c is not None]
        result["val_correlation"] = sum(known) / len(known) if known else math.nan
        result["val_network_correlation"] = correlations
        result["val_by_dataset"] = {
            str(name): _scores(errors[i], values[i]) for i, name in enumerate(self.datasets) if values[i] > 0
        }
        return result, example

    def _draw(self, part: _RankSlice) -> Iterator[tuple[Any, bool]]:
        loader = make_loader(
            self.store, part, kind="host", device=str(self.device), on_corrupt=self.on_corrupt
        )
        with closing_loader(loader) as batches:
            for step in range(-(-self.batches // self.ranks.world)):
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


def _scores(errors: Tensor, values: Tensor) -> dict[str, float]:
    """Return L1, MSE of each guess and the model's explained variance from sums [guesses, 2]."""
    scores = {}
    for name, (l1, mse) in zip(_GUESSES, (errors / values).tolist(), strict=True):
        scores[f"{name}l1"], scores[f"{name}mse"] = l1, mse
    variance = scores["mean_mse"]
    scores["explained_variance"] = 1 - scores["mse"] / variance if variance > 0 else math.nan
    return scores


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
