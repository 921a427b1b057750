"""The store: fMRI runs in one chunked Zarr v3 array, read by memory map. Needs numpy, zarr and numcodecs."""

if __name__ == "storage":
    raise ImportError("this folder is a package of brainflow: write `from brainflow.storage import …`")

from .errors import StoreError, StoreWarning
from .parts import gather, write_part
from .publishing import publish
from .store import BoldStore
from .tables import RunTable, Segment, SegmentTable
from .verify import VerifyReport, verify
from .writer import StoreWriter

__all__ = [
    "BoldStore",
    "RunTable",
    "Segment",
    "SegmentTable",
    "StoreError",
    "StoreWarning",
    "StoreWriter",
    "VerifyReport",
    "gather",
    "publish",
    "verify",
    "write_part",
]
