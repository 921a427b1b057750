"""The datum of the system: windows of BOLD laid end to end along one token axis, without padding.

A sampler says which windows (:class:`Windows`), a loader reads their BOLD, and :meth:`PackedBatch.pack` puts
the two together. What follows from the windows' lengths alone (offsets, positions, times) is computed on the
host, where the lengths are known, and sent by :func:`upload`: nothing here waits for a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Ints = NDArray[np.int64]


def offsets(lengths: NDArray[Any]) -> Ints:
    """Return the offsets of windows of these lengths: int64 [windows + 1], 0 first.

    Examples
    --------
    >>> offsets(np.array([3, 2])).tolist()
    [0, 3, 5]
    """
    return np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))


def window_of(lengths: NDArray[Any]) -> Ints:
    """Return the number of the window that each token belongs to: int64 [tokens].

    Examples
    --------
    >>> window_of(np.array([3, 2])).tolist()
    [0, 0, 0, 1, 1]
    """
    return np.repeat(np.arange(len(lengths), dtype=np.int64), lengths)


def positions(lengths: NDArray[Any]) -> Ints:
    """Return the place of each token in its window: int64 [tokens].

    Examples
    --------
    >>> positions(np.array([3, 2])).tolist()
    [0, 1, 2, 0, 1]
    """
    starts = offsets(lengths)
    return np.arange(starts[-1], dtype=np.int64) - np.repeat(starts[:-1], lengths)


def upload(device: torch.device, **arrays: NDArray[Any]) -> dict[str, Tensor]:
    """Return the arrays as tensors on `device`, sent as one buffer (pinned and asynchronous for CUDA)."""
    offset, places = 0, {}
    for name, array in arrays.items():
        places[name] = offset
        # Each array begins at a multiple of 16 bytes, so that its view in another element type is aligned.
        offset += -(-array.nbytes // 16) * 16
    # A copy from pageable memory would stop the GPU's queue, and one copy costs less than one an array.
    buffer = torch.empty(offset, dtype=torch.uint8, pin_memory=device.type == "cuda")
    host = buffer.numpy()
    for name, array in arrays.items():
        host[places[name] : places[name] + array.nbytes] = (
            np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        )
    sent = buffer.to(device, non_blocking=True)
    return {
        name: sent[places[name] : places[name] + array.nbytes]
        # The slice is copied because `from_numpy` warns of an array that is read-only, as broadcast ones are.
        .view(torch.from_numpy(array[:0].copy()).dtype)
        .view(array.shape)
        for name, array in arrays.items()
    }


# eq=False: arrays that are compared give arrays, not a truth value.
@dataclass(frozen=True, kw_only=True, eq=False)
class Windows:
    """The windows of one batch, as a sampler draws them; host arrays.

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
    step
        Which step the windows are for; what is drawn for them (masks) is drawn from it.
    labels
        int64 [windows] or None.
    is_next
        float32 [windows // 2] or None: windows 2i and 2i + 1 are a pair; 1 where the second truly follows.
    skipped
        Windows that were left out because the store cannot give them.
    """

    starts: NDArray[np.int64]
    lengths: NDArray[np.int32]
    runs: NDArray[np.int32]
    t_r: NDArray[np.float64]
    step: int
    labels: NDArray[np.int64] | None = None
    is_next: NDArray[np.float32] | None = None
    skipped: int = 0

    @classmethod
    def end_to_end(cls, lengths: ArrayLike, *, t_r: ArrayLike, step: int = 0, **more: Any) -> Windows:
        """Return windows that lie one behind the other in an array: no store, no runs.

        Parameters
        ----------
        lengths
            [windows], time points.
        t_r
            Seconds between time points, one for all windows or [windows].
        step, more
            Further attributes.

        Examples
        --------
        >>> Windows.end_to_end([3, 2], t_r=0.72).starts.tolist()
        [0, 3]
        """
        counts = np.asarray(lengths, dtype=np.int32)
        return cls(
            starts=offsets(counts)[:-1],
            lengths=counts,
            runs=np.zeros(len(counts), np.int32),
            t_r=np.broadcast_to(np.asarray(t_r, np.float64), counts.shape),
            step=step,
            **more,
        )

    def __len__(self) -> int:
        return len(self.starts)

    def rows(self) -> NDArray[np.int32]:
        """Return which row of the store each token of the packed batch is: [tokens]; must fit 32 bits."""
        ends = self.lengths.cumsum(dtype=np.int64)
        rows = (self.starts - ends + self.lengths).repeat(self.lengths)
        rows += np.arange(len(rows))
        return rows.astype(np.int32)

    def columns(self) -> dict[str, NDArray[Any]]:
        """Return `times`, `cu_seqlens` and, where there are any, `labels` and `is_next` of the packed batch.

        Times are `i * t_r` in seconds, computed in float64 and rounded once to float32.
        """
        times = (positions(self.lengths) * self.t_r.repeat(self.lengths)).astype(np.float32)
        found: dict[str, NDArray[Any]] = {
            "times": times,
            "cu_seqlens": offsets(self.lengths).astype(np.int32),
        }
        if self.labels is not None:
            found["labels"] = np.ascontiguousarray(self.labels, dtype=np.int64)
        if self.is_next is not None:
            found["is_next"] = np.ascontiguousarray(self.is_next, dtype=np.float32)
        return found


# eq=False: as above.
@dataclass(frozen=True, kw_only=True, eq=False)
class PackedBatch:
    """Windows of BOLD laid end to end; made by :meth:`pack`.

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
    t_r
        float64 [windows] NumPy array, on the host: seconds between the time points of each window.
    step
        Which step the batch is for; the offset of the mask seed.
    labels
        int64 [windows], or None.
    is_next
        float32 [windows // 2], or None: windows 2i and 2i + 1 are a pair, 1 where the second truly follows
        the first after a short gap, 0 where it is from another run.
    mask
        What a framework hides of the batch (:meth:`brainflow.frameworks.base.Framework.mask`), drawn on the
        host; None as long as nobody has drawn it.
    """

    bold: Tensor
    times: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    lengths: NDArray[np.int32]
    runs: NDArray[np.int32]
    t_r: NDArray[np.float64]
    step: int
    labels: Tensor | None = None
    is_next: Tensor | None = None
    mask: Any = None

    @staticmethod
    def pack(
        bold: Tensor,
        windows: Windows,
        *,
        device: str | torch.device | None = None,
        columns: dict[str, Tensor] | None = None,
    ) -> PackedBatch:
        """Return the batch of some windows, whose BOLD has been read.

        Parameters
        ----------
        bold
            [tokens, networks], window after window. On the CPU the batch has this very memory.
        windows
            Which windows these are, none of them empty.
        device
            Where the tensors shall be; where `bold` is if None.
        columns
            `windows.columns()` as tensors on the device, of a caller who has sent them already.

        Raises
        ------
        ValueError
            If `bold` has not as many rows as the windows have time points, or a window has none.
        """
        tokens = int(windows.lengths.sum(dtype=np.int64))
        if bold.shape[0] != tokens or windows.lengths.min(initial=1) < 1:
            raise ValueError(
                f"bold: got {bold.shape[0]} rows for {len(windows)} windows with {tokens} time points, "
                "expected a row for each time point, and no window without any"
            )
        target = bold.device if device is None else torch.device(device)
        if columns is None:
            arrays = windows.columns()
            if target.type == "cpu":
                columns = {name: torch.from_numpy(array) for name, array in arrays.items()}
            else:
                columns = upload(target, **arrays)
        return PackedBatch(
            bold=bold.to(target, non_blocking=True),
            max_seqlen=int(windows.lengths.max()),
            lengths=windows.lengths,
            runs=windows.runs,
            t_r=windows.t_r,
            step=windows.step,
            **columns,
        )

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
