"""The array in a file: what it says of itself is compared with its bytes before memory is taken for it."""

from __future__ import annotations

import importlib.util
import io
import math
import os
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ..errors import StoreError
from .foreign import MAX_NETWORKS, check_shape, pick
from .limits import budget, regular_size

_HEADER_BYTES = 10_000
_NUMBER_CHARACTERS = 32
_HDF5 = b"\x89HDF\r\n\x1a\n"
_SECONDS = 60
_BYTES_A_SECOND = 10 * 2**20


def load_array(path: Path, name: str | None = None) -> np.ndarray:
    """Return the array in a .npy, .npz, .mat, .csv, .tsv, .h5, .hdf5 or .parquet file; no file is unpickled.

    Parameters
    ----------
    path
        The file.
    name
        Which array of a file that holds several.

    Returns
    -------
    real numbers in two dimensions

    Raises
    ------
    StoreError
        If the file cannot be read, holds several arrays and none is named, or is larger than a run.
    ImportError
        If the package for this kind of file is not installed.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise StoreError(f"{path}: unknown kind of file, expected one of {', '.join(_READERS)}")
    try:
        return np.asarray(reader(path, name or ""))
    except (StoreError, ImportError, FileNotFoundError):
        raise
    except ValueError as error:
        raise StoreError(f"{path}: {error}") from error
    except Exception as error:  # a damaged file fails in any way that its library likes
        raise StoreError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error


def _npy(path: Path, name: str) -> np.ndarray:
    size = regular_size(path)
    with open(path, "rb") as file:
        return _read_npy(file, size)


def _read_npy(file: Any, size: int) -> np.ndarray:
    """Return an array of `size` bytes with its header, from an open file or a member of an archive."""
    begin = file.read(12)
    if begin[:6] != np.lib.format.MAGIC_PREFIX or begin[6:7] not in (b"\x01", b"\x02"):
        raise ValueError("cannot be read: is no .npy array of version 1 or 2")
    first = begin[6] == 1
    length = int.from_bytes(begin[8:10] if first else begin[8:12], "little")
    if length > _HEADER_BYTES:
        raise ValueError(f"cannot be read: its header declares {length} bytes")
    header = io.BytesIO(begin + file.read(length - 2 if first else length))
    np.lib.format.read_magic(header)
    read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
    try:
        shape, fortran, dtype = read(header)
    except Exception as error:  # the header is a Python literal, parsed without running it
        raise ValueError(f"cannot be read: its header is damaged ({type(error).__name__})") from None
    check_shape(shape, dtype, 2**63)
    expected = math.prod(shape) * dtype.itemsize
    if size - header.tell() != expected:
        raise ValueError(
            f"declares shape {list(shape)}, {expected} bytes, and has {size - header.tell()}; the file is "
            "truncated or damaged"
        )
    values = np.empty(shape[::-1] if fortran else shape, dtype)
    view = values.reshape(-1).view(np.uint8)
    done = 0
    # In pieces: a compressed member gives what it has decoded so far, not what was asked for.
    while done < expected and (count := file.readinto(view[done : done + 2**20].data)):
        done += count
    if done != expected:
        raise ValueError(f"cannot be read: holds {done} of {expected} bytes")
    return values.T if fortran else values


def _npz(path: Path, name: str) -> np.ndarray:
    allowed = budget(regular_size(path))
    with zipfile.ZipFile(path) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        if len(members) != len(archive.infolist()):
            raise ValueError("cannot be read: two of its arrays have one name")
        chosen = pick(members, name)
        info = members[chosen]
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"array {chosen!r}: its compression is not one of .npz files")
        if info.file_size > allowed:
            raise ValueError(f"array {chosen!r} has {info.file_size} bytes; this file may hold {allowed}")
        try:
            with archive.open(info) as member:
                return _read_npy(member, info.file_size)
        except ValueError as error:
            raise ValueError(f"array {chosen!r} {error}") from error


def _mat(path: Path, name: str) -> np.ndarray:
    _require("scipy", path)
    regular_size(path)
    with open(path, "rb") as file:
        begin = file.read(512 + len(_HDF5))
    if _HDF5 in (begin[: len(_HDF5)], begin[512:]):  # of MATLAB 7.3: HDF5, whose axes are in reverse
        return _hdf5(path, name).T
    return _in_a_child("mat", path, name)


def _hdf5(path: Path, name: str) -> np.ndarray:
    _require("h5py", path)
    return _in_a_child("hdf5", path, name)


def _parquet(path: Path, name: str) -> np.ndarray:
    _require("pyarrow", path)
    return _in_a_child("parquet", path, name)


def _in_a_child(kind: str, path: Path, name: str) -> np.ndarray:
    """Have a file read by `foreign.py`, so that a crash or a bomb in it is the file's own failure."""
    size = regular_size(path)
    allowed, seconds = budget(size), _SECONDS + size // _BYTES_A_SECOND
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "array.npy"
        script = os.fspath(Path(__file__).with_name("foreign.py"))
        # -P: the folder of the script is not a place to import from
        command = [sys.executable, "-P", script, kind, os.fspath(path), name, os.fspath(out)]
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        try:
            done = subprocess.run(
                [*command, str(allowed), str(seconds)],
                # Addresses are limited there, and Arrow's own allocator reserves a gigabyte of them.
                env={**os.environ, **threads, "ARROW_DEFAULT_MEMORY_POOL": "system"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                # By the wall clock, beside the limit of CPU time: a reader may also wait for ever.
                timeout=2 * seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ValueError(f"cannot be read within {2 * seconds} s") from None
        if done.returncode:
            _refuse(done.returncode, done.stdout.decode(errors="replace").strip())
        return _npy(out, "")


def _refuse(code: int, message: str) -> NoReturn:
    if message:
        raise ValueError(message)
    reason = signal.strsignal(-code) if code < 0 else f"exit code {code}"
    raise ValueError(f"cannot be read: its reader died ({reason}); the file is damaged or hostile")


def _text(path: Path, name: str) -> np.ndarray:
    size = regular_size(path)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with open(path, encoding="utf-8-sig") as file:
        first = file.readline(MAX_NETWORKS * _NUMBER_CHARACTERS).split(delimiter)
    skipped = 0 if all(map(_is_number, first)) and not _counts(first) else 1
    # `loadtxt` takes memory for whatever comes, so lines are counted first.
    with open(path, "rb") as file:
        lines = sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b""))
    try:
        check_shape((max(lines - skipped, 1), len(first)), np.dtype("f8"), budget(size))
    except ValueError as error:
        raise ValueError(f"{error}; save such a table as .npy") from None
    return np.loadtxt(path, delimiter=delimiter, skiprows=skipped, ndmin=2, encoding="utf-8-sig")


def _counts(first: list[str]) -> bool:
    """Whether a row is 0, 1, 2, … (or 1, 2, 3, …): the names that pandas gives to columns without any."""
    cells = [cell.strip() for cell in first]
    return len(cells) > 2 and any(cells == [str(i + begin) for i in range(len(cells))] for begin in (0, 1))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _require(package: str, path: Path) -> None:
    if importlib.util.find_spec(package) is None:
        raise ImportError(
            f"{path}: reading {path.suffix} files needs {package}: pip install 'brainflow-fmri[arrays]'"
        )


_READERS: dict[str, Callable[[Path, str], np.ndarray]] = {
    ".npy": _npy,
    ".npz": _npz,
    ".mat": _mat,
    ".csv": _text,
    ".tsv": _text,
    ".h5": _hdf5,
    ".hdf5": _hdf5,
    ".parquet": _parquet,
}
