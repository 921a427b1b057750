"""The learning frameworks: how a batch is masked, which model reads it, which loss it gives."""

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
    "check_framework",
    "framework_names",
    "framework_spec",
    "register_framework",
]
