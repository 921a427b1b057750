"""What turns features of windows into classes: heads fitted by scikit-learn or trained, all of them torch.

Whatever fitted a head, it is a module whose weights can be saved without pickle and differentiated.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from brainflow.decoding.attentive import AttentiveHead
from brainflow.decoding.baselines import single_threaded
from brainflow.models.heads import DecodingHead
from brainflow.optional import requires

with requires("decoding", "report"):
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier

ProbeName = Literal["linear", "mlp", "knn"]
NEVER = -1e4
"""Logit of a class that the training windows do not hold."""
MLP_UNITS = 256
NEIGHBOURS, TEMPERATURE = 20, 0.07


class Neighbours(nn.Module):
    """Votes of the nearest training windows by cosine similarity, weighted by exp(similarity / 0.07).

    As in Wu et al. 2018 (arXiv 1805.01978), on features centred by their training mean.

    Parameters
    ----------
    examples, width, classes
        Number of training windows, width of the features, number of classes.
    """

    def __init__(self, examples: int, width: int, classes: int) -> None:
        super().__init__()
        self.mean: Tensor
        self.keys: Tensor
        self.votes: Tensor
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("keys", torch.zeros(examples, width))
        self.register_buffer("votes", torch.zeros(examples, classes))

    def forward(self, features: Tensor) -> Tensor:
        """Return log votes `[windows, classes]` of `features` `[windows, width]`."""
        similar = F.normalize(features - self.mean, dim=-1) @ self.keys.T
        best, which = similar.topk(min(NEIGHBOURS, len(self.keys)), dim=-1)
        weight = ((best - 1) / TEMPERATURE).exp()
        votes = (weight[..., None] * self.votes[which]).sum(dim=1)
        return (votes / votes.sum(dim=-1, keepdim=True)).clamp_min(1e-12).log()


def make_head(kind: str, *, width: int, classes: int, dropout: float = 0.0, examples: int = 0) -> nn.Module:
    """Return an unfitted head; `kind` is the mode of adaptation."""
    if kind == "linear":
        return nn.Linear(width, classes)
    if kind == "mlp":
        return nn.Sequential(nn.Linear(width, MLP_UNITS), nn.ReLU(), nn.Linear(MLP_UNITS, classes))
    if kind == "knn":
        return Neighbours(examples, width, classes)
    if kind == "attentive":
        return AttentiveHead(width, classes, dropout)
    return DecodingHead(width, classes, dropout)


def fit_probe(
    kind: ProbeName,
    features: NDArray[np.float32],
    labels: NDArray[np.int64],
    *,
    classes: int,
    balance: bool = False,
    seed: int = 0,
) -> nn.Module:
    """Fit a head on frozen features.

    Parameters
    ----------
    kind
        `linear`: logistic regression; `mlp`: one hidden layer of 256; `knn`: see :class:`Neighbours`.
    features, labels
        `[windows, width]` and int64 `[windows]` in [0, classes).
    classes
        Number of classes.
    balance
        Weigh windows by the inverse of their class's frequency.
    seed
        Seeds the MLP.
    """
    width = features.shape[1]
    head = make_head(kind, width=width, classes=classes, examples=len(features)).eval()
    weights = class_weights(labels, classes)[labels] if balance else None
    if kind == "knn":
        assert isinstance(head, Neighbours)
        x = torch.from_numpy(features)
        head.mean.copy_(x.mean(dim=0))
        head.keys.copy_(F.normalize(x - head.mean, dim=-1))
        votes = F.one_hot(torch.from_numpy(labels), classes).float()
        head.votes.copy_(votes if weights is None else votes * torch.from_numpy(weights)[:, None])
        return head
    mean, scale = features.mean(axis=0, dtype=np.float64), features.std(axis=0, dtype=np.float64)
    scale[scale == 0] = 1.0
    scaled = (features - mean) / scale
    with single_threaded(), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        if kind == "linear":
            fitted: Any = LogisticRegression(max_iter=1_000).fit(scaled, labels, sample_weight=weights)
            layers = [(fitted.coef_, fitted.intercept_)]
        else:
            fitted = MLPClassifier((MLP_UNITS,), random_state=seed, max_iter=200)
            fitted.fit(scaled, labels, sample_weight=weights)
            layers = [(w.T, b) for w, b in zip(fitted.coefs_, fitted.intercepts_, strict=True)]
    weight, bias = layers[0]
    layers[0] = (weight / scale, bias - (weight / scale) @ mean)  # the scaler, folded in
    layers[-1] = _all_classes(*layers[-1], np.asarray(fitted.classes_), classes)
    linears = (
        [head] if isinstance(head, nn.Linear) else [m for m in head.children() if isinstance(m, nn.Linear)]
    )
    with torch.no_grad():
        for linear, (weight, bias) in zip(linears, layers, strict=True):
            linear.weight.copy_(torch.from_numpy(weight))
            linear.bias.copy_(torch.from_numpy(bias))
    return head


def class_weights(labels: NDArray[np.int64], classes: int) -> NDArray[np.float32]:
    """Return a weight a class, inverse to its frequency, with mean 1 over the windows."""
    counts = np.bincount(labels, minlength=classes).astype(np.float64)
    present = counts > 0
    weights = np.zeros(classes)
    weights[present] = len(labels) / (present.sum() * counts[present])
    return weights.astype(np.float32)


def _all_classes(weight: NDArray, bias: NDArray, seen: NDArray, classes: int) -> tuple[NDArray, NDArray]:
    """Return output weights with a row for every class; scikit-learn has one row for two classes."""
    if len(weight) == 1:
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    full, offset = np.zeros((classes, weight.shape[1])), np.full(classes, NEVER)
    full[seen], offset[seen] = weight, bias
    return full, offset
