"""Which modules make up a suite, and running their measurements one by one.

A module of a suite has one function, `measurements(quick, device)`, which returns name → a function without
arguments that measures and returns rows. Nothing is measured or allocated before that function is called.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .timing import Row

SUITES: dict[str, tuple[str, ...]] = {
    "ceilings": ("ceilings",),
    "loader": ("loader",),
    "kernels": ("kernels",),
    "frameworks": ("frameworks", "data_wait", "throughput", "loop", "time_to_loss"),
    "scaling": ("scaling",),
    "prepare": ("prepare",),
}


def measure(
    modules: tuple[str, ...], quick: bool, device: str, only: str | None, failures: list[str]
) -> Iterator[list[Row]]:
    """Run the measurements of some modules and yield the rows of each.

    A measurement that raises gives no row: it is named on stderr and in `failures`, and the others go on.

    Parameters
    ----------
    modules
        Names of modules of this package.
    quick, device
        Handed to the modules.
    only
        Pattern that a measurement's name must fit, e.g. "masked_loss/*"; None for all.
    failures
        Gets a line for each measurement that raised.
    """
    from .timing import WrongResultError  # imports torch: not before the command line is known to be right

    for module in modules:
        for name, function in load(module, quick, device).items():
            if only is not None and not fnmatch(name, only):
                continue
            print(f"{module}: {name} …", file=sys.stderr, flush=True)
            try:
                yield function()
            except WrongResultError as error:
                failures.append(f"{module} {name}: wrong result, so no speed: {error}")
            except Exception as error:
                traceback.print_exc()
                failures.append(f"{module} {name}: failed, so no speed: {type(error).__name__}: {error}")


def load(module: str, quick: bool, device: str) -> dict[str, Callable[[], list[Row]]]:
    """Return the measurements of a module of this package."""
    if importlib.util.find_spec(f".{module}", __package__) is None:
        return {}
    found: dict[str, Callable[[], list[Row]]] = importlib.import_module(
        f".{module}", __package__
    ).measurements(quick, device)
    return found
