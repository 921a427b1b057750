"""One store being filled from many sources, of which a bad one must not harm the others."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..errors import StoreError
from ..writer import StoreWriter
from .report import IngestReport


class IngestSession:
    """Writes the runs of one source after another; use it in a `with` block, which commits at its end.

    The store is made when the first good source comes, because its runs say how many networks there are. If
    every source is bad, no store is made.

    Parameters
    ----------
    path : the store; runs are added if it exists, unless `overwrite`
    create : keyword arguments of `StoreWriter.create`, without `networks`; a store that exists must have
        been made with those that are not defaults
    overwrite : replace the store at `path`
    """

    def __init__(self, path: str | os.PathLike[str], create: Mapping[str, Any], *, overwrite: bool) -> None:
        self._path = Path(path)
        self._create = create
        self._overwrite = overwrite
        self._writer: StoreWriter | None = None
        self.report = IngestReport()

    def __enter__(self) -> Self:
        if self._path.exists() and not self._overwrite:
            self._writer = StoreWriter.append_to(self._path)
            try:
                self._writer.attributes.check_same(self._create, str(self._path))
            except StoreError as error:
                self._writer.__exit__(type(error), error, None)
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.__exit__(kind, error, traceback)

    def add(self, source: str, runs: Iterable[Mapping[str, Any]]) -> None:
        """Write all runs of one source, or none and note the reason.

        Parameters
        ----------
        source : file name
        runs : keyword arguments of `StoreWriter.append` for each run; ValueError, TypeError and OSError
            raised by iterating count as the source's failure
        """
        made: StoreWriter | None = None
        try:
            collected = list(runs)
            if not collected:
                raise ValueError(f"{source}: holds no run")
            if self._writer is None:
                networks = int(collected[0]["bold"].shape[1])
                self._writer = made = StoreWriter.create(
                    self._path, networks=networks, overwrite=self._overwrite, **self._create
                )
            prepared = [self._writer.prepare(**run) for run in collected]
        except (ValueError, TypeError, OSError) as error:
            self.report.failures[source] = " ".join(str(error).split())
            if made is not None:  # a bad source neither makes (or replaces) a store nor says how wide it is
                made.__exit__(type(error), error, None)
                self._writer = None
            return
        for run in prepared:
            self._writer.write(run)
            self.report.runs.append(run.row["key"])
        self.report.sources += 1
