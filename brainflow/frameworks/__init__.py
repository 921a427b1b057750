"""The learning frameworks, by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from brainflow.config import ModelConfig
from brainflow.frameworks.autoencode import Autoencoder
from brainflow.frameworks.base import Framework, StepOutput
from brainflow.frameworks.csm import CSM
from brainflow.frameworks.net_bert import NetBERT
from brainflow.frameworks.seq_bert import SeqBERT

FRAMEWORKS: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "csm": CSM,
    "seq-bert": SeqBERT,
    "net-bert": NetBERT,
    "autoencoder": Autoencoder,
}


def build(config: ModelConfig) -> nn.Module:
    """Return the framework that `config.framework` names, with fresh weights.

    Raises
    ------
    ValueError
        If there is no framework of that name.

    Examples
    --------
    >>> module = build(ModelConfig(framework="csm", networks=8, width=16, layers=1, heads=2))
    >>> module.config.masking
    'dense'
    """
    if config.framework not in FRAMEWORKS:
        raise ValueError(
            f"model.framework: got {config.framework!r}, expected one of {', '.join(FRAMEWORKS)}"
        )
    return FRAMEWORKS[config.framework](config)


__all__ = ["FRAMEWORKS", "Framework", "StepOutput", "build"]
