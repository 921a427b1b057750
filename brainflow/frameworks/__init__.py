"""The learning frameworks: how a batch is masked, which model reads it, which loss it gives."""

from brainflow.frameworks import built_in  # registers the four
from brainflow.frameworks.registry import (
    FrameworkSpec,
    build,
    check_framework,
    framework_names,
    framework_spec,
    register_framework,
)

__all__ = [
    "FrameworkSpec",
    "build",
    "built_in",
    "check_framework",
    "framework_names",
    "framework_spec",
    "register_framework",
]
