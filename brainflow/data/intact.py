"""A sampler without the windows that a damaged store cannot give."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from brainflow.data.windows import Sampler, Windows
from brainflow.storage import StoreError


class IntactSampler:
    """The batches of another sampler, each without its windows (pairs) that lie on damaged chunks.

    Which windows those are depends on the store alone, so that the order stays reproducible.

    Parameters
    ----------
    sampler
        Which windows stand in which batch.
    store
        Store that tells by `intact(starts, lengths)` which windows can be read.

    Attributes
    ----------
    damaged_runs
        Run ids whose windows are left out as well, whatever the store says.
    """

    def __init__(self, sampler: Sampler, store: Any) -> None:
        self._sampler, self._store = sampler, store
        self.steps = sampler.steps
        self.damaged_runs: set[int] = set()

    @property
    def windows_per_batch(self) -> int:
        """Most windows in a batch."""
        return self._sampler.windows_per_batch

    @property
    def max_tokens(self) -> int:
        """Time points that no batch exceeds."""
        return self._sampler.max_tokens

    def batch(self, step: int) -> Windows:
        """Return the windows of batch `step` that can be read; the number of the others is `skipped`.

        Raises
        ------
        StoreError
            If none is left.
        """
        windows = self._sampler.batch(step)
        good = self._store.intact(windows.starts, windows.lengths)
        if self.damaged_runs:
            good &= ~np.isin(windows.runs, list(self.damaged_runs))
        if good.all():
            return windows
        is_next = windows.is_next
        if is_next is not None:  # half a pair is of no use
            pairs = good.reshape(-1, 2).all(axis=1)
            good, is_next = pairs.repeat(2), is_next[pairs]
        if not good.any():
            raise StoreError(
                f"batch {step}: all of its {len(good)} windows are damaged, so none can be skipped; "
                "`brainflow verify` lists all damage; restore the store from a copy"
            )
        return replace(
            windows,
            starts=windows.starts[good],
            lengths=windows.lengths[good],
            runs=windows.runs[good],
            t_r=windows.t_r[good],
            labels=None if windows.labels is None else windows.labels[good],
            is_next=is_next,
            skipped=int(len(good) - good.sum()),
        )
