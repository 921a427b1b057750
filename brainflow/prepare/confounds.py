"""Confounds of a run and cleaning with them, by nilearn, and the checks that it does not do."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from brainflow.optional import need
from brainflow.prepare.hcp import MOVEMENT, read_movement
from brainflow.prepare.records import Unusable
from brainflow.prepare.settings import CleanSettings, Strategy
from brainflow.storage.normalise import normalise

# Without nilearn's "high_pass", which is cosines: the Butterworth filter of `clean` does that.
_PUBLISHED = {
    "strategy": ("motion", "wm_csf", "global_signal"),
    "motion": "basic",
    "wm_csf": "basic",
    "global_signal": "basic",
}
_MOTION = {"strategy": ("motion",), "motion": "basic"}
_PRESETS = {"simple": "simple", "scrubbing": "scrubbing", "compcor": "compcor", "aroma": "ica_aroma"}
_MOTION_NAMES = ("trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z")
AROMA_IMAGE = "smoothAROMAnonaggr"
"""`desc-` of the images that the strategy "aroma" goes with: ICA-AROMA has cleaned and smoothed them."""
FRAMEWISE_DISPLACEMENT = "framewise_displacement"
DVARS = "std_dvars"


@dataclass(frozen=True, kw_only=True)
class Confounds:
    """What is regressed out of a run, and what is known about its motion.

    Parameters
    ----------
    values
        float64 [time, confounds], or None for nothing.
    names
        Their names.
    censor
        bool [time], True where nilearn's sample mask leaves the volume out.
    displacement
        float64 [time], framewise displacement in mm, NaN for the first volume; None where unknown.
    steady_from
        Number of leading volumes that fMRIPrep marked as non-steady.
    dvars
        float64 [time], standardised DVARS, NaN for the first volume; None where unknown.
    """

    values: np.ndarray | None
    names: tuple[str, ...]
    censor: np.ndarray
    displacement: np.ndarray | None
    steady_from: int
    dvars: np.ndarray | None = None

    @property
    def has_cosines(self) -> bool:
        """Whether cosine drift terms are among them, which are a high-pass filter."""
        return any(name.startswith("cosine") for name in self.names)


def load(images: tuple[Path, ...], table: Path | None, strategy: Strategy, volumes: int) -> Confounds:
    """Read the confounds of a run.

    Parameters
    ----------
    images
        The image, or the two hemispheres of GIFTI.
    table
        Its `desc-confounds` table, or `Movement_Regressors.txt` of the HCP.
    strategy
        What is regressed out, see `CleanSettings`.
    volumes
        Time points of the image.

    Raises
    ------
    Unusable
        If the table is missing or damaged, lacks columns of the strategy, does not have one row a volume, or
        has NaN below the first row of a column that is needed.
    """
    if table is None:
        if strategy == "none":
            return Confounds(
                values=None, names=(), censor=np.zeros(volumes, bool), displacement=None, steady_from=0
            )
        raise Unusable("no confounds table (desc-confounds_timeseries.tsv) lies beside the image")
    if table.name == MOVEMENT:
        return _load_hcp(table, strategy, volumes)
    raw = _read_table(table)
    if len(raw) != volumes:
        raise Unusable(f"{table.name}: has {len(raw)} rows for {volumes} volumes")
    displacement, dvars = (
        _numbers(raw, name, table) if name in raw else None for name in (FRAMEWISE_DISPLACEMENT, DVARS)
    )
    # fMRIPrep writes a column for each such volume.
    columns = [name for name in raw.columns if re.fullmatch(r"non_steady_state_outlier\d+", name)]
    marked = np.flatnonzero(_numbers(raw, columns, table).any(axis=1)) if columns else np.zeros(0, np.int64)
    steady_from = int(marked[-1]) + 1 if len(marked) else 0
    censor = np.zeros(volumes, bool)
    if strategy == "none":
        # nilearn, whose sample mask leaves them out, is not asked here.
        censor[marked] = True
        return Confounds(
            values=None,
            names=(),
            censor=censor,
            displacement=displacement,
            steady_from=steady_from,
            dvars=dvars,
        )
    chosen, kept = _select(images, strategy)
    _check_finite(raw, chosen, table)
    if kept is not None:
        censor[:] = True
        censor[np.asarray(kept, np.int64)] = False
    return Confounds(
        values=chosen.to_numpy(float) if chosen.size else None,
        names=tuple(map(str, chosen.columns)),
        censor=censor,
        displacement=displacement,
        steady_from=steady_from,
        dvars=dvars,
    )


def _load_hcp(table: Path, strategy: Strategy, volumes: int) -> Confounds:
    """Motion is all that the HCP's folders hold."""
    if strategy not in ("motion", "none"):
        raise Unusable(
            f"confounds {strategy!r}: the HCP's folders hold motion parameters only; take --confounds motion "
            "or none (images that ICA-FIX has cleaned: --hcp-image hp2000_clean --confounds none)"
        )
    motion, displacement = read_movement(table, volumes)
    return Confounds(
        values=motion if strategy == "motion" else None,
        names=_MOTION_NAMES if strategy == "motion" else (),
        censor=np.zeros(volumes, bool),
        displacement=displacement,
        steady_from=0,
    )


def _read_table(path: Path) -> Any:
    pandas = need("pandas", "reading confounds", "bids")
    try:
        return pandas.read_csv(path, sep="\t", na_values=["n/a"])
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
        raise Unusable(f"{path.name}: cannot be read as a table ({error})") from error


def _select(images: tuple[Path, ...], strategy: Strategy) -> tuple[Any, np.ndarray | None]:
    """Return columns of the strategy as a DataFrame, and the volumes that it keeps."""
    fmriprep = need("nilearn.interfaces.fmriprep", "choosing confounds", "bids")
    # Texts, because nilearn takes a single Path for a list.
    files: Any = str(images[0]) if len(images) == 1 else [str(path) for path in images]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if strategy in ("published", "motion"):
                wanted: Any = _PUBLISHED if strategy == "published" else _MOTION
                chosen, kept = fmriprep.load_confounds(files, **wanted)
            else:
                chosen, kept = fmriprep.load_confounds_strategy(files, denoise_strategy=_PRESETS[strategy])
    except (ValueError, KeyError, OSError, IndexError, TypeError) as error:
        raise Unusable(f"confounds {strategy!r}: {' '.join(str(error).split())}") from error
    # Of a pair of hemispheres both have the same.
    if isinstance(chosen, list):
        chosen, kept = chosen[0], kept[0]
    return chosen, kept


def _numbers(frame: Any, columns: str | list[str], table: Path) -> np.ndarray:
    try:
        return np.asarray(frame[columns].to_numpy(float))
    except (ValueError, TypeError) as error:
        raise Unusable(
            f"{table.name}: column {columns} holds something that is no number ({error})"
        ) from error


def _check_finite(raw: Any, chosen: Any, table: Path) -> None:
    for name in chosen.columns:
        # Of the table itself: nilearn fills gaps of its own columns.
        column = _numbers(raw if name in raw else chosen, name, table)
        bad = np.flatnonzero(~np.isfinite(column))
        # fMRIPrep's derivatives have no first value, which nilearn fills in.
        if len(bad) > 1 or (len(bad) == 1 and (bad[0] != 0 or len(column) == 1)):
            raise Unusable(
                f"{table.name}: column {name} is not a number in {len(bad)} of {len(column)} rows, "
                f"first in row {bad[0]}"
            )


def clean(series: np.ndarray, confounds: Confounds | None, settings: CleanSettings, t_r: float) -> np.ndarray:
    """Detrend, filter, remove confounds and normalise, with nilearn's `sample_mask` for censored time points.

    Parameters
    ----------
    series
        float [time, networks], as extracted.
    confounds
        Of the same time points, with their censor bits; None for none.
    settings
        How to clean.
    t_r
        Seconds.

    Returns
    -------
    float32 [time, networks]; censored time points take no part, and hold a straight line between the nearest
    others, so that the time axis keeps its spacing

    Raises
    ------
    Unusable
        If nilearn cannot clean it, values are not finite afterwards, or it cannot be normalised.
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
                # The others are done below, z-scoring included.
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
    """Return the median over networks of mean / standard deviation over time; NaN if no network varies."""
    mean, std = series.mean(axis=0, dtype=np.float64), series.std(axis=0, dtype=np.float64)
    # Below that a network is constant but for rounding.
    varying = std > 1e-9 * np.abs(mean).clip(1e-30)
    return float(np.median(np.abs(mean[varying]) / std[varying])) if varying.any() else float("nan")
