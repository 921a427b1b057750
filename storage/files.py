"""Small file operations that survive a crash: write beside, fsync, rename; and an exclusive writer's lock."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from pathlib import Path

from .errors import StoreError

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def output_folder(path: Path, what: str) -> Path:
    """Return the folder for the results of a command, made if absent.

    Parameters
    ----------
    path
        Given by the user as `out`.
    what
        What is to be written there, for the message.

    Raises
    ------
    ValueError
        If it is a file, or a store.
    """
    if (path / "zarr.json").exists() or path.is_file():
        raise ValueError(
            f"out: {path} is a store or a file, expected a directory for the {what}; choose another --out"
        )
    path.mkdir(parents=True, exist_ok=True)
    return path


def write_durably(path: Path, data: bytes) -> None:
    """Write a new file and flush it to the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_durably(path: Path, data: bytes) -> None:
    """Put `data` in place of `path` in one step: readers see all the old bytes or all the new ones."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    write_durably(temporary, data)
    os.replace(temporary, path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Flush a directory's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(path: Path) -> int:
    """Take the writer's lock of a store, on its directory, and return the file descriptor that holds it.

    The kernel drops the lock if the process dies.

    Raises
    ------
    StoreError : if another writer holds it
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise StoreError(
                f"{path}: this file system cannot lock files ({error}); write to a local disk"
            ) from error
        raise StoreError(
            f"{path}: another process is writing to this store; wait for it, or write parts and gather them"
        ) from error
    return descriptor


def move_into_place(staged: Path, path: Path) -> None:
    """Rename the directory `staged` to `path`; if `path` exists, they change places and the old one goes."""
    if not path.exists():
        os.rename(staged, path)
    elif _exchange(staged, path):
        shutil.rmtree(staged)
    else:  # a file system without exchange: two renames, between which no store stands at `path`
        old = staged.with_name(staged.name + ".old")
        os.rename(path, old)
        os.rename(staged, path)
        shutil.rmtree(old)
    sync_directory(path.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two directory entries atomically (renameat2); False where kernel or file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    arguments = (_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE))
    return int(renameat2(*arguments)) == 0
