"""Chunks of remote stores kept on this machine, up to a size; those not read for longest go first."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import threading
import warnings
from pathlib import Path
from typing import Self

import numpy as np

from .errors import StoreError, StoreWarning
from .layout import crc32c

_DEFAULT_GB = 20.0
_SHARE = 16  # after writing this part of the limit, a process looks at the whole cache again


class ChunkCache:
    """One file a chunk, named by its checksum, so that it is never another one's; checked when it is read.

    Several processes may share a directory: files appear by rename and may vanish at any time. Each process
    may overshoot the limit by a sixteenth.

    Parameters
    ----------
    root
        Directory of all stores' chunks; made if it is not there.
    store
        Name of the store's folder in it.
    limit
        Bytes.
    """

    def __init__(self, root: Path, store: str, limit: int) -> None:
        self._root, self._folder, self._limit = root, root / store, limit
        self._written = limit  # look at what is there before the first chunk is kept
        self._lock = threading.Lock()

    @classmethod
    def from_environment(cls, url: str) -> Self | None:
        """Return the cache of a store in BRAINFLOW_CACHE (none if empty) of BRAINFLOW_CACHE_GB gigabytes.

        The directory is made for this user alone. One that others may write is not used, with a
        `StoreWarning`: they could give a chunk of theirs the checksum of ours.

        Raises
        ------
        StoreError
            If BRAINFLOW_CACHE_GB is not a number.
        """
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        root = os.environ.get("BRAINFLOW_CACHE", str(Path(home) / "brainflow" / "chunks"))
        size = os.environ.get("BRAINFLOW_CACHE_GB", str(_DEFAULT_GB))
        try:
            limit = int(float(size) * 1e9)
        except ValueError as error:
            raise StoreError(f"BRAINFLOW_CACHE_GB: got {size!r}, expected a number of gigabytes") from error
        if not root or limit <= 0 or not is_private(Path(root)):
            return None
        return cls(Path(root), hashlib.sha256(url.encode()).hexdigest()[:16], limit)

    def get(self, array: str, chunk: int, checksum: int) -> np.ndarray | None:
        """Return a chunk, uint8 [bytes], or None if it is not here or damaged."""
        path = self._path(array, chunk, checksum)
        try:
            data = _read_regular(path, self._limit)
            # For `_trim`: many file systems do not note when a file was read.
            os.utime(path)
        except OSError:
            return None
        if crc32c(data) != checksum:
            path.unlink(missing_ok=True)
            return None
        return data

    def put(self, array: str, chunk: int, checksum: int, data: np.ndarray) -> None:
        """Keep a chunk. A full or read-only disk is no error: then it is not kept."""
        path = self._path(array, chunk, checksum)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "xb") as file:
                data.tofile(file)
            # Not flushed before: what a crash leaves of it has a wrong checksum.
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            return
        with self._lock:
            self._written += data.nbytes
            if self._written * _SHARE > self._limit:
                self._written = 0
                self._trim()

    def _trim(self) -> None:
        """Delete the chunks of all stores that were not read for longest, until the rest fits."""
        files = []
        for path in self._root.glob("*/*/*"):
            with contextlib.suppress(OSError):
                status = path.stat()
                files.append((status.st_mtime_ns, status.st_size, path))
        excess = sum(size for _, size, _ in files) - self._limit
        for _, size, path in sorted(files):
            if excess <= 0:
                break
            with contextlib.suppress(OSError):
                path.unlink()
            excess -= size

    def _path(self, array: str, chunk: int, checksum: int) -> Path:
        return self._folder / array / f"{chunk}-{checksum:08x}"


def is_private(root: Path) -> bool:
    """Whether a directory, made if it is not there, is ours and only we may write it."""
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        root.mkdir(mode=0o700, exist_ok=True)
        status = root.stat()
    except OSError:  # a full or read-only disk: no cache
        return False
    if status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return True
    warnings.warn(
        f"{root}: is not used as a cache, because others may write it; run `chmod go-w {root}` if it is "
        "yours, or set BRAINFLOW_CACHE to a directory of your own",
        StoreWarning,
        stacklevel=2,
    )
    return False


def _read_regular(path: Path, limit: int) -> np.ndarray:
    """Return the bytes of a file, uint8; OSError if it is a link, no regular file or more than the cache."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
            raise OSError("not a chunk")
        return np.fromfile(file, np.uint8)
