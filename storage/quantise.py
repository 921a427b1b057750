"""From floats to the element type of a store and back, refusing what does not fit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NEGLIGIBLE = 1e-3
"""Change by rounding, relative to the standard deviation of a network, that is not worth a word."""
_ROWS = 256


def run_statistics(bold: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation over time of each network: two float32 [networks]."""
    # In float64: over thousands of volumes with a mean of 10,000 float32 would lose what varies.
    mean = bold.mean(axis=0, dtype=np.float64)
    std = bold.std(axis=0, dtype=np.float64)
    return mean.astype(np.float32), std.astype(np.float32)


def encode(bold: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray | None]:
    """Round a run to the element type of the store.

    Parameters
    ----------
    bold
        Real [time, networks].
    dtype
        float16, float32, int16 or int8.

    Returns
    -------
    values
        [time, networks] of `dtype`.
    scale
        float32 [networks] for integer types (BOLD = values · scale; largest absolute value over 32767 or
        127), else None.

    Raises
    ------
    Overflow
        If a value is not finite, or not after rounding.
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
    # A subnormal scale has few digits: values divided by it would not come back.
    if not np.isfinite(scale).all() or (scale[peak > 0] < np.finfo(np.float32).tiny).any():
        bad = np.broadcast_to(
            ~np.isfinite(scale) | ((scale < np.finfo(np.float32).tiny) & (peak > 0)), bold.shape
        )
        raise Overflow(bold, ~bad, "is out of the range of a float32 scale")
    # The scale as it is stored, in float32: what rounding did to it is no second error then.
    divisor = np.where(scale > 0, scale, np.float32(1)).astype(np.float64)
    values = np.clip(np.rint(bold / divisor), -largest, largest).astype(dtype)
    return values, scale


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """What rounding did to a run, in the network that it changed most.

    Attributes
    ----------
    network
        Its number.
    change
        Root mean square of the change over its standard deviation; infinite where that is 0.
    zeros
        Values of the run that were not 0 and are now.
    """

    network: int
    change: float
    zeros: int

    def __str__(self) -> str:
        change = (
            f" by {self.change:.2%} of its standard deviation" if self.change < np.inf else ", a constant"
        )
        zeros = f"; {self.zeros} values of the run became 0" if self.zeros else ""
        return f"rounding changed network {self.network}{change}{zeros}"


def rounding(bold: np.ndarray, values: np.ndarray, std: np.ndarray) -> Rounding | None:
    """Return what rounding to floats did to a run, if that is more than `NEGLIGIBLE`.

    Z-scored runs lose some 0.02 % to float16, runs with a mean of 10,000 and a standard deviation of 100 some
    2 %. Integer types round by design, to 1/254 or 1/65,534 of the range of a network.

    Parameters
    ----------
    bold
        Real [time, networks].
    values
        The same from `encode`.
    std
        [networks], from `run_statistics`.
    """
    if values.dtype.kind != "f" or values.dtype == bold.dtype:
        return None
    squares = np.zeros(bold.shape[1])
    for start in range(0, len(bold), _ROWS):  # in pieces that a cache holds
        before, after = bold[start : start + _ROWS], values[start : start + _ROWS]
        error = np.subtract(after, before, dtype=np.result_type(before.dtype, np.float32))
        squares += np.einsum("tn,tn->n", error, error)
    root = np.sqrt(squares / len(bold))
    change = np.divide(root, std, out=np.where(root > 0, np.inf, 0.0), where=std > 0)
    network = int(np.argmax(change))
    if change[network] <= NEGLIGIBLE:
        return None
    zeros = int(((np.asarray(bold) != 0) & (values == 0)).sum())
    return Rounding(network=network, change=float(change[network]), zeros=zeros)


class Overflow(ValueError):
    """A value that a store cannot hold: where it is (`network`, `time`) and the `reason`."""

    def __init__(self, bold: np.ndarray, good: np.ndarray, reason: str) -> None:
        self.time, self.network = (int(i) for i in np.argwhere(~good)[0])
        self.reason = f"the value {bold[self.time, self.network]} {reason}"
        super().__init__(f"time point {self.time}, network {self.network}: {self.reason}")
