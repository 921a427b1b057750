"""How well a pretrained model predicts what is masked in runs that it did not train on, by network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from brainflow.decoding.windows import ArrayWindows
from brainflow.storage import BoldStore
from brainflow.storage.text import counted

MASK_SEED = 0
BATCH, MOST = 32, 512
"""Windows that are predicted at once; most windows that are read."""


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """Masked reconstruction of some runs.

    Attributes
    ----------
    truth, prediction
        float32 `[time, networks]`: the first window; the prediction is NaN where nothing was masked.
    error, mean_error
        float32 `[networks]`: mean absolute error over all masked values, of the model and of predicting each
        network's mean; NaN where a network was never masked.
    explained
        float32 `[networks]`: explained variance over the same values, against each network's mean.
    run
        Key of the run that the first window is from.
    t_r
        Its repetition time in seconds.
    windows
        Number of windows.
    """

    truth: NDArray[np.float32]
    prediction: NDArray[np.float32]
    error: NDArray[np.float32]
    mean_error: NDArray[np.float32]
    explained: NDArray[np.float32]
    run: str
    t_r: float
    windows: int


@torch.no_grad()
def reconstruct(store: BoldStore, module: Any, runs: tuple[str, ...], *, length: int) -> Reconstruction:
    """Predict the masked values of runs, cut into windows end to end.

    Parameters
    ----------
    store
        The store.
    module
        A pretrained module; put into evaluation mode.
    runs
        Keys of the runs; at most 512 windows of them, spread evenly, are predicted.
    length
        Time points of a window; a shorter run is one window.

    Raises
    ------
    ValueError
        If the store holds none of the runs.
    """
    module.eval()
    ids = np.flatnonzero(np.isin(np.asarray(store.runs.key, dtype=np.str_), runs))
    if not len(ids):
        raise ValueError(
            f"runs: the store {store.path} holds none of the {counted(len(runs), 'run')} asked for"
        )
    windows = []
    for run in ids:
        total = int(store.runs.length[run])
        size = min(length, total)
        windows += [(run, place * size, size) for place in range(total // size)]
    windows = [windows[i] for i in np.unique(np.linspace(0, len(windows) - 1, MOST).round().astype(int))]
    owner, onset, lengths = (np.array(column, dtype=np.int64) for column in zip(*windows, strict=True))
    starts = np.asarray(store.runs.start)[owner].astype(np.int64) + onset
    t_r = np.asarray(store.runs.t_r, dtype=np.float64)[owner]
    sums = np.zeros((5, store.networks))  # of count, value, value², |error|, error²
    kept: list[tuple[NDArray, NDArray]] = []
    for step, begin in enumerate(range(0, len(owner), BATCH)):
        part = slice(begin, begin + BATCH)
        # A seed for each batch: with one for all, the same places would be masked in all of them.
        truth, guess = _predict(store, module, starts[part], lengths[part], t_r[part], seed=MASK_SEED + step)
        kept.append((truth, guess))
        known = np.isfinite(guess)
        value, residual = np.where(known, truth, 0.0), np.where(known, truth - guess, 0.0)
        sums += [
            known.sum(axis=0),
            value.sum(axis=0),
            np.square(value).sum(axis=0),
            np.abs(residual).sum(axis=0),
            np.square(residual).sum(axis=0),
        ]
    count = np.where(sums[0] > 0, sums[0], np.nan)
    mean = sums[1] / count
    # Distances from the mean need the mean first, hence a second pass.
    spread = np.zeros(store.networks)
    for truth, guess in kept:
        spread += np.where(np.isfinite(guess), np.abs(truth - mean), 0.0).sum(axis=0)
    variance = np.maximum(sums[2] / count - np.square(mean), 1e-12)
    first = slice(0, int(lengths[0]))
    return Reconstruction(
        truth=kept[0][0][first].astype(np.float32),
        prediction=kept[0][1][first].astype(np.float32),
        error=(sums[3] / count).astype(np.float32),
        mean_error=(spread / count).astype(np.float32),
        explained=(1 - sums[4] / count / variance).astype(np.float32),
        run=str(store.runs.key[owner[0]]),
        t_r=float(t_r[0]),
        windows=len(owner),
    )


def _predict(
    store: BoldStore, module: Any, starts: NDArray, lengths: NDArray, t_r: NDArray, *, seed: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return windows end to end `[tokens, networks]` and their prediction, NaN where nothing was masked."""
    bold = np.asarray(store.windows(starts, lengths), dtype=np.float32)
    source = ArrayWindows(np.split(bold, np.cumsum(lengths)[:-1]), t_r=t_r)
    everything, cpu = np.arange(len(lengths)), torch.device("cpu")
    with source.loader(everything, batch=len(lengths), shuffle=False, seed=0, device=cpu) as batches:
        values, rows = module.reconstruct(next(batches), seed=seed)
    guess = np.full(bold.shape, np.nan, dtype=np.float32)
    guess[rows.numpy()] = values.numpy()
    return bold, guess
