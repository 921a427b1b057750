"""How much of a device's speed a training uses (MFU: model FLOPs utilisation)."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import nn

from brainflow.models.transformer import Transformer

# Dense peaks in TFLOP/s, from NVIDIA's data sheets: fp32, tf32, bf16 and fp16. The first that fits counts.
_PEAKS = {
    "V100-SXM2": (15.7, 15.7, 125.0),
    "A100-SXM4": (19.5, 156.0, 312.0),
    "A100-PCIE": (19.5, 156.0, 312.0),
    "A100 80GB PCIe": (19.5, 156.0, 312.0),
    "H100 80GB HBM3": (67.0, 494.7, 989.4),
    "H100 PCIe": (51.0, 378.0, 756.0),
    "H100 NVL": (60.0, 417.5, 835.5),
    "H200 NVL": (60.0, 417.5, 835.5),
    "H200": (67.0, 494.7, 989.4),
}


@dataclass(frozen=True)
class MatrixWeights:
    """Weights of matrix products: those that every token passes, and those that every time point passes."""

    per_token: int
    per_time_point: int

    def flops(self, tokens: int, time_points: int) -> float:
        """Return the operations of a training step: 2 a weight forward, 4 backward.

        As in Chowdhery et al. 2022 (arXiv 2204.02311, appendix B), but without the attention's own products,
        which are few in windows of tens of time points; so the utilisation is not overstated.
        """
        return 6.0 * (self.per_token * tokens + self.per_time_point * time_points)


def matrix_weights(module: nn.Module) -> MatrixWeights:
    """Count a framework's weights; tables that are looked up (positions, TR embedding) do not multiply."""
    tables = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    inside = {
        id(p)
        for part in module.modules()
        if isinstance(part, Transformer)
        for block in part.blocks
        for p in block.parameters()
    }
    matrices = [p for p in module.parameters() if p.ndim == 2 and id(p) not in tables]
    blocks = sum(p.numel() for p in matrices if id(p) in inside)
    return MatrixWeights(blocks, sum(p.numel() for p in matrices) - blocks)


def peak_flops(device: torch.device, precision: str) -> float:
    """Return the operations a second that a device can do: from the data sheet, else measured.

    Measured is one large matrix product, the best of five: what is reached is then a share of the speed of
    this machine's own matrix products.
    """
    half = precision in ("bf16", "fp16")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, peaks in _PEAKS.items():
            if part in name:
                return 1e12 * peaks[2 if half else 1 if precision == "tf32" else 0]
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    size = 8192 if device.type == "cuda" else 384
    a = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    a @ a  # the first product on a GPU loads cuBLAS
    for _ in range(5):
        _wait(device)
        began = time.perf_counter()
        a @ a
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return 2.0 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
