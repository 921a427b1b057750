"""From floats to the element type of a store and back, refusing what does not fit."""

from __future__ import annotations

import numpy as np


def run_statistics(bold: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation over time of each network: two float32 [networks] from [time, networks]."""
    mean = bold.mean(axis=0, dtype=np.float64)
    std = bold.std(axis=0, dtype=np.float64)
    return mean.astype(np.float32), std.astype(np.float32)


def encode(bold: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray | None]:
    """Round a run to the element type of the store.

    Parameters
    ----------
    bold : real [time, networks]
    dtype : float16, float32, int16 or int8

    Returns
    -------
    values : [time, networks] of `dtype`
    scale : float32 [networks] for integer types (BOLD = values · scale; largest absolute value over
        32767 or 127), else None

    Raises
    ------
    Overflow : if a value is not finite, or not after rounding
    """
    if bold.dtype.kind == "f" and not np.isfinite(bold).all():
        raise Overflow(bold, np.isfinite(bold), "is not finite")
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            values = bold.astype(dtype)
        if not np.isfinite(values).all():
            raise Overflow(
                bold, np.isfinite(values), f"does not fit {dtype.name} (at most {np.finfo(dtype).max:g})"
            )
        return values, None
    largest = np.iinfo(dtype).max
    peak = np.abs(bold).max(axis=0).astype(np.float64)
    with np.errstate(over="ignore", under="ignore"):
        scale = (peak / largest).astype(np.float32)
    if not np.isfinite(scale).all() or (scale[peak > 0] < np.finfo(np.float32).tiny).any():
        bad = np.broadcast_to(
            ~np.isfinite(scale) | ((scale < np.finfo(np.float32).tiny) & (peak > 0)), bold.shape
        )
        raise Overflow(bold, ~bad, "is out of the range of a float32 scale")
    divisor = np.where(scale > 0, scale, np.float32(1)).astype(np.float64)
    values = np.clip(np.rint(bold / divisor), -largest, largest).astype(dtype)
    return values, scale


class Overflow(ValueError):
    """A value that a store cannot hold: where it is (`network`, `time`) and the `reason`."""

    def __init__(self, bold: np.ndarray, good: np.ndarray, reason: str) -> None:
        self.time, self.network = (int(i) for i in np.argwhere(~good)[0])
        self.reason = f"the value {bold[self.time, self.network]} {reason}"
        super().__init__(f"time point {self.time}, network {self.network}: {self.reason}")
