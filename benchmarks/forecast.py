"""How well a model forecasts people who were not in its pretraining, beside the best linear predictor.

Explained variance is 1 - squared error ÷ squared error of predicting the training people's mean, over the
values that the framework itself hid and predicted. The linear predictor of the same values is fitted here, in
closed form, on all people who pretrained, apart from whatever linear path a model carries: it is the check of
that, too. What it may look at, by framework:

- `csm`: the two volumes before (one, for the second volume of a window);
- `seq-bert`: the nearest volumes that are not hidden, one before and one after;
- `net-bert`: the networks of the same volume that are not hidden;
- `autoencoder`: as many principal components of a window as the model passes through its bottleneck.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from brainflow.batch import PackedBatch, Windows
from brainflow.decoding.scores import Interval
from brainflow.frameworks import framework_spec
from brainflow.storage import BoldStore

MASK_SEED = 20_261_130
PENALTIES = 10.0 ** np.arange(-4, 1, 0.5)
"""Ridge penalties that are tried, in units of the mean eigenvalue of the predictors' covariance."""
DRAWS = 4
"""How often each window is hidden and predicted, where the framework draws what it hides."""
Array = NDArray[np.float64]
Predictor = Callable[[Array, NDArray[np.bool_]], Array]
"""(window `[time, networks]`, which of its values are hidden) → predictions of the whole window."""


def explained(
    module: Any, known: Sequence[NDArray], store: BoldStore, tested: Sequence[int], length: int
) -> dict[str, Interval]:
    """Return `ev`, `ev_linear`, `ev_minus_linear` with 95 % intervals over people.

    And `ev_path`, of the linear path that the model carries, if it does: without its network.

    Parameters
    ----------
    module
        A pretrained framework.
    known
        Runs of the people who pretrained, `[time, networks]` each.
    store, tested
        Runs of people who did not, one a person: a store and rows of its runs.
    length
        Time points of the windows, which tile the runs.
    """
    framework = module.config.framework
    series = [np.asarray(run, dtype=np.float64) for run in known]
    mean = np.concatenate(series).mean(axis=0)
    linear = LINEAR[framework](series, module.config.width)
    errors = np.array([_errors(module, store, run, length, mean, linear) for run in tested])
    ours, theirs, path, variance = errors.T
    found = {
        # Errors are summed before the division: people with little variance count little.
        "ev": over_people(lambda w: 1 - w @ ours / (w @ variance), len(errors)),
        "ev_linear": over_people(lambda w: 1 - w @ theirs / (w @ variance), len(errors)),
        "ev_minus_linear": over_people(lambda w: w @ (theirs - ours) / (w @ variance), len(errors)),
    }
    if module.linear_path is not None:
        found["ev_path"] = over_people(lambda w: 1 - w @ path / (w @ variance), len(errors))
    return found


def _errors(module: Any, store: BoldStore, run: int, length: int, mean: Array, linear: Predictor) -> Array:
    """Return the squared errors in one person: model, linear predictor, the model's linear path, the mean."""
    total = np.zeros(4)
    module.eval()
    for draw in range(DRAWS if module.config.framework.endswith("bert") else 1):
        batch = tiled(store, run, length, paired=framework_spec(module.config.framework).paired, step=draw)
        with torch.no_grad():
            _, predicted, rows = module.score(batch, seed=MASK_SEED)
            path = predicted
            if module.linear_path is not None:
                path = module.linear_path(replace(batch, mask=module.drawn(batch, MASK_SEED)))
        bold = batch.bold.double().numpy()
        values = np.full_like(bold, np.nan)  # of what was not hidden
        values[rows.numpy()] = predicted.double().numpy()
        hidden = np.isfinite(values)
        carried = np.zeros_like(bold)
        carried[rows.numpy()] = path.double().numpy()
        straight = np.concatenate(
            [
                linear(window, mask)
                for window, mask in zip(
                    *(np.split(x, np.cumsum(batch.lengths)[:-1]) for x in (bold, hidden)), strict=True
                )
            ]
        )
        guesses = (values, straight, carried, np.broadcast_to(mean, bold.shape))
        total += [np.square((guess - bold)[hidden]).sum() for guess in guesses]
    return total


def tiled(store: BoldStore, run: int, length: int, *, paired: bool, step: int) -> PackedBatch:
    """Return the windows of `length` that tile a run; paired ones as two halves with a time point between."""
    start, end = int(store.runs.start[run]), int(store.runs.start[run] + store.runs.length[run])
    starts = np.arange(start, end - length + 1, length)
    lengths = np.full(len(starts), length, np.int32)
    if paired:
        first = length // 2
        starts = np.stack([starts, starts + first + 1], axis=1).ravel()
        lengths = np.tile(np.array([first, length - first - 1], np.int32), len(lengths))
    windows = Windows(
        starts=starts.astype(np.int64),
        lengths=lengths,
        runs=np.full(len(starts), run, np.int32),
        t_r=np.full(len(starts), float(store.runs.t_r[run])),
        step=step,
        is_next=np.ones(len(starts) // 2, np.float32) if paired else None,
    )
    bold = store.windows(windows.starts, windows.lengths).astype(np.float32)
    return PackedBatch.pack(torch.from_numpy(bold), windows)


def over_people(metric: Callable[[Array], Array], people: int, resamples: int = 2_000) -> Interval:
    """Return a metric of weights over people, `[…, people]`, with an interval like that of decoders."""
    value = float(metric(np.ones(people)))
    if people < 2:
        return Interval(value=value, low=float("nan"), high=float("nan"))
    weights = np.random.default_rng(0).multinomial(people, np.full(people, 1 / people), size=resamples)
    # Widened like those of `decoding.scores`: the bootstrap of few people is too narrow.
    tail = stats.norm.cdf(np.sqrt(people / (people - 1)) * stats.t.ppf(0.025, people - 1))
    low, high = np.quantile(metric(weights.astype(float)), [tail, 1 - tail])
    return Interval(value=value, low=float(low), high=float(high))


Regression = Callable[[Array], Array]


def _regression(x: list[Array], y: list[Array]) -> Regression:
    """Return the ridge regression of rows `y` on rows `x`, an entry a person; left-out people choose."""
    errors = np.zeros(len(PENALTIES))
    for fit, judge in _left_out(len(x)):
        fitted = _fits(*(np.concatenate([z[i] for i in fit]) for z in (x, y)))
        new, true = (np.concatenate([z[i] for i in judge]) for z in (x, y))
        errors += [np.square(fitted(penalty)(new) - true).sum() for penalty in PENALTIES]
    return _fits(np.concatenate(x), np.concatenate(y))(float(PENALTIES[errors.argmin()]))


def _left_out(people: int) -> list[tuple[list[int], list[int]]]:
    """Return who fits and who judges: every fourth one is left out in turn."""
    # As in the linear path: halves, with decades of penalties, explained .02 less (dev/log.md).
    parts = [[i for i in range(people) if i % 4 == part] for part in range(min(4, people))]
    # A single person leaves nobody to fit.
    return [(sorted(set(range(people)) - set(part)), part) for part in parts if len(part) < people]


def _fits(x: Array, y: Array) -> Callable[[float], Regression]:
    """Return penalty → regression, from one decomposition."""
    from_, to = x.mean(axis=0), y.mean(axis=0)
    value, vector = np.linalg.eigh((x - from_).T @ (x - from_))
    seen = vector.T @ ((x - from_).T @ (y - to))

    def with_(penalty: float) -> Regression:
        weight = vector @ (seen / (value + penalty * value.mean())[:, None])
        return lambda new: to + (new - from_) @ weight

    return with_


def _from_offsets(series: list[Array]) -> Callable[[tuple[int, ...]], Regression]:
    """Return a cache: offsets of known volumes → regression of a volume on these, laid side by side."""

    @cache
    def fitted(offsets: tuple[int, ...]) -> Regression:
        before, after = max(0, -min(offsets)), max(0, *offsets)
        x = [
            np.concatenate([run[before + n : len(run) - after + n] for n in offsets], axis=1)
            for run in series
        ]
        return _regression(x, [run[before : len(run) - after] for run in series])

    return fitted


def from_past(series: list[Array], width: int) -> Predictor:
    """Return the predictor of each volume from the two before it."""
    fitted = _from_offsets(series)

    def predict(window: Array, hidden: NDArray[np.bool_]) -> Array:
        found = np.zeros_like(window)
        found[1] = fitted((-1,))(window[0])
        found[2:] = fitted((-2, -1))(np.concatenate([window[:-2], window[1:-1]], axis=1))
        return found

    return predict


def from_neighbours(series: list[Array], width: int) -> Predictor:
    """Return the predictor of hidden volumes from the nearest others, one before and one after."""
    fitted = _from_offsets(series)
    mean = np.concatenate(series).mean(axis=0)

    def predict(window: Array, hidden: NDArray[np.bool_]) -> Array:
        found = np.zeros_like(window)
        seen = np.flatnonzero(~hidden[:, 0])
        for t in np.flatnonzero(hidden[:, 0]):
            near = [*seen[seen < t][-1:], *seen[seen > t][:1]]
            found[t] = (
                fitted(tuple(int(n - t) for n in near))(np.concatenate([window[n] for n in near]))
                if near
                else mean
            )
        return found

    return predict


def from_other_networks(series: list[Array], width: int) -> Predictor:
    """Return the predictor of hidden networks from the others of the same volume."""
    errors = np.zeros(len(PENALTIES))
    for fit, judge in _left_out(len(series)):
        known, window = _given_others([series[i] for i in fit]), np.concatenate([series[i] for i in judge])
        # A fifth, as in training.
        hidden = np.broadcast_to(np.arange(window.shape[1]) % 5 == 0, window.shape)
        errors += [np.square((known(p)(window, hidden) - window)[hidden]).sum() for p in PENALTIES]
    return _given_others(series)(float(PENALTIES[errors.argmin()]))


def _given_others(series: list[Array]) -> Callable[[float], Predictor]:
    """Return penalty → expectation of hidden networks, given the others of a volume."""
    everything = np.concatenate(series)
    mean, raw = everything.mean(axis=0), np.cov(everything.T, bias=True)

    def with_(penalty: float) -> Predictor:
        covariance = raw + penalty * np.trace(raw) / len(raw) * np.eye(len(raw))

        @lru_cache(maxsize=64)
        def weight(pattern: bytes) -> Array:
            mask = np.frombuffer(pattern, dtype=bool)
            return np.linalg.solve(covariance[~mask][:, ~mask], covariance[~mask][:, mask])

        def predict(window: Array, hidden: NDArray[np.bool_]) -> Array:
            found = np.broadcast_to(mean, window.shape).copy()
            # A window hides the same networks in all its volumes: one solution serves them.
            patterns, which = np.unique(hidden, axis=0, return_inverse=True)
            for number, mask in enumerate(patterns):
                if mask.any() and not mask.all():
                    rows = np.flatnonzero(which.ravel() == number)
                    given = window[np.ix_(rows, ~mask)] - mean[~mask]
                    found[np.ix_(rows, mask)] += given @ weight(mask.tobytes())
            return found

        return predict

    return with_


def from_components(series: list[Array], width: int) -> Predictor:
    """Return the reconstruction of a window from `width` principal components of windows of its length."""

    @cache
    def fitted(length: int) -> tuple[Array, Array]:
        windows = np.stack([run[t : t + length].ravel() for run in series for t in _onsets(run, length)])
        mean = windows.mean(axis=0)
        windows -= mean
        # Of the two products the smaller one has the same components.
        wide = windows.shape[1] > windows.shape[0]
        value, vector = np.linalg.eigh(windows @ windows.T if wide else windows.T @ windows)
        # The mean is taken off: the last eigenvalue may be 0, by which nothing can be divided.
        best = value.argsort()[::-1][: min(width, len(value) - 1)]
        parts = windows.T @ vector[:, best] / np.sqrt(value[best]) if wide else vector[:, best]
        return mean, parts

    def predict(window: Array, hidden: NDArray[np.bool_]) -> Array:
        mean, parts = fitted(len(window))
        centred = window.ravel() - mean
        return np.asarray(mean + parts @ (parts.T @ centred)).reshape(window.shape)

    return predict


def _onsets(run: Array, length: int) -> range:
    return range(len(run) - length + 1)


LINEAR: dict[str, Callable[[list[Array], int], Predictor]] = {
    "csm": from_past,
    "seq-bert": from_neighbours,
    "net-bert": from_other_networks,
    "autoencoder": from_components,
}
