"""How far a long work is and what time it will still take.

A bar on a terminal, one line that changes in a notebook, a plain line now and then elsewhere; never on the
stdout of a command, which may be piped.
"""

from __future__ import annotations

import html
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

LINES = 10
"""Plain lines of a whole work."""
QUIET_FOR = 60.0
"""Seconds after which a plain line comes in any case, with the next unit."""
WARM = 0.02
"""Share of the work that is taken for its slow start: it compiles, loads, and fills caches."""
REDRAWN = 0.2
"""Seconds between two changes of the line in a notebook."""
Report = Callable[[int, int], None]


@dataclass
class Pause:
    """An interruption that comes at known places, such as a validation.

    Parameters
    ----------
    every
        Units between two of them; there is one at the end, too.
    guess
        What it takes, in units, as long as none has been.
    """

    every: int
    guess: float = 0.0
    behind: int = 0
    count: int = 0
    seconds: float = 0.0

    def left(self, total: int) -> int:
        """Return how many are to come."""
        return max(0, math.ceil(total / self.every) - self.behind)


class Remaining:
    """The time that a work still takes: what its units took so far, for those to come, and its pauses.

    Parameters
    ----------
    total
        Units of the whole work; may be said later.
    done
        Units that lie behind already, of a work that continues.
    pauses
        Name → what interrupts the work; their time is counted apart.
    at_once
        Units that are worked on at a time. Of several the first come together, and say by themselves nothing
        about the others: then no slow start is left out.
    clock
        Gives seconds.
    """

    def __init__(
        self,
        total: int = 0,
        *,
        done: int = 0,
        pauses: Mapping[str, Pause] | None = None,
        at_once: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.done = total, done
        self._first, self._at_once, self._clock = done, at_once, clock
        self._pauses = dict(pauses or {})
        for pause in self._pauses.values():
            pause.behind = done // pause.every
        self._pausing: Pause | None = None
        self._units = {"warm": 0, "rest": 0}
        self._seconds = {"warm": 0.0, "rest": 0.0}
        self._worked = 0.0  # for the unit that is not done yet, before the last pause
        self._step = 0
        self._since = clock()

    def advance(self, done: int, total: int | None = None) -> None:
        """Say that so many units are done, of so many in all."""
        self.total = self.total if total is None else total
        if done <= self.done:
            return
        now, behind = self._clock(), self.done - self._first
        warm = self._at_once == 1 and (behind == 0 or behind < WARM * (self.total - self._first))
        part = "warm" if warm else "rest"
        self._units[part] += done - self.done
        self._seconds[part] += self._worked + now - self._since
        self._step, self.done, self._since, self._worked = done - self.done, done, now, 0.0

    @contextmanager
    def pause(self, name: str) -> Iterator[None]:
        """Count what is done inside as an interruption of that name."""
        pause, begin = self._pauses[name], self._clock()
        self._worked += begin - self._since
        self._pausing, self._since = pause, begin
        try:
            yield
        finally:
            self._pausing, self._since = None, self._clock()
            pause.count += 1
            pause.seconds += self._since - begin
            pause.behind = (
                math.ceil(self.done / pause.every) if self.done >= self.total else self.done // pause.every
            )

    def seconds(self) -> float | None:
        """Return the seconds that are left; None before the first unit is done."""
        part = "rest" if self._units["rest"] else "warm"
        if not self._units[part]:
            return None
        unit = self._seconds[part] / self._units[part]
        left = unit * (self.total - self.done)
        left += sum(pause.left(self.total) * _cost(pause, unit) for pause in self._pauses.values())
        # it counts down between two units, but not below what those after the next one take
        since = self._clock() - self._since
        if self._pausing is not None:
            left -= min(since, _cost(self._pausing, unit))
            since = 0.0
        return max(0.0, left - min(self._worked + since, unit * self._step))

    def __str__(self) -> str:
        """Return hours, minutes and seconds that are left, as 0:03:20."""
        left = self.seconds()
        return "-:--:--" if left is None else _spelled(left)


def _cost(pause: Pause, unit: float) -> float:
    return pause.seconds / pause.count if pause.count else pause.guess * unit


def _spelled(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


class ProgressLine:
    """One line that shows how far a work is, where it can be drawn again: on a terminal and in a notebook.

    Parameters
    ----------
    what
        What is counted, such as "tars".
    left
        The work.
    quiet
        Show nothing.
    counts
        Show units, not per cent.
    keep
        Leave the bar on the terminal at the end.
    """

    def __init__(
        self, what: str, left: Remaining, *, quiet: bool = False, counts: bool = False, keep: bool = False
    ) -> None:
        self.what, self.left, self._counts = what, left, counts
        self._bar: Progress | None = None
        self._notebook: Any = None
        self._began = self._drawn = time.monotonic()
        if not quiet and in_notebook():
            self._notebook = _display(self._html(""))
        elif not quiet and sys.stderr.isatty():
            console = Console(stderr=True)
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=40 if console.width >= 120 else 16),
                MofNCompleteColumn() if counts else TextColumn("{task.percentage:>3.0f} %"),
                _EtaColumn(left),
                TextColumn(  # gets what the others leave: else a long text takes their place
                    "{task.fields[text]}",
                    markup=False,
                    table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
                ),
                console=console,
                transient=not keep,
                expand=True,
            )
            self._task = self._bar.add_task(what, total=left.total or None, completed=left.done, text="")

    @property
    def live(self) -> bool:
        """Whether there is such a line; if not, plain lines are due."""
        return self._bar is not None or self._notebook is not None

    def __enter__(self) -> ProgressLine:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._notebook is not None:
            self._redraw(self._html(f"after {_spelled(time.monotonic() - self._began)}"))

    def update(self, text: str = "") -> None:
        """Draw the work as it is now, with a text behind it."""
        if self._bar is not None:
            self._bar.update(self._task, completed=self.left.done, total=self.left.total, text=text)
        # Each change is a message to the browser.
        if self._notebook is not None and time.monotonic() - self._drawn >= REDRAWN:
            self._redraw(self._html(f"ETA {self.left}  {text}"))

    def print(self, text: str) -> None:
        """Print a line that stays."""
        if self._bar is not None:
            # rich would read what stands in brackets as markup.
            self._bar.console.print(text, highlight=False, markup=False)
        if self._notebook is not None:
            sys.stdout.write(text + "\n")

    def _redraw(self, text: str) -> None:
        self._notebook.update(_as_html(text))
        self._drawn = time.monotonic()

    def _html(self, text: str) -> str:
        done, total = self.left.done, self.left.total
        value = f' value="{done}" max="{total}"' if total else ""
        share = f"{done:,} of {total:,}" if self._counts else f"{100 * done // max(1, total)} %"
        bar = f"{html.escape(self.what)} <progress{value}></progress> {share}"
        return f"<div>{bar} {html.escape(text)}</div>"


class _EtaColumn(ProgressColumn):
    """Time that is left, by `Remaining`: rich's own looks back half a minute, and forgets validations."""

    def __init__(self, left: Remaining) -> None:
        super().__init__()
        self.left = left

    def render(self, task: Task) -> Text:
        """Return the text of the column."""
        return Text(f"ETA {self.left}", style="progress.remaining")


@contextmanager
def progress_bar(what: str, *, quiet: bool = False, at_once: int = 1) -> Iterator[Report]:
    """Show progress on stderr, or below the cell of a notebook.

    Parameters
    ----------
    what
        What is counted, such as "tars".
    quiet
        Show nothing.
    at_once
        Units that are worked on at a time.

    Yields
    ------
    function to call with (done, total)

    Examples
    --------
    >>> with progress_bar("runs", quiet=True) as progress:
    ...     for number in range(3):
    ...         progress(number + 1, 3)
    """
    left = Remaining(at_once=at_once)
    with ProgressLine(what, left, quiet=quiet) as line:
        said = [0.0, time.monotonic()]

        def report(done: int, total: int) -> None:
            left.advance(done, total)
            line.update()
            share, now = LINES * done // max(1, total), time.monotonic()
            if quiet or line.live or not (share > said[0] or now - said[1] >= QUIET_FOR):
                return
            said[:] = share, now
            more = f", {left} left" if done < total else ""
            sys.stderr.write(f"{what}: {100 * done // max(1, total)} %{more}\n")
            sys.stderr.flush()

        yield report


def or_notebook(given: Report | None, what: str) -> Report:
    """Return the `progress` that a function was given; without, in a notebook, one that shows a line there.

    Parameters
    ----------
    given
        The caller's.
    what
        What is counted.
    """
    if given is not None or not in_notebook():
        return given or (lambda done, total: None)
    left = Remaining()
    line = ProgressLine(what, left)

    def report(done: int, total: int) -> None:
        left.advance(done, total)
        line.update()
        if done >= total:
            # Nobody else closes it.
            line.__exit__(None, None, None)

    return report


def in_notebook() -> bool:
    """Whether this runs in a cell of a notebook: in IPython with a kernel, not in its terminal."""
    # Not imported: whoever runs in a notebook has it already.
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


def _display(text: str) -> Any:
    """Show a text as HTML below the cell, and return the handle that changes it."""
    from IPython.display import display

    return display(_as_html(text), display_id=True)


def _as_html(text: str) -> Any:
    from IPython.display import HTML

    return HTML(text)
