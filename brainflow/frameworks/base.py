"""What a learning framework is: how a batch is masked, which model reads it, which loss it gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from brainflow.batch import PackedBatch, Windows, offsets, upload, window_of
from brainflow.config import FREEZABLE, ModelConfig
from brainflow.kernels import MaskSpec, linear_masked_loss
from brainflow.models.linear_path import LinearPath

Pooling = Literal["last", "mean", "first", "cls", "tokens"]
PARTS = {
    "embedder": ("embedding.", "mask_token", "cls_token", "sep_token"),
    "decoder": ("transformer.", "is_next.", "encoder.", "decoder."),
    "decoder-without-heads": ("transformer.", "encoder.lstms", "encoder.norms", "decoder."),
    "unembedder": ("unembedding.",),
}
"""Published part → beginnings of our parameters' names; heads are the poolers and is-next."""


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """Result of a training step.

    Attributes
    ----------
    loss
        Scalar with gradient.
    metrics
        Name → detached scalar on the model's device; reading one is the caller's synchronisation. See
        :class:`Framework` for `reconstruction`; all others are means over windows.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Framework(nn.Module, ABC):
    """A learning framework: a module that masks a batch, predicts what it masked, and measures how well.

    Its loss is the mean over what it predicts of a batch, so that batches of different sizes can be weighed:
    a step may be cut into microbatches and shared among ranks. If `StepOutput.metrics` has `reconstruction`,
    that is the part of the loss which is a mean over targets, and the rest of it is a mean over windows that
    the head `is_next` computes; else all of the loss is a mean over targets.

    Attributes
    ----------
    config
        What it was built from.
    linear_path
        Linear predictor of the targets that the model carries, None without one. `reconstruct` and `score`
        return its mean with the network's prediction; the loss is that of the network alone.
    one_draw
        Whether all microbatches of a step draw from one seed: something is decided for the step as a whole.
    """

    config: ModelConfig
    linear_path: LinearPath | None
    one_draw: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.linear_path = None

    def make_linear(self) -> LinearPath | None:
        """Return a linear predictor of the targets, not fitted yet; None if the framework has none."""
        return None

    def predicted(self, values: Tensor, batch: PackedBatch, seed: int) -> Tensor:
        """Return what the model predicts, float32 [rows, networks], of the network's prediction `values`."""
        values = at_least_float(values)
        if self.linear_path is None:
            return values
        return self.linear_path.blend(values, replace(batch, mask=self.drawn(batch, seed)))

    @property
    def untrained(self) -> tuple[nn.Parameter, ...]:
        """Parameters that the loss never reads: they wait for the decoding that follows."""
        return ()

    @property
    def varying(self) -> bool:
        """Whether a parameter that is trained has a gradient in some steps only."""
        return False

    def mask(self, batch: PackedBatch, *, seed: int) -> Any:
        """Draw what is hidden of a batch, on the host, from (`seed`, `batch.step`) alone.

        The step puts it into `batch.mask`, for `num_targets` and the call; where there is none yet, the call
        draws it. None if nothing is drawn.
        """
        return None

    def drawn(self, batch: PackedBatch, seed: int) -> Any:
        """Return the mask that the batch carries, or draw it."""
        return self.mask(batch, seed=seed) if batch.mask is None else batch.mask

    @abstractmethod
    def num_targets(self, batch: PackedBatch) -> int:
        """Return over how many targets the loss of a batch that carries its mask is a mean.

        It weighs the microbatches of a step, so any number proportional to it does.
        """

    @abstractmethod
    def forward(self, batch: PackedBatch, *, seed: int) -> StepOutput:
        """Return loss and metrics; masks are drawn from (`seed`, `batch.step`)."""

    @abstractmethod
    def reconstruct(self, batch: PackedBatch, *, seed: int) -> tuple[Tensor, Tensor]:
        """Return predictions, float32 [masked rows, networks], and their rows of `batch.bold`, int64."""

    def score(self, batch: PackedBatch, *, seed: int) -> tuple[StepOutput, Tensor, Tensor]:
        """Return what the call and `reconstruct` return; frameworks override it to encode the batch once."""
        return self.forward(batch, seed=seed), *self.reconstruct(batch, seed=seed)

    @abstractmethod
    def features(self, batch: PackedBatch, pooling: Pooling = "last") -> Tensor:
        """Return one vector a window, [windows, width], for decoding; "tokens": one a time point."""

    @torch.no_grad()
    def embed(self, bold: Any, t_r: float) -> Tensor:
        """Return the mean over time of the last hidden states of each window.

        Parameters
        ----------
        bold
            Array or tensor [windows, time, networks], or [time, networks] of one window, normalised as the
            model's data were.
        t_r
            Seconds between time points.

        Returns
        -------
        Tensor
            float32 [windows, width], on the model's device.

        Raises
        ------
        ValueError
            If the shape does not fit, a value is not finite, or `t_r` is no positive number.
        """
        device = next(self.parameters()).device
        values = torch.as_tensor(bold, dtype=torch.float32, device=device)
        values = values[None] if values.ndim == 2 else values
        if values.ndim != 3 or not values.numel() or values.shape[2] != self.config.networks:
            raise ValueError(
                f"bold: got shape {list(np.shape(bold))}, expected [windows, time, {self.config.networks}] "
                f"or [time, {self.config.networks}]"
            )
        if not torch.isfinite(values).all() or not 0 < t_r < float("inf"):
            raise ValueError(f"bold, t_r: got NaN or infinity, or t_r={t_r}, expected finite BOLD, t_r > 0")
        windows = Windows.end_to_end([values.shape[1]] * len(values), t_r=t_r)
        before = self.training
        self.eval()
        try:
            return at_least_float(self.features(PackedBatch.pack(values.flatten(0, 1), windows), "mean"))
        finally:
            self.train(before)


def drawn_rows(mask: MaskSpec, lengths: np.ndarray) -> np.ndarray:
    """Return the masked rows of packed windows, int64 [masked], drawn on the host."""
    return mask.rows(torch.from_numpy(offsets(lengths).astype(np.int32))).numpy()


def whole_loss(hidden: Tensor, unembedding: nn.Linear, target: Tensor, loss: str) -> Tensor:
    """Return the mean loss of projected `hidden` [rows, width] against `target` [rows, networks]."""
    sent = upload(hidden.device, bounds=np.array([0, len(hidden)], np.int32))
    # Not a product and a loss: this computes the gradients at once and keeps no predictions.
    return linear_masked_loss(
        hidden, unembedding.weight, unembedding.bias, target, MaskSpec.all_valid(), loss=loss,
        cu_seqlens=sent["bounds"],
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


def freeze(module: nn.Module, parts: str) -> None:
    """Keep the parameters of parts, named as "embedder,decoder", from being trained.

    Raises
    ------
    ValueError
        If there is no such part.

    Examples
    --------
    >>> from brainflow.frameworks import build
    >>> model = build(ModelConfig(networks=8, width=16, layers=1, heads=2))
    >>> freeze(model, "embedder,decoder")
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['unembedding.weight', 'unembedding.bias']
    """
    for part in filter(None, (word.strip() for word in parts.split(","))):
        if part not in PARTS:
            raise ValueError(f"freeze: got {part!r}, expected some of {', '.join(FREEZABLE)}")
        for name, parameter in module.named_parameters():
            if name.startswith(PARTS[part]):
                parameter.requires_grad_(False)
