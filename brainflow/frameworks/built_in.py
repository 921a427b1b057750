"""The four frameworks of arXiv 2206.11417, registered, with the settings of their runs of 2022.

Each is imported when one is built, because torch costs seconds that a command line need not pay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from brainflow.config import ModelConfig
from brainflow.frameworks.registry import register_framework

if TYPE_CHECKING:
    from brainflow.frameworks.base import Framework


def _published(lr: float, batch_size: int, layers: int, dropout: float, **model: Any) -> dict[str, Any]:
    return {
        "model": {"layers": layers, "width": 768, "heads": 12, "dropout": dropout, **model},
        "data": {"batch_size": batch_size, "validation_batches": 1000},
        "train": {"lr": lr, "steps": 300_000, "validate_every": 10_000, "checkpoint_every": 10_000},
    }


def _check_masking(model: ModelConfig) -> None:
    """Refuse a form of CSM, which no other framework has."""
    if model.masking != "dense":
        raise ValueError(
            f"model.masking: got {model.masking} with model.framework={model.framework}, expected csm; leave "
            "it out"
        )


@register_framework("csm", published=_published(5e-4, 192, 4, 0.1, masking="single"))
def _csm(config: ModelConfig) -> Framework:
    from brainflow.frameworks.csm import CSM

    return CSM(config)


_BERT: dict[str, Any] = {
    "paired": True,
    "special_tokens": 3,  # CLS and two SEP
    "published": _published(1e-4, 96, 4, 0.1),
    "check": _check_masking,
}


@register_framework("seq-bert", **_BERT)
def _seq_bert(config: ModelConfig) -> Framework:
    from brainflow.frameworks.seq_bert import SeqBERT

    return SeqBERT(config)


@register_framework("net-bert", **_BERT)
def _net_bert(config: ModelConfig) -> Framework:
    from brainflow.frameworks.net_bert import NetBERT

    return NetBERT(config)


@register_framework(
    "autoencoder", transformer=False, published=_published(2e-4, 192, 2, 0.2), check=_check_masking
)
def _autoencoder(config: ModelConfig) -> Framework:
    from brainflow.frameworks.autoencode import Autoencoder

    return Autoencoder(config)
