"""A progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

LINES = 10


@contextmanager
def progress_bar(what: str, *, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Show progress on stderr.

    Parameters
    ----------
    what : what is counted, such as "tars"
    quiet : show nothing

    Yields
    ------
    function to call with (done, total)
    """
    if quiet:
        yield lambda done, total: None
    elif sys.stderr.isatty():
        columns = (
            TextColumn(what),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        shown = [0]

        def line(done: int, total: int) -> None:
            step = LINES * done // max(1, total)
            if step > shown[0]:
                shown[0] = step
                print(f"{what}: {100 * done // total} %", file=sys.stderr)

        yield line
