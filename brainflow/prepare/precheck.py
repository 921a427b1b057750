"""Checks of GIFTI and CIFTI files before nibabel reads them: it trusts what they name and declare."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from pathlib import Path
from xml.parsers import expat

from brainflow.prepare.records import Unusable
from brainflow.storage.columns import shown
from brainflow.storage.ingest.foreign import MAX_NETWORKS, MAX_TIME
from brainflow.storage.ingest.limits import budget, regular_size

_ENCODINGS = ("ASCII", "Base64Binary", "GZipBase64Binary")  # nibabel takes more names, also for other files
_MOST_ELEMENTS = 8 * MAX_TIME
_WORD = 8  # no type that nibabel reads is wider
_PIECE = 2**20
_NIFTI2_BYTES = 544
_CIFTI_CODE = 32
_MOST_POINTS = 2**20


def check_gifti(path: Path) -> None:
    """Read the tags of a GIFTI file, and unpack its arrays without keeping them.

    nibabel opens the files that a GIFTI names, wherever they are, and unpacks arrays to any size.

    Raises
    ------
    Unusable : if arrays lie in other files, or are more or longer than a run of its size can have
    """
    scan = _Scan(path, budget(regular_size(path)))
    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = scan.start, scan.end
    parser.CharacterDataHandler = scan.text
    try:
        with open(path, "rb") as file:
            parser.ParseFile(file)
    except (expat.ExpatError, zlib.error, ValueError) as error:
        if isinstance(error, Unusable):
            raise
        raise Unusable(f"{path.name}: cannot be opened ({error})") from error


class _Scan:
    """What the tags have said so far."""

    def __init__(self, path: Path, allowed: int) -> None:
        self._path, self._allowed = path, allowed
        self._elements = self._arrays = self._declared = self._left = 0
        self._packed = False
        self._unpack: zlib._Decompress | None = None
        self._base64 = ""

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        """Look at an element."""
        self._elements += 1
        if self._elements > _MOST_ELEMENTS:
            raise Unusable(f"{self._path.name}: holds more than {_MOST_ELEMENTS} elements")
        if tag == "DataArray":
            self._start_array(attributes)
        elif tag == "Data" and self._packed:
            self._unpack, self._base64 = zlib.decompressobj(), ""

    def _start_array(self, attributes: dict[str, str]) -> None:
        self._arrays += 1
        if self._arrays > MAX_TIME:
            raise Unusable(f"{self._path.name}: holds more than {MAX_TIME} arrays")
        encoding = attributes.get("Encoding", "")
        if attributes.get("ExternalFileName") or encoding not in _ENCODINGS:
            raise Unusable(
                f"{self._path.name}: an array is encoded as {shown(encoding)!r}; arrays in other files are "
                "not read"
            )
        lengths = [
            int(value) for name, value in attributes.items() if name.startswith("Dim") and name[3:].isdigit()
        ]
        if any(not 0 <= length <= MAX_NETWORKS for length in lengths) or len(lengths) > 6:
            raise Unusable(f"{self._path.name}: an array declares shape {lengths[:6]}")
        self._left = _WORD * math.prod(lengths)
        self._declared += self._left
        if self._declared > self._allowed:
            raise Unusable(f"{self._path.name}: declares more data than its bytes can hold")
        self._packed = encoding == _ENCODINGS[-1]

    def text(self, characters: str) -> None:
        """Unpack a piece of an array and count it."""
        if self._unpack is None:
            return
        self._base64 += "".join(characters.split())
        whole = len(self._base64) // 4 * 4
        piece = base64.b64decode(self._base64[:whole])
        self._base64 = self._base64[whole:]
        while piece:
            self._left -= len(self._unpack.decompress(piece, _PIECE))
            if self._left < 0:
                raise Unusable(f"{self._path.name}: an array is longer than it declares")
            piece = self._unpack.unconsumed_tail

    def end(self, tag: str) -> None:
        """Leave an element."""
        if tag == "Data":
            self._unpack = None


def check_cifti(path: Path, size: int) -> None:
    """Look at the XML of a CIFTI-2 file: nibabel makes arrays of the lengths that it declares on loading.

    Raises
    ------
    Unusable : if these are more than any surface has
    """
    with open(path, "rb") as file:
        head = file.read(_NIFTI2_BYTES)
        order = "<" if head[:4] == b"\x1c\x02\0\0" else ">"
        offset = struct.unpack_from(f"{order}q", head.ljust(_NIFTI2_BYTES, b"\0"), 168)[0]
        extensions = file.read(max(0, min(offset if offset > 0 else size, size) - len(head)))
    declared = 0

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal declared
        declared += int(attributes.get("IndexCount", 0))
        if declared > _MOST_POINTS:
            raise Unusable(f"{path.name}: declares {declared} points, expected at most {_MOST_POINTS}")

    begin = 0
    while begin + 8 <= len(extensions):
        length, code = struct.unpack_from(f"{order}ii", extensions, begin)
        if code == _CIFTI_CODE:
            parser = expat.ParserCreate()
            parser.StartElementHandler = start
            parser.Parse(extensions[begin + 8 : begin + length].rstrip(b"\0 "), True)
        if length < 8:
            return
        begin += length
