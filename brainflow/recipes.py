"""Whole configurations as functions: model sizes with the settings that go with them, and the runs of 2022.

Torch-free. A preset is what `brainflow pretrain --preset NAME` sets; the command line wins over it.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from brainflow.config import DataConfig, FrameworkName, ModelConfig, PretrainConfig, TrainConfig

PresetName = Literal["tiny", "small", "published", "base", "large", "1b"]
Settings = dict[str, dict[str, Any]]

# Blocks, width, heads, peak learning rate. tiny and small run on a laptop; base to 1b are as wide and deep as
# GPT-2 and GPT-3 of that size (arXiv 2005.14165, table 2.1), with about half of their learning rates.
SIZES: dict[str, tuple[int, int, int, float]] = {
    "tiny": (2, 128, 2, 1e-3),
    "small": (4, 256, 4, 5e-4),
    "base": (12, 768, 12, 3e-4),
    "large": (24, 1024, 16, 1.5e-4),
    "1b": (20, 2048, 16, 1e-4),
}
# Learning rate, batch size, blocks, dropout (arXiv 2206.11417).
PUBLISHED: dict[str, tuple[float, int, int, float]] = {
    "csm": (5e-4, 192, 4, 0.1),
    "seq-bert": (1e-4, 96, 4, 0.1),
    "net-bert": (1e-4, 96, 4, 0.1),
    "autoencoder": (2e-4, 192, 2, 0.2),
}


def preset(name: str, framework: str = "csm") -> Settings:
    """Return section → setting → value of a preset.

    Raises
    ------
    ValueError
        If there is no such preset or framework, or the framework has none of that size.

    Examples
    --------
    >>> preset("small")["model"]
    {'layers': 4, 'width': 256, 'heads': 4}
    """
    if name not in get_args(PresetName):
        raise ValueError(f"preset: got {name!r}, expected one of {', '.join(get_args(PresetName))}")
    if framework not in PUBLISHED:
        raise ValueError(f"model.framework: got {framework!r}, expected one of {', '.join(PUBLISHED)}")
    if name == "published":
        lr, batch, layers, dropout = PUBLISHED[framework]
        return {
            "model": {"layers": layers, "width": 768, "heads": 12, "dropout": dropout}
            | ({"masking": "single"} if framework == "csm" else {}),
            "data": {"batch_size": batch, "validation_batches": 1000},
            "train": {"lr": lr, "steps": 300_000, "validate_every": 10_000, "checkpoint_every": 10_000},
        }
    layers, width, heads, lr = SIZES[name]
    if framework == "autoencoder":
        if width > 768:
            raise ValueError(
                f"preset: got {name} for the autoencoder, expected tiny, small, base or published: "
                "LSTMs of that size are not trained"
            )
        layers = 2
    settings: Settings = {"model": {"layers": layers, "width": width, "heads": heads}, "train": {"lr": lr}}
    if name == "1b":
        settings["model"]["recompute"] = True
    return settings


def pretraining(
    store: str, out: str, *, preset_name: PresetName = "published", framework: FrameworkName = "csm"
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
        model=ModelConfig(framework=framework, **found.get("model", {})),
        data=DataConfig(**found.get("data", {})),
        train=TrainConfig(**found.get("train", {})),
    )
