"""Small file operations that survive a crash: write beside, fsync, rename; and an exclusive writer's lock."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import StoreError

_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2
_AT_FDCWD = -100
_ATTEMPTS = 100


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


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError that names no file, as of a write to a full disk, name `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Write a file that takes the place of `path` in one step: readers see all old bytes or all new ones.

    Yields a new file beside it, which is flushed and renamed at the end of the block, or removed on failure.
    Its name cannot be guessed and nothing that exists is opened, so no link is ever followed. Errors of it
    name `path`.
    """
    # Cut: file names have at most 255 bytes.
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(8)}.tmp")
    try:
        with naming(path), open(temporary, "xb") as file:
            yield file
            # Before the rename: after a crash the name must not lead to bytes that were never written.
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # gone if it was the rename that was interrupted
            temporary.unlink()
        if isinstance(error, OSError) and error.filename == os.fspath(temporary):
            error.filename, error.filename2 = os.fspath(path), None
        raise
    # Until then a crash may bring the old file back.
    sync_directory(path.parent)


def replace_durably(path: Path, data: bytes) -> None:
    """Put `data` in place of `path` in one step; see `replacing`."""
    with replacing(path) as file:
        file.write(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Put a UTF-8 text in place of `path` in one step; see `replacing`."""
    replace_durably(Path(path), text.encode())


def write_durably(path: Path, data: bytes) -> None:
    """Write a file that must not exist yet, and flush it to the disk."""
    with naming(path), open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Flush a directory's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, a link (not what it leads to) or a directory with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


class Lock:
    """The writer's lock of a store, on its directory. The kernel drops it if the process dies.

    Parameters
    ----------
    path
        The directory; the last part of its name may not be a link.

    Raises
    ------
    StoreError
        If another writer holds the lock, in this process or elsewhere.
    FileNotFoundError, NotADirectoryError
        If there is no such directory.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor: int | None = None
        for _ in range(_ATTEMPTS):
            self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                self._take(path)
                # Between `open` and `flock` an overwriting writer may have put another directory there.
                if self.holds(path):
                    return
            except BaseException:
                self.release()
                raise
            self.release()
        raise StoreError(f"{path}: is replaced again and again by other writers; try later")

    def _take(self, path: Path) -> None:
        assert self._descriptor is not None
        try:
            # flock, not a POSIX lock: it also holds against this process, and stays when another descriptor
            # is closed.
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise StoreError(
                    f"{path}: this file system cannot lock files ({error}); write to a local disk"
                ) from error
            raise StoreError(
                f"{path}: another process is writing to this store; wait for it, or write parts and gather "
                "them"
            ) from error

    def holds(self, path: Path) -> bool:
        """Whether `path` is now the directory that this lock is on."""
        if self._descriptor is None:
            return False
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.lstat(path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Let others write."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)

    def __del__(self) -> None:
        self.release()  # an exception may have come before anybody could keep the lock


def move_into_place(staged: Path, path: Path, *, overwrite: bool) -> None:
    """Rename the directory `staged` to `path`; one that is to be overwritten then stands at `staged`.

    Raises
    ------
    FileExistsError
        If something is at `path` and `overwrite` is false.
    """
    if not overwrite:
        # In one call: between a look and a rename another writer could come.
        _rename(staged, path, _RENAME_NOREPLACE)
    elif not _rename(staged, path, _RENAME_EXCHANGE):
        # A file system without exchange: two renames, between which no store stands at `path`.
        old = path.with_name(f".{path.name}.old")
        try:
            os.rename(path, old)
            os.rename(staged, path)
        except BaseException:
            # Put back unless somebody has taken the place meanwhile.
            if not os.path.lexists(path):
                os.rename(old, path)
            raise
        os.rename(old, staged)
    sync_directory(path.parent)


def restore_interrupted_move(path: Path) -> None:
    """Put back a store whose overwriting writer was killed between the two renames of `move_into_place`.

    Raises
    ------
    StoreError
        If that writer still lives.
    """
    old = path.with_name(f".{path.name}.old")
    if not os.path.lexists(path) and old.is_dir() and not old.is_symlink():
        # Held as long as the writer that moved it lives.
        lock = Lock(old)
        try:
            os.rename(old, path)
        finally:
            lock.release()


def _rename(one: Path, other: Path, flags: int) -> bool:
    """Rename by renameat2; False where kernel or file system cannot exchange."""
    # Python's os has no rename that fails where something is, and none that exchanges.
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        arguments = (_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(flags))
        if renameat2(*arguments) == 0:
            return True
        number = ctypes.get_errno()
        if number not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(number, os.strerror(number), str(one), None, str(other))
    if flags == _RENAME_EXCHANGE:
        return False
    if os.path.lexists(other):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(other))
    os.rename(one, other)
    return True
