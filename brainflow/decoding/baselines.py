"""Decoders without a pretrained model, on the same windows and folds: what a model has to beat.

Features are the values of a window laid in a row, scaled inside each fold by what trains there. Nothing is
tuned: both classifiers keep scikit-learn's default regularisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from brainflow.decoding.extra import requires_report
from brainflow.decoding.splits import Fold

with requires_report("decoding"):
    from sklearn.linear_model import LogisticRegression, RidgeClassifier
    from sklearn.pipeline import Pipeline, make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

BaselineName = Literal["logistic", "ridge"]


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
    starts = np.cumsum(lengths) - lengths
    means: NDArray[np.float32] = np.add.reduceat(bold, starts, axis=0)
    means /= np.asarray(lengths, dtype=np.float32)[:, None]
    return means


def single_threaded() -> Any:
    """Keep linear algebra to one thread, so that results do not depend on the number of cores."""
    return threadpool_limits(1, user_api="blas")


def make_classifier(name: BaselineName) -> Pipeline:
    """Return an unfitted classifier with its scaler in front.

    Raises
    ------
    ValueError
        If there is no such baseline.
    """
    if name == "logistic":
        return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1_000))
    if name == "ridge":
        return make_pipeline(StandardScaler(), RidgeClassifier())
    raise ValueError(f"name: got {name!r}, expected one of {', '.join(get_args(BaselineName))}")


def predict_folds(
    name: BaselineName, features: NDArray, labels: NDArray[np.int64], folds: Sequence[Fold]
) -> NDArray[np.int64]:
    """Fit a classifier in each fold and return its prediction for every window.

    Parameters
    ----------
    name
        Which classifier.
    features
        `[windows, features]`.
    labels
        Class of each window, `[windows]`.
    folds
        Folds that test each window once.

    Returns
    -------
    ndarray
        int64 `[windows]`: the class that the fold named which did not train on the window.
    """
    predictions = np.full(len(labels), -1, dtype=np.int64)
    for fold in folds:
        with threadpool_limits(
            1, user_api="blas"
        ):  # too small for threads, and results do not depend on them
            classifier = make_classifier(name).fit(features[fold.train], labels[fold.train])
            predictions[fold.test] = classifier.predict(features[fold.test])
    return predictions
