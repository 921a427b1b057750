"""What a figure was measured on: stored with every row, printed above every table."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    *("torch", "triton", "numpy", "zarr", "numcodecs", "nvidia-dali-cuda130", "nvidia-dali-cuda120"),
    *("flash-attn", "flash-attn-4", "transformers", "webdataset", "zarrs", "tensorstore", "litdata"),
)


def environment(device: str) -> dict[str, Any]:
    """Return CPU, GPU, threads and package versions as a JSON-ready dict."""
    env: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "device": device,
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
    }
    if device == "cuda":
        env |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "driver": _driver()}
    return env | {name: version for name in PACKAGES if (version := _version(name)) is not None}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _driver() -> str | None:
    version = Path("/proc/driver/nvidia/version")
    return version.read_text().splitlines()[0] if version.exists() else None
