"""Runs from single images, here or at URLs; their side files are those that BIDS names put beside them.

An image at a URL is fetched by the worker that prepares it, and removed afterwards.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from brainflow.prepare.files import RUN_ENTITIES, Kind, RunFiles, parse_name
from brainflow.prepare.records import Unusable
from brainflow.prepare.run import Job
from brainflow.storage.errors import StoreError, StoreUnavailable
from brainflow.storage.remote import RemoteFiles, is_remote

ENDINGS: dict[str, Kind] = {
    ".dtseries.nii": "cifti",
    ".func.gii": "gifti",
    ".nii.gz": "volume",
    ".nii": "volume",
}
_TABLES = ("timeseries", "regressors")  # of confounds; the second until fMRIPrep 20.2
_READS = 3  # of a compressed image that arrives damaged


@dataclass(frozen=True, kw_only=True)
class RemoteJob(Job):
    """A run whose files are at a URL.

    Parameters
    ----------
    folder
        URL of the folder that holds them.
    versions
        Size and version of each image, so that a changed one is prepared again.
    """

    folder: str
    versions: tuple[tuple[int, str], ...] = ()

    def fingerprint(self) -> str:
        """Return the digest of the settings, and of URLs and versions of the images."""
        names = [str(path) for path in self.files.inputs]
        facts = [self.recipe, self.folder, names, self.versions]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @contextmanager
    def local(self) -> Iterator[RunFiles]:
        """Fetch the files for the time of the block."""
        with tempfile.TemporaryDirectory(prefix="brainflow-") as temporary:
            here, remote = Path(temporary), RemoteFiles(self.folder)
            try:
                for path in self.files.inputs:
                    fetch_file(remote, path.name, here / path.name)
                if self.files.confounds is not None:
                    beside = Path(self.files.confounds.stem + ".json")  # says what components are made of
                    # nilearn misses it for CompCor alone, and then says so.
                    with suppress(StoreError):
                        remote.download(beside.name, here / beside)
            except StoreError as error:
                raise Unusable(str(error)) from error
            files = self.files
            yield replace(
                files,
                images=tuple(here / path for path in files.images),
                sidecars=tuple(here / path for path in files.sidecars),
                confounds=files.confounds and here / files.confounds,
            )


def fetch_file(remote: RemoteFiles, name: str, target: Path) -> None:
    """Download a file; one that is compressed is compared with its own checksum.

    Parameters
    ----------
    remote
        Folder at a URL.
    name
        Of the file in it.
    target
        Where it shall lie.

    Raises
    ------
    StoreError
        If it cannot be had, or arrives damaged again and again.
    """
    for _ in range(_READS):
        remote.download(name, target)
        if target.suffix != ".gz" or _is_whole(target):
            return
    raise StoreError(
        f"{remote.where}/{name}: is damaged (its gzip checksum is wrong), however often it is read"
    )


def _is_whole(path: Path) -> bool:
    try:
        with gzip.open(path) as file:
            # gzip compares the checksum at the end alone.
            while file.read(2**20):
                pass
    except (OSError, EOFError, zlib.error):
        return False
    return True


def kind_of(name: str) -> Kind | None:
    """Return the kind of an image by the end of its name; None if it is no image of a run."""
    return next((kind for ending, kind in ENDINGS.items() if name.endswith(ending)), None)


def split_url(url: str) -> tuple[str, str]:
    """Return the folder and name of a file at a URL.

    Raises
    ------
    StoreError
        If there is something behind the name.
    """
    if re.search(r"[?#]", url):
        raise StoreError(f"{url}: URLs with ? or # are not read; download the file and give its path")
    folder, _, name = url.rpartition("/")
    return folder, name


def files_of(image: str) -> RunFiles:
    """Return an image and what lies beside it; for a hemisphere, the other one as well.

    Parameters
    ----------
    image
        Path or URL; at a URL, the paths of the result are names in its folder.

    Raises
    ------
    StoreError
        If a URL cannot be asked.
    """
    remote: RemoteFiles | None = None
    place = Path()
    if is_remote(image):
        where, name = split_url(image)
        remote = RemoteFiles(where)
    else:
        place, name = Path(os.path.abspath(image)).parent, Path(image).name
        where = str(place)

    def beside(relative: str) -> bool:
        if remote is None:
            return (place / relative).is_file()
        try:
            return remote.exists(relative)
        except StoreUnavailable as error:
            if type(error.__cause__).__name__ == "PermissionDeniedError":
                return False  # what S3 says of a missing object where it may not be listed
            raise

    parsed = parse_name(Path(name))
    entities = dict(parsed.entities) if parsed else {}
    stem = name.removesuffix(next(ending for ending in ENDINGS if name.endswith(ending)))
    images, problem = [name], ""
    if kind_of(name) == "gifti":
        # Left first, whichever was given: both mean the same run, and get the same key.
        images = [re.sub(r"hemi-[LR](?=[_.])", f"hemi-{side}", name) for side in "LR"]
        if len(set(images)) < 2 or not all(map(beside, images)):
            problem = "expected hemi-L or hemi-R in the name, and the other hemisphere beside it"
    recording = "_".join(part for part in stem.split("_") if part.partition("-")[0] in RUN_ENTITIES)
    tables = [f"{recording}_desc-confounds_{suffix}.tsv" for suffix in _TABLES if recording and parsed]
    # Images of one name in different folders are different runs.
    digest = hashlib.sha256(f"{where}/{images[0]}".encode()).hexdigest()[:12]
    return RunFiles(
        # The key becomes a file's name, of 255 bytes at most.
        key=f"{re.sub(r'[^A-Za-z0-9._+-]', '-', stem)[:120]}-{digest}",
        dataset="",
        entities={entity: entities[entity] for entity in RUN_ENTITIES if entities.get(entity)},
        images=tuple(place / one for one in images),
        sidecars=(place / f"{stem}.json",) if beside(f"{stem}.json") else (),
        confounds=next((place / table for table in tables if beside(table)), None),
        space=entities.get("space", ""),
        description=entities.get("desc", ""),
        problem=problem,
    )


def job_of(image: str, files: RunFiles, job: Job) -> Job:
    """Return a job for the files of an image, like another job in all else."""
    if not is_remote(image):
        return replace(job, files=files)
    folder, _ = split_url(image)
    remote = RemoteFiles(folder)
    return RemoteJob(
        files=files,
        kind=job.kind,
        settings=job.settings,
        atlases=job.atlases,
        work=job.work,
        folder=folder,
        versions=tuple(remote.version(path.name) for path in files.images),
    )


def address(job: Job) -> str:
    """Return the path or URL of the image of a job."""
    image = job.files.images[0]
    return f"{job.folder}/{image}" if isinstance(job, RemoteJob) else str(image)
