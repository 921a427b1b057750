"""What each of the four frameworks has of its own to set; torch-free, a field's docstring is its `--help`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from brainflow.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class CSMConfig(ModelConfig):
    """Architecture and objective of causal sequence modelling."""

    framework: str = "csm"
    masking: Literal["dense", "single", "next"] = "dense"
    """`single` masks one position a window (as published), `dense` all of them in one pass with the same
    objective, `next` predicts the next time point without mask tokens."""

    @property
    def tokens_per_time_point(self) -> int:
        """Two with `dense`: itself and its mask token."""
        return 2 if self.masking == "dense" else 1


@dataclass(frozen=True, kw_only=True)
class BertConfig(ModelConfig):
    """What Seq-BERT and Net-BERT share."""

    mask_rate: float = 0.2
    """Probability that a time point (Net-BERT: a network) is masked."""
    mask_span: int = 0
    """Seq-BERT: mask contiguous spans of this many time points; Net-BERT: mask networks over this many time
    points. 0 is as published: single time points, networks over the whole window."""
    late_read: bool = False
    """Only for the weights released in 2022: CLS after the sequence, values read one position late."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.mask_rate <= 1.0:
            raise ValueError(f"model.mask_rate: got {self.mask_rate}, expected a number in (0, 1]")
        if self.mask_span < 0:
            raise ValueError(f"model.mask_span: got {self.mask_span}, expected 0 or a number of time points")


@dataclass(frozen=True, kw_only=True)
class SeqBERTConfig(BertConfig):
    """Architecture and objective of Seq-BERT."""

    framework: str = "seq-bert"
    mask_fill: Literal["token", "neighbours"] = "token"
    """What is read at a masked time point: the mask token (as published), or that on top of the mean of the
    nearest time points that are not masked."""


@dataclass(frozen=True, kw_only=True)
class NetBERTConfig(BertConfig):
    """Architecture and objective of Net-BERT."""

    framework: str = "net-bert"


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(ModelConfig):
    """Architecture and objective of the autoencoder."""

    framework: str = "autoencoder"
    teacher_forcing: float = 0.5
    """Probability that a batch is decoded from the true values before each time point."""
    chained_states: bool = False
    """Only for the weights released in 2022: each LSTM starts from the states that the one below it ended
    with, the decoder from the encoder's; its first input is the pooled vector."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.teacher_forcing <= 1.0:
            raise ValueError(
                f"model.teacher_forcing: got {self.teacher_forcing}, expected a number in [0, 1]"
            )
