"""Reading runs from array files, with a small TOML file that says which file is which run.

The TOML file has three parts, described in `docs/format.md`:

    [store]            # keyword arguments of StoreWriter.create
    [defaults]         # what all runs share: t_r, dataset, task, array, layout, …
    [[files]]          # one or more: a glob relative to the TOML file, and what differs from the defaults
"""

from __future__ import annotations

import csv
import importlib
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import StoreError
from ..segments import Label, Segment
from .report import IngestReport
from .session import IngestSession

ENTITIES = ("dataset", "subject", "session", "task", "run")
KEYS = frozenset({*ENTITIES, "t_r", "key", "array", "layout", "pattern", "segments", "glob"})
STORE_KEYS = frozenset(
    [
        "dtype",
        "parcellation",
        "network_names",
        "network_coordinates",
        "preprocessing",
        "normalisation",
        "provenance",
        "compression",
    ]
)
_BIDS = re.compile(r"(?:^|[_/])(ds|sub|ses|task|run)-([A-Za-z0-9]+)")
_BIDS_NAMES = dict(zip(("ds", "sub", "ses", "task", "run"), ENTITIES, strict=True))


def ingest_arrays(
    config: str | os.PathLike[str],
    store_path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> IngestReport:
    """Write the runs that a TOML file lists to a store.

    Parameters
    ----------
    config : the TOML file
    store_path : runs are added if the store exists
    overwrite : replace the store
    progress : called with (files done, files in all)

    Returns
    -------
    IngestReport : a file that cannot be read is in `failures`, and nothing of it is in the store

    Raises
    ------
    StoreError : if the TOML file is wrong, or the store cannot be written
    """
    path = Path(config)
    store, jobs = read_config(path)
    with IngestSession(store_path, store, overwrite=overwrite) as session:
        for done, (file, options) in enumerate(jobs):
            session.add(str(file), _runs(file, options, path.parent))
            if progress is not None:
                progress(done + 1, len(jobs))
    return session.report


def read_config(path: Path) -> tuple[dict[str, Any], list[tuple[Path, dict[str, Any]]]]:
    """Arguments for the store, and every file with its options, by entry and then by name.

    Raises
    ------
    StoreError : if the file is not TOML, a key is unknown or a glob finds nothing
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise StoreError(f"{path}: cannot be read as TOML ({error})") from error
    store, defaults, entries = (content.get(name, {}) for name in ("store", "defaults", "files"))
    _refuse_unknown(path, "the file", content, {"store", "defaults", "files"})
    _refuse_unknown(path, "[store]", store, STORE_KEYS)
    _refuse_unknown(path, "[defaults]", defaults, KEYS)
    if not isinstance(entries, list) or not entries:
        raise StoreError(f'{path}: expected at least one [[files]] with glob = "…"')
    jobs = []
    for i, entry in enumerate(entries):
        _refuse_unknown(path, f"[[files]] number {i + 1}", entry, KEYS)
        options = {**defaults, **entry}
        found = sorted(path.parent.glob(str(options.get("glob", ""))) if options.get("glob") else [])
        if not found:
            raise StoreError(f"{path}: [[files]] number {i + 1}: glob {options.get('glob')!r} finds no file")
        jobs += [(file, options) for file in found]
    return store, jobs


def load_array(path: Path, name: str | None = None) -> np.ndarray:
    """The array in a .npy, .npz, .mat, .csv, .tsv, .h5, .hdf5 or .parquet file; no file is unpickled.

    Parameters
    ----------
    path : the file
    name : which array of a file that holds several

    Raises
    ------
    StoreError : if the file cannot be read, or holds several arrays and none is named
    ImportError : if the package for this kind of file is not installed
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise StoreError(f"{path}: unknown kind of file, expected one of {', '.join(_READERS)}")
    try:
        return np.asarray(reader(path, name))
    except (StoreError, ImportError, FileNotFoundError):
        raise
    except Exception as error:  # a damaged file fails in any way that its library likes
        raise StoreError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error


def _runs(file: Path, options: Mapping[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
    """The one run of a file, as keyword arguments of `StoreWriter.append`."""
    try:
        array = load_array(file, options.get("array"))
    except ImportError as error:
        raise StoreError(str(error)) from error
    layout = options.get("layout", "time network")
    if layout not in ("time network", "network time"):
        raise StoreError(f'{file}: layout: got {layout!r}, expected "time network" or "network time"')
    bold = array.T if layout == "network time" else array
    if "t_r" not in options:
        raise StoreError(f"{file}: t_r: the repetition time in seconds is not given; it is never guessed")
    entities = _entities(file, options)
    segments = []
    if options.get("segments"):
        segments = _segments(folder / str(options["segments"]).format(**entities, stem=file.stem))
    keywords: dict[str, Any] = {"bold": bold, "t_r": float(options["t_r"]), "segments": segments, **entities}
    if options.get("key"):
        keywords["key"] = str(options["key"]).format(**entities, stem=file.stem)
    yield keywords


def _entities(file: Path, options: Mapping[str, Any]) -> dict[str, str]:
    """Entities from the options, else from `pattern`, else from `sub-…`, `task-…` in the path."""
    text = file.as_posix()
    found = {_BIDS_NAMES[name]: value for name, value in _BIDS.findall(text)}
    if options.get("pattern"):
        match = re.search(str(options["pattern"]), text)
        if match is None:
            raise StoreError(f"{file}: pattern {options['pattern']!r} does not match the path")
        found = {name: value for name, value in match.groupdict().items() if name in ENTITIES and value}
    entities = {name: str(options.get(name, found.get(name, ""))) for name in ENTITIES}
    for name in ("dataset", "subject"):
        if not entities[name]:
            raise StoreError(f"{file}: {name} is not given; set it in the TOML file or by pattern")
    return entities


def _segments(path: Path) -> list[Segment]:
    """Segments from a .csv or .tsv with the columns onset and length in time points; others are labels."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
        return [
            Segment(
                onset=int(row.pop("onset")),
                length=int(row.pop("length")),
                labels={name: _parse(text) for name, text in row.items() if text not in (None, "", "n/a")},
            )
            for row in rows
        ]
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        raise StoreError(f"{path}: expected whole numbers in columns onset and length ({error!r})") from error


def _parse(text: str) -> Label:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _refuse_unknown(path: Path, where: str, table: Any, known: frozenset[str] | set[str]) -> None:
    if not isinstance(table, dict):
        raise StoreError(f"{path}: {where}: expected a table")
    for name in table:
        if name not in known:
            raise StoreError(
                f"{path}: {where}: unknown key {name!r}, expected one of {', '.join(sorted(known))}"
            )


def _pick(path: Path, arrays: Mapping[str, Any], name: str | None) -> Any:
    """The named array of a file, or its only one."""
    if name is None and len(arrays) == 1:
        return next(iter(arrays.values()))
    if name is None or name not in arrays:
        raise StoreError(f'{path}: array: choose one of {", ".join(sorted(arrays))} with array = "…"')
    return arrays[name]


def _npy(path: Path, name: str | None) -> Any:
    return np.load(path, allow_pickle=False)


def _npz(path: Path, name: str | None) -> Any:
    with np.load(path, allow_pickle=False) as file:
        return _pick(path, file, name)


def _mat(path: Path, name: str | None) -> Any:
    io = _need("scipy.io", path)
    try:
        content = io.loadmat(path, variable_names=None if name is None else [name])
    except NotImplementedError:  # MATLAB 7.3 files are HDF5, whose axes are in reverse
        return np.asarray(_hdf5(path, name)).T
    return _pick(path, {key: value for key, value in content.items() if not key.startswith("__")}, name)


def _hdf5(path: Path, name: str | None) -> Any:
    with _need("h5py", path).File(path, "r") as file:
        if name is not None and name not in file:
            raise StoreError(f"{path}: array: {name!r} is not among {', '.join(sorted(file))}")
        arrays = {key: file[key] for key in ([name] if name else file) if hasattr(file[key], "shape")}
        return _pick(path, arrays, name)[()]


def _parquet(path: Path, name: str | None) -> Any:
    table = _need("pyarrow.parquet", path).read_table(path)
    return np.stack([column.to_numpy() for column in table.columns], axis=1)


def _text(path: Path, name: str | None) -> Any:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with open(path, encoding="utf-8") as file:
        first = file.readline().split(delimiter)
    return np.loadtxt(path, delimiter=delimiter, skiprows=0 if all(map(_is_number, first)) else 1, ndmin=2)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _need(module: str, path: Path) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise ImportError(
            f"{path}: reading {path.suffix} files needs {package}: pip install 'brainflow-fmri[arrays]'"
        ) from error


_READERS: dict[str, Callable[[Path, str | None], Any]] = {
    ".npy": _npy,
    ".npz": _npz,
    ".mat": _mat,
    ".csv": _text,
    ".tsv": _text,
    ".h5": _hdf5,
    ".hdf5": _hdf5,
    ".parquet": _parquet,
}
