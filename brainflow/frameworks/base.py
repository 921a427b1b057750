"""What a learning framework is: how a batch is masked, which model reads it, which loss it gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from brainflow.batch import PackedBatch, offsets, upload, window_of
from brainflow.config import ModelConfig
from brainflow.kernels import MaskSpec, linear_masked_loss

Pooling = Literal["last", "mean", "first", "cls", "tokens"]


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """Result of a training step.

    Attributes
    ----------
    loss
        Scalar with gradient.
    metrics
        Name → detached scalar on the model's device; reading one is the caller's synchronisation.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


@runtime_checkable
class Framework(Protocol):
    """The interface of a framework; every one is an `nn.Module` too."""

    config: ModelConfig

    @property
    def untrained(self) -> tuple[nn.Parameter, ...]:
        """Parameters that the loss never reads: they wait for the decoding that follows."""
        ...

    def __call__(self, batch: PackedBatch, *, seed: int) -> StepOutput:
        """Return loss and metrics; masks are drawn from (`seed`, `batch.step`)."""
        ...

    def reconstruct(self, batch: PackedBatch, *, seed: int) -> tuple[Tensor, Tensor]:
        """Return predictions, float32 [masked rows, networks], and their rows of `batch.bold`, int64."""
        ...

    def score(self, batch: PackedBatch, *, seed: int) -> tuple[StepOutput, Tensor, Tensor]:
        """Return what the call and `reconstruct` return, from one encoding of the batch."""
        ...

    def features(self, batch: PackedBatch, pooling: Pooling = "last") -> Tensor:
        """Return one vector a window, [windows, width], for decoding; "tokens": one a time point."""
        ...


def drawn_rows(mask: MaskSpec, lengths: np.ndarray) -> np.ndarray:
    """Return the masked rows of packed windows, int64 [masked], drawn on the host."""
    return mask.rows(torch.from_numpy(offsets(lengths).astype(np.int32))).numpy()


def whole_loss(hidden: Tensor, unembedding: nn.Linear, target: Tensor, loss: str) -> Tensor:
    """Return the mean loss of the projection of all `hidden` [rows, width] against `target` [rows, networks].

    The rows are named by the host, so that finding them costs no synchronisation.
    """
    count = len(hidden)
    sent = upload(hidden.device, rows=np.arange(count), bounds=np.array([0, count], np.int32))
    return linear_masked_loss(
        hidden, unembedding.weight, unembedding.bias, target, None, loss=loss, cu_seqlens=sent["bounds"],
        rows=sent["rows"],
    )  # fmt: skip


def at_least_float(x: Tensor) -> Tensor:
    """Return `x` in float32, or as it is if it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def pool(hidden: Tensor, lengths: np.ndarray, how: Pooling) -> Tensor:
    """Return one vector a window from packed hidden states, or with "tokens" these states.

    Parameters
    ----------
    hidden
        [tokens, width].
    lengths
        Host int [windows], tokens of each window.
    how
        "first" or "last" token, "mean" over the window's tokens, or "tokens": all of them.

    Returns
    -------
    Tensor
        [windows, width]; [tokens, width] for "tokens".
    """
    if how == "tokens":
        return hidden
    starts = offsets(lengths)
    if how in ("first", "last"):
        rows = starts[:-1] if how == "first" else starts[1:] - 1
        return hidden.index_select(0, upload(hidden.device, rows=rows)["rows"])
    if how == "mean":
        sent = upload(
            hidden.device,
            window=window_of(lengths),
            share=(1.0 / np.asarray(lengths))[window_of(lengths), None],
        )
        summed = hidden.new_zeros(len(lengths), hidden.shape[-1])
        return summed.index_add(0, sent["window"], hidden * sent["share"].to(hidden.dtype))
    raise ValueError(
        f"pooling: got {how!r}, expected 'last', 'mean', 'first' or 'tokens' (or 'cls' where there is one)"
    )
