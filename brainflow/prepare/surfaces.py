"""Parcel time series of surfaces: CIFTI `.dtseries.nii` with a dlabel, pairs of GIFTI with label files.

A network's time series is the mean over its vertices and voxels. Surfaces are not smoothed here: that needs
the geodesic distances of a mesh (`wb_command -cifti-smoothing` does it beforehand). Files are checked before
nibabel reads them: it trusts what they name and declare.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.parsers import expat

import numpy as np

from brainflow.optional import need
from brainflow.prepare.atlas import BACKGROUND, AtlasSpec, network_names
from brainflow.prepare.records import Unusable
from brainflow.prepare.volumes import refuse_lost
from brainflow.storage.columns import shown
from brainflow.storage.ingest.foreign import MAX_NETWORKS, MAX_TIME
from brainflow.storage.ingest.limits import budget, regular_size

_ENCODINGS = ("ASCII", "Base64Binary", "GZipBase64Binary")  # nibabel takes more names, also for other files
# Around the numbers of an array stand a few elements: Data, MetaData, MD, Name, Value.
_MOST_ELEMENTS = 8 * MAX_TIME
_WORD = 8  # no type that nibabel reads is wider
_PIECE = 2**20
_NIFTI2_BYTES = 544
_CIFTI_CODE = 32
# fsLR 32k has 91,282 grayordinates, the HCP's files at 7 T 170,494.
_MOST_POINTS = 2**20


def check_gifti(path: Path) -> None:
    """Read the tags of a GIFTI file, and unpack its arrays without keeping them.

    nibabel opens the files that a GIFTI names, wherever they are, and unpacks arrays to any size.

    Raises
    ------
    Unusable
        If arrays lie in other files, or are more or longer than a run of its size can have.
    """
    scan = _Scan(path, budget(regular_size(path)))
    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = scan.start, scan.end
    parser.CharacterDataHandler = scan.text
    try:
        with open(path, "rb") as file:
            parser.ParseFile(file)
    except (expat.ExpatError, zlib.error, ValueError) as error:
        # It is a ValueError, too, and says what is wrong already.
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
        # Base64 comes in groups of four characters.
        whole = len(self._base64) // 4 * 4
        piece = base64.b64decode(self._base64[:whole])
        self._base64 = self._base64[whole:]
        while piece:
            # A piece at a time: an array that unpacks to more is noticed before it does.
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
    Unusable
        If these are more than any surface has.
    """
    with open(path, "rb") as file:
        head = file.read(_NIFTI2_BYTES)
        # The header's own size, 540, tells its byte order.
        order = "<" if head[:4] == b"\x1c\x02\0\0" else ">"
        # vox_offset: extensions, the XML among them, lie between the header and there.
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
            # Extensions are padded to a multiple of 16 bytes.
            parser.Parse(extensions[begin + 8 : begin + length].rstrip(b"\0 "), True)
        # Shorter than its own two numbers: the loop would not get on.
        if length < 8:
            return
        begin += length


@dataclass(frozen=True, kw_only=True)
class Dense:
    """A run on grayordinates or vertices.

    Parameters
    ----------
    data
        float32 [time, points].
    points
        One (structure, index) a column: a vertex number, or a voxel as (i, j, k).
    t_r
        Seconds from the header, None where it has none.
    """

    data: np.ndarray
    points: list[tuple[str, Any]]
    t_r: float | None


def read_cifti(path: Path) -> Dense:
    """Read a dense time series.

    Raises
    ------
    Unusable
        If it cannot be read or is no time series.
    """
    image = _load(path)
    axes = _axes(image, path)
    # By name: nibabel is an extra, imported where it is needed.
    if len(axes) != 2 or type(axes[0]).__name__ != "SeriesAxis" or type(axes[1]).__name__ != "BrainModelAxis":
        raise Unusable(
            f"{path.name}: is no dense time series (its axes are {', '.join(type(a).__name__ for a in axes)})"
        )
    series = axes[0]
    t_r = float(series.step) if series.unit == "SECOND" and series.step > 0 else None
    return Dense(data=_data(image, path), points=_points(axes[1]), t_r=t_r)


def read_parcels(path: Path) -> tuple[np.ndarray, list[str], float | None]:
    """Read a CIFTI parcel series: float32 [time, parcels], names of the parcels, seconds of the header.

    Raises
    ------
    Unusable
        If it cannot be read or is no parcel series.
    """
    image = _load(path)
    axes = _axes(image, path)
    if [type(axis).__name__ for axis in axes] != ["SeriesAxis", "ParcelsAxis"]:
        raise Unusable(f"{path.name}: is no parcel series")
    series = axes[0]
    t_r = float(series.step) if series.unit == "SECOND" and series.step > 0 else None
    return _data(image, path), [str(name) for name in axes[1].name], t_r


def read_gifti(paths: Sequence[Path]) -> Dense:
    """Read a pair of hemispheres, one data array a time point.

    Raises
    ------
    Unusable
        If a file cannot be read or the hemispheres have different numbers of time points.
    """
    hemispheres = [_gifti_arrays(path) for path in paths]
    lengths = [len(data) for data in hemispheres]
    if len(set(lengths)) != 1 or lengths[0] < 2:
        names = ", ".join(path.name for path in paths)
        raise Unusable(
            f"{names}: have {' and '.join(map(str, lengths))} time points, expected equally many, and more "
            f"than one"
        )
    points = [(side, vertex) for side, data in enumerate(hemispheres) for vertex in range(data.shape[1])]
    # The repetition time of GIFTI files stands in their sidecar.
    return Dense(data=np.hstack(hemispheres), points=[(str(side), v) for side, v in points], t_r=None)


def extract(run: Dense, atlases: Sequence[AtlasSpec], dropped: int) -> list[np.ndarray]:
    """Return the mean time series of each label.

    Parameters
    ----------
    run
        Time series of grayordinates or vertices.
    atlases
        Labels of such points.
    dropped
        Volumes left out at the start.

    Raises
    ------
    Unusable
        If a label of an atlas has no point in the run, or nothing was recorded at a volume.
    """
    return [np.hstack([_means(run, part, dropped) for part in atlas.pieces]) for atlas in atlases]


def _means(run: Dense, atlas: AtlasSpec, dropped: int) -> np.ndarray:
    sparse = need("scipy.sparse", "averaging labels", "bids")
    labelled, known = labels_of(atlas)
    wanted = np.array(sorted(set(labelled.values()) - {BACKGROUND}), np.int64)
    labels = np.array([labelled.get(point, BACKGROUND) for point in run.points], np.int64)
    lost = np.setdiff1d(wanted, labels)
    if len(lost):
        examples = ", ".join(network_names(atlas, lost[:5].tolist(), known))
        raise Unusable(
            f"atlas {atlas.label}: {len(lost)} of {len(wanted)} labels are not in the run ({examples})"
        )
    points = np.flatnonzero(labels != BACKGROUND)
    networks = np.searchsorted(wanted, labels[points])
    weights = 1.0 / np.bincount(networks, minlength=len(wanted))[networks]
    matrix = sparse.csr_array((weights, (networks, points)), shape=(len(wanted), len(labels)))
    finite = np.isfinite(run.data)
    refuse_lost(finite.any(axis=1), dropped=dropped)
    data = np.where(finite, run.data, 0)[dropped:]
    return (matrix @ data.T.astype(np.float64)).T


def labels_of(atlas: AtlasSpec) -> tuple[dict[tuple[str, Any], int], dict[int, str]]:
    """Return the label of each point of a dlabel or a pair of GIFTI files, and the names that they hold.

    Raises
    ------
    Unusable
        If the atlas is a volume, or a file cannot be read.
    """
    if atlas.kind == "dlabel":
        path = atlas.paths[0]
        image = _load(path)
        axes = _axes(image, path)
        values = np.rint(_data(image, path)[0]).astype(np.int64)
        table = axes[0].label[0]
        known = {int(value): str(name) for value, (name, _) in table.items()}
        return dict(zip(_points(axes[1]), values.tolist(), strict=True)), known
    if atlas.kind != "gifti":
        raise Unusable(
            f"atlas {atlas.label}: is a volume; surfaces need a .dlabel.nii or a pair of .label.gii files"
        )
    labelled: dict[tuple[str, Any], int] = {}
    names: dict[int, str] = {}
    shift = 0
    for side, path in enumerate(atlas.paths):
        values = np.rint(_gifti_arrays(path)[0]).astype(np.int64)
        own = {int(k): str(v) for k, v in _load(path).labeltable.get_labels_as_dict().items()}
        clash = [
            value for value in own if value in names and names[value] != own[value] and value != BACKGROUND
        ]
        shift = (
            max(names) if clash else 0
        )  # both hemispheres count from 1: the right one goes behind the left
        for vertex, value in enumerate(values.tolist()):
            labelled[str(side), vertex] = value + shift if value != BACKGROUND else BACKGROUND
        names |= {value + shift if value != BACKGROUND else value: name for value, name in own.items()}
    return labelled, names


def _points(axis: Any) -> list[tuple[str, Any]]:
    """Return (structure, vertex) or (structure, (i, j, k)) of each grayordinate."""
    voxels = [tuple(voxel) for voxel in axis.voxel.tolist()]
    return [
        # nibabel gives voxels -1 as their vertex.
        (str(name), vertex if vertex >= 0 else voxel)
        for name, vertex, voxel in zip(axis.name, axis.vertex.tolist(), voxels, strict=True)
    ]


def _gifti_arrays(path: Path) -> np.ndarray:
    """Return float32 [time, vertices]."""
    arrays = getattr(_load(path), "darrays", [])
    if not arrays:
        raise Unusable(f"{path.name}: holds no data arrays")
    try:
        return np.stack([np.asarray(array.data, np.float32).reshape(-1) for array in arrays])
    except (ValueError, TypeError) as error:
        raise Unusable(f"{path.name}: its data arrays differ in length ({error})") from error


def _load(path: Path) -> Any:
    nibabel = need("nibabel", "reading surfaces", "bids")
    try:
        size = regular_size(path)
        if path.name.endswith(".gii"):
            check_gifti(path)
        else:
            check_cifti(path, size)
        return nibabel.load(path)
    except Unusable:
        raise
    except Exception as error:  # expat, zlib and nibabel raise many kinds for a damaged file
        raise Unusable(f"{path.name}: cannot be opened ({' '.join(str(error).split())})") from error


def _axes(image: Any, path: Path) -> list[Any]:
    if type(image).__name__ != "Cifti2Image":
        raise Unusable(f"{path.name}: is no CIFTI-2 file")
    if 4 * math.prod(image.shape) > budget(path.stat().st_size):
        raise Unusable(f"{path.name}: declares shape {list(image.shape)}, more than its bytes can hold")
    try:
        return [image.header.get_axis(i) for i in range(image.ndim)]
    except Exception as error:  # a header that contradicts itself fails in any way
        raise Unusable(
            f"{path.name}: its header cannot be understood ({' '.join(str(error).split())})"
        ) from error


def _data(image: Any, path: Path) -> np.ndarray:
    try:
        return np.asarray(image.dataobj, np.float32)
    except (OSError, EOFError, ValueError, OverflowError) as error:
        raise Unusable(
            f"{path.name}: cannot be read; the file is truncated or damaged ({' '.join(str(error).split())})"
        ) from error
