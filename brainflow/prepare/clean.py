"""Cleaning of parcel time series by `nilearn.signal.clean`, and what the quality report says about them."""

from __future__ import annotations

import warnings

import numpy as np

from brainflow.optional import need
from brainflow.prepare.confounds import Confounds
from brainflow.prepare.records import Unusable
from brainflow.prepare.settings import CleanSettings
from brainflow.storage.normalise import normalise


def clean(series: np.ndarray, confounds: Confounds | None, settings: CleanSettings, t_r: float) -> np.ndarray:
    """Detrend, filter, remove confounds and normalise, with nilearn's `sample_mask` for censored time points.

    Parameters
    ----------
    series : float [time, networks], as extracted
    confounds : of the same time points, with their censor bits; None for none
    t_r : seconds

    Returns
    -------
    float32 [time, networks]; censored time points take no part, and hold a straight line between the nearest
    others, so that the time axis keeps its spacing

    Raises
    ------
    Unusable : if nilearn cannot clean it, values are not finite afterwards, or it cannot be normalised
    """
    signal = need("nilearn.signal", "cleaning time series", "bids")
    kept = np.arange(len(series)) if confounds is None else np.flatnonzero(~confounds.censor)
    if not len(kept):
        raise Unusable(f"cleaning: all {len(series)} volumes are censored")
    high_pass = settings.high_pass if confounds is None or not confounds.has_cosines else None
    filtered = high_pass is not None or settings.low_pass is not None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cleaned = signal.clean(
                np.array(series),
                detrend=settings.detrend,
                standardize="zscore_sample" if settings.normalise == "zscore" else None,
                confounds=None if confounds is None else confounds.values,
                filter="butterworth" if filtered else False,
                low_pass=settings.low_pass,
                high_pass=high_pass,
                t_r=t_r,
                sample_mask=None if len(kept) == len(series) else kept,
            )
    except ValueError as error:
        raise Unusable(f"cleaning: of {len(kept)} volumes: {' '.join(str(error).split())}") from error
    bad = np.flatnonzero(~np.isfinite(cleaned).all(axis=0))
    if len(bad):
        raise Unusable(f"cleaning: {len(bad)} networks are not finite afterwards (first: network {bad[0]})")
    whole = _on_all_volumes(cleaned, kept, len(series))
    if settings.normalise in ("spatial", "gsr"):
        censor = None if confounds is None else confounds.censor
        try:
            whole = normalise(whole, settings.normalise, censor=censor)
        except ValueError as error:
            raise Unusable(f"cleaning: {error}") from error
    return np.ascontiguousarray(whole, np.float32)


def _on_all_volumes(values: np.ndarray, kept: np.ndarray, volumes: int) -> np.ndarray:
    if len(kept) == volumes:
        return values
    return np.stack([np.interp(np.arange(volumes), kept, network) for network in values.T], axis=1)


def temporal_snr(series: np.ndarray) -> float:
    """Median over networks of mean / standard deviation over time; NaN if no network varies."""
    mean, std = series.mean(axis=0, dtype=np.float64), series.std(axis=0, dtype=np.float64)
    varying = std > 1e-9 * np.abs(mean).clip(1e-30)
    return float(np.median(np.abs(mean[varying]) / std[varying])) if varying.any() else float("nan")
