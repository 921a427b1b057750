"""What decoders without a model said, kept over calls: they are the same beside every model.

A file for each task and decoder, named by the SHA-256 of all that decides the outcome: content of the store,
windows, labels, groups, folds, and the code. Nothing in it is unpickled; one that is damaged is fitted again.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from brainflow.data import sampler
from brainflow.decoding import baselines, readout, ridge, task
from brainflow.decoding.task import DecodingTask
from brainflow.storage.cache import is_private
from brainflow.storage.files import replacing

CODE = (baselines, readout, ridge, sampler, task)
LIBRARIES = ("numpy", "scipy", "scikit-learn", "torch", "nilearn")
MOST_FILES = 4_000
"""Those that were not read for longest go first."""
Kept = tuple[NDArray[np.int64], NDArray[np.float32] | None]


def cache_folder() -> Path | None:
    """Return the folder, made if absent; None if BRAINFLOW_CACHE is empty or others may write there.

    It is `baselines` in BRAINFLOW_CACHE, by default in ~/.cache/brainflow (XDG_CACHE_HOME for ~/.cache).
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = os.environ.get("BRAINFLOW_CACHE", str(home / "brainflow"))
    folder = Path(root) / "baselines"
    return folder if root and is_private(folder) else None


def recall(folder: Path, of: DecodingTask, name: str) -> Kept | None:
    """Return predictions `[windows]` and probabilities `[windows, classes]` (or None); None if not kept.

    Parameters
    ----------
    folder
        From :func:`cache_folder`.
    of
        The task, whose windows, labels and folds are part of the key.
    name
        Which decoder.
    """
    path = _path(folder, of, name)
    if not path.is_file():
        return None
    count, classes = len(of.labels), len(of.classes)
    try:
        with np.load(path, allow_pickle=False) as file:
            predictions, chances = file["predictions"], file["probabilities"]
        fits = predictions.dtype == np.int64 and predictions.shape == (count,)
        fits &= chances.dtype == np.float32 and chances.shape in ((count, classes), (0, classes))
        # Those that were not read for longest go first.
        os.utime(path)
    except Exception:  # a damaged archive fails in any way
        return None
    return (predictions, chances if len(chances) else None) if fits else None


def keep(
    folder: Path, of: DecodingTask, name: str, predictions: NDArray[np.int64], chances: NDArray | None
) -> None:
    """Keep what :func:`recall` returns. A full or read-only disk is no error: then it is not kept.

    Parameters
    ----------
    folder, of, name
        As in :func:`recall`.
    predictions, chances
        `[windows]` and `[windows, classes]`, or None.
    """
    # None would need a pickle in the file: no rows stand for it.
    known = np.zeros((0, len(of.classes)), np.float32) if chances is None else chances
    content = io.BytesIO()
    np.savez_compressed(content, predictions=predictions, probabilities=known)
    with contextlib.suppress(OSError):
        with replacing(_path(folder, of, name)) as file:
            file.write(content.getbuffer())
        _trim(folder)


def _path(folder: Path, of: DecodingTask, name: str) -> Path:
    digest = hashlib.sha256(_code().encode())
    settings = [name, of.store.snapshot, of.config.hrf_shift, len(of.classes), of.groups.tolist()]
    digest.update(repr(settings).encode())
    arrays = [of.segments, of.labels]
    # Without validation windows, which no decoder of these looks at.
    for fold in of.folds:
        arrays += [fold.train, fold.test]
    for array in arrays:
        # The length before it: [1, 2], [3] and [1], [2, 3] are different folds.
        digest.update(f"{len(array)} ".encode() + np.ascontiguousarray(array, np.int64).tobytes())
    return folder / f"{digest.hexdigest()}.npz"


@cache
def _code() -> str:
    """Return what changes where another version may say something else."""
    # Sources, since the package's version stays the same while they are worked on.
    files = (hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest() for module in CODE)
    return " ".join([*files, *(version(library) for library in LIBRARIES)])


def _trim(folder: Path) -> None:
    files = [(entry.stat().st_mtime_ns, entry.path) for entry in os.scandir(folder)]
    for _, path in sorted(files)[: max(0, len(files) - MOST_FILES)]:
        os.unlink(path)
