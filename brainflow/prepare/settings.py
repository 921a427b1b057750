"""How runs are prepared. The defaults are those of the published models (Thomas, Ré & Poldrack 2022)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from brainflow.prepare.events import EventSettings
from brainflow.storage.normalise import KINDS, Kind

Strategy = Literal["published", "motion", "simple", "scrubbing", "compcor", "aroma", "none"]
AUTO = -1


@dataclass(frozen=True, kw_only=True)
class CleanSettings:
    """What is done to each parcel's time series, in nilearn's order: detrend, filter, confounds, normalise.

    Parameters
    ----------
    confounds
        "published" is 6 motion parameters, white matter, CSF and global signal; "motion" the 6 motion
        parameters (all that the HCP's folders have); "simple", "scrubbing", "compcor" and "aroma" are the
        strategies of nilearn's `load_confounds_strategy`; "none" removes nothing.
    detrend
        Remove the linear trend.
    high_pass, low_pass
        Cut-off of the Butterworth filter in Hz, None for none; no high-pass filter is applied where the
        confounds hold cosine drift terms, which do the same.
    normalise
        "zscore" z-scores each parcel and run (standard deviation with n - 1); "spatial" then takes away mean
        and standard deviation over parcels at each volume, "gsr" regresses out the mean over parcels, and
        both z-score again; "none".
    smoothing_fwhm
        Gaussian smoothing of volumes before averaging, full width at half maximum in mm; None for none.
    dummy_scans
        Volumes dropped at the start of each run; -1 drops the non-steady-state ones that fMRIPrep marked.
    """

    confounds: Strategy = "published"
    detrend: bool = True
    high_pass: float | None = 0.008
    low_pass: float | None = None
    normalise: Kind = "zscore"
    smoothing_fwhm: float | None = 3.0
    dummy_scans: int = 0

    def __post_init__(self) -> None:
        if self.dummy_scans < AUTO:
            raise ValueError(
                f"dummy_scans: got {self.dummy_scans}, expected a number of volumes, or -1 for automatic"
            )
        if self.normalise not in KINDS:
            raise ValueError(f"normalise: got {self.normalise!r}, expected one of {', '.join(KINDS)}")
        for name in ("high_pass", "low_pass", "smoothing_fwhm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: got {value}, expected a positive number or None")


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Which runs are left out.

    Parameters
    ----------
    max_mean_fd
        Largest mean framewise displacement in mm; None for no limit.
    min_volumes
        Shortest run, in volumes that are neither dummy scans nor censored.
    allow_sheared
        Keep runs whose image is sheared (axes not at right angles), and those that fMRIPrep 20.2.0 made from
        a sheared image of the scanner, which it resampled wrongly.
    """

    max_mean_fd: float | None = None
    min_volumes: int = 50
    allow_sheared: bool = False

    def __post_init__(self) -> None:
        if self.min_volumes < 2:
            raise ValueError(f"min_volumes: got {self.min_volumes}, expected at least 2")
        if self.max_mean_fd is not None and not self.max_mean_fd > 0:
            raise ValueError(f"max_mean_fd: got {self.max_mean_fd}, expected a positive number or None")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that decides what a prepared run holds, apart from its files and atlases."""

    clean: CleanSettings = field(default_factory=CleanSettings)
    rules: Rules = field(default_factory=Rules)
    events: EventSettings = field(default_factory=EventSettings)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return asdict(self)
