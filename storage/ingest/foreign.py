"""Reading .mat, HDF5 and Parquet files in a process of its own, with limits of memory and time.

Their readers are large libraries in C, which a damaged file can crash or make take any amount of memory. This
file is run as a script and imports nothing of this package: `python foreign.py KIND PATH ARRAY OUT BYTES
SECONDS` writes the array to OUT as .npy, or prints why not and ends with exit code 1.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np

MAX_TIME = 65_536
MAX_NETWORKS = 2**18  # all voxels of a brain at 2 mm; a store takes memory for 128 time points of them
_WORD = 4  # what is narrower is wider in the store
_SHOWN = 300
_LIBRARIES = {"mat": "scipy.io", "hdf5": "h5py", "parquet": "pyarrow.parquet"}
_MATLAB = {"double": "f8", "single": "f4"} | {
    f"{sign}int{bits}": f"{sign or 'i'}{bits // 8}" for sign in ("", "u") for bits in (8, 16, 32, 64)
}


def check_shape(shape: tuple[int, ...], dtype: np.dtype, allowed: int) -> None:
    """Refuse an array that is no run, before it is read.

    Parameters
    ----------
    shape, dtype
        As the file declares them.
    allowed
        Bytes.

    Raises
    ------
    ValueError
        If it does not hold real numbers in two dimensions, one of them time, or takes more bytes.
    """
    if dtype.kind not in "fiu" or dtype.itemsize > 8:
        raise ValueError(f"holds {dtype}, expected real numbers")
    if len(shape) != 2:
        raise ValueError(f"has shape {list(shape[:8])}, expected two dimensions, time and network")
    if min(shape) < 1 or min(shape) > MAX_TIME or max(shape) > MAX_NETWORKS:
        raise ValueError(
            f"has shape {list(shape)}, expected 1 to {MAX_TIME} time points and 1 to {MAX_NETWORKS} networks"
        )
    size = math.prod(shape) * max(dtype.itemsize, _WORD)
    if size > allowed:
        raise ValueError(f"has shape {list(shape)}: {size} bytes; a file of this size may hold {allowed}")


def pick(names: Collection[str], wanted: str) -> str:
    """Return the name asked for, or the only one.

    Raises
    ------
    ValueError
        If there are several and none is asked for, or it is not there.
    """
    if not wanted and len(names) == 1:
        return next(iter(names))
    if not names:
        raise ValueError("holds no array")
    listed = ", ".join(sorted(names)[:20])
    if not wanted:
        raise ValueError(f'array: choose one of {listed} with array = "…"')
    if wanted not in names:
        raise ValueError(f"array: {wanted!r} is not among {listed}")
    return wanted


def read_mat(path: str, wanted: str, allowed: int) -> np.ndarray:
    """Return a matrix of a .mat file of MATLAB 4 to 7.2."""
    matlab = import_module("scipy.io")
    held = {name: (shape, kind) for name, shape, kind in matlab.whosmat(path)}
    name = pick(held, wanted)
    shape, kind = held[name]
    if kind not in _MATLAB:
        raise ValueError(f"{name!r} holds {kind}, expected real numbers")
    with _about(name):
        check_shape(shape, np.dtype(_MATLAB[kind]), allowed)
        values = np.asarray(matlab.loadmat(path, variable_names=[name])[name])
        check_shape(values.shape, values.dtype, allowed)
    return values


def read_hdf5(path: str, wanted: str, allowed: int) -> np.ndarray:
    """Return a dataset of an HDF5 file that lies in this file itself."""
    h5py = import_module("h5py")
    with h5py.File(path, "r") as file:
        links = {key: type(file.get(key, getlink=True)).__name__ for key in file}
        if wanted and wanted.split("/")[0] in links:
            name = wanted
        elif wanted:
            name = pick(links, wanted)
        else:  # links count: a file with one to elsewhere does not say which array is meant
            groups = {
                k for k, kind in links.items() if kind == "HardLink" and isinstance(file[k], h5py.Group)
            }
            name = pick(links.keys() - groups, wanted)
        with _about(name):
            dataset = _own(file, name)
            if not isinstance(dataset, h5py.Dataset):
                raise ValueError("is no dataset")
            if dataset.external or dataset.is_virtual:
                raise ValueError("lies in another file (external or virtual), which is not read")
            check_shape(dataset.shape or (), dataset.dtype, allowed)
            return np.asarray(dataset[()])


def _own(file: Any, name: str) -> Any:
    """Return the object of a name, reached without a link to elsewhere."""
    found = file
    for part in name.split("/"):
        link = found.get(part, getlink=True) if hasattr(found, "keys") else None
        if link is None:
            raise ValueError("is not there")
        if type(link).__name__ != "HardLink":
            raise ValueError(f"is a link to elsewhere ({type(link).__name__}), which is not followed")
        found = found[part]
    return found


def read_parquet(path: str, wanted: str, allowed: int) -> np.ndarray:
    """Return a table with a column a network."""
    kind, parquet = import_module("pyarrow.types"), import_module("pyarrow.parquet")
    with parquet.ParquetFile(path) as file:
        schema = file.schema_arrow
        for field in schema:
            if not kind.is_integer(field.type) and not kind.is_floating(field.type):
                raise ValueError(f"column {field.name!r} holds {field.type}, expected real numbers")
        check_shape((file.metadata.num_rows, len(schema)), np.dtype("f8"), allowed)
        # A thread reserves addresses for a stack and an arena, which the limit of memory counts.
        columns = file.read(use_threads=False).columns
    return np.stack([column.to_numpy() for column in columns], axis=1)


READERS: dict[str, Callable[[str, str, int], np.ndarray]] = {
    "mat": read_mat,
    "hdf5": read_hdf5,
    "parquet": read_parquet,
}


@contextmanager
def _about(name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"array {name!r} {error}") from error


def _limit(allowed: int, seconds: int) -> None:
    """Bound memory, time and output of this process, beyond what it has now."""
    import resource

    memory = resource.RLIM_INFINITY  # other systems than Linux do not say what is held, nor keep the limit
    if os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm") as file:
            memory = int(file.read().split()[0]) * resource.getpagesize() + 2 * allowed
    for kind, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, allowed + 4096),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))


def _main(kind: str, path: str, wanted: str, out: str, allowed: str, seconds: str) -> int:
    try:
        import_module(_LIBRARIES[kind])  # before the limits, so that they bound what the file takes
        _limit(int(allowed), int(seconds))
        np.save(out, READERS[kind](path, wanted, int(allowed)), allow_pickle=False)
    except MemoryError:
        sys.stdout.write("needs more memory than a file of its size may take")
    except ValueError as error:
        sys.stdout.write(str(error)[:_SHOWN])
    except Exception as error:  # a damaged file fails in any way that its library likes
        sys.stdout.write(f"cannot be read ({type(error).__name__}: {error})"[:_SHOWN])
    else:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
