"""Configuration of a pretraining run: torch-free dataclasses; the docstring under a field is its `--help`."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_type_hints

FREEZABLE = ("embedder", "decoder", "decoder-without-heads", "unembedder")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture and objective, as far as all frameworks share them; the defaults are the published ones.

    What a framework has of its own to set stands in its subclass, in `brainflow/frameworks/configs.py` or in
    the package that brings it. Where this class itself names a framework, those settings have their defaults.
    """

    framework: str = "csm"
    """Learning framework: csm, seq-bert, net-bert, autoencoder, or one that another package registers."""
    networks: int = 1024
    """Networks (parcels) of the store; set from the store by `pretrain`."""
    width: int = 768
    """Hidden width; divisible by `heads`."""
    layers: int = 4
    """Transformer blocks (LSTM layers for the autoencoder)."""
    heads: int = 12
    """Attention heads."""
    feedforward: int = 4
    """Feed-forward width as a multiple of `width`."""
    dropout: float = 0.1
    """Dropout after embedding, attention and feed-forward."""
    max_positions: int = 512
    """Longest window in time points, special tokens included."""
    max_seconds: float = 300.0
    """Longest window in seconds that the TR embedding covers."""
    time_resolution: float = 0.2
    """Step of the TR embedding in seconds: a time point's index is round(seconds / time_resolution)."""
    loss: Literal["l1", "mse", "huber"] = "l1"
    """Reconstruction loss over masked values."""
    attention: Literal["auto", "window", "fa4", "fa2", "torch", "fallback"] = "auto"
    """Attention kernel on GPUs: `window`, this package's own for windows of up to 128 tokens (64 in two
    streams), flash-attn 4 or 2, torch's own, or plain PyTorch, many times as slow. `auto` takes the first of
    these that is installed and can, one that can drop attention weights before others; where it cannot, none
    are dropped. fa4, fa2 and torch need bf16 or fp16."""
    recompute: bool = False
    """Activation checkpointing of the transformer: less memory, about a third more time."""
    positions: Literal["learned", "rotary", "seconds"] = "learned"
    """Positions in a window: a learned table (as published), or rotary ones, which windows longer than those
    of training may have: by time point, or by `seconds`, which mean the same at every TR."""
    norm: Literal["layer", "rms"] = "layer"
    """The transformer's normalisation: LayerNorm or RMSNorm."""
    activation: Literal["published", "gelu", "gelu-tanh", "swiglu"] = "published"
    """The transformer's feed-forward: GELU (`published`: GPT-2's tanh form for CSM, BERT's exact one), or
    SwiGLU with as many weights."""
    time_encoding: Literal["table", "fourier", "none"] = "table"
    """Seconds since onset: a table with a row each `time_resolution` (as published), a learned projection
    of sines and cosines, which knows every TR and length, or none (with `positions=seconds`)."""
    embedding_norm: bool = True
    """LayerNorm after the projection of a time point, as published; it divides the amplitude away."""
    norm_first: bool = False
    """BERT: normalise before each part of a block, not after each sum (as published). GPT always does."""
    linear: bool = False
    """Carry the linear predictor of the targets, fitted in closed form before training; what the model
    predicts is then a mean of it and of the network, weighed by what held-out runs say."""
    coordinates: bool = False
    """Add to each network's input weights a learned function of its coordinates, taken from the store."""

    def __post_init__(self) -> None:
        _check_finite(self, "model")
        for name in ("networks", "width", "layers", "heads", "feedforward", "max_positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}: got {getattr(self, name)}, expected at least 1")
        for name in ("max_seconds", "time_resolution"):
            if not getattr(self, name) > 0:
                raise ValueError(f"model.{name}: got {getattr(self, name)}, expected a positive number")
        if self.width % self.heads:
            raise ValueError(
                f"model.width: got {self.width}, which is not divisible by model.heads={self.heads}"
            )
        if self.positions != "learned" and self.width // self.heads % 2:
            raise ValueError(
                f"model.positions: got {self.positions} with {self.width // self.heads} values a head "
                "(model.width / model.heads), expected an even number"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"model.dropout: got {self.dropout}, expected a number in [0, 1)")

    @property
    def tokens_per_time_point(self) -> int:
        """How many tokens of the transformer a time point takes: as many as the framework has streams."""
        return 1


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is drawn from the store."""

    batch_size: int = 64
    """Windows a step, over all ranks."""
    seq_min: int = 10
    """Shortest window in time points."""
    seq_max: int = 50
    """Windows are shorter than this many time points (exclusive, as published)."""
    loader: Literal["auto", "dali", "host", "resident"] = "auto"
    """`auto` keeps the store in GPU memory where it fits, else takes DALI where it is installed, else the
    plain loader. All give identical batches."""
    onset: Literal["any", "grid"] = "any"
    """Windows begin at any time point, or (`grid`, as published) at multiples of their length."""
    weights: str = ""
    """How often an epoch draws the windows of a dataset, e.g. ds000030=2,hcp=0.5: twice, and every second
    epoch; 0: never; not named: once. Validation ignores it."""
    on_corrupt: Literal["error", "skip"] = "error"
    """A damaged chunk of the store stops the training, or (`skip`) its windows are left out and counted."""
    split: str = ""
    """Split file (of `brainflow split`): its test people are never read; without, runs are split."""
    validation_fraction: float = 0.05
    """Share of the runs of each dataset held out for validation (at least 2 runs, as published)."""
    validation_batches: int = 10
    """Fixed held-out batches at each validation."""

    def __post_init__(self) -> None:
        _check_finite(self, "data")
        self.dataset_weights()
        if self.batch_size < 1:
            raise ValueError(f"data.batch_size: got {self.batch_size}, expected at least 1")
        if not 2 <= self.seq_min < self.seq_max:
            raise ValueError(
                f"data.seq_min, data.seq_max: got {self.seq_min}, {self.seq_max}, "
                "expected 2 <= seq_min < seq_max"
            )
        if self.validation_batches < 1:
            raise ValueError(f"data.validation_batches: got {self.validation_batches}, expected at least 1")
        if not 0.0 < self.validation_fraction < 1.0:
            raise ValueError(
                f"data.validation_fraction: got {self.validation_fraction}, expected a number in (0, 1)"
            )

    def dataset_weights(self) -> dict[str, float] | None:
        """Return `weights` as dataset → weight, None if there are none.

        Examples
        --------
        >>> DataConfig(weights="hcp=0.5, ds000030=2").dataset_weights()
        {'hcp': 0.5, 'ds000030': 2.0}
        """
        found: dict[str, float] = {}
        for part in filter(None, (word.strip() for word in self.weights.split(","))):
            name, _, number = part.rpartition("=")
            try:
                found[name.strip()] = float(number)
            except ValueError:
                name = ""
            if not name:
                raise ValueError(f"data.weights: got {part!r}, expected DATASET=NUMBER, e.g. hcp=0.5")
        return found or None


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimisation, logging, checkpoints."""

    init: str = ""
    """Begin from these weights: the folder of a brainflow model, or the folder or hub name of a GPT-2 (csm)
    or BERT (seq-bert, net-bert) language model with safetensors, e.g. gpt2, google-bert/bert-base-uncased."""
    freeze: str = ""
    """Parts that are not trained, e.g. embedder,decoder: of embedder, decoder, decoder-without-heads (all but
    the poolers and is-next) and unembedder."""
    steps: int = 300_000
    """Optimizer steps."""
    lr: float = 1e-4
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    beta1: float = 0.9
    """AdamW beta 1."""
    beta2: float = 0.999
    """AdamW beta 2."""
    clip: float = 1.0
    """Gradient norm limit."""
    warmup: float = 0.01
    """Share of the steps with rising learning rate."""
    schedule: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    """Learning rate after the warm-up: linear decay to 0 (as published), half a cosine to 0, constant, or
    warm-up–stable–decay: constant, then linear decay over the last tenth of the steps."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """`auto`: bf16 on GPUs that have it, else fp32; a run continues in what it began with. `bf16` and `fp16`
    run the forward pass under autocast, `fp16` with a loss scale; `tf32` lets GPUs round the inputs of matrix
    products to 10 bits."""
    micro_batches: int = 0
    """Parts that the batch of a step is cut into, over all ranks: gradient accumulation where there are more
    parts than ranks. 0: one a rank, or as the run began. The numbers do not depend on who computes a part."""
    parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """Several ranks: copy the parameters to each, shard them over all (FSDP2), or over a machine's ranks."""
    ema: float = 0.0
    """Decay of a moving average of the weights, e.g. 0.999, which is validated and released; 0 for none."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Run the transformer's blocks through torch.compile: fewer and larger kernels; `auto`: on GPUs."""
    patience: int = 0
    """Stop after this many validations in a row without a lower validation loss; 0: never."""
    keep_best: bool = False
    """The trained model is the one with the lowest validation error, not the one of the last step."""
    seed: int = 0
    """Seeds weights, data order and masks."""
    log_every: int = 10
    """Steps between metrics lines."""
    validate_every: int = 1_000
    """Steps between validations."""
    checkpoint_every: int = 1_000
    """Steps between checkpoints."""
    keep: int = 2
    """Newest checkpoints kept; older ones are deleted."""
    permanent_every: int = 0
    """Checkpoints at multiples of this many steps are never deleted; 0 for none."""
    plot: bool = True
    """Draw masked BOLD beside its reconstruction at each validation, into RUN/reconstructions (extra
    `report`)."""
    tracker: Literal["none", "tensorboard", "wandb", "mlflow"] = "none"
    """Also send the metrics there (extra `tracking`); metrics.jsonl is written in any case."""

    def __post_init__(self) -> None:
        _check_finite(self, "train")
        for part in filter(None, (word.strip() for word in self.freeze.split(","))):
            if part not in FREEZABLE:
                raise ValueError(f"train.freeze: got {part!r}, expected some of {', '.join(FREEZABLE)}")
        for name in ("steps", "log_every", "validate_every", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name}: got {getattr(self, name)}, expected at least 1")
        for name in ("lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"train.{name}: got {getattr(self, name)}, expected a positive number")
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"train.{name}: got {getattr(self, name)}, expected a number in [0, 1)")
        for name in ("micro_batches", "patience", "permanent_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name}: got {getattr(self, name)}, expected 0 or more")
        if not 0.0 <= self.ema < 1.0:
            raise ValueError(f"train.ema: got {self.ema}, expected a number in [0, 1)")
        if self.permanent_every % self.checkpoint_every:
            raise ValueError(
                f"train.permanent_every: got {self.permanent_every}, expected a multiple of "
                f"train.checkpoint_every={self.checkpoint_every}, or 0"
            )
        if self.schedule == "wsd" and self.warmup > 0.9:
            raise ValueError(
                f"train.warmup: got {self.warmup}, expected at most 0.9 with train.schedule=wsd, which "
                "decays over the last tenth of the steps"
            )
        if not self.weight_decay >= 0:
            raise ValueError(f"train.weight_decay: got {self.weight_decay}, expected 0 or more")
        if not 0.0 <= self.warmup < 1.0:
            raise ValueError(f"train.warmup: got {self.warmup}, expected a share of the steps in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """A whole pretraining run; see :func:`brainflow.frameworks.check_framework` for what a framework asks."""

    store: str
    """Store to train on."""
    out: str
    """Run directory."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is one."""

    def __post_init__(self) -> None:
        data, train = self.data, self.train
        if train.micro_batches and data.batch_size % train.micro_batches:
            raise ValueError(
                f"train.micro_batches: got {train.micro_batches}, expected a divisor of data.batch_size="
                f"{data.batch_size}"
            )


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config dataclass as plain nested dicts, ready for JSON."""
    return asdict(config)


def _check_finite(config: Any, prefix: str) -> None:
    for name, kind in get_type_hints(type(config)).items():
        if kind is float and not math.isfinite(getattr(config, name)):
            raise ValueError(f"{prefix}.{name}: got {getattr(config, name)}, expected a finite number")
