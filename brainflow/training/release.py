"""What goes with the weights: where they come from, and what a user's data must look like to fit them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from brainflow.config import PretrainConfig, to_dict
from brainflow.data.splits import Split
from brainflow.pretrained.compatibility import fingerprint
from brainflow.pretrained.hub import base_model
from brainflow.storage import BoldStore

# Attributes of the store that whoever feeds the model must match.
_MATCH = ("parcellation", "network_names", "network_coordinates", "normalisation", "preprocessing")


def facts(config: PretrainConfig, store: BoldStore, split: Split, step: int) -> dict[str, Any]:
    """Return what `config.json` says beside the architecture.

    Keys: `pretrain` (the run's configuration), `base_model` (where it began from one of the hub), `step`, and
    `data`: the store's snapshot, parcellation, network names and coordinates, normalisation and
    preprocessing, and of the training runs the repetition times in seconds, the number of runs by dataset,
    the subjects, so that nobody evaluates on them unawares, and what the signal is like (`fingerprint`; None
    where every training run has damage), for `brainflow doctor`.
    """
    runs = store.runs
    train = split.part("train", runs)
    datasets = np.asarray(runs.dataset)[train].tolist()
    read = train  # damaged runs were left out of training
    if config.data.on_corrupt == "skip":
        read = train[store.intact(runs.start[train], runs.length[train])]
    data = {
        "store_snapshot": store.snapshot,
        **{name: store.attributes.get(name) for name in _MATCH},
        "t_r": sorted(set(np.asarray(runs.t_r)[train].tolist())),
        "datasets": dict(sorted(Counter(datasets).items())),
        "training_subjects": sorted({split.subjects[key] for key in split.parts["train"]}),
        "fingerprint": fingerprint(store, read) if len(read) else None,
    }
    return {"pretrain": to_dict(config), **base_model(config.train.init), "step": step, "data": data}
