"""The one error of this package: a store, part or source file on disk cannot be used."""

from __future__ import annotations


class StoreError(ValueError):
    """Something on disk is missing, damaged or not what it should be; the message names file and remedy."""
