"""Registry of the learning frameworks: their names, what a run with one has to observe, and how to build one.

Torch-free: a command line is checked without it, and a framework's module is imported when one is built. A
package brings a framework of its own with :func:`register_framework`, in a module that its entry point of
the group `brainflow.frameworks` names. At the end stand the four of arXiv 2206.11417, with the settings of
their runs of 2022.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_origin, get_type_hints

from brainflow.config import ModelConfig, PretrainConfig
from brainflow.frameworks.configs import AutoencoderConfig, CSMConfig, NetBERTConfig, SeqBERTConfig

if TYPE_CHECKING:
    from brainflow.frameworks.base import Framework

GROUP = "brainflow.frameworks"
"""Group of the entry points: name = the framework's, value = the module that registers it."""
# The sampler's, written out: to import that would import torch.
_GAP = 4  # most time points between the halves of a pair
_Builder = TypeVar("_Builder", bound="Callable[[Any], Framework]")


@dataclass(frozen=True, kw_only=True)
class FrameworkSpec:
    """A registered framework.

    Attributes
    ----------
    name
        Value of `model.framework`.
    build
        Returns the module of a configuration, with fresh weights.
    config
        Class of its configuration: `ModelConfig`, or a frozen subclass with settings of its own. That has a
        default for each, the name for that of `framework`, and checks ranges.
    paired
        Whether it reads windows in pairs and learns whether the second half follows the first.
    special_tokens
        Tokens that it adds to a window.
    transformer
        Whether it is built of `brainflow.models.transformer`: only these can be compiled and recomputed.
    layers
        Preset → number of layers, where they are others than those of `brainflow.recipes.SIZES`; presets that
        are not named are refused then.
    usual
        Settings that every run of it has but those of its paper.
    lr
        Preset → peak learning rate, where it is another than that of `brainflow.recipes.SIZES`.
    published
        Section → setting → value: of a run of its paper, for `--preset published`.
    """

    name: str
    build: Callable[[Any], Framework]
    config: type[ModelConfig] = ModelConfig
    paired: bool = False
    special_tokens: int = 0
    transformer: bool = True
    layers: Mapping[str, int] = field(default_factory=dict)
    usual: Mapping[str, Any] = field(default_factory=dict)
    lr: Mapping[str, float] = field(default_factory=dict)
    published: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


_SPECS: dict[str, FrameworkSpec] = {}


def register_framework(name: str, **facts: Any) -> Callable[[_Builder], _Builder]:
    """Return a decorator that registers a framework's class, or a function that returns its module.

    Parameters
    ----------
    name
        What `model.framework` calls it.
    facts
        Further attributes of :class:`FrameworkSpec`.

    Raises
    ------
    ValueError
        If the name is taken, or `config` has a setting that no file can hold or that has no default.
    """
    _check_config(facts.get("config", ModelConfig))

    def register(build: _Builder) -> _Builder:
        if name in _SPECS:
            raise ValueError(f"name: {name!r} is a registered framework already; choose another name")
        _SPECS[name] = FrameworkSpec(name=name, build=build, **facts)
        return build

    return register


def _check_config(config: type[ModelConfig]) -> None:
    """Refuse settings before a model is trained with them that could not be read back."""
    types = get_type_hints(config)
    for setting in fields(config):
        kind = types[setting.name]
        if setting.default is MISSING or (
            kind not in (bool, int, float, str) and get_origin(kind) is not Literal
        ):
            raise ValueError(
                f"config: got {config.__name__}.{setting.name}: {setting.type}, expected a bool, int, float, "
                "str or Literal of texts, with a default"
            )


def framework_names() -> list[str]:
    """Return the names of all frameworks, those of installed packages included, without importing them."""
    return list(dict.fromkeys([*_SPECS, *(point.name for point in entry_points(group=GROUP))]))


def framework_spec(name: str) -> FrameworkSpec:
    """Return what is registered under a name; imports the package whose entry point has it.

    Raises
    ------
    ValueError
        If there is no such framework, or its package cannot be imported.
    """
    if name not in _SPECS:
        for point in entry_points(group=GROUP, name=name):
            try:
                point.load()
            except (ImportError, AttributeError) as error:
                raise ValueError(
                    f"model.framework: {name!r} is brought by {point.value}, which cannot be imported "
                    f"({error}); install that package again"
                ) from error
    if name not in _SPECS:
        names = framework_names()
        near = difflib.get_close_matches(name, names, n=1)
        raise ValueError(
            f"model.framework: got {ascii(name)[:60]}, expected one of {', '.join(names)}"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
    return _SPECS[name]


def registered() -> list[FrameworkSpec]:
    """Return what is registered by now, without packages that nobody has asked for."""
    return list(_SPECS.values())


def own_config(config: ModelConfig) -> ModelConfig:
    """Return a configuration as its framework's class, a plain `ModelConfig` with the defaults of the rest.

    Raises
    ------
    ValueError
        If there is no framework of that name, or the configuration is of another framework's class.
    """
    wanted = framework_spec(config.framework).config
    if type(config) is ModelConfig:
        return wanted(**vars(config))
    if type(config) is not wanted:
        raise ValueError(
            f"model: got {type(config).__name__} with model.framework={config.framework}, expected "
            f"{wanted.__name__}; give it the framework that it belongs to"
        )
    return config


def build(config: ModelConfig) -> Framework:
    """Return the framework that `config.framework` names, with fresh weights.

    Raises
    ------
    ValueError
        If there is no framework of that name, or the configuration is of another framework's class.

    Examples
    --------
    >>> module = build(ModelConfig(framework="csm", networks=8, width=16, layers=1, heads=2))
    >>> module.config.masking
    'dense'
    """
    return framework_spec(config.framework).build(own_config(config))


def check_framework(config: PretrainConfig) -> None:
    """Check that a run's settings fit its framework.

    Raises
    ------
    ValueError
        If they do not, or there is no such framework; the message names the setting.
    """
    model, data = config.model, config.data
    spec = framework_spec(model.framework)
    own_config(model)
    if model.positions == "learned" and data.seq_max - 1 + spec.special_tokens > model.max_positions:
        added = f" and {spec.name} adds {spec.special_tokens} special tokens" if spec.special_tokens else ""
        raise ValueError(
            f"data.seq_max: got {data.seq_max}, but model.max_positions is {model.max_positions}{added}; "
            "raise model.max_positions or shorten the windows"
        )
    if spec.paired and data.seq_min < _GAP + 2:
        raise ValueError(
            f"data.seq_min: got {data.seq_min}, expected at least {_GAP + 2} with model.framework="
            f"{spec.name}, which cuts a window in two halves with a gap of up to {_GAP} time points"
        )
    if not spec.transformer and (config.train.compile == "on" or model.recompute):
        asked = "train.compile: got on" if config.train.compile == "on" else "model.recompute: got True"
        raise ValueError(
            f"{asked} with model.framework={spec.name}, which has no transformer blocks; leave it out"
        )


def _published(lr: float, batch_size: int, layers: int, dropout: float, **model: Any) -> dict[str, Any]:
    return {
        "model": {"layers": layers, "width": 768, "heads": 12, "dropout": dropout, **model},
        "data": {"batch_size": batch_size, "validation_batches": 1000},
        "train": {"lr": lr, "steps": 300_000, "validate_every": 10_000, "checkpoint_every": 10_000},
    }


@register_framework(
    "csm",
    config=CSMConfig,
    usual={"masking": "next"},
    lr={"tiny": 2e-3},  # orders of events are decoded better, the story is forecast as well (dev/log.md)
    published=_published(5e-4, 192, 4, 0.1, masking="single"),
)
def _csm(config: CSMConfig) -> Framework:
    from brainflow.frameworks.csm import CSM

    return CSM(config)


_BERT: dict[str, Any] = {
    "paired": True,
    "special_tokens": 3,  # CLS and two SEP
    "published": _published(1e-4, 96, 4, 0.1),
}


# By neighbours it explains .41 of the story's variance after 300 steps, by the token .31 (dev/log.md).
@register_framework("seq-bert", config=SeqBERTConfig, usual={"mask_fill": "neighbours"}, **_BERT)
def _seq_bert(config: SeqBERTConfig) -> Framework:
    from brainflow.frameworks.seq_bert import SeqBERT

    return SeqBERT(config)


@register_framework("net-bert", config=NetBERTConfig, **_BERT)
def _net_bert(config: NetBERTConfig) -> Framework:
    from brainflow.frameworks.net_bert import NetBERT

    return NetBERT(config)


@register_framework(
    "autoencoder",
    config=AutoencoderConfig,
    transformer=False,
    layers={"tiny": 2, "small": 2, "base": 2},  # more were never trained
    published=_published(2e-4, 192, 2, 0.2),
)
def _autoencoder(config: AutoencoderConfig) -> Framework:
    from brainflow.frameworks.autoencode import Autoencoder

    return Autoencoder(config)
