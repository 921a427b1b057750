"""Chunks of remote stores kept on this machine, up to a size; those not read for longest go first."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from pathlib import Path
from typing import Self

import numpy as np

from .errors import StoreError
from .layout import crc32c

_DEFAULT_GB = 20.0
_SHARE = 16  # after writing this part of the limit, a process looks at the whole cache again


class ChunkCache:
    """One file a chunk, named by its checksum, so that it is never another one's; checked when it is read.

    Several processes may share a directory: files appear by rename and may vanish at any time. Each process
    may overshoot the limit by a sixteenth.

    Parameters
    ----------
    root : directory of all stores' chunks; made if it is not there
    store : name of the store's folder in it
    limit : bytes
    """

    def __init__(self, root: Path, store: str, limit: int) -> None:
        self._root, self._folder, self._limit = root, root / store, limit
        self._written = limit  # look at what is there before the first chunk is kept
        self._lock = threading.Lock()

    @classmethod
    def from_environment(cls, url: str) -> Self | None:
        """The cache of a store in BRAINFLOW_CACHE (none if empty) of BRAINFLOW_CACHE_GB gigabytes.

        Raises
        ------
        StoreError : if BRAINFLOW_CACHE_GB is not a number
        """
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        root = os.environ.get("BRAINFLOW_CACHE", str(Path(home) / "brainflow" / "chunks"))
        size = os.environ.get("BRAINFLOW_CACHE_GB", str(_DEFAULT_GB))
        try:
            limit = int(float(size) * 1e9)
        except ValueError as error:
            raise StoreError(f"BRAINFLOW_CACHE_GB: got {size!r}, expected a number of gigabytes") from error
        if not root or limit <= 0:
            return None
        return cls(Path(root), hashlib.sha256(url.encode()).hexdigest()[:16], limit)

    def get(self, array: str, chunk: int, checksum: int) -> np.ndarray | None:
        """A chunk, uint8 [bytes], or None if it is not here or damaged."""
        path = self._path(array, chunk, checksum)
        try:
            data = np.fromfile(path, np.uint8)
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
            data.tofile(temporary)
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
