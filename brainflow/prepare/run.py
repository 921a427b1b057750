"""Prepare one run: its files → one part for each atlas and a record."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from brainflow.optional import need
from brainflow.prepare import surfaces, volumes
from brainflow.prepare.atlas import AtlasSpec
from brainflow.prepare.confounds import Confounds, clean, temporal_snr
from brainflow.prepare.confounds import load as load_confounds
from brainflow.prepare.events import segments_of
from brainflow.prepare.files import Kind, RunFiles
from brainflow.prepare.records import (
    DONE,
    EXCLUDED,
    FAILED,
    Excluded,
    Unusable,
    forget,
    is_complete,
    parts_of,
    read_record,
    write_before,
    write_record,
)
from brainflow.prepare.settings import AUTO, Settings
from brainflow.prepare.timing import nifti_repetition_time, repetition_time
from brainflow.prepare.volumes import is_sheared, wrongly_resampled
from brainflow.storage.columns import check_segments
from brainflow.storage.errors import StoreError
from brainflow.storage.ingest.limits import TEXT_BYTES, regular_size
from brainflow.storage.parts import write_part

_CONFOUNDS_BYTES = 256 * 2**20


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run to prepare, with all that decides the outcome."""

    files: RunFiles
    kind: Kind
    settings: Settings
    atlases: tuple[AtlasSpec, ...]
    work: Path

    @property
    def atlas_labels(self) -> list[str]:
        """Labels of the atlases."""
        return [atlas.label for atlas in self.atlases]

    @property
    def recipe(self) -> dict[str, Any]:
        """Settings and atlases as JSON values: what runs of one store must have in common."""
        atlases = {atlas.label: atlas.digest for atlas in self.atlases}
        images = {"kind": self.kind, "space": self.files.space, "description": self.files.description}
        return {**images, "atlases": atlases, **self.settings.to_dict()}

    def fingerprint(self) -> str:
        """Return the digest of the settings and of names, sizes and times of the input files."""
        inputs = []
        for path in self.files.inputs:
            try:
                status = path.stat()
                # Not the content: to hash it would read every image once more.
                inputs.append([path.name, status.st_size, status.st_mtime_ns])
            except OSError:
                # A file that is gone makes another fingerprint, too.
                inputs.append([path.name, -1, 0])
        return hashlib.sha256(json.dumps([self.recipe, inputs], sort_keys=True).encode()).hexdigest()

    @contextmanager
    def local(self) -> Iterator[RunFiles]:
        """Let its files be on this machine within the block."""
        yield self.files

    def is_done(self) -> bool:
        """Whether nothing is left to do for this run."""
        record = read_record(self.work, self.files.key)
        return is_complete(self.work, record, self.fingerprint(), self.atlas_labels)


def prepare_run(job: Job) -> dict[str, Any]:
    """Prepare a run, write its parts and its record, and return the record. Never raises for a bad run."""
    # One thread: workers share the cores, and sums come out alike however many there are.
    with need("threadpoolctl", "preparing runs", "bids").threadpool_limits(1):
        record = {"key": job.files.key, "dataset": job.files.dataset, "entities": job.files.entities}
        record |= {
            "fingerprint": job.fingerprint(),
            "recipe": job.recipe,
            "inputs": [str(path.absolute()) for path in job.files.inputs],
            "status": DONE,
            "reason": "",
            "notes": [],
        }
        # What an earlier preparation left is not to be taken for this one's.
        forget(job.work, job.files.key, job.atlas_labels)
        try:
            with job.local() as files:
                _prepare(replace(job, files=files), record)
        except Excluded as reason:
            record |= {"status": EXCLUDED, "reason": str(reason)}
        except (Unusable, OSError, MemoryError) as error:
            record |= {"status": FAILED, "reason": str(error) or type(error).__name__}
        # A missing package concerns every run.
        except ImportError:
            raise
        except Exception as error:  # a fault of ours or of a library: the other runs go on
            what = f"{type(error).__name__}: {' '.join(str(error).split())}"
            names = ", ".join(path.name for path in job.files.images)
            record |= {"status": FAILED, "reason": f"{names}: cannot be prepared ({what})"}
        write_record(job.work, record)
    return record


def failed_record(job: Job, reason: str) -> dict[str, Any]:
    """Write and return the record of a run whose worker did not come back."""
    record = {"key": job.files.key, "dataset": job.files.dataset, "entities": job.files.entities}
    record |= {"fingerprint": "", "recipe": job.recipe, "status": FAILED, "reason": reason, "notes": []}
    write_record(job.work, record)
    return record


def _prepare(job: Job, record: dict[str, Any]) -> None:
    files, settings = job.files, job.settings
    if files.problem:
        raise Unusable(files.problem)
    _check_files(files)
    image, length, header_t_r = _open(job)
    timing = repetition_time(files.sidecars, header_t_r)
    record |= {"t_r": timing.seconds, "t_r_source": timing.source, "volumes": length}
    record["notes"] = [timing.note] if timing.note else []
    confounds = load_confounds(files.images, files.confounds, settings.clean.confounds, length)
    dropped = confounds.steady_from if settings.clean.dummy_scans == AUTO else settings.clean.dummy_scans
    dropped = min(dropped, length)
    confounds = _drop(confounds, dropped)
    record |= {"volumes": length - dropped, "dropped": dropped} | _motion(confounds)
    # Before anything is extracted, which takes longest.
    _apply_rules(job, record)
    segments = tuple(
        segments_of(
            files.events,
            settings.events,
            task=files.entities.get("task", ""),
            t_r=timing.seconds,
            volumes=length - dropped,
            dropped=dropped,
        )
    )
    try:
        # Else the store would refuse them, when all runs are prepared.
        check_segments(segments, files.key, length - dropped)
    except ValueError as error:
        names = ", ".join(path.name for path in files.events)
        raise Unusable(f"{names}: {error}") from error
    record["segments"] = len(segments)
    if job.kind == "volume":
        extracted = volumes.extract(image, job.atlases, settings.clean.smoothing_fwhm, dropped)
    else:
        extracted = surfaces.extract(image, job.atlases, dropped)
    # Before cleaning, which takes the mean away.
    record["tsnr"] = _finite(temporal_snr(extracted[0][~confounds.censor]))
    record["flat_networks"] = {}
    for atlas, series in zip(job.atlases, extracted, strict=True):
        record["flat_networks"][atlas.label] = int((np.ptp(series, axis=0) == 0).sum())
        write_before(job.work, atlas.label, files.key, series)
        write_part(
            parts_of(job.work, atlas.label),
            clean(series, confounds, settings.clean, timing.seconds),
            t_r=timing.seconds,
            dataset=files.dataset,
            subject=files.entities.get("sub", ""),
            session=files.entities.get("ses", ""),
            task=files.entities.get("task", ""),
            run=files.entities.get("run", ""),
            key=files.key,
            censor=confounds.censor,
            segments=segments,
        )


def _check_files(files: RunFiles) -> None:
    """Refuse what is no regular file (a FIFO is read forever), and tables far larger than any run's."""
    texts = dict.fromkeys((*files.sidecars, *files.events), TEXT_BYTES)
    tables = {files.confounds: _CONFOUNDS_BYTES} if files.confounds else {}
    for path, largest in (dict.fromkeys(files.images, math.inf) | texts | tables).items():
        try:
            regular_size(path, largest)
        except (OSError, StoreError) as error:
            raise Unusable(f"{path.name}: {str(error).removeprefix(f'{path}: ')}") from error


def _open(job: Job) -> tuple[Any, int, float | None]:
    """Return the image, its number of time points, and the repetition time of its header in seconds."""
    if job.kind == "volume":
        image = volumes.open_volume(job.files.images[0])
        if is_sheared(image.affine) and not job.settings.rules.allow_sheared:
            raise Excluded("the image is sheared (a fault of fMRIPrep 20.2.0)")
        return image, image.shape[3], nifti_repetition_time(image.header)
    if job.kind == "cifti":
        run = surfaces.read_cifti(job.files.images[0])
    else:
        run = surfaces.read_gifti(job.files.images)
    return run, len(run.data), run.t_r


def _drop(confounds: Confounds, dropped: int) -> Confounds:
    displacement = confounds.displacement
    return Confounds(
        values=None if confounds.values is None else confounds.values[dropped:],
        names=confounds.names,
        censor=confounds.censor[dropped:],
        displacement=None if displacement is None else displacement[dropped:],
        steady_from=confounds.steady_from,
        dvars=None if confounds.dvars is None else confounds.dvars[dropped:],
    )


def _motion(confounds: Confounds) -> dict[str, Any]:
    record: dict[str, Any] = {
        "mean_fd": None,
        "max_fd": None,
        "fd": None,
        "dvars": None,
        "censored": int(confounds.censor.sum()),
        "confounds": list(confounds.names),
    }
    displacement = confounds.displacement
    if displacement is not None and np.isfinite(displacement).any():
        record["mean_fd"] = float(np.nanmean(displacement))
        record["max_fd"] = float(np.nanmax(displacement))
        record["fd"] = [_finite(round(float(value), 4)) for value in displacement]
    if confounds.dvars is not None:
        record["dvars"] = [_finite(round(float(value), 4)) for value in confounds.dvars]
    return record


def _apply_rules(job: Job, record: dict[str, Any]) -> None:
    rules = job.settings.rules
    if not rules.allow_sheared and wrongly_resampled(job.files.images[0], job.files.source):
        raise Excluded("the scanner's image is sheared, which fMRIPrep 20.2.0 resampled wrongly")
    left = record["volumes"] - record["censored"]
    if left < rules.min_volumes:
        censored = f" that are not censored (of {record['volumes']})" if record["censored"] else ""
        raise Excluded(f"short run: {left} volumes{censored}, fewer than {rules.min_volumes}")
    if rules.max_mean_fd is not None:
        if record["mean_fd"] is None:
            # Not kept: nobody could say that it is within the limit.
            raise Unusable("framewise displacement is not known, so the limit on it cannot be applied")
        if record["mean_fd"] > rules.max_mean_fd:
            raise Excluded(
                f"motion: mean framewise displacement {record['mean_fd']:.3f} mm, more than "
                f"{rules.max_mean_fd:g} mm"
            )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def jobs_for(
    runs: Sequence[RunFiles], *, kind: Kind, settings: Settings, atlases: Sequence[AtlasSpec], work: Path
) -> list[Job]:
    """Return one job a run.

    Parameters
    ----------
    runs
        Files of each run.
    kind
        What their images are.
    settings
        How runs are cleaned, left out and labelled.
    atlases
        What is averaged.
    work
        Where parts and records go.

    Raises
    ------
    ValueError
        If there is no atlas, two have one label, or an atlas does not fit the kind of image.
    """
    labels = [atlas.label for atlas in atlases]
    if not labels:
        raise ValueError("atlas: none was given, expected at least one, such as schaefer-400 or a path")
    # Parts and stores lie under the labels.
    if len(set(labels)) != len(labels):
        raise ValueError(f"atlas: labels must differ, got {', '.join(labels)}; write LABEL=PATH")
    fitting = {"volume": ("labels", "maps"), "cifti": ("dlabel",), "gifti": ("gifti",)}[kind]
    for atlas in atlases:
        if atlas.kind not in fitting:
            raise ValueError(f"atlas {atlas.label}: holds {atlas.kind}, which does not fit --input {kind}")
    return [Job(files=run, kind=kind, settings=settings, atlases=tuple(atlases), work=work) for run in runs]
