"""A packed batch: windows laid end to end along one token axis, no padding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedBatch:
    """Windows of BOLD laid end to end.

    Attributes
    ----------
    bold
        [tokens, networks], in the store's float type or float32.
    times
        float32 [tokens], seconds since the onset of the token's window.
    cu_seqlens
        int32 [windows + 1]: window i is tokens `cu_seqlens[i] : cu_seqlens[i + 1]`.
    max_seqlen
        Longest window of the batch, in time points.
    lengths
        int32 [windows] NumPy array, on the host: time points of each window.
    runs
        int32 [windows] NumPy array, on the host: run id of each window.
    step
        Which batch this is; the offset of the mask seed.
    labels
        int64 [windows], or None.
    is_next
        float32 [windows // 2], or None: windows 2i and 2i + 1 are a pair, 1 where the second truly follows
        the first after a short gap, 0 where it is from another run.
    """

    bold: Tensor
    times: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    lengths: NDArray[np.int32]
    runs: NDArray[np.int32]
    step: int
    labels: Tensor | None = None
    is_next: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Time points in the batch."""
        return self.bold.shape[0]

    @property
    def windows(self) -> int:
        """Windows in the batch."""
        return len(self.lengths)

    def to(self, device: str | torch.device, non_blocking: bool = False) -> PackedBatch:
        """Return the batch with its tensors on `device`; host arrays stay where they are."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=non_blocking)
            for name in ("bold", "times", "cu_seqlens", "labels", "is_next")
            if isinstance(value := getattr(self, name), Tensor)
        }
        return replace(self, **moved)

    def cast(self, dtype: torch.dtype) -> PackedBatch:
        """Return the batch with `bold` in another float type."""
        return replace(self, bold=self.bold.to(dtype))
