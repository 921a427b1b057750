"""brainflow models in Brainmarks (`brainmarks` on PyPI), which finds this file in its namespace.

`brainmarks` and `brainmarks.models` are namespace packages: several distributions put files of their own
there, and each removes its own. This file has the name of our distribution, so that a wrapper of theirs may
be called `brainflow.py`. The model is the keyword argument `ckpt_path`, or the environment variable
BRAINFLOW_MODEL.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from brainmarks.models.base import Embeddings, ModelTransform, ModelWrapper
from brainmarks.models.registry import register_model
from torch import Tensor

from brainflow.batch import PackedBatch, Windows
from brainflow.decoding.readout import Readout
from brainflow.pretrained.compatibility import TR_TOLERANCE, longest_window, signal_differences
from brainflow.pretrained.format import load_pretrained, read_config
from brainflow.pretrained.hub import fetch
from brainflow.storage.normalise import kind_of, normalise

SPACES = {
    "Schaefer400n17": ("schaefer400", 400),
    "TianS3Schaefer400n17": ("schaefer400_tians3", 450),
    "A424": ("a424", 424),
}
"""Our parcellation → Brainmarks' space of the same parcels in the same order, and their number. Brainmarks
orders Schaefer's parcels by 17 networks, and has Tian's subcortex before them."""
READOUT = Readout(pooling="tokens", layer="both")


class BrainflowTransform(ModelTransform):
    """Brings a run to a repetition time and the normalisation that the model was trained on.

    Parameters
    ----------
    data
        Section `data` of the model's `config.json`.
    """

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data
        self.t_r = data.get("t_r") or []
        self.kind = kind_of(data.get("normalisation")) or "none"

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Return the sample with `bold`, float32 [time, networks], and `tr` in seconds.

        Raises
        ------
        ValueError
            If its values are still not like those that the model was trained on.
        """
        bold, t_r = np.asarray(sample["bold"], np.float32), float(sample["tr"])
        if self.t_r:
            low, high = min(self.t_r), max(self.t_r)
            if not low * (1 - TR_TOLERANCE) <= t_r <= high * (1 + TR_TOLERANCE):
                from brainmarks import nisc  # draws surfaces, too, which costs seconds

                wanted = min(max(t_r, low), high)
                # the filter against aliases pads runs by 27 time points
                bold = nisc.resample_timeseries(bold, t_r, wanted, antialias=len(bold) > 27)
                t_r = wanted
        values = np.asarray(normalise(bold, self.kind), np.float32)
        found = signal_differences(self.data, values)
        if found:
            raise ValueError(f"bold: does not fit the model: {'; '.join(found)}")
        return {**sample, "bold": torch.from_numpy(values), "tr": t_r}


class BrainflowWrapper(ModelWrapper):
    """Embedding and last states of a brainflow model side by side: of each time point, and their mean.

    Parameters
    ----------
    folder
        Folder of a saved model.
    space
        Brainmarks' name of the parcels.
    """

    def __init__(self, folder: str | os.PathLike[str], space: str) -> None:
        super().__init__()
        self.__space__ = space
        self.module = load_pretrained(folder).requires_grad_(False)
        self.longest = longest_window(read_config(folder), self.module.config)

    def forward(self, batch: dict[str, Tensor]) -> Embeddings:
        """Embed `bold` [runs, time, networks] with `tr` [runs] in seconds, in windows as in training."""
        bold = batch["bold"].float()
        runs, time, networks = bold.shape
        parts = -(-time // self.longest)
        lengths = np.diff(np.linspace(0, time, parts + 1).round().astype(int))
        windows = Windows.end_to_end(np.tile(lengths, runs), t_r=np.repeat(batch["tr"].tolist(), parts))
        states = READOUT(self.module, PackedBatch.pack(bold.reshape(-1, networks), windows))
        states = states.reshape(runs, time, -1)
        return Embeddings(cls_embeds=states.mean(1, keepdim=True), reg_embeds=None, patch_embeds=states)


@register_model
def brainflow(
    ckpt_path: str | None = None, space: str | None = None, **_: Any
) -> tuple[BrainflowTransform, BrainflowWrapper]:
    """Return a brainflow model with its transform.

    Parameters
    ----------
    ckpt_path
        Folder of a model or `owner/name` on the hub; by default BRAINFLOW_MODEL.
    space
        Brainmarks' space, where the model's parcellation does not say it; whoever gives it vouches for the
        order of the parcels.

    Raises
    ------
    ValueError
        If there is no model, or its parcels are not those of a space.
    """
    name = ckpt_path or os.environ.get("BRAINFLOW_MODEL")
    if not name:
        raise ValueError("ckpt_path: got none; give a brainflow model, or set BRAINFLOW_MODEL")
    folder = fetch(name)
    config = read_config(folder)
    data = config.get("data") or {}
    networks, parcellation = config["model"]["networks"], str(data.get("parcellation"))
    if space is None:
        space, expected = SPACES.get(parcellation, ("", 0))
        if networks != expected:
            raise ValueError(
                f"ckpt_path: {name} has {networks} networks of {ascii(parcellation)[:60]}, expected one of "
                f"{', '.join(SPACES)} (`--atlas schaefer-400-17`, `tian-s3+schaefer-400-17`, `a424`); give "
                "space if its parcels are those of a space of Brainmarks, in that order"
            )
    return BrainflowTransform(data), BrainflowWrapper(folder, space)
