"""Validation on fixed held-out windows, beside two predictions that need no model.

Keys of a validation line:

- `val_loss`: the framework's own objective, and `val_<name>` for whatever else it reports;
- `val_l1`, `val_mse`: error of the model's reconstruction, every masked value counting the same;
- `val_mean_l1`, `val_mean_mse`: error of the training set's mean of each network, on the same masked values;
- `val_last_l1`, `val_last_mse`: error of repeating the time point before (for the first time point of a
  window, which has none, the training set's mean);
- `val_explained_variance`: 1 - val_mse / val_mean_mse.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from brainflow.data import make_loader
from brainflow.storage import BoldStore

# Masks of validation are drawn with a seed of their own, the same at every validation of every run.
MASK_SEED = 20_220_611


class Validator:
    """Measures a module on the first `batches` batches of a held-out sampler.

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
    """

    def __init__(
        self, store: BoldStore, held_out: Any, training: Any, *, batches: int, device: torch.device
    ) -> None:
        self.store, self.held_out, self.batches, self.device = store, held_out, batches, device
        total = torch.zeros(store.networks, dtype=torch.float64, device=device)
        tokens = 0
        for batch in self._draw(training):
            total += batch.bold.double().sum(dim=0)
            tokens += batch.tokens
        self.mean = (total / tokens).float()

    @torch.no_grad()
    def __call__(self, module: Any) -> dict[str, float]:
        """Return the metrics; the module is left in the mode that it was in."""
        was_training = module.training
        module.eval()
        reported: dict[str, Tensor] = {}
        errors = torch.zeros(3, 2, dtype=torch.float64, device=self.device)
        values = torch.zeros((), dtype=torch.float64, device=self.device)
        windows = 0
        for batch in self._draw(self.held_out):
            out = module(batch, seed=MASK_SEED)
            for name, value in {"loss": out.loss, **out.metrics}.items():
                reported[name] = reported.get(name, 0.0) + value.double() * batch.windows
            windows += batch.windows
            prediction, rows = module.reconstruct(batch, seed=MASK_SEED)
            bold = batch.bold.float()
            target = bold[rows]
            guesses = (
                prediction.float(),
                self.mean.expand_as(target),
                self._last(bold, rows, batch.cu_seqlens),
            )
            given = prediction.isnan()  # values of a row that were not masked, as in Net-BERT
            errors += torch.stack([_error_sums((guess - target).masked_fill(given, 0)) for guess in guesses])
            values += (~given).sum()
        module.train(was_training)
        result = {f"val_{name}": float(value) / windows for name, value in reported.items()}
        for name, (l1, mse) in zip(("", "mean_", "last_"), (errors / values).tolist(), strict=True):
            result[f"val_{name}l1"], result[f"val_{name}mse"] = l1, mse
        variance = result["val_mean_mse"]
        result["val_explained_variance"] = 1 - result["val_mse"] / variance if variance > 0 else float("nan")
        return result

    def _draw(self, sampler: Any) -> Iterator[Any]:
        with closing_loader(make_loader(self.store, sampler, kind="host", device=str(self.device))) as loader:
            for _ in range(self.batches):
                yield next(loader)

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


def _error_sums(error: Tensor) -> Tensor:
    """Return [sum |error|, sum error²], float64."""
    return torch.stack([error.abs().double().sum(), error.double().square().sum()])
