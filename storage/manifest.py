"""The manifest: the attributes of the root group, in a file renamed last, say what is committed.

Metadata and manifest stand in one `zarr.json`, so that one rename commits and any Zarr client shows both.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from typing import Any

from .attributes import StoreAttributes
from .errors import StoreError
from .index import Digests
from .layout import group_metadata, to_compact_json

MANIFEST = "zarr.json"
MANIFEST_COPY = "manifest.json"  # in the index of each generation: the bytes of the root's file


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What is committed.

    Parameters
    ----------
    generation : 0 for a new store, one more with every commit
    runs, segments : rows of the two tables
    rows : rows of `bold`, gaps included
    slots : rows of `statistics`, gaps included
    files : {path: [bytes, CRC-32C]} of the index; chunks have their own checksums, in the index
    """

    generation: int
    runs: int
    segments: int
    rows: int
    slots: int
    files: Digests

    def to_bytes(self, attributes: StoreAttributes) -> bytes:
        """Content of the root's `zarr.json`; `snapshot` is the SHA-256 of the other attributes."""
        body = {**attributes.to_dict(), "manifest": self.__dict__}
        return group_metadata({**body, "snapshot": hashlib.sha256(to_compact_json(body)).hexdigest()})


def parse_manifest(data: bytes, where: str) -> tuple[Manifest, StoreAttributes, str]:
    """Read the root's `zarr.json`.

    Returns
    -------
    manifest, attributes, snapshot

    Raises
    ------
    StoreError : if it is truncated, damaged, of something else or of another format version; `where` is named
    """
    file = f"{where}/{MANIFEST}"
    try:
        body: dict[str, Any] = json.loads(data)["attributes"]
        attributes = StoreAttributes.from_dict(body, file)
        snapshot = body.pop("snapshot")
        manifest = Manifest(**{field.name: body["manifest"][field.name] for field in fields(Manifest)})
        digest = hashlib.sha256(to_compact_json(body)).hexdigest()
    except StoreError:
        raise
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise StoreError(
            f"{file}: truncated or damaged ({type(error).__name__}: {error}); restore this file from a "
            "copy of the "
            "store"
        ) from error
    if digest != snapshot:
        raise StoreError(f"{file}: damaged (wrong digest); restore this file from a copy of the store")
    return manifest, attributes, snapshot
