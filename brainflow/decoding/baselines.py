"""Decoders without a pretrained model, on the same windows and folds: what a model has to beat.

Nothing is tuned: every classifier keeps its package's default regularisation. What is scaled or projected is
fitted to the training windows of a fold alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from brainflow.decoding.linear_over_time import LinearOverTime
from brainflow.decoding.splits import Fold
from brainflow.optional import requires

with requires("decoding", "report"):
    from sklearn.decomposition import PCA
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression, RidgeClassifier
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

BaselineName = Literal["logistic", "ridge", "connectome", "mlp", "linear-over-time", "nilearn"]
BASELINES: tuple[BaselineName, ...] = get_args(BaselineName)
DESCRIPTIONS: dict[str, str] = {
    "logistic": "logistic regression, no model",
    "ridge": "ridge classifier, no model",
    "connectome": "connectome + logistic regression, no model",
    "mlp": "MLP on the time series, no model",
    "linear-over-time": "linear over time, no model",
    "nilearn": "nilearn Decoder on window means, no model",
}
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
        float32 `[windows, length · networks]` where all windows have one length, else the means over time
        `[windows, networks]`: rows of unequal length have no common features.
    """
    if int(np.sum(lengths)) != len(bold):
        raise ValueError(
            f"lengths: got a sum of {int(np.sum(lengths))}, expected the {len(bold)} rows of bold"
        )
    bold = np.asarray(bold, dtype=np.float32)
    if (lengths == lengths[0]).all():
        return bold.reshape(len(lengths), -1)
    return means(bold, lengths)


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
        pick = np.sort(np.random.default_rng(0).choice(len(above), EDGES, replace=False))
        above, below = above[pick], below[pick]
    rows = []
    for window in np.split(np.asarray(bold, dtype=np.float32), np.cumsum(lengths)[:-1]):
        z = window - window.mean(axis=0)
        z /= np.maximum(np.linalg.norm(z, axis=0), 1e-6)
        rows.append(np.arctanh(np.clip((z.T @ z)[above, below], -0.999, 0.999)))
    return np.stack(rows)


def padded(bold: NDArray, lengths: NDArray) -> NDArray[np.float32]:
    """Return windows filled up with zeros to the longest, `[windows, time, networks]`."""
    result = np.zeros((len(lengths), int(np.max(lengths)), bold.shape[1]), dtype=np.float32)
    for row, window in zip(result, np.split(bold, np.cumsum(lengths)[:-1]), strict=True):
        row[: len(window)] = window
    return result


def make_features(name: BaselineName, bold: NDArray, lengths: NDArray) -> NDArray[np.float32]:
    """Return what a baseline sees of windows laid end to end, one entry a window."""
    makers = {"connectome": connectomes, "nilearn": means, "linear-over-time": padded}
    return makers.get(name, flatten)(bold, lengths)


def single_threaded() -> Any:
    """Keep linear algebra to one thread, so that results do not depend on the number of cores."""
    return threadpool_limits(1, user_api="blas")


def make_classifier(name: BaselineName) -> Any:
    """Return an unfitted classifier with its scaler in front.

    Raises
    ------
    ValueError
        If there is no such baseline.
    """
    # A penalised linear model is the same on all principal components as on the features, and much faster
    # where there are more features than windows.
    if name in ("logistic", "connectome"):
        return make_pipeline(StandardScaler(), PCA(svd_solver="full"), LogisticRegression(max_iter=1_000))
    if name == "ridge":
        return make_pipeline(StandardScaler(), RidgeClassifier())
    if name == "mlp":
        # no PCA here: it costs the MLP 9 points on the example data
        return make_pipeline(StandardScaler(), MLPClassifier(random_state=0))
    if name == "linear-over-time":
        return LinearOverTime()
    if name == "nilearn":
        return NetworkDecoder()
    raise ValueError(f"name: got {name!r}, expected one of {', '.join(get_args(BaselineName))}")


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
        folds = int(min(3, np.unique(y, return_counts=True)[1].min()))
        self._decoder = Decoder(
            mask=mask,
            cv=folds,
            screening_percentile=100,
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
        with single_threaded(), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            classifier = make_classifier(name).fit(features[fold.train], labels[fold.train])
            predictions[fold.test] = classifier.predict(features[fold.test])
            if chances is None or not hasattr(classifier, "predict_proba"):
                chances = None
                continue
            chances[np.ix_(fold.test, classifier.classes_)] = classifier.predict_proba(features[fold.test])
    return predictions, chances
