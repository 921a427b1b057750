"""What a sampler returns: the windows of one batch, as host arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, eq=False)
class Windows:
    """The windows of one batch (of one rank).

    Attributes
    ----------
    starts
        int64 [windows], first row of each window in the store.
    lengths
        int32 [windows], time points.
    runs
        int32 [windows], run id of each window.
    t_r
        float64 [windows], repetition time in seconds.
    labels
        int64 [windows] or None.
    is_next
        float32 [windows // 2] or None: windows 2i and 2i + 1 are a pair; 1 where the second truly follows.
    skipped
        Windows that were left out because they are damaged, see :mod:`brainflow.data.intact`.
    """

    starts: NDArray[np.int64]
    lengths: NDArray[np.int32]
    runs: NDArray[np.int32]
    t_r: NDArray[np.float64]
    labels: NDArray[np.int64] | None = None
    is_next: NDArray[np.float32] | None = None
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.starts)


class RunColumns(Protocol):
    """The columns of a store's run table that the data layer reads (`BoldStore.runs` has them)."""

    @property
    def start(self) -> NDArray[np.int64]: ...  # noqa: D102
    @property
    def length(self) -> NDArray[np.int32]: ...  # noqa: D102
    @property
    def t_r(self) -> NDArray[np.float64]: ...  # noqa: D102
    @property
    def dataset(self) -> NDArray[Any]: ...  # noqa: D102
    @property
    def subject(self) -> NDArray[Any]: ...  # noqa: D102
    @property
    def key(self) -> NDArray[Any]: ...  # noqa: D102
    def __len__(self) -> int: ...


class Sampler(Protocol):
    """What a loader asks of a sampler."""

    steps: int | None

    @property
    def windows_per_batch(self) -> int:
        """Most windows in a batch."""
        ...

    @property
    def max_tokens(self) -> int:
        """Time points that no batch exceeds."""
        ...

    def batch(self, step: int) -> Windows:
        """Return the windows of batch `step`."""
        ...


def rank_share(batch: int, rank: int, world: int) -> NDArray[np.int64]:
    """Return the places of a global batch that belong to `rank`: the rank-th of `world` contiguous shares."""
    if world < 1 or not 0 <= rank < world:
        raise ValueError(f"rank, world: got {rank}, {world}, expected 0 <= rank < world")
    return np.arange(rank * batch // world, (rank + 1) * batch // world, dtype=np.int64)
