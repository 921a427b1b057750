"""From fMRIPrep's derivatives to a store: find runs, clean their parcel time series, gather them.

`brainflow prepare` is the command; `extract` and `store_from_masker` do single images in Python.
"""

from .atlas import AtlasSpec, find_atlas
from .events import EventSettings
from .export import export
from .hcp import is_hcp
from .index import check_folders, find_runs
from .masker import extract, store_from_masker
from .runfiles import Query, RunFiles
from .settings import CleanSettings, Rules, Settings

__all__ = [
    "AtlasSpec",
    "CleanSettings",
    "EventSettings",
    "Query",
    "Rules",
    "RunFiles",
    "Settings",
    "check_folders",
    "export",
    "extract",
    "find_atlas",
    "find_runs",
    "is_hcp",
    "store_from_masker",
]
