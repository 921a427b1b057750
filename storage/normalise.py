"""Normalisation of runs in the field's terms, and the words by which stores and models know it.

`zscore` subtracts the mean of each network over the run and divides by its standard deviation. `spatial`
then takes mean and standard deviation over networks away at each volume, and z-scores again: what all
networks do together, and how strongly all of them do anything, is gone. `gsr` regresses the mean over
networks (the global signal) out of each network instead, and z-scores again.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

Kind = Literal["none", "zscore", "spatial", "gsr"]
KINDS: tuple[Kind, ...] = get_args(Kind)
APPLIED: dict[str, str] = {
    "zscore": "z-scored per run and network",
    "spatial": "mean and SD over networks removed at each volume, z-scored per run and network",
    "gsr": "global signal regressed out, z-scored per run and network",
}
"""What the attribute `normalisation` of a store, and of a model's data, says of each kind."""
FEWEST = 3
"""Networks that must vary for `spatial` and `gsr`: two would become each other's mirror, one nothing."""
_SAME_SCALE = 1e-9  # of the median standard deviation: what detrending leaves of a constant is smaller
_NOISE = 1e-5  # of a standard deviation: what rounding to float32 leaves where nothing is left
_NETWORKS = 1024  # at a time in float64


def kind_of(text: object) -> str | None:
    """Return the kind that an attribute `normalisation` of a store or model names; None for other texts."""
    return next((kind for kind, words in APPLIED.items() if words == text), None)


def normalise(bold: np.ndarray, kind: Kind, *, censor: np.ndarray | None = None) -> np.ndarray:
    """Normalise one run. Nothing is clipped: a spike stays one.

    A network that does not vary (no more than rounding makes it) becomes 0 and takes no part in what is taken
    over networks. A volume at which all networks are equal becomes 0 by `spatial`.

    Parameters
    ----------
    bold
        Real [time, networks], finite: a whole run, not a window of it.
    kind
        "zscore", "spatial", "gsr", or "none", which returns `bold` itself.
    censor
        bool [time], True for time points that take no part in what is computed over time.

    Returns
    -------
    float32 [time, networks]; standard deviations over time are those with n - 1

    Raises
    ------
    ValueError
        If the run is not as described, has fewer than 2 time points that are not censored, no network that
        varies, or (`spatial`, `gsr`) fewer than 3; network and time point of a value that is not finite are
        named.

    Examples
    --------
    >>> run = np.array([[1.0, 5.0, 0.0, 7.0], [2.0, 3.0, 9.0, 7.0], [3.0, 1.0, 0.0, 7.0]])
    >>> normalise(run, "zscore")[:, 3].tolist()
    [0.0, 0.0, 0.0]
    """
    if kind not in KINDS:
        raise ValueError(f"normalise: got {kind!r}, expected one of {', '.join(KINDS)}")
    bold = np.asarray(bold)
    if kind == "none":
        return bold
    _check(bold)
    used = np.ones(len(bold), bool) if censor is None else ~np.asarray(censor, bool)
    if used.sum() < 2:
        raise ValueError(
            f"normalise: the run has {used.sum()} time points that are not censored, expected at least 2"
        )
    values, varies = _zscore(bold, used)
    if not varies.any():
        raise ValueError("normalise: no network of the run varies over time; drop the run")
    if kind == "zscore":
        return values
    if varies.sum() < FEWEST:
        raise ValueError(
            f"normalise: {kind} needs {FEWEST} networks that vary over time, the run has {varies.sum()}; "
            "take zscore"
        )
    shared = values[:, varies]
    shared = spatially_normalised(shared) if kind == "spatial" else _without_global_signal(shared, used)
    values[:, varies] = _zscore(shared, used, floor=_NOISE)[0]
    return values


def spatially_normalised(bold: np.ndarray) -> np.ndarray:
    """Return `bold` [time, networks] without mean and standard deviation over networks at each time point.

    Returns
    -------
    float32 [time, networks]; 0 at time points at which all networks are equal
    """
    centred = np.asarray(bold, np.float64)
    centred = centred - centred.mean(axis=1, keepdims=True)
    spread = centred.std(axis=1, keepdims=True)
    flat = spread <= 1e-6
    return np.asarray(np.where(flat, 0.0, centred / np.where(flat, 1.0, spread)), np.float32)


def left_to_remove(bold: np.ndarray, kind: str) -> float:
    """Return which share of the mean square `kind` would still take: about 0 where it was done.

    What `spatial` and `gsr` take away is taken at each volume, so that windows tell it as well as runs.

    Parameters
    ----------
    bold
        Real [time, networks].
    kind
        "spatial" or "gsr".
    """
    values = np.asarray(bold, np.float64)
    power = float(np.square(values).mean())
    if not power:
        return 0.0
    if kind == "gsr":
        return float(np.square(values.mean(axis=1)).mean()) / power
    done = spatially_normalised(values).astype(np.float64)
    along = float((values * done).mean()) ** 2 / max(float(np.square(done).mean()), 1e-30)
    return 1.0 - along / power


def _zscore(bold: np.ndarray, used: np.ndarray, floor: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Return z-scores over time, and bool [networks]: which networks vary, by more than `floor`.

    Values are first divided by the largest of their network, so that no finite ones overflow.
    """
    values = np.empty(bold.shape, np.float32)
    # As a logarithm: spread times peak may be beyond float64.
    level = np.empty(bold.shape[1])  # log of the standard deviation; minus infinity for a constant
    precision = np.finfo(bold.dtype).eps if bold.dtype.kind == "f" else np.finfo(np.float64).eps
    for start in range(0, bold.shape[1], _NETWORKS):
        part = slice(start, start + _NETWORKS)
        block = bold[:, part].astype(np.float64)
        peak = np.abs(block).max(axis=0)
        block /= np.where(peak > 0, peak, 1.0)
        mean = block[used].mean(axis=0)
        block -= mean
        spread = block[used].std(axis=0, ddof=1)
        # Equal numbers have a spread, too: some rounding errors of their mean.
        constant = spread <= 4 * precision * np.abs(mean)
        values[:, part] = block / np.where(constant, np.inf, spread)
        with np.errstate(divide="ignore"):
            level[part] = np.where(constant, -np.inf, np.log(spread) + np.log(peak))
    varies = level > -np.inf
    if varies.any():
        least = max(np.median(level[varies]) + np.log(_SAME_SCALE), np.log(floor) if floor else -np.inf)
        varies &= level >= least
    values[:, ~varies] = 0.0
    return values, varies


def _without_global_signal(values: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Return the rest of regressing networks on the mean over networks; all have mean 0 over time."""
    signal = values.mean(axis=1, dtype=np.float64)
    power = float(np.square(signal[used]).mean())
    if power <= _NOISE**2:  # networks cancel exactly: there is no global signal
        return values
    slopes = signal[used] @ values[used] / (power * used.sum())
    return np.asarray(values - np.outer(signal, slopes), np.float32)


def _check(bold: np.ndarray) -> None:
    if bold.ndim != 2 or bold.dtype.kind not in "fiu":
        raise ValueError(
            f"bold: got {bold.dtype} of shape {list(bold.shape)}, expected real numbers [time, networks]"
        )
    if bold.dtype.kind == "f" and not np.isfinite(bold).all():
        time, network = np.argwhere(~np.isfinite(bold))[0].tolist()
        raise ValueError(
            f"network {network}, time point {time}: the value {bold[time, network]} is not finite; repair or "
            "drop the run"
        )
