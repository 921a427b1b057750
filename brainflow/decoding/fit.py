"""One decoder from labelled windows: a fitted head, and then all weights or low-rank changes with it.

By default a linear head is fitted in closed form to time bins of the frozen states: of the layer that reads
people best who were left out, or of the first and the last side by side. Then head and body train together
for a few steps (Kumar et al. 2022, arXiv 2202.10054: a head that begins at random pulls the features out of
shape).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from brainflow.decoding.finetune import Decoder, History, finetune, frozen_features, state_covariance
from brainflow.decoding.heads import ProbeName, fit_probe, linear_head, make_head
from brainflow.decoding.lora import add_lora, merge_lora
from brainflow.decoding.readout import ALL, BINS, BOTH, SPREAD, Layer, Pooling, Readout, layers
from brainflow.decoding.ridge import BETTER, Ridge, fit_ridge
from brainflow.decoding.windows import WindowSource
from brainflow.frameworks.base import freeze

Mode = Literal["finetune", "lora", "attentive", "linear", "mlp", "knn"]
PROBES = get_args(ProbeName)
LEARNING_RATES = {"finetune": 1e-4, "lora": 1e-3, "attentive": 1e-3}
PUBLISHED_RATES = LEARNING_RATES | {"finetune": 3e-4}
STEPS, LONG_STEPS = 60, 500
"""Steps from a fitted head, and from a random one."""
JITTER = 1
"""Time points by which onsets of training windows move."""
HELD_OUT = 5
"""One of so many training people, at least one, says when to stop."""
NAMES = {
    "finetune": "fine-tuned",
    "lora": "LoRA",
    "attentive": "attentive probe",
    "linear": "linear probe",
    "mlp": "MLP probe",
    "knn": "nearest neighbours",
}


@dataclass(frozen=True, kw_only=True)
class AdaptConfig:
    """How a pretrained model is adapted."""

    mode: Mode = "finetune"
    """`finetune`: all weights, from a fitted head. `lora`: low-rank changes of the blocks' projections, from
    one. On frozen weights: `attentive` (attention over the time points), and on one vector a window `linear`
    (ridge in closed form), `mlp` (one hidden layer), `knn` (nearest neighbours)."""
    published: bool = False
    """`finetune`, `lora`: as published, from a random tanh head on the appended CLS token."""
    scratch: bool = False
    """Take the checkpoint's architecture with fresh weights: what pretraining has to beat."""
    pooling: Pooling | None = None
    """How one vector is made of a window: `bins` lays the means of equal time bins side by side, `moments`
    takes mean and log-SD over time, `spread` the log-SD alone, `cls` appends the CLS token, `last`, `mean`,
    `first` take hidden states of the time points, `tokens` keeps them all for `attentive`, which takes
    nothing else. By default `bins`, or the spread of the BOLD where people who are left out are clearly read
    better by how much their networks vary; `cls` if `published`."""
    bins: int = BINS
    """Number of time bins."""
    layer: Layer = None
    """Which states are read: 0 the embedding, 1, 2, … after so many blocks (their number: the last), `input`
    the BOLD itself, normalised over networks at each time point, `both` embedding and last side by side,
    `all` these and the input. By default what reads people best who are left out of the training windows
    (windows of one person), the input alone apart; `all` where classes have one window each."""
    freeze: str = ""
    """`finetune` only: pretrained parts that stay as they are, e.g. embedder,decoder: of embedder, decoder,
    decoder-without-heads and unembedder."""
    steps: int | None = None
    """Optimizer steps a fold; by default 60 from a fitted head, 500 from a random one."""
    batch_size: int = 32
    """Windows a step."""
    lr: float | None = None
    """Peak learning rate of AdamW; by default 1e-4 for `finetune` (3e-4 if `published`), 1e-3 for `lora` and
    `attentive`."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    dropout: float = 0.1
    """Dropout of a random head."""
    rank: int = 8
    """Rank of `lora`'s changes."""
    balance: bool = False
    """Weigh windows by the inverse of their class's frequency."""
    label_smoothing: float = 0.0
    """Share of each label spread over all classes; `finetune`, `lora` and `attentive` only."""
    seed: int = 0
    """Seeds fresh weights, dropout and the order of the windows."""

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode: got {self.mode!r}, expected one of {', '.join(get_args(Mode))}")
        for name in ("steps", "batch_size", "rank"):
            if (getattr(self, name) or 1) < 1 or getattr(self, name) == 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if self.lr is not None and not self.lr > 0:
            raise ValueError(f"lr: got {self.lr}, expected a positive number")
        for name in ("dropout", "label_smoothing"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a number in [0, 1)")
        if self.label_smoothing and self.by_features:
            raise ValueError(
                f"label_smoothing: got {self.label_smoothing} with mode {self.mode}, which takes no smoothed "
                "labels; expected 0, or mode finetune, lora or attentive"
            )
        if self.freeze and self.mode != "finetune":
            raise ValueError(f"freeze: got {self.freeze!r} with mode {self.mode}, expected mode finetune")
        if self.pooling is not None and (self.pooling == "tokens") != (self.mode == "attentive"):
            raise ValueError(
                f"pooling: got {self.pooling!r} with mode {self.mode}; tokens goes with attentive, and "
                "attentive with nothing else"
            )
        if self.published and self.mode not in ("finetune", "lora"):
            raise ValueError(f"published: got True with mode {self.mode}, expected mode finetune or lora")
        # It checks its own numbers.
        Readout(pooling=self.pooled_by, bins=self.bins, layer=self.layer)

    @property
    def by_features(self) -> bool:
        """Whether a head is fitted to one frozen vector a window."""
        return self.mode in PROBES

    @property
    def fitted_first(self) -> bool:
        """Whether the decoder begins with, or is, what is fitted to frozen features."""
        return self.mode != "attentive" and not self.published

    @property
    def head(self) -> str:
        """Kind of the head, as :func:`~brainflow.decoding.heads.make_head` calls it."""
        return "linear" if self.mode in ("finetune", "lora") and self.fitted_first else self.mode

    @property
    def pooled_by(self) -> Pooling:
        """Pooling, the default filled in."""
        if self.mode == "attentive":
            return "tokens"
        return self.pooling or ("cls" if self.published else "bins")

    @property
    def whitens(self) -> bool:
        """Whether the last states may be whitened before the ridge."""
        ridge = self.mode in ("finetune", "lora", "linear") and not self.published
        return ridge and self.pooled_by == "bins"

    @property
    def name(self) -> str:
        """What tables call the decoder."""
        how = NAMES[self.mode] + (" as published" if self.published else "")
        return f"{how}, {'from scratch' if self.scratch else 'pretrained'}"

    def readouts(self, module: Any) -> list[Readout]:
        """Return what may be read of a module; the last of them where nothing can choose."""
        known: list[Layer] = [*layers(module)]
        if self.layer is not None:
            chosen = [None if self.layer == len(known) - 1 else self.layer]
        elif self.pooled_by == "cls" or not self.fitted_first:
            chosen = [None]
        else:  # of two layers side by side a cosine would see the longer vector
            chosen = known if self.mode == "knn" else [*known, BOTH, ALL]
        found = [Readout(pooling=self.pooled_by, bins=self.bins, layer=layer) for layer in chosen]
        if self.pooling is None and len(chosen) > 1 and self.mode != "knn":
            # Not at the end, which is what is taken where nothing can choose.
            return [SPREAD, *found]  # states that are regimes: models forecast the mean, not the variance
        return found


def fit_decoder(
    module: Any,
    source: WindowSource,
    windows: NDArray[np.int64],
    config: AdaptConfig,
    *,
    classes: int,
    device: torch.device,
    validation: NDArray[np.int64] | None = None,
    features: Sequence[NDArray[np.float32]] | None = None,
    covariance: NDArray | None = None,
) -> tuple[Decoder, History | None]:
    """Fit a decoder to some windows.

    Parameters
    ----------
    module
        Pretrained module on `device`; not changed.
    source, windows
        Labelled windows and the positions of those that train.
    config
        How; its seed seeds everything drawn here.
    classes
        Number of classes.
    device
        Where to compute.
    validation
        Windows that choose the weights of `finetune`, `lora` and `attentive`, in neither training nor test.
        Without them some of the training people choose when a fitted head's training stops.
    features
        Frozen features of all windows of the source, one array for each of `config.readouts(module)`, where
        they are known already.
    covariance
        Of the last states over windows without labels, see :func:`~brainflow.decoding.finetune.
        state_covariance`; by default over the time points of the training windows.

    Returns
    -------
    decoder, history
        The decoder in evaluation mode; how its training went, None for `linear`, `mlp` and `knn`.
    """
    if not config.fitted_first:
        return _from_random_head(module, source, windows, config, classes, device, validation)
    readouts = config.readouts(module)
    if features is None:
        features = frozen_features(module, source, readouts, device=device)
    if covariance is None and config.whitens:
        covariance = state_covariance(module, source, device=device, windows=windows)
    place, ridge = choose(
        readouts, features, source, windows, covariance, classes=classes, balance=config.balance
    )
    readout, labels = readouts[place], source.labels[windows]
    # NaN: nothing could be left out, each class has one window.
    if np.isnan(ridge.loss):
        ridge = _fit_to_moved(module, source, windows, config, readout, features[place], classes, device)
    if config.by_features:
        head: nn.Module = linear_head(ridge)
        if config.mode != "linear":
            kind: Any = config.mode
            settings: Any = {"classes": classes, "balance": config.balance, "seed": config.seed}
            head = fit_probe(kind, features[place][windows], labels, **settings)
        return Decoder(module, head.to(device), readout).eval(), None
    # A whitened head reads small differences of states, which a step of the body changes more than it helps:
    # from such a head 60 steps cost four points where 4 or 8 people have labels (dev/log.md). And what reads
    # the BOLD's variance reads no weight of the body.
    if ridge.whitened or readout.of_variance:
        return Decoder(module, linear_head(ridge).to(device), readout).eval(), History(losses=[], rates=[])
    stop: int | None = None
    checks: list[tuple[int, float, float]] = []
    if validation is None:
        stop, checks = _steps_to_take(
            module, source, windows, config, readout, features[place], classes, device
        )
    decoder = _trainable(module, linear_head(ridge), readout, config, device)
    history = _train(decoder, source, windows, config, classes, device, validation, stop=stop)
    return decoder.eval(), replace(history, checks=history.checks or checks)


def choose(
    readouts: Sequence[Readout],
    features: Sequence[NDArray],
    source: WindowSource,
    windows: NDArray[np.int64],
    covariance: NDArray | None,
    *,
    classes: int,
    balance: bool,
) -> tuple[int, Ridge]:
    """Return which readout reads left-out people of the training windows best, and the ridge on it.

    The last one is taken where nothing can be left out.

    Parameters
    ----------
    readouts, features
        What may be read, and what they give, `[windows, …]` each.
    source, windows
        Labelled windows, and the positions of those that train.
    covariance
        Of the last states, as :func:`fit_ridge` takes it.
    classes, balance
        As in :func:`fit_ridge`.
    """
    groups = None if source.groups is None else source.groups[windows]
    settings: Any = {"classes": classes, "groups": groups, "balance": balance}
    fits = [
        fit_ridge(
            x[windows],
            source.labels[windows],
            times=one.times,
            # Of the last states alone: whitening the embedding, or BOLD, cost points (dev/log.md).
            covariance=covariance if one.layer is None else None,
            **settings,
        )
        for one, x in zip(readouts, features, strict=True)
    ]
    # The log-SD alone has to be clearly better: see BETTER.
    margins = [BETTER if one.of_variance else 1.0 for one in readouts]
    losses = [fit.loss / margin for fit, margin in zip(fits, margins, strict=True)]
    place = len(fits) - 1 if np.isnan(losses).any() else int(np.argmin(losses))
    return place, fits[place]


def _fit_to_moved(
    module: Any,
    source: WindowSource,
    windows: NDArray[np.int64],
    config: AdaptConfig,
    readout: Readout,
    features: NDArray[np.float32],
    classes: int,
    device: torch.device,
) -> Ridge:
    """Return the ridge on windows of which a class has one: that is read at neighbouring onsets, too.

    Where there are more windows, what they differ in says more than copies of them.
    """
    copies = [features[windows]]
    for by in (by for far in range(1, JITTER + 1) for by in (-far, far)):
        moved = source.moved(by)
        if moved is not None:
            copies += frozen_features(module, moved, [readout], device=device, windows=windows)
    labels, groups = source.labels[windows], None if source.groups is None else source.groups[windows]
    return fit_ridge(np.stack(copies), labels, classes=classes, groups=groups, balance=config.balance)


def _steps_to_take(
    module: Any,
    source: WindowSource,
    windows: NDArray[np.int64],
    config: AdaptConfig,
    readout: Readout,
    features: NDArray[np.float32],
    classes: int,
    device: torch.device,
) -> tuple[int | None, list[tuple[int, float, float]]]:
    """Return after how many steps people who neither fitted the head nor trained were read best."""
    if source.groups is None:
        return None, []
    groups = source.groups[windows]
    names = np.random.default_rng(config.seed).permutation(np.unique(groups))
    out = np.isin(groups, names[: max(1, len(names) // HELD_OUT)])
    rest, held = windows[~out], windows[out]
    # Nobody can say when to stop for a class that only they have.
    if not len(rest) or len(np.setdiff1d(source.labels[windows], source.labels[rest])):
        return None, []
    settings: Any = {"classes": classes, "balance": config.balance, "times": readout.times}
    # A head of its own: the other one has been fitted to the people who judge here.
    # Without a covariance: nothing is trained from a head that is whitened.
    ridge = fit_ridge(features[rest], source.labels[rest], groups=groups[~out], **settings)
    decoder = _trainable(module, linear_head(ridge), readout, config, device)
    checks = _train(decoder, source, rest, config, classes, device, held).checks
    return min(checks, key=lambda check: check[1])[0], checks


def _trainable(
    module: Any, head: nn.Module, readout: Readout, config: AdaptConfig, device: torch.device
) -> Decoder:
    """Return a decoder with a copy of the module, of which the right parts can be trained."""
    # The module serves the other folds, too.
    own = copy.deepcopy(module)
    if config.mode == "lora":
        # The first factor of a change is drawn at random.
        torch.manual_seed(config.seed)
        add_lora(own, rank=config.rank)
    freeze(own, config.freeze)
    return Decoder(own, head, readout, frozen=config.mode == "attentive").to(device)


def _train(
    decoder: Decoder,
    source: WindowSource,
    windows: NDArray[np.int64],
    config: AdaptConfig,
    classes: int,
    device: torch.device,
    validation: NDArray[np.int64] | None,
    *,
    stop: int | None = None,
) -> History:
    torch.manual_seed(config.seed)  # dropout
    rates = PUBLISHED_RATES if config.published else LEARNING_RATES
    history = finetune(
        decoder,
        source,
        windows,
        classes=classes,
        steps=config.steps or (STEPS if config.fitted_first else LONG_STEPS),
        batch=config.batch_size,
        lr=config.lr or rates[config.mode],
        weight_decay=config.weight_decay,
        seed=config.seed,
        device=device,
        balance=config.balance,
        smoothing=config.label_smoothing,
        validation=validation,
        jitter=JITTER if config.fitted_first else 0,
        stop=stop,
    )
    if config.mode == "lora":
        merge_lora(decoder.module)
    return history


def _from_random_head(
    module: Any,
    source: WindowSource,
    windows: NDArray[np.int64],
    config: AdaptConfig,
    classes: int,
    device: torch.device,
    validation: NDArray[np.int64] | None,
) -> tuple[Decoder, History]:
    (readout,) = config.readouts(module)
    torch.manual_seed(config.seed)
    width = readout.width(module.config)
    head = make_head(config.mode, width=width, classes=classes, dropout=config.dropout)
    decoder = _trainable(module, head, readout, config, device)
    history = _train(decoder, source, windows, config, classes, device, validation)
    return decoder.eval(), history
