"""Opening files of a stranger's folder: regular files only, no link followed, nothing waited for."""

from __future__ import annotations

import errno
import os
import stat

from .errors import StoreError, StoreUnavailable

# O_NONBLOCK: to open a FIFO would wait for somebody who writes it.
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
# What these say is no fault of the store.
_OF_THE_MACHINE = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE)
_REMEDY = "restore it from a copy"


def open_regular(relative: str, directory: int, where: str) -> int:
    """Open a file below a directory.

    Parameters
    ----------
    relative
        Path below the directory.
    directory
        File descriptor of the directory.
    where
        Its path, for messages.

    Returns
    -------
    int
        File descriptor.

    Raises
    ------
    StoreError
        If it is missing, not a regular file, or reached through a link.
    StoreUnavailable
        If it may not be read.
    """
    try:
        descriptor = _walk(relative, directory)
    except OSError as error:
        raise unusable(f"{where}/{relative}", error) from error
    try:
        # Asked of what is open: between a look and an opening another file could take the place.
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
    except OSError as error:
        os.close(descriptor)
        raise unusable(f"{where}/{relative}", error) from error
    os.close(descriptor)
    raise StoreError(f"{where}/{relative}: is not a regular file; {_REMEDY}")


def _walk(relative: str, directory: int) -> int:
    """Open each folder of a path in the one before: the flag against links holds for the last name only."""
    *folders, name = relative.split("/")
    at = directory
    try:
        for folder in folders:
            below = os.open(folder, _FLAGS | os.O_DIRECTORY, dir_fd=at)
            if at != directory:
                os.close(at)
            at = below
        return os.open(name, _FLAGS, dir_fd=at)
    finally:
        if at != directory:
            os.close(at)


def unusable(path: str, error: OSError) -> StoreError:
    """Return why a file cannot be opened, as an error that names it."""
    if error.errno in _OF_THE_MACHINE:
        return StoreUnavailable(
            f"{path}: cannot be read ({error.strerror}); check its owner and mode, and ulimit -n"
        )
    if error.errno == errno.ELOOP:
        return StoreError(
            f"{path}: is a link, and links inside a store are not followed; copy the store with `cp -rL`"
        )
    if error.errno == errno.ENOTDIR:
        return StoreError(f"{path}: a folder of this path is a link or a file; copy the store with `cp -rL`")
    what = "is missing" if error.errno == errno.ENOENT else "cannot be read"
    return StoreError(f"{path}: a file of the store {what} ({error.strerror}); {_REMEDY}")
