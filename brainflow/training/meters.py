"""Numbers of a training: those that stay on the device until they can be read without stopping it; time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


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
