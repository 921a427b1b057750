"""One decoder from labelled windows: all weights, low-rank changes, or a head on frozen weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from brainflow.decoding.finetune import Decoder, History, Pooling, finetune, frozen_features
from brainflow.decoding.heads import ProbeName, fit_probe, make_head
from brainflow.decoding.lora import add_lora, merge_lora
from brainflow.decoding.windows import WindowSource
from brainflow.pretrained.warm_start import freeze

Mode = Literal["finetune", "lora", "attentive", "linear", "mlp", "knn"]
PROBES = get_args(ProbeName)
LEARNING_RATES = {"finetune": 3e-4, "lora": 1e-3, "attentive": 1e-3}
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
    """`finetune`: all weights. `lora`: low-rank changes of the blocks' projections. On frozen weights:
    `attentive` (attention over the time points), and on one vector a window `linear` (logistic regression),
    `mlp` (one hidden layer), `knn` (nearest neighbours)."""
    scratch: bool = False
    """Take the checkpoint's architecture with fresh weights: what pretraining has to beat."""
    pooling: Pooling | None = None
    """How one vector is made of a window: `cls` appends the CLS token as published, `last`, `mean`, `first`
    take hidden states of the time points, `tokens` keeps them all for `attentive`, which takes nothing else.
    By default `cls` for `finetune` and `lora`, `mean` for `linear`, `mlp` and `knn`."""
    freeze: str = ""
    """`finetune` only: pretrained parts that stay as they are, e.g. embedder,decoder: of embedder, decoder,
    decoder-without-heads and unembedder."""
    steps: int = 500
    """Optimizer steps a fold."""
    batch_size: int = 32
    """Windows a step."""
    lr: float | None = None
    """Peak learning rate of AdamW; by default 3e-4 for `finetune`, 1e-3 for `lora` and `attentive`."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    dropout: float = 0.1
    """Dropout of the decoding head."""
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
            if getattr(self, name) < 1:
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

    @property
    def by_features(self) -> bool:
        """Whether a head is fitted to one frozen vector a window."""
        return self.mode in PROBES

    @property
    def pooled_by(self) -> Pooling:
        """Pooling, the default filled in."""
        if self.mode == "attentive":
            return "tokens"
        return self.pooling or ("mean" if self.by_features else "cls")

    @property
    def name(self) -> str:
        """What tables call the decoder."""
        return f"{NAMES[self.mode]}, {'from scratch' if self.scratch else 'pretrained'}"


def fit_decoder(
    module: Any,
    source: WindowSource,
    windows: NDArray[np.int64],
    config: AdaptConfig,
    *,
    classes: int,
    device: torch.device,
    validation: NDArray[np.int64] | None = None,
    features: NDArray[np.float32] | None = None,
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
    features
        Frozen features of all windows of the source, where they are known already.

    Returns
    -------
    decoder, history
        The decoder in evaluation mode; how its training went, None for `linear`, `mlp` and `knn`.
    """
    width = module.config.width
    if config.by_features:
        if features is None:
            features = frozen_features(module, source, pooling=config.pooled_by, device=device)
        kind: Any = config.mode
        head = fit_probe(
            kind,
            features[windows],
            source.labels[windows],
            classes=classes,
            balance=config.balance,
            seed=config.seed,
        )
        return Decoder(module, head.to(device), pooling=config.pooled_by).eval(), None
    torch.manual_seed(config.seed)
    head = make_head(config.mode, width=width, classes=classes, dropout=config.dropout)
    own = copy.deepcopy(module)
    if config.mode == "lora":
        add_lora(own, rank=config.rank)
    freeze(own, config.freeze)
    frozen = config.mode == "attentive"
    decoder = Decoder(own, head, pooling=config.pooled_by, frozen=frozen).to(device)
    history = finetune(
        decoder,
        source,
        windows,
        classes=classes,
        steps=config.steps,
        batch=config.batch_size,
        lr=config.lr or LEARNING_RATES[config.mode],
        weight_decay=config.weight_decay,
        seed=config.seed,
        device=device,
        balance=config.balance,
        smoothing=config.label_smoothing,
        validation=validation,
    )
    if config.mode == "lora":
        merge_lora(own)
    return decoder.eval(), history
