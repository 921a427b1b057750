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

from brainflow.batch import upload, window_of
from brainflow.decoding.ridge import NEVER, Ridge, fit_ridge, one_thread
from brainflow.kernels.dropout import Dropout
from brainflow.optional import requires

with requires("decoding", "report"):
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

ProbeName = Literal["linear", "mlp", "knn"]
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
        # Buffers: they are saved with the head, and no optimizer changes them.
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("keys", torch.zeros(examples, width))
        self.register_buffer("votes", torch.zeros(examples, classes))

    def forward(self, features: Tensor) -> Tensor:
        """Return log votes `[windows, classes]` of `features` `[windows, width]`."""
        similar = F.normalize(features - self.mean, dim=-1) @ self.keys.T
        best, which = similar.topk(min(NEIGHBOURS, len(self.keys)), dim=-1)
        # Similarities are at most 1, so nothing overflows.
        weight = ((best - 1) / TEMPERATURE).exp()
        votes = (weight[..., None] * self.votes[which]).sum(dim=1)
        return (votes / votes.sum(dim=-1, keepdim=True)).clamp_min(1e-12).log()


class AttentiveHead(nn.Module):
    """One learned query a head attends over a window's hidden states; what it reads is classified.

    Cross-attention pooling as in Bardes et al. 2024 (V-JEPA, arXiv 2404.08471), with one layer and without
    the feed-forward block that follows it there. Windows lie end to end: the softmax is taken within each.

    Parameters
    ----------
    width
        Width of the hidden states.
    classes
        Number of classes.
    dropout
        Dropout before the last layer.

    Examples
    --------
    >>> AttentiveHead(16, 3)(torch.zeros(5, 16), np.array([2, 3])).shape
    torch.Size([2, 3])
    """

    def __init__(self, width: int, classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = next(count for count in (8, 4, 2, 1) if width % count == 0)
        self.norm = nn.LayerNorm(width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        # Small, so that attention begins as nearly the mean over the window.
        self.query = nn.Parameter(torch.randn(self.heads, width // self.heads) * 0.02)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(width, classes)

    def forward(self, hidden: Tensor, lengths: np.ndarray) -> Tensor:
        """Return logits `[windows, classes]` of `hidden` `[tokens, width]`; `lengths` in host memory."""
        hidden = self.norm(hidden)
        window = upload(hidden.device, window=window_of(lengths))["window"]
        shape = (len(hidden), self.heads, -1)
        score = (self.key(hidden).view(shape) * self.query).sum(dim=-1) * self.query.shape[1] ** -0.5
        index = window[:, None].expand_as(score)
        blank = score.new_zeros(len(lengths), self.heads)
        # Detached: a constant that keeps `exp` in range, whose gradient cancels.
        # Without the zeros of `blank`, which would lie above scores that are all negative.
        top = blank.scatter_reduce(0, index, score.detach(), "amax", include_self=False)
        weight = (score - top[window]).exp()
        share = weight / blank.index_add(0, window, weight)[window]
        read = share[..., None] * self.value(hidden).view(shape)
        pooled = blank.new_zeros(len(lengths), hidden.shape[1]).index_add(0, window, read.flatten(1))
        logits: Tensor = self.output(self.dropout(pooled))
        return logits


def make_head(kind: str, *, width: int, classes: int, dropout: float = 0.0, examples: int = 0) -> nn.Module:
    """Return an unfitted head; `kind` is the mode of adaptation.

    Parameters
    ----------
    kind
        Mode of adaptation; what is none of the others gets the published head.
    width, classes
        Width of the features, number of classes.
    dropout
        Dropout of a trained head.
    examples
        Training windows that `knn` keeps.
    """
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
        `linear`: :func:`~brainflow.decoding.ridge.fit_ridge`; `mlp`: one hidden layer of 256; `knn`: see
        :class:`Neighbours`.
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
    if kind == "linear":
        return linear_head(fit_ridge(features, labels, classes=classes, balance=balance))
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
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted: Any = MLPClassifier((MLP_UNITS,), random_state=seed, max_iter=200)
        fitted.fit(scaled, labels, sample_weight=weights)
        layers = [(w.T, b) for w, b in zip(fitted.coefs_, fitted.intercepts_, strict=True)]
    weight, bias = layers[0]
    layers[0] = (weight / scale, bias - (weight / scale) @ mean)  # the scaler, folded in
    layers[-1] = _all_classes(*layers[-1], np.asarray(fitted.classes_), classes)
    linears = [m for m in head.children() if isinstance(m, nn.Linear)]
    with torch.no_grad():
        for linear, (weight, bias) in zip(linears, layers, strict=True):
            linear.weight.copy_(torch.from_numpy(weight))
            linear.bias.copy_(torch.from_numpy(bias))
    return head


def linear_head(ridge: Ridge) -> nn.Linear:
    """Return a ridge classifier as a layer."""
    head = nn.Linear(ridge.weight.shape[1], len(ridge.bias))
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(ridge.weight))
        head.bias.copy_(torch.from_numpy(ridge.bias))
    return head.eval()


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
        # Of two classes scikit-learn gives one logit: halves of opposite sign have the same softmax.
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    full, offset = np.zeros((classes, weight.shape[1])), np.full(classes, NEVER)
    full[seen], offset[seen] = weight, bias
    return full, offset


class DecodingHead(nn.Module):
    """The published decoding head: Linear + tanh + dropout, then Linear to the classes.

    Parameters
    ----------
    width
        Width of the features.
    classes
        Number of classes.
    dropout
        Dropout after the tanh.

    Examples
    --------
    >>> DecodingHead(16, 3, 0.1)(torch.zeros(5, 16)).shape
    torch.Size([5, 3])
    """

    def __init__(self, width: int, classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        if classes < 2:
            raise ValueError(f"classes: got {classes}, expected at least 2")
        self.pooler = nn.Linear(width, width)
        self.dropout = Dropout(dropout)
        self.output = nn.Linear(width, classes)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits [windows, classes] of `features` [windows, width]."""
        return self.output(self.dropout(torch.tanh(self.pooler(features))))
