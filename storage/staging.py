"""The private directory in which a new store is built, beside the place that it takes at its first commit."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from .attributes import FORMAT_NAME
from .errors import StoreError
from .files import Lock, remove
from .manifest import MANIFEST

_ATTEMPTS = 100
OURS = ".brainflow-partial"  # marks a staging directory that this package made


def stage(target: Path) -> tuple[Path, Lock]:
    """Make the private directory in which a new store is built, beside its place, and lock it.

    What a killed writer left there is removed. Anything else of that name is refused and left as it is: in a
    folder that several people write, it may be a link to, or the folder of, somebody else.

    Raises
    ------
    StoreError
        If another writer builds a store there, or the name is taken.
    """
    root = target.with_name(f".{target.name}.partial")
    for _ in range(_ATTEMPTS):
        try:
            root.mkdir(mode=0o700)
        except FileExistsError:
            _refuse_foreign(root)
        except OSError as error:
            raise StoreError(
                f"{root}: cannot be made ({error.strerror}); make room there or choose another place, then "
                "run the same command again"
            ) from error
        try:
            lock = Lock(root)
        except FileNotFoundError:  # another writer has just put it into its place
            continue
        try:
            # Marked before anything else is in it: whenever its writer is killed, the next one knows it for
            # ours.
            (root / OURS).touch()
            # What was left over may have another mode.
            root.chmod(0o700)
            for left_over in root.iterdir():
                if left_over.name != OURS:
                    remove(left_over)
        except BaseException:
            lock.release()
            raise
        old = target.with_name(f".{target.name}.old")  # see `move_into_place`
        # Its writer was killed behind the second rename: the new store stands, the old one was still to go.
        if os.path.lexists(target) and _is_store(old) and not old.is_symlink():
            discard(old)
        return root, lock
    raise StoreError(f"{root}: other writers come first again and again; try later")


def _refuse_foreign(root: Path) -> None:
    """Refuse a staging directory that this package, run by this user, did not leave there."""
    try:
        found = os.lstat(root)
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid():
            names = os.listdir(root)
            if not names or OURS in names or _is_store(root):
                return
    except FileNotFoundError:  # another writer has just put it into its place
        return
    raise StoreError(
        f"{root}: is in the way and was not left by a writer of yours; look at it, then rename or remove it"
    )


def discard(directory: Path) -> None:
    """Remove a staging directory so that at any instant of it the next writer knows it for ours."""
    if directory.is_dir():
        mark = directory / OURS
        mark.touch()
        for entry in directory.iterdir():
            if entry != mark:
                remove(entry)
        mark.unlink()
        directory.rmdir()


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse a place where something is that may not be replaced.

    Raises
    ------
    StoreError
        Naming it.
    """
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise StoreError(
            f"{target}: already exists; add runs with StoreWriter.append_to, or pass overwrite=True "
            "(--overwrite) to replace it"
        )
    if not _is_store(target):
        raise StoreError(
            f"{target}: is not a brainflow store, so it will not be overwritten; remove it first"
        )


def _is_store(path: Path) -> bool:
    """Whether `path` holds a store of ours, be it damaged: only such a directory may be overwritten."""
    manifest = path / MANIFEST
    try:
        if not stat.S_ISREG(os.lstat(manifest).st_mode):
            return False
        with open(manifest, "rb") as file:
            # Not parsed: a damaged store of ours may be overwritten, too.
            return f'"format": "{FORMAT_NAME}"'.encode() in file.read(2**16)
    except OSError:
        return False
