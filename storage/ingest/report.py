"""What an ingestion did, source by source."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class IngestReport:
    """Outcome of an ingestion.

    Attributes
    ----------
    runs : keys of the runs that were written
    sources : files that were read completely
    failures : {file: reason} of those of which nothing was written
    """

    runs: list[str] = field(default_factory=list)
    sources: int = 0
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether every source was written."""
        return not self.failures
