"""The learning frameworks: how a batch is masked, which model reads it, which loss it gives."""

from brainflow.frameworks.configs import AutoencoderConfig, CSMConfig, NetBERTConfig, SeqBERTConfig
from brainflow.frameworks.registry import (
    FrameworkSpec,
    build,
    check_framework,
    framework_names,
    framework_spec,
    own_config,
    register_framework,
)
from brainflow.frameworks.settings import model_config

__all__ = [
    "AutoencoderConfig",
    "CSMConfig",
    "FrameworkSpec",
    "NetBERTConfig",
    "SeqBERTConfig",
    "build",
    "check_framework",
    "framework_names",
    "framework_spec",
    "model_config",
    "own_config",
    "register_framework",
]
