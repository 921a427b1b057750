"""Parts: runs written by independent processes, one file each, that a later step gathers into a store."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

import numpy as np

from .errors import StoreError
from .files import replacing
from .layout import run_key, to_json
from .quantise import run_statistics
from .regular import open_regular
from .store import BoldStore
from .tables import Segment
from .writer import StoreWriter

SUFFIX = ".part.npz"
_LONGEST_NAME = 180  # with the suffix and what a temporary name adds, below the 255 bytes of a file name
# The first day that ZIP knows, instead of a time stamp: equal runs give equal bytes.
_EPOCH = (1980, 1, 1, 0, 0, 0)
_TEXTS = ("key", "dataset", "subject", "session", "task", "run")
# The header that NumPy writes; any other Python literal is refused.
_HEADER = re.compile(
    rb"\{'descr': '([<>|][fiub][1248])', 'fortran_order': (True|False), "
    rb"'shape': \(((?:\d{1,18},? ?){0,2})\), \} *\n"
)
_LONGEST_HEADER = 2**24  # bytes; some 100,000 segments with labels
_MEMBERS = {"bold.npy": "fiu", "header.npy": "u", "censor.npy": "b"}


def write_part(
    directory: str | os.PathLike[str],
    bold: np.ndarray,
    *,
    t_r: float,
    dataset: str,
    subject: str,
    session: str = "",
    task: str = "",
    run: str = "",
    key: str | None = None,
    censor: np.ndarray | None = None,
    segments: Iterable[Segment] = (),
) -> bool:
    """Write one run as a part, atomically; any number of processes may do so in one directory.

    Parameters
    ----------
    directory
        Made if it is not there.
    bold, t_r, …
        As in `StoreWriter.append`.

    Returns
    -------
    bool
        False if this part was there already, which is then left as it is.
    """
    entities = {"dataset": dataset, "subject": subject, "session": session, "task": task, "run": run}
    key = run_key(**entities) if key is None else key
    path = part_path(directory, key)
    if path.exists():
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    labelled = [
        {
            "onset": int(s.onset),
            "length": int(s.length),
            "labels": {k: _plain(v) for k, v in s.labels.items()},
        }
        for s in segments
    ]
    header = {"key": key, "t_r": float(t_r), "segments": labelled, **entities}
    arrays = {"bold": np.asarray(bold), "header": np.frombuffer(to_json(header), np.uint8)}
    if censor is not None:
        arrays["censor"] = np.asarray(censor, bool)
    with replacing(path) as file:
        _write_npz(file, arrays)
    return True


def part_path(directory: str | os.PathLike[str], key: str) -> Path:
    """Return the file of the part of a run, by its key."""
    name = quote(key, safe="")
    if len(name) > _LONGEST_NAME:
        # A name that was cut holds a digest of the key: two long keys must not share a file.
        name = f"{name[: _LONGEST_NAME - 17]}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    # What begins with a point is passed over when parts are gathered.
    return Path(directory) / (re.sub(r"^\.", "%2E", name) + SUFFIX)


def gather(
    parts: str | os.PathLike[str],
    store: str | os.PathLike[str],
    *,
    progress: Callable[[int, int], None] | None = None,
    **create: Any,
) -> int:
    """Commit the parts of a directory to a store, in the order of their keys, all at once.

    Parts that the store holds already are passed over, so a gather may be repeated.

    Parameters
    ----------
    parts
        Directory that `write_part` filled.
    store
        Runs are added if it exists, unless `overwrite=True` is among `create`.
    progress
        Called with (parts done, parts in all).
    create
        Keyword arguments of `StoreWriter.create` for a new store, without `networks`.

    Returns
    -------
    int
        Runs added.

    Raises
    ------
    StoreError
        If there are no parts, one is damaged, or one differs from the run of its key in the store.
    """
    # Names with a point in front are temporaries of processes that still write.
    # By key: the store is the same whichever process was done first.
    files = sorted(
        (read_part(path)["key"], path) for path in Path(parts).glob(f"*{SUFFIX}") if path.name[0] != "."
    )
    if not files:
        raise StoreError(f"{parts}: holds no parts (*{SUFFIX}); write them with write_part")
    committed: dict[str, int] = {}
    appending = Path(store).exists() and not create.get("overwrite")
    if appending:
        writer = StoreWriter.append_to(store)
    else:
        networks = int(read_part(files[0][1])["bold"].shape[1])
        writer = StoreWriter.create(store, networks=networks, **create)
    added = 0
    with writer:
        if appending:
            # Opened under the writer's lock: nobody adds a run between this look and the commit.
            opened = BoldStore.open(store, fallback=False)
            committed = {key: i for i, key in enumerate(opened.runs.key.tolist())}
        for done, (key, path) in enumerate(files):
            part = read_part(path)
            if key in committed:
                _compare(opened, committed[key], part, path)
            else:
                writer.append(**part)
                added += 1
            if progress is not None:
                progress(done + 1, len(files))
    return added


def _compare(store: BoldStore, run: int, part: dict[str, Any], path: Path) -> None:
    """Refuse a part that is not the run of its key."""
    # By statistics, because the values in the store are rounded.
    mean, std = run_statistics(part["bold"])
    held = store.statistics(run)
    same = len(part["bold"]) == store.runs.length[run] and part["t_r"] == store.runs.t_r[run]
    if not (same and np.array_equal(mean, held["mean"]) and np.array_equal(std, held["std"])):
        raise StoreError(
            f"{path}: the store holds another run under the key {part['key']}; give it another key"
        )


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _write_npz(file: Any, arrays: dict[str, np.ndarray]) -> None:
    """Write an uncompressed .npz without time stamps."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            # How long a member becomes is not known when it is begun; beyond 2 GiB it would fail without
            # zip64.
            with archive.open(zipfile.ZipInfo(f"{name}.npy", _EPOCH), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)


def read_part(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return one part, as keyword arguments of `StoreWriter.append`.

    An uncompressed .npz as `write_part` makes it is read, and nothing else that an .npz can be.

    Raises
    ------
    StoreError
        If the file is damaged, or not as `write_part` makes it.
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
    """Return the arrays in a part; the size of each is compared with that of the file before it is read."""
    size = os.fstat(file.fileno()).st_size
    arrays: dict[str, np.ndarray] = {}
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        # Entries that overlap would let a small file become a large one.
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
    """Return an array from the bytes of an .npy file of version 1.0, with one of some kinds of elements."""
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
    """Return entities, TR and segments of a part, each of the type that `StoreWriter.append` takes."""
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
