"""Registry of the learning frameworks: their names, what a run with one has to observe, and how to build one.

Torch-free: a command line is checked without it, and a framework's module is imported when one is built. A
package brings a framework of its own with :func:`register_framework`, in a module that its entry point of
the group `brainflow.frameworks` names. At the end stand the four of arXiv 2206.11417, with the settings of
their runs of 2022.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, TypeVar

from brainflow.config import ModelConfig, PretrainConfig

if TYPE_CHECKING:
    from brainflow.frameworks.base import Framework
from typing import TYPE_CHECKING

GROUP = "brainflow.frameworks"
"""Group of the entry points: name = the framework's, value = the module that registers it."""
_GAP = 4  # most time points between the halves of a pair
_Builder = TypeVar("_Builder", bound="Callable[[ModelConfig], Framework]")


@dataclass(frozen=True, kw_only=True)
class FrameworkSpec:
    """A registered framework.

    Attributes
    ----------
    name
        Value of `model.framework`.
    build
        Returns the module of a configuration, with fresh weights.
    paired
        Whether it reads windows in pairs and learns whether the second half follows the first.
    special_tokens
        Tokens that it adds to a window.
    transformer
        Whether it is built of `brainflow.models.transformer`: only these can be compiled and recomputed.
    published
        Section → setting → value: of a run of its paper, for `--preset published`.
    check
        Checks how its settings go together: raises ValueError, naming the setting. (The range of a setting is
        checked in `ModelConfig`, whoever reads it.)
    """

    name: str
    build: Callable[[ModelConfig], Framework]
    paired: bool = False
    special_tokens: int = 0
    transformer: bool = True
    published: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    check: Callable[[ModelConfig], None] | None = None


_SPECS: dict[str, FrameworkSpec] = {}


def register_framework(name: str, **facts: Any) -> Callable[[_Builder], _Builder]:
    """Return a decorator that registers a :class:`~brainflow.frameworks.base.Framework` or a function that
    returns one.

    Parameters
    ----------
    name
        What `model.framework` calls it.
    facts
        Further attributes of :class:`FrameworkSpec`.

    Raises
    ------
    ValueError
        If the name is taken.
    """

    def register(build: _Builder) -> _Builder:
        if name in _SPECS:
            raise ValueError(f"name: {name!r} is a registered framework already; choose another name")
        _SPECS[name] = FrameworkSpec(name=name, build=build, **facts)
        return build

    return register


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


def build(config: ModelConfig) -> Framework:
    """Return the framework that `config.framework` names, with fresh weights.

    Raises
    ------
    ValueError
        If there is no framework of that name, or it refuses a setting.

    Examples
    --------
    >>> module = build(ModelConfig(framework="csm", networks=8, width=16, layers=1, heads=2))
    >>> module.config.masking
    'dense'
    """
    spec = framework_spec(config.framework)
    if spec.check is not None:
        spec.check(config)
    return spec.build(config)


def check_framework(config: PretrainConfig) -> None:
    """Check that a run's settings fit its framework.

    Raises
    ------
    ValueError
        If they do not, or there is no such framework; the message names the setting.
    """
    model, data = config.model, config.data
    spec = framework_spec(model.framework)
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
    if spec.check is not None:
        spec.check(model)


def _published(lr: float, batch_size: int, layers: int, dropout: float, **model: Any) -> dict[str, Any]:
    return {
        "model": {"layers": layers, "width": 768, "heads": 12, "dropout": dropout, **model},
        "data": {"batch_size": batch_size, "validation_batches": 1000},
        "train": {"lr": lr, "steps": 300_000, "validate_every": 10_000, "checkpoint_every": 10_000},
    }


def _check_masking(model: ModelConfig) -> None:
    """Refuse a form of CSM, which no other framework has."""
    if model.masking != "dense":
        raise ValueError(
            f"model.masking: got {model.masking} with model.framework={model.framework}, expected csm; leave "
            "it out"
        )


@register_framework("csm", published=_published(5e-4, 192, 4, 0.1, masking="single"))
def _csm(config: ModelConfig) -> Framework:
    from brainflow.frameworks.csm import CSM

    return CSM(config)


_BERT: dict[str, Any] = {
    "paired": True,
    "special_tokens": 3,  # CLS and two SEP
    "published": _published(1e-4, 96, 4, 0.1),
    "check": _check_masking,
}


@register_framework("seq-bert", **_BERT)
def _seq_bert(config: ModelConfig) -> Framework:
    from brainflow.frameworks.seq_bert import SeqBERT

    return SeqBERT(config)


@register_framework("net-bert", **_BERT)
def _net_bert(config: ModelConfig) -> Framework:
    from brainflow.frameworks.net_bert import NetBERT

    return NetBERT(config)


@register_framework(
    "autoencoder", transformer=False, published=_published(2e-4, 192, 2, 0.2), check=_check_masking
)
def _autoencoder(config: ModelConfig) -> Framework:
    from brainflow.frameworks.autoencode import Autoencoder

    return Autoencoder(config)
