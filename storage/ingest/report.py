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
    rounded : {key: what} of the runs that the element type of the store changed by more than 0.1 % of the
        standard deviation of a network
    """

    runs: list[str] = field(default_factory=list)
    sources: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    rounded: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether every source was written."""
        return not self.failures
