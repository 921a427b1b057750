"""What a store says about itself: the attributes of its root group, and the layouts that follow from them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np

from .errors import StoreError
from .layout import (
    COMPRESSIONS,
    DTYPES,
    FORMAT_VERSION,
    STATISTICS_CHUNK_ROWS,
    STATISTICS_SHARD_ROWS,
    Grid,
    to_json,
)

FORMAT_NAME = "brainflow"
MAX_NETWORKS = 2**22  # voxels of a whole brain at 0.7 mm
MAX_ROWS = 2**31 - 1  # the length of a run is int32
MAX_CHUNKS = 2**20  # of a shard: an index of 16 MiB
MAX_DECODED_CHUNK = 2**28  # bytes that a compressed chunk of some bytes may ask for


@dataclass(frozen=True, kw_only=True)
class StoreAttributes:
    """Attributes of a store; see `StoreWriter.create` for what each means."""

    networks: int
    dtype: str
    parcellation: str
    network_names: list[str] | None
    network_coordinates: list[list[float]] | None
    preprocessing: dict[str, Any]
    normalisation: str
    provenance: dict[str, Any]
    compression: str | None
    chunk_rows: int
    shard_rows: int

    @classmethod
    def build(
        cls,
        *,
        network_names: Sequence[str] | None,
        network_coordinates: Sequence[Sequence[float]] | np.ndarray | None,
        preprocessing: Mapping[str, Any] | None,
        provenance: Mapping[str, Any] | None,
        **others: Any,
    ) -> Self:
        """Check what the user gave.

        Raises
        ------
        ValueError
            Naming the argument that is wrong.
        """
        networks, dtype, compression = others["networks"], others["dtype"], others["compression"]
        if isinstance(networks, bool) or not isinstance(networks, int | np.integer) or networks < 1:
            raise ValueError(f"networks: got {networks!r}, expected a whole number of at least 1")
        if dtype not in DTYPES:
            raise ValueError(f"dtype: got {dtype!r}, expected one of {', '.join(DTYPES)}")
        if compression not in COMPRESSIONS:
            raise ValueError(f"compression: got {compression!r}, expected None or 'zstd'")
        if network_names is not None and len(network_names) != networks:
            raise ValueError(f"network_names: got {len(network_names)} names for {networks} networks")
        coordinates = None
        if network_coordinates is not None:
            array = np.asarray(network_coordinates, np.float64)
            if array.shape != (networks, 3) or not np.isfinite(array).all():
                raise ValueError(
                    f"network_coordinates: expected finite mm of shape [{networks}, 3], got "
                    f"{list(array.shape)}"
                )
            coordinates = array.tolist()
        for name, value in (("preprocessing", preprocessing), ("provenance", provenance)):
            try:
                to_json(value)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name}: must hold JSON values only ({error})") from error
        attributes = cls(
            network_names=None if network_names is None else [str(name) for name in network_names],
            network_coordinates=coordinates,
            preprocessing=dict(preprocessing or {}),
            provenance=dict(provenance or {}),
            **{**others, "networks": int(networks)},
        )
        fault = next(attributes.faults(), None)
        if fault is not None:
            raise ValueError(fault)
        return attributes

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes as they stand in `zarr.json`."""
        return {"format": FORMAT_NAME, "format_version": FORMAT_VERSION, **self.__dict__}

    @classmethod
    def from_dict(cls, attributes: Mapping[str, Any], where: str) -> Self:
        """Undo `to_dict`.

        Raises
        ------
        StoreError
            If an attribute is missing, of another type or out of range, or the version is another; the file
            `where` is named.
        """
        name, version = attributes.get("format"), attributes.get("format_version")
        if name != FORMAT_NAME or type(version) is not int or version != FORMAT_VERSION:
            raise StoreError(
                f"{where}: not a brainflow store of format version {FORMAT_VERSION} "
                f"(format {brief(name)}, version {brief(version)}); read it with the brainflow that wrote it"
            )
        try:
            held = cls(**{field.name: attributes[field.name] for field in fields(cls)})
        except KeyError as error:
            raise StoreError(f"{where}: attribute {error} is missing; restore this file") from error
        fault = next(held.faults(), None)
        if fault is not None:
            raise StoreError(f"{where}: {fault}; restore this file from a copy of the store")
        return held

    def faults(self) -> Iterator[str]:
        """Yield what is wrong with the attributes, one by one, the first one that matters first."""
        for name, largest in (("networks", MAX_NETWORKS), ("chunk_rows", MAX_ROWS), ("shard_rows", MAX_ROWS)):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= largest:
                yield f"{name}: got {brief(value)}, expected a whole number from 1 to {largest}"
        for name, known in (("dtype", DTYPES), ("compression", COMPRESSIONS)):
            if not any(getattr(self, name) == value for value in known):
                names = ", ".join(map(str, known))
                yield f"{name}: got {brief(getattr(self, name))}, expected one of {names}"
        yield from self._layout_faults()
        for name in ("parcellation", "normalisation"):
            if not isinstance(getattr(self, name), str):
                yield f"{name}: got {brief(getattr(self, name))}, expected a text"
        for name in ("preprocessing", "provenance"):
            if not isinstance(getattr(self, name), dict):
                yield f"{name}: got {brief(getattr(self, name))}, expected an object"
        if self.network_names is not None and not _is_list_of(self.network_names, self.networks, str):
            yield f"network_names: got {brief(self.network_names)}, expected {self.networks} texts or null"
        if self.network_coordinates is not None and not (
            _is_list_of(self.network_coordinates, self.networks, list)
            and all(
                len(place) == 3 and all(_is_finite(x) for x in place) for place in self.network_coordinates
            )
        ):
            yield (
                f"network_coordinates: got {brief(self.network_coordinates)}, expected {self.networks} × "
                "[x, y, z] in mm, or null"
            )

    def _layout_faults(self) -> Iterator[str]:
        """Yield what is wrong with the size of chunks and shards."""
        if self.shard_rows % self.chunk_rows:
            yield f"shard_rows: got {self.shard_rows}, expected a multiple of chunk_rows ({self.chunk_rows})"
        if self.shard_rows // self.chunk_rows > MAX_CHUNKS:
            yield f"shard_rows: got {self.shard_rows}, expected at most {MAX_CHUNKS} chunks a shard"
        if self.compression and self.bold_grid.chunk_bytes > MAX_DECODED_CHUNK:
            yield (
                f"chunk_rows: got {self.chunk_rows}, expected compressed chunks of at most "
                f"{MAX_DECODED_CHUNK} bytes"
            )

    def check_same(self, options: Mapping[str, Any], where: str) -> None:
        """Refuse to add to a store what was asked to be stored in another way.

        Parameters
        ----------
        options
            Arguments of `StoreWriter.create`; defaults are not compared, nor is `provenance`.
        where
            The store.

        Raises
        ------
        StoreError
            Naming the option that differs.
        """
        for name, value in options.items():
            asked = value.tolist() if isinstance(value, np.ndarray) else value
            # A default that is asked for cannot be told from one that is not.
            if name == "provenance" or asked in (None, "", {}, []) or (name, asked) == ("dtype", "float16"):
                continue
            held = getattr(self, name)
            if to_json(asked) != to_json(held):
                raise StoreError(
                    f"{name}: got {asked!r}, but the store {where} has {held!r}; leave it out, or write the "
                    "store anew with overwrite=True (--overwrite)"
                )

    @property
    def statistics(self) -> list[str]:
        """Names of what `statistics` holds for each run and network."""
        return ["mean", "std"] + (["scale"] if np.dtype(self.dtype).kind == "i" else [])

    @property
    def bold_grid(self) -> Grid:
        """Layout of `bold[time, network]`."""
        return Grid(
            name="bold",
            row_shape=(self.networks,),
            dtype=np.dtype(self.dtype).newbyteorder("<"),
            chunk_rows=self.chunk_rows,
            shard_rows=self.shard_rows,
            compression=self.compression,
        )

    @property
    def statistics_grid(self) -> Grid:
        """Layout of `statistics[slot, statistic, network]`."""
        return Grid(
            name="statistics",
            row_shape=(len(self.statistics), self.networks),
            dtype=np.dtype("<f4"),
            chunk_rows=STATISTICS_CHUNK_ROWS,
            shard_rows=STATISTICS_SHARD_ROWS,
        )

    def array_metadata(self, grid: Grid, rows: int) -> bytes:
        """Return `zarr.json` of `bold` or `statistics` with `rows` rows."""
        if grid.name == "bold":
            return grid.metadata(rows, {}, ["time", "network"])
        return grid.metadata(rows, {"statistics": self.statistics}, ["slot", "statistic", "network"])

    def network_label(self, network: int) -> str:
        """Return a network for an error message: its number, and its name where known."""
        return f"network {network}" + (f" ({self.network_names[network]})" if self.network_names else "")


def brief(value: Any) -> str:
    """Return a value for an error message, shortened: what a stranger's file holds may be long."""
    text = repr(value[:60] if isinstance(value, list | str) else value)
    return text if len(text) <= 60 else text[:60] + " …"


def _is_list_of(value: Any, length: int, kind: type) -> bool:
    return isinstance(value, list) and len(value) == length and all(isinstance(item, kind) for item in value)


def _is_finite(value: Any) -> bool:
    # Magnitude first: `isfinite` of a huge whole number raises.
    return type(value) in (int, float) and abs(value) < 1e9 and math.isfinite(value)
