"""What a person sees while a run trains: a bar in a terminal, plain lines elsewhere; always on stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_EVERY = 5.0  # seconds between plain lines


class TrainingProgress:
    """Show metrics lines as they come.

    Parameters
    ----------
    steps
        Optimizer steps of the whole run.
    done
        Steps that a resumed run has behind it.
    quiet
        Show nothing.
    """

    def __init__(self, steps: int, *, done: int = 0, quiet: bool = False) -> None:
        self.steps = steps
        self.quiet = quiet
        self._last = 0.0
        self._bar: Progress | None = None
        if not quiet and sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[line]}"),
            )
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("pretrain", total=steps, completed=done, line="")

    def __enter__(self) -> TrainingProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def show(self, line: dict[str, Any]) -> None:
        """Show one line of `metrics.jsonl`."""
        validation = "val_loss" in line
        text = _validation(line) if validation else _training(line)
        if self._bar:
            if validation:
                self._bar.console.print(f"step {line['step']}  {text}", highlight=False)
            else:
                self._bar.update(self._task, completed=line["step"], line=text)
        elif not self.quiet and (validation or time.monotonic() - self._last >= PLAIN_EVERY):
            self._last = time.monotonic()
            eta = "" if validation else _eta(line, self.steps)
            sys.stderr.write(f"step {line['step']}/{self.steps}  {text}{eta}\n")
            sys.stderr.flush()


def _training(line: dict[str, Any]) -> str:
    text = (
        f"loss {line['loss']:.4f}  lr {line['lr']:.2e}  {line['trs_per_s']:,.0f} TRs/s  "
        f"{line['tokens_per_s']:,.0f} tokens/s  data-wait {100 * line['data_wait']:.1f} %  "
        f"MFU {100 * line['mfu']:.0f} %"
    )
    if "gpu_memory_gib" in line:
        text += f"  GPU {line['gpu_memory_gib']:.1f} GiB"
    return text + (f"  skipped {line['skipped']}" if line["skipped"] else "")


def _eta(line: dict[str, Any], steps: int) -> str:
    left = round((steps - line["step"]) / line["steps_per_s"])
    return f"  ETA {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"


def _validation(line: dict[str, Any]) -> str:
    return (
        f"validation loss {line['val_loss']:.4f}; L1 {line['val_l1']:.4f} "
        f"(predicting the mean {line['val_mean_l1']:.4f}, the last value {line['val_last_l1']:.4f}); "
        f"explained variance {line['val_explained_variance']:.3f}, correlation {line['val_correlation']:.3f}"
    )
