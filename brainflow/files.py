"""Reading the files of a folder that a stranger may have filled.

What is read must be a regular file (links are followed: the hub's cache is made of them) of a size that fits
its kind; what is damaged is a ValueError that names the file.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import stat
import tomllib
from pathlib import Path
from typing import Any

Name = str | os.PathLike[str]
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
MOST_TEXT = 40 * 2**20
"""Bytes of the largest JSON file that is read; the coordinates of 2**18 networks take half of it."""
MOST_TABLES = 2**20
"""Lists and objects in a JSON text: an empty one of two bytes takes 64 in memory."""
MOST_TOML = 2**20


def open_regular(path: Name) -> io.FileIO:
    """Open a file for reading; a pipe or a device, which may never end, is refused without waiting for it.

    Raises
    ------
    ValueError
        If it is no regular file.
    OSError
        If it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path}: is no regular file, expected one; remove it, or copy the file itself here")
    return io.FileIO(descriptor, "rb")


def read_text(path: Name, *, most: int = MOST_TEXT) -> str:
    """Return a text of at most `most` bytes.

    Raises
    ------
    ValueError
        If it is larger, no regular file, or not UTF-8.
    """
    with io.BufferedReader(open_regular(path)) as file:
        # One byte more than allowed tells that a file is larger.
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{path}: has more than {most} bytes, expected a smaller file; restore or delete it")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); restore or delete it") from None


def read_json(path: Name) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises
    ------
    ValueError
        If it is damaged or holds anything but an object.
    """
    return parse_json(read_text(path), path)


def parse_json(text: str, where: object) -> dict[str, Any]:
    """Return the object in a JSON text; `where` it stands is named if it holds anything else.

    Raises
    ------
    ValueError
        If it is damaged, nested too deeply, or holds anything but an object.
    """
    # Counted before parsing, which would take the memory.
    if text.count("[") + text.count("{") > MOST_TABLES:
        raise ValueError(f"{where}: has more than {MOST_TABLES} lists and objects; restore or delete it")
    try:
        value = json.loads(text)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()  # half a pair can be neither written nor hashed
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{where}: not valid JSON ({reason}); restore or delete it") from None
    if not isinstance(value, dict):
        raise ValueError(
            f"{where}: holds a {type(value).__name__}, expected a JSON object; restore or delete it"
        )
    return value


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    # What does not fit int64 breaks whoever computes with it.
    return abs(value) < 2**63 if isinstance(value, int) else math.isfinite(value)


def is_count(value: Any) -> bool:
    """Whether a JSON value is a whole number from 0."""
    return is_number(value) and isinstance(value, int) and value >= 0


def read_toml(path: Name) -> dict[str, Any]:
    """Return the tables of a TOML file.

    Raises
    ------
    ValueError
        If it is no TOML.
    """
    try:
        return tomllib.loads(read_text(path, most=MOST_TOML))
    except RecursionError:
        raise ValueError(f"{path}: not valid TOML (nested too deeply)") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not valid TOML ({error})") from None


def own_folder(path: Path) -> Path:
    """Return a folder inside one of ours, made if absent.

    Raises
    ------
    ValueError
        If it is a link, through which files would be written elsewhere.
    """
    if path.is_symlink():
        raise ValueError(
            f"{path}: is a link, through which nothing is written; delete it, or move what it names here"
        )
    path.mkdir(parents=True, exist_ok=True)
    return path


def digest(path: Name) -> str:
    """Return the SHA-256 of a regular file in hexadecimal digits."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
