"""Decoders without a pretrained model, on the same windows and folds: what a model has to beat.

Nothing is tuned by hand. Ridge is the one that reads models, too: its penalty comes from people left out
within the training windows. Other classifiers keep their package's default regularisation. What is scaled or
projected is fitted to the training windows of a fold alone; only half-whitening knows the covariance of all
runs, without labels, those of the tested people included, which can only favour it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from brainflow.decoding.readout import time_bins
from brainflow.decoding.ridge import RidgeDecoder, one_thread, power_of
from brainflow.decoding.splits import Fold
from brainflow.optional import requires
from brainflow.storage.normalise import spatially_normalised

with requires("decoding", "report"):
    from sklearn.covariance import ledoit_wolf
    from sklearn.decomposition import PCA
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

BaselineName = Literal[
    "ridge",
    "ridge-spatial",
    "ridge-whitened",
    "ridge-spatial-whitened",
    "logistic",
    "logistic-spatial",
    "means",
    "log-variance",
    "connectome",
    "tangent",
    "mlp",
    "linear-over-time",
    "nilearn",
]
BASELINES: tuple[BaselineName, ...] = get_args(BaselineName)
DESCRIPTIONS: dict[str, str] = {
    "ridge": "ridge, no model",
    "ridge-spatial": "ridge, mean and SD over networks removed, no model",
    "ridge-whitened": "ridge, half-whitened, no model",
    "ridge-spatial-whitened": "ridge, mean and SD over networks removed, half-whitened, no model",
    "logistic": "logistic regression, no model",
    "logistic-spatial": "logistic regression, mean and SD over networks removed, no model",
    "means": "logistic regression on window means, no model",
    "log-variance": "logistic regression on log-variances, no model",
    "tangent": "tangent connectome + ridge, no model",
    "connectome": "connectome + logistic regression, no model",
    "mlp": "MLP on the time series, no model",
    "linear-over-time": "linear over time, no model",
    "nilearn": "nilearn Decoder on window means, no model",
}
ITERATIONS, WEIGHT_PENALTY = 30, 1e-3
"""Of the linear model over time."""
RUNS = 64
"""Most runs that half-whitening looks at."""
EDGES = 10_000
"""Most edges of a connectome that are used; of more, this many are drawn once with a fixed seed."""


def flatten(bold: NDArray, lengths: NDArray) -> NDArray[np.float32]:
    """Return one row of features a window.

    Parameters
    ----------
    bold
        Windows end to end, `[tokens, networks]`.
    lengths
        Time points of each window, `[windows]`; they sum to `tokens`.

    Returns
    -------
    ndarray
        float32 `[windows, length · networks]`; where windows differ in length, equal time bins of each, as
        many as the median length has time points.

    Raises
    ------
    ValueError
        If the lengths do not sum to the rows of `bold`.
    """
    if int(np.sum(lengths)) != len(bold):
        raise ValueError(
            f"lengths: got a sum of {int(np.sum(lengths))}, expected the {len(bold)} rows of bold"
        )
    bold = np.asarray(bold, dtype=np.float32)
    if (lengths == lengths[0]).all():
        return bold.reshape(len(lengths), -1)
    return time_bins(torch.from_numpy(bold), lengths, int(np.median(lengths))).numpy()


def half_whitener(store: Any, *, spatial: bool) -> NDArray[np.float32]:
    """Return the covariance of a store's runs to the power -1/4, `[networks, networks]`.

    Half-way to whitening: directions of much variance, as the global signal, no longer drown the others,
    and those of noise are not blown up. At most `RUNS` runs are read, spread evenly.
    """
    total, count = np.zeros((store.networks, store.networks)), 0
    for run in np.unique(np.linspace(0, len(store.runs) - 1, min(RUNS, len(store.runs))).astype(int)):
        bold = np.asarray(store.run(int(run)), dtype=np.float64)
        bold = spatially_normalised(bold).astype(np.float64) if spatial else bold
        bold = bold - bold.mean(axis=0)
        total, count = total + bold.T @ bold, count + len(bold)
    return power_of(total / count, -0.25).astype(np.float32)


def log_variances(bold: NDArray, lengths: NDArray) -> NDArray[np.float32]:
    """Return the log of each network's variance within each window, `[windows, networks]`."""
    windows = np.split(np.asarray(bold, dtype=np.float64), np.cumsum(lengths)[:-1])
    # A constant network has no log.
    return np.log(np.stack([w.var(axis=0) for w in windows]) + 1e-6).astype(np.float32)


def covariances(bold: NDArray, lengths: NDArray) -> NDArray[np.float64]:
    """Return the shrunk covariance (Ledoit & Wolf 2004) of each window, `[windows, networks, networks]`.

    Of more networks than give `EDGES` edges a part is drawn once with a fixed seed.
    """
    # n networks have about n²/2 edges.
    most = int(np.sqrt(2 * EDGES))
    if bold.shape[1] > most:
        bold = bold[:, np.sort(np.random.default_rng(0).choice(bold.shape[1], most, replace=False))]
    windows = np.split(np.asarray(bold, dtype=np.float64), np.cumsum(lengths)[:-1])
    # Shrunk: of fewer time points than networks a covariance is singular and has no logarithm.
    return np.stack([ledoit_wolf(w - w.mean(axis=0), assume_centered=True)[0] for w in windows])


def tangents(covariances: NDArray, mean: NDArray) -> NDArray[np.float64]:
    """Return covariances C seen from their mean M, the upper triangle of log(M^-1/2 C M^-1/2).

    From Varoquaux et al. 2010.

    Parameters
    ----------
    covariances, mean
        `[windows, networks, networks]` and `[networks, networks]`.
    """
    value, vector = np.linalg.eigh(mean)
    # A singular mean has values of 0 or, by rounding, below.
    root = (vector * np.maximum(value, 1e-12 * value[-1]) ** -0.5) @ vector.T
    value, vector = np.linalg.eigh(root @ covariances @ root)
    log = (vector * np.log(np.maximum(value, 1e-9))[:, None, :]) @ vector.transpose(0, 2, 1)
    return np.asarray(log[:, *np.triu_indices(len(mean))])


def means(bold: NDArray, lengths: NDArray) -> NDArray[np.float32]:
    """Return the mean of each window over time, `[windows, networks]`."""
    starts = np.cumsum(lengths) - lengths
    total: NDArray[np.float32] = np.add.reduceat(np.asarray(bold, dtype=np.float32), starts, axis=0)
    total /= np.asarray(lengths, dtype=np.float32)[:, None]
    return total


def connectomes(bold: NDArray, lengths: NDArray) -> NDArray[np.float32]:
    """Return Fisher's z of the correlations between networks within each window, `[windows, edges]`."""
    networks = bold.shape[1]
    above, below = np.triu_indices(networks, k=1)
    if len(above) > EDGES:
        # A fixed seed: runs may come one by one, and have to give the same edges.
        pick = np.sort(np.random.default_rng(0).choice(len(above), EDGES, replace=False))
        above, below = above[pick], below[pick]
    rows = []
    for window in np.split(np.asarray(bold, dtype=np.float32), np.cumsum(lengths)[:-1]):
        z = window - window.mean(axis=0)
        # A constant network correlates with nothing.
        z /= np.maximum(np.linalg.norm(z, axis=0), 1e-6)
        # Clipped, since z of a correlation of 1 is infinite.
        rows.append(np.arctanh(np.clip((z.T @ z)[above, below], -0.999, 0.999)))
    return np.stack(rows)


def padded(bold: NDArray, lengths: NDArray) -> NDArray[np.float32]:
    """Return windows filled up with zeros to the longest, `[windows, time, networks]`."""
    result = np.zeros((len(lengths), int(np.max(lengths)), bold.shape[1]), dtype=np.float32)
    for row, window in zip(result, np.split(bold, np.cumsum(lengths)[:-1]), strict=True):
        row[: len(window)] = window
    return result


MAKERS: dict[str, Any] = {
    "connectome": connectomes,
    "tangent": covariances,
    "nilearn": means,
    "means": means,
    "log-variance": log_variances,
    "linear-over-time": padded,
}


def make_features(name: BaselineName, bold: NDArray, lengths: NDArray, store: Any) -> NDArray:
    """Return what a baseline sees of windows laid end to end, one entry a window; `store` holds the runs.

    Parameters
    ----------
    name
        Which baseline.
    bold, lengths
        Windows end to end, `[tokens, networks]`, and their time points, `[windows]`.
    store
        Runs that half-whitening reads; their labels are not.
    """
    spatial = "-spatial" in name
    if spatial:
        bold = spatially_normalised(bold)
    if "-whitened" in name:
        bold = np.asarray(bold, dtype=np.float32) @ half_whitener(store, spatial=spatial)
    features: NDArray = MAKERS.get(name, flatten)(bold, lengths)
    return features


def make_classifier(name: BaselineName, times: int = 1) -> Any:
    """Return an unfitted classifier with its scaler in front; `times` as in :func:`predict_folds`.

    Raises
    ------
    ValueError
        If there is no such baseline.
    """
    # A penalised linear model is the same on all principal components as on the features, and much faster
    # where there are more features than windows.
    if name in ("logistic", "logistic-spatial", "means", "log-variance", "connectome"):
        # `full`: by itself PCA may take a solver that draws at random.
        return make_pipeline(StandardScaler(), PCA(svd_solver="full"), LogisticRegression(max_iter=1_000))
    if name.startswith("ridge"):
        return RidgeDecoder(times)
    if name == "tangent":
        return TangentDecoder()
    if name == "mlp":
        # no PCA here: it costs the MLP 9 points on the example data
        return make_pipeline(StandardScaler(), MLPClassifier(random_state=0))
    if name == "linear-over-time":
        return LinearOverTime()
    if name == "nilearn":
        return NetworkDecoder()
    raise ValueError(f"name: got {name!r}, expected one of {', '.join(get_args(BaselineName))}")


class TangentDecoder:
    """Ridge on covariances seen from the mean of the training windows, see :func:`tangents`."""

    def fit(self, X: NDArray, y: NDArray[np.int64], groups: NDArray | None = None) -> Self:
        """Fit to covariances `[windows, networks, networks]`, classes and the person of each window."""
        # Of the training windows: the mean of all would know those that are tested.
        self._mean = X.mean(axis=0)
        self._ridge = RidgeDecoder().fit(tangents(X, self._mean), y, groups)
        self.classes_ = self._ridge.classes_
        return self

    def predict(self, X: NDArray) -> NDArray[np.int64]:
        """Return the class of each window."""
        return self._ridge.predict(tangents(X, self._mean))

    def predict_proba(self, X: NDArray) -> NDArray[np.float64]:
        """Return the probability of each of `classes_` for each window."""
        return self._ridge.predict_proba(tangents(X, self._mean))


class LinearOverTime:
    """Linear over time points → 1, Linear over networks → classes (the linear model of arXiv 2206.11417).

    Fitted by L-BFGS with a quadratic penalty, from zero weights over networks and uniform ones over time:
    nothing is drawn.
    """

    def fit(self, X: NDArray, y: NDArray[np.int64]) -> Self:
        """Fit to windows `[windows, time, networks]` (short ones padded with zeros) and their classes."""
        self.classes_, target = np.unique(y, return_inverse=True)
        x, named = torch.from_numpy(np.asarray(X, dtype=np.float32)), torch.from_numpy(target)
        self._mean, self._scale = x.mean(dim=(0, 1)), x.std(dim=(0, 1)).clamp_min(1e-6)
        x = (x - self._mean) / self._scale
        # Not zeros as the weights below: with both at zero neither would have a gradient.
        self._time = torch.full((x.shape[1],), 1.0 / x.shape[1], requires_grad=True)
        self._weight = torch.zeros(x.shape[2], len(self.classes_), requires_grad=True)
        self._bias = torch.zeros(len(self.classes_), requires_grad=True)
        parameters = [self._time, self._weight, self._bias]
        optimizer = torch.optim.LBFGS(parameters, max_iter=ITERATIONS, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            penalty = WEIGHT_PENALTY * (self._weight.square().sum() + self._time.square().sum())
            loss = F.cross_entropy(self._logits(x), named) + penalty
            loss.backward()
            return loss

        optimizer.step(closure)
        return self

    def predict(self, X: NDArray) -> NDArray[np.int64]:
        """Return the class of each window."""
        return self.classes_[self.predict_proba(X).argmax(axis=1)]

    def predict_proba(self, X: NDArray) -> NDArray[np.float32]:
        """Return the probability of each of `classes_` for each window."""
        with torch.no_grad():
            x = (torch.from_numpy(np.asarray(X, dtype=np.float32)) - self._mean) / self._scale
            return self._logits(x).softmax(dim=1).numpy()

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("wtn,t->wn", x, self._time) @ self._weight + self._bias


class NetworkDecoder:
    """nilearn's `Decoder` for networks instead of voxels.

    nilearn wants images: network i becomes voxel (i, 0, 0) of one. Nothing that it does here looks at where a
    voxel lies: there is no smoothing, and screening, which goes by the volume of the brain, is off.
    """

    def fit(self, X: NDArray, y: NDArray[np.int64]) -> NetworkDecoder:
        """Fit to `[windows, networks]`, at least 2 windows a class."""
        from nilearn.decoding import Decoder
        from nilearn.image import new_img_like

        self._mean, scale = X.mean(axis=0), X.std(axis=0)
        self._scale = np.where(scale > 0, scale, 1.0)
        shape = (X.shape[1], 1, 1)
        mask = new_img_like(self._image(X[:1]), np.ones(shape, dtype=np.uint8))
        # Stratified folds need a window of each class.
        folds = int(min(3, np.unique(y, return_counts=True)[1].min()))
        self._decoder = Decoder(
            mask=mask,
            cv=folds,
            screening_percentile=100,
            # Scaled already, by the training windows.
            standardize=None,
            scoring="accuracy",
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._decoder.fit(self._image(X), y)
        return self

    def predict(self, X: NDArray) -> NDArray[np.int64]:
        """Return the class of each window."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return np.asarray(self._decoder.predict(self._image(X)), dtype=np.int64)

    def _image(self, X: NDArray) -> Any:
        import nibabel

        values = ((X - self._mean) / self._scale).astype(np.float32)
        return nibabel.Nifti1Image(np.ascontiguousarray(values.T[:, None, None, :]), np.eye(4))


def predict_folds(
    name: BaselineName,
    features: NDArray,
    labels: NDArray[np.int64],
    folds: Sequence[Fold],
    *,
    classes: int,
    groups: NDArray | None = None,
    times: int = 1,
) -> tuple[NDArray[np.int64], NDArray[np.float32] | None]:
    """Fit a classifier in each fold and return what it says about every window that a fold tests.

    Parameters
    ----------
    name
        Which classifier.
    features
        `[windows, features]`, as :func:`make_features` returns them.
    labels
        Class of each window, `[windows]`.
    folds
        Folds that test each window at most once.
    classes
        Number of classes.
    groups
        Person or run of each window: ridge leaves these out to choose its penalty.
    times
        Time points that the features of a ridge lie side by side of.

    Returns
    -------
    predictions
        int64 `[windows]`: the class that the fold named which did not train on the window; -1 where no fold
        tests it.
    probabilities
        float32 `[windows, classes]`, zeros where no fold tests the window; None if the classifier has none.
    """
    predictions = np.full(len(labels), -1, dtype=np.int64)
    chances: NDArray[np.float32] | None = np.zeros((len(labels), classes), dtype=np.float32)
    for fold in folds:
        # too small for threads, and results do not depend on them
        with one_thread(), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            classifier = make_classifier(name, times)
            known = (features[fold.train], labels[fold.train])
            if isinstance(classifier, RidgeDecoder | TangentDecoder) and groups is not None:
                classifier.fit(*known, groups[fold.train])
            else:
                classifier.fit(*known)
            predictions[fold.test] = classifier.predict(features[fold.test])
            if chances is None or not hasattr(classifier, "predict_proba"):
                chances = None
                continue
            # A fold may train on fewer classes.
            chances[np.ix_(fold.test, classifier.classes_)] = classifier.predict_proba(features[fold.test])
    return predictions, chances
