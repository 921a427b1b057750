"""Reading a part: an uncompressed .npz as `write_part` makes it, and nothing else that an .npz can be."""

from __future__ import annotations

import json
import math
import os
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .errors import StoreError
from .regular import open_regular
from .segments import Segment

_TEXTS = ("key", "dataset", "subject", "session", "task", "run")
_HEADER = re.compile(
    rb"\{'descr': '([<>|][fiub][1248])', 'fortran_order': (True|False), "
    rb"'shape': \(((?:\d{1,18},? ?){0,2})\), \} *\n"
)
_LONGEST_HEADER = 2**24  # bytes; some 100,000 segments with labels
_MEMBERS = {"bold.npy": "fiu", "header.npy": "u", "censor.npy": "b"}


def read_part(path: str | os.PathLike[str]) -> dict[str, Any]:
    """One part, as keyword arguments of `StoreWriter.append`.

    Raises
    ------
    StoreError : if the file is damaged, or not as `write_part` makes it
    """
    path = Path(path)
    try:
        with open(_open(path), "rb") as file:
            arrays = _members(file)
        if "bold.npy" not in arrays or arrays["bold.npy"].ndim != 2:
            raise ValueError("no array bold of [time, networks]")
        censor = arrays.get("censor.npy")
        if censor is not None and censor.shape != arrays["bold.npy"].shape[:1]:
            raise ValueError("censor does not have the length of bold")
        return {"bold": arrays["bold.npy"], "censor": censor, **_header(arrays["header.npy"])}
    except StoreError:
        raise
    except (
        *(OSError, EOFError, ValueError, KeyError, TypeError, NotImplementedError, RuntimeError, MemoryError),
        *(RecursionError, OverflowError, zipfile.BadZipFile, zlib.error, struct.error),
    ) as error:
        raise StoreError(f"{path}: this part is damaged ({error}); delete it and write it again") from error


def _open(path: Path) -> int:
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return open_regular(path.name, directory, str(path.parent))
    finally:
        os.close(directory)


def _members(file: BinaryIO) -> dict[str, np.ndarray]:
    """The arrays in a part; the size of each is compared with that of the file before it is read."""
    size = os.fstat(file.fileno()).st_size
    arrays: dict[str, np.ndarray] = {}
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if len(entries) > len(_MEMBERS) or sum(entry.file_size for entry in entries) > size:
            raise ValueError("it lists more than it holds")
        for entry in entries:
            if entry.filename not in _MEMBERS or entry.filename in arrays:
                raise ValueError(f"holds {entry.filename!r:.80}, expected {', '.join(_MEMBERS)}")
            if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                raise ValueError(f"{entry.filename} is compressed; parts are not")
            arrays[entry.filename] = _array(archive.read(entry), _MEMBERS[entry.filename])
    return arrays


def _array(data: bytes, kinds: str) -> np.ndarray:
    """An array from the bytes of an .npy file of version 1.0, with one of some kinds of elements."""
    begin = 10 + int.from_bytes(data[8:10], "little")
    header = _HEADER.fullmatch(data[10:begin])
    if data[:8] != b"\x93NUMPY\x01\x00" or header is None:
        raise ValueError("a member is not an .npy file of version 1.0 with numbers in one or two dimensions")
    dtype, shape = np.dtype(header[1].decode()), tuple(int(n) for n in re.findall(rb"\d+", header[3]))
    if dtype.kind not in kinds:
        raise ValueError(f"a member holds {dtype}")
    if math.prod(shape) * dtype.itemsize != len(data) - begin:
        raise ValueError(f"a member of shape {list(shape)} has {len(data) - begin} bytes")
    return np.frombuffer(data, dtype, offset=begin).reshape(shape, order="F" if header[2] == b"True" else "C")


def _header(encoded: np.ndarray) -> dict[str, Any]:
    """Entities, TR and segments of a part, each of the type that `StoreWriter.append` takes."""
    if len(encoded) > _LONGEST_HEADER:
        raise ValueError(f"header: has {len(encoded)} bytes, expected at most {_LONGEST_HEADER}")
    header = json.loads(encoded.tobytes(), parse_constant=_refuse)
    if set(header) != {*_TEXTS, "t_r", "segments"}:
        raise ValueError(f"header: expected {', '.join(_TEXTS)}, t_r and segments")
    for name in _TEXTS:
        if not isinstance(header[name], str) or "\0" in header[name]:
            raise ValueError(f"header: {name} is not a text")
        header[name].encode()  # ValueError if it is not Unicode
    if type(header["t_r"]) not in (int, float) or not 0 < header["t_r"] < math.inf:
        raise ValueError("header: t_r is not a positive number")
    return {**header, "t_r": float(header["t_r"]), "segments": [_segment(one) for one in header["segments"]]}


def _segment(fields: dict[str, Any]) -> Segment:
    if set(fields) != {"onset", "length", "labels"} or not isinstance(fields["labels"], dict):
        raise ValueError("header: a segment does not have onset, length and labels")
    if any(type(fields[name]) is not int for name in ("onset", "length")):
        raise ValueError("header: onset and length of a segment are not whole numbers")
    for name, value in fields["labels"].items():
        if type(value) not in (str, int, float):
            raise ValueError("header: a label is not a text or number")
        f"{name}{value}".encode()  # ValueError if it is not Unicode, or has thousands of digits
    return Segment(**fields)


def _refuse(constant: str) -> float:
    raise ValueError(f"header: {constant} is not JSON")
