"""Numbers of a training that stay on the device until they can be read without stopping it; time and MFU."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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


class Meters:
    """Running sums of a training, kept on the device so that no step waits for a number.

    `values` float64 [6] are, by `NAMES`: sum of losses and number of good steps since the last reading; bad
    steps in all; bad steps in a row now; the longest such row since the last reading; the last bad step
    (0-based). They are part of a checkpoint.
    """

    NAMES = ("total", "good", "skipped", "bad_row", "worst", "bad_step")

    def __init__(self, device: torch.device) -> None:
        self.values = torch.zeros(len(self.NAMES), dtype=torch.float64, device=device)

    def update(self, loss: Tensor, grad_norm: Tensor, step: int) -> Tensor:
        """Count one step and return 1.0 if its loss or gradient is not finite, else 0.0 (float32, 0-d)."""
        bad = (~(torch.isfinite(loss) & torch.isfinite(grad_norm))).double()
        total, good, skipped, row, worst, bad_step = self.values.unbind()
        row = (row + bad) * bad
        self.values = torch.stack(
            [
                # `where`, because NaN · 0 would be NaN.
                total + torch.where(bad > 0, 0.0, loss.double()),
                good + 1 - bad,
                skipped + bad,
                row,
                torch.maximum(worst, row),
                torch.where(bad > 0, float(step), bad_step),
            ]
        )
        return bad.float()

    def read(self) -> Tensor:
        """Return the sums as they stand and begin new ones."""
        values = self.values
        total, _, skipped, row, _, bad_step = values.unbind()
        zero = torch.zeros_like(total)
        self.values = torch.stack([zero, zero, skipped, row, row, bad_step])
        return values


class Readback:
    """Numbers on their way from the device to the host; asked for now, picked up when they have arrived."""

    def __init__(self) -> None:
        self._queue: deque[tuple[Tensor, torch.cuda.Event | None, dict[str, Any]]] = deque()

    def push(self, values: Tensor, tag: dict[str, Any]) -> None:
        """Start copying `values` (1-d) to the host; `tag` comes back with them."""
        if values.device.type != "cuda":
            self._queue.append((values.clone(), None, tag))
            return
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._queue.append((host, event, tag))

    def pop(self, *, wait: bool = False) -> Iterator[tuple[list[float], dict[str, Any]]]:
        """Yield what has arrived, oldest first; with `wait`, all of it."""
        while self._queue:
            values, event, tag = self._queue[0]
            if event is not None:
                if wait:
                    event.synchronize()
                elif not event.query():
                    return
            self._queue.popleft()
            yield values.tolist(), tag


class Clock:
    """Throughput between two log lines."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.begin = time.perf_counter()
        self.restart()

    def restart(self) -> None:
        """Begin a new interval: what came before was validation or a checkpoint, not training."""
        self.steps = 0
        self.waited = self.loader.wait_s
        self.since = time.perf_counter()

    def lap(self) -> dict[str, float]:
        """Return the figures of the interval and begin a new one."""
        now = time.perf_counter()
        seconds = max(now - self.since, 1e-9)
        figures = {
            "lap": seconds,
            "steps_per_s": self.steps / seconds,
            "data_wait": (self.loader.wait_s - self.waited) / seconds,
            "seconds": now - self.begin,
        }
        self.restart()
        return figures


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
