"""Settings as files and command lines hold them, checked for the framework that they are for; torch-free."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from brainflow.config import DataConfig, ModelConfig, PretrainConfig, TrainConfig
from brainflow.frameworks.registry import framework_spec, registered

Section = type[ModelConfig] | type[DataConfig] | type[TrainConfig]
SECTIONS = ("model", "data", "train")
MOST_FLOAT = 1.7e308  # what JSON calls a number may be an integer that no float holds


def sections(framework: str) -> dict[str, Section]:
    """Return section → the dataclass of its settings, those of the framework's own included.

    Raises
    ------
    ValueError
        If there is no such framework.
    """
    return {"model": framework_spec(framework).config, "data": DataConfig, "train": TrainConfig}


def model_config(framework: Any = "csm", **settings: Any) -> ModelConfig:
    """Return the configuration of a framework's model, of the framework's own class.

    Raises
    ------
    ValueError
        If there is no such framework or setting, or a value is not of its type or not in its range; the
        message names the setting.

    Examples
    --------
    >>> model_config("seq-bert", mask_rate=0.3).mask_fill
    'token'
    """
    values = {"framework": framework, **settings}
    check_settings({"model": values})
    return framework_spec(framework).config(**values)


def pretrain_config(values: Any) -> PretrainConfig:
    """Return the run that nested dicts describe, section → setting → value.

    Raises
    ------
    ValueError
        As :func:`check_settings`, or if a value is not in its range, or `store` or `out` is missing.
    """
    check_settings(values)
    for name in ("store", "out"):
        if name not in values:
            raise ValueError(f"{name}: is missing, expected a path")
    model, data, train = (values.get(section, {}) for section in SECTIONS)
    made = {"model": model_config(**model), "data": DataConfig(**data), "train": TrainConfig(**train)}
    return PretrainConfig(**{**values, **made})


def check_settings(values: Any, framework: str | None = None) -> None:
    """Check that nested dicts hold settings of a run and values of their types.

    Parameters
    ----------
    values
        Section → setting → value, and the settings of no section.
    framework
        Whose settings they are; by default that of `model.framework`, or else csm.

    Raises
    ------
    ValueError
        If a key is no setting, or one of another framework, or a value is not of its type; the message gives
        its full name and what to do.
    """
    if not isinstance(values, dict):
        raise ValueError(f"settings: got {_short(values)}, expected a table of settings and their values")
    model = values.get("model")
    named = model.get("framework", "csm") if isinstance(model, dict) else "csm"
    if not isinstance(named, str):
        raise ValueError(f"model.framework: got {_short(named)}, expected text")
    framework = framework or named
    known = sections(framework)
    if isinstance(model, dict):
        refuse_foreign(model, framework)
    _check(PretrainConfig, {key: value for key, value in values.items() if key not in known}, "", known)
    for section in filter(values.__contains__, SECTIONS):
        if not isinstance(values[section], dict):
            raise ValueError(f"{section}: got {_short(values[section])}, expected a table")
        _check(known[section], values[section], f"{section}.", known)


def refuse_foreign(names: Iterable[str], framework: str) -> None:
    """Refuse settings of the section `model` that other frameworks have and this one has not.

    Raises
    ------
    ValueError
        Naming the setting and whose it is.
    """
    for name in names:
        if owners := _owners(name, framework):
            raise ValueError(
                f"model.{name}: is a setting of {' and '.join(owners)}, not of {framework}; leave it out"
            )


def without_foreign(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the section `model` of what an older version saved, which held the settings of all frameworks.

    Those of other frameworks are left out, whatever their values: nothing ever read them.
    """
    framework = model.get("framework", "csm")
    if not isinstance(framework, str):
        return dict(model)  # refused where it is read
    return {name: value for name, value in model.items() if not _owners(name, framework)}


def _owners(name: str, framework: str) -> list[str]:
    """Return the frameworks that have a setting which this one has not."""
    if name in _names(framework_spec(framework).config):
        return []
    return [spec.name for spec in registered() if name in _names(spec.config)]


def _names(config: Any) -> list[str]:
    return [field.name for field in fields(config)]


def _check(config: Any, values: Mapping[str, Any], prefix: str, known: Mapping[str, Section]) -> None:
    names, types = _names(config), get_type_hints(config)
    for key, value in values.items():
        if key not in names:
            raise ValueError(f"unknown setting {_short(prefix + key)}; {_suggest(key, names, prefix, known)}")
        if isinstance(value, dict):
            raise ValueError(f"{prefix + key}: got {_short(value)}, expected a single value")
        fits, expected = _fits(types[key], value)
        if not fits:
            raise ValueError(f"{prefix + key}: got {_short(value)}, expected {expected}")


def _fits(kind: Any, value: Any) -> tuple[bool, str]:
    """Return whether a value is of the type of a field, and what that type is in words."""
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind), f"one of {', '.join(get_args(kind))}"
    if kind is bool:
        return isinstance(value, bool), "true or false"
    if kind is str:
        return isinstance(value, str), "text"
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return number and isinstance(value, int) and abs(value) < 2**63, "a whole number"
    return number and abs(value) <= MOST_FLOAT, "a finite number"


def _short(value: Any) -> str:
    """Return a value of any size for a message."""
    try:
        shown = ascii(value) if isinstance(value, str) else repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits
        return f"a value of type {type(value).__name__}"
    return shown if len(shown) <= 60 else f"{shown[:57]}…"


def _suggest(key: str, names: list[str], prefix: str, known: Mapping[str, Section]) -> str:
    """Name the nearest setting, one of another section included."""
    elsewhere = [section for section, config in known.items() if key in _names(config)]
    if elsewhere:
        return f"did you mean {elsewhere[0] + '.' + key!r}?"
    if near := difflib.get_close_matches(key, names, n=1):
        return f"did you mean {prefix + near[0]!r}?"
    return f"known: {', '.join(prefix + name for name in names)}"
