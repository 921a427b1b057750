"""The networks of an atlas, in the order of a store's columns."""

from __future__ import annotations

import numpy as np

from brainflow.optional import need
from brainflow.prepare.atlas import BACKGROUND, AtlasSpec, network_names, read_labels
from brainflow.prepare.surfaces import labels_of


def networks_of(atlas: AtlasSpec) -> list[str]:
    """Name of each network: labels in ascending order without the background, or maps in their order."""
    if atlas.kind in ("dlabel", "gifti"):
        labelled, known = labels_of(atlas)
        return network_names(atlas, sorted(set(labelled.values()) - {BACKGROUND}), known)
    image = need("nibabel", "reading an atlas", "bids").load(atlas.paths[0])
    if atlas.kind == "maps":
        return network_names(atlas, range(1, image.shape[3] + 1))
    values = np.unique(read_labels(image))
    return network_names(atlas, values[values != BACKGROUND].tolist())
