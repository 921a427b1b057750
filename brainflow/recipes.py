"""Whole configurations as functions: model sizes with the settings that go with them, and the runs of 2022.

Torch-free. A preset is what `brainflow pretrain --preset NAME` sets; the command line wins over it.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from brainflow.config import DataConfig, PretrainConfig, TrainConfig
from brainflow.frameworks import framework_spec, model_config

PresetName = Literal["tiny", "small", "published", "base", "large", "1b"]
Settings = dict[str, dict[str, Any]]

# What every run has but those of 2022: forecasts that begin at the linear predictor, amplitudes that survive
# the embedding, positions that mean the same in longer windows and at another TR, no over-fitted last step.
MODEL: dict[str, Any] = {
    # What explained variance measures.
    "loss": "mse",
    "positions": "seconds",
    "time_encoding": "none",
    "embedding_norm": False,
    # Post-LN BERTs of these sizes do not start to learn for thousands of steps.
    "norm_first": True,
    "linear": True,
}
# Blocks, width, heads, peak learning rate. tiny and small run on a laptop; base to 1b are as wide and deep as
# GPT-2 and GPT-3 of that size (arXiv 2005.14165, table 2.1), with about half of their learning rates.
SIZES: dict[str, tuple[int, int, int, float]] = {
    "tiny": (3, 128, 4, 1e-3),
    "small": (4, 256, 4, 5e-4),
    "base": (12, 768, 12, 3e-4),
    "large": (24, 1024, 16, 1.5e-4),
    "1b": (20, 2048, 16, 1e-4),
}

# Settings that say how large a model is; initial weights do, too.
SIZED_BY = ("model.layers", "model.width", "model.heads", "train.init", "init")
# What `pretrain` takes where none of them is given: by kind of machine, a preset from so many time points on.
FITTING: dict[str, tuple[tuple[int, PresetName], ...]] = {
    "cpu": ((0, "tiny"), (2_000_000, "small")),
    "cuda": ((0, "tiny"), (200_000, "small"), (2_000_000, "base")),
}
# Windows to train on where no number of steps is given: so many for so many time points, and with the square
# root of the time points more. Two or three blocks of width 128 had enough of 13,000 to 29,000 windows for 24
# people of 300 volumes, of 64,000 for 300 people, and gained up to 128,000 for 2,000.
WINDOWS = (64_000, 90_000)
FEWEST_STEPS, MOST_STEPS = 200, 300_000


def today(framework: str = "csm") -> Settings:
    """Return what every run has, whatever its size, unless it repeats one of 2022.

    Raises
    ------
    ValueError
        If there is no such framework.

    Examples
    --------
    >>> today()["model"]["masking"]
    'next'
    """
    return {"model": {**MODEL, **framework_spec(framework).usual}, "train": {"keep_best": True}}


def preset(name: str, framework: str = "csm") -> Settings:
    """Return section → setting → value of a preset.

    Raises
    ------
    ValueError
        If there is no such preset or framework, or the framework has none of that size.

    Examples
    --------
    >>> found = preset("small")
    >>> found["model"]["layers"], found["model"]["width"], found["train"]["lr"]
    (4, 256, 0.0005)
    """
    if name not in get_args(PresetName):
        raise ValueError(f"preset: got {name!r}, expected one of {', '.join(get_args(PresetName))}")
    spec = framework_spec(framework)
    if name == "published":
        if not spec.published:
            raise ValueError(f"preset: got published for {framework}, of which no run is; take tiny or small")
        return {section: dict(settings) for section, settings in spec.published.items()}
    layers, width, heads, lr = SIZES[name]
    if spec.layers:
        if name not in spec.layers:
            known = [*spec.layers, *(["published"] if spec.published else [])]
            raise ValueError(f"preset: got {name} for {framework}, expected one of {', '.join(known)}")
        layers = spec.layers[name]
    settings = today(framework)
    settings["model"] |= {"layers": layers, "width": width, "heads": heads}
    settings["train"]["lr"] = spec.lr.get(name, lr)
    if name == "1b":
        settings["model"]["recompute"] = True
    return settings


def pretraining(
    store: str, out: str, *, preset_name: PresetName = "published", framework: str = "csm"
) -> PretrainConfig:
    """Return a whole run of a preset.

    Examples
    --------
    >>> pretraining("store", "run", framework="seq-bert").data.batch_size
    96
    """
    found = preset(preset_name, framework)
    return PretrainConfig(
        store=store,
        out=out,
        model=model_config(framework, **found.get("model", {})),
        data=DataConfig(**found.get("data", {})),
        train=TrainConfig(**found.get("train", {})),
    )
