"""Stopping a run from outside: SIGTERM, SIGUSR1, SIGUSR2 (SLURM's warnings), Ctrl-C ask for a checkpoint."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from brainflow.storage.files import write_text

MARKER = "PREEMPTED"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Preempted(Exception):
    """Training was asked to stop and has written a checkpoint.

    Attributes
    ----------
    exit_code
        128 + signal number, as shells have it: 130 Ctrl-C, 143 SIGTERM, 138 SIGUSR1, 140 SIGUSR2.
    """

    def __init__(self, number: int, step: int, folder: Path) -> None:
        self.signal = signal.Signals(number).name
        self.step = step
        self.exit_code = 128 + number
        super().__init__(
            f"stopped by {self.signal} at step {step}; a checkpoint is written, "
            f"the same command continues {folder}"
        )


class StopRequest:
    """While entered, the first signal sets `number`; a second Ctrl-C interrupts at once.

    Signals reach the main thread only: entered in another one, this changes nothing.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number


def mark(folder: Path, stopped: Preempted) -> None:
    """Write RUN/PREEMPTED for schedulers: torchrun's exit code does not tell a preemption from a failure."""
    write_text(folder / MARKER, json.dumps({"signal": stopped.signal, "step": stopped.step}) + "\n")
