"""From fMRIPrep's derivatives to a store: find runs, clean their parcel time series, gather them.

`brainflow prepare` is the command; `extract` and `store_from_masker` do single images in Python.
"""

from brainflow.prepare.atlas import AtlasSpec, find_atlas
from brainflow.prepare.bids import check_folders, find_runs
from brainflow.prepare.events import EventSettings
from brainflow.prepare.export import export
from brainflow.prepare.files import Query, RunFiles
from brainflow.prepare.hcp import is_hcp
from brainflow.prepare.masker import extract, store_from_masker
from brainflow.prepare.settings import CleanSettings, Rules, Settings

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
