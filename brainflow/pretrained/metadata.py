"""What `config.json` may say beside the architecture, and the check that it says it in these types."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from brainflow.files import is_count, is_number

Check = tuple[Callable[[Any], bool], str]
"""Whether a value fits, and what is expected in words."""
MODES = ("finetune", "lora", "attentive", "linear", "mlp", "knn")
POOLINGS = ("bins", "moments", "cls", "last", "mean", "first", "tokens")
DTYPES = ("float16", "bfloat16", "float32", "float64")


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _maybe(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_table(value: Any) -> bool:
    return isinstance(value, dict)


def _positive(value: Any) -> bool:
    return is_number(value) and value > 0


def _classes(value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return False
    kind = type(value[0])
    return kind in (str, int, float, bool) and all(type(item) is kind for item in value) and _distinct(value)


def _distinct(value: list[Any]) -> bool:
    return len(set(value)) == len(value)


def _score(value: Any) -> bool:
    if not isinstance(value, dict) or not value.keys() >= {"value", "low", "high"}:
        return False
    ends = (value["low"], value["high"])
    return is_number(value["value"]) and (ends == (None, None) or all(map(is_number, ends)))


def _fingerprint(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    length = value.get("length")
    return (
        isinstance(length, list)
        and len(length) == 2
        and all(is_count(n) for n in length)
        and all(is_number(value.get(name)) for name in ("variance", "spectrum", "correlation"))
    )


def _windows(value: Any) -> bool:
    return isinstance(value, dict) and all(is_count(value.get(name, 0)) for name in ("seq_min", "seq_max"))


def _coordinates(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(point, list) and len(point) == 3 and all(is_number(x) for x in point) for point in value
    )


def _digests(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    listed = [one if isinstance(one, list) else [one] for one in value.values()]
    return all(
        _texts(few) and few and all(re.fullmatch("[0-9a-f]{64}", one) for one in few) for few in listed
    )


_TEXT: Check = (_maybe(_is_text), "text")
_TEXTS: Check = (_maybe(_texts), "a list of texts")
_TABLE: Check = (_maybe(_is_table), "a table")
_RUN_DATA: Check = (_maybe(_windows), "a table, seq_min and seq_max as whole numbers")
_ONE: Check = (is_number, "a number")
_SCORE: Check = (_score, "value, low and high as numbers")

SECTIONS: dict[str, dict[str, Check]] = {
    "data": {
        "store_snapshot": _TEXT,
        "parcellation": _TEXT,
        "normalisation": _TEXT,
        "network_names": _TEXTS,
        "network_coordinates": (_maybe(_coordinates), "a list of [x, y, z] in mm"),
        "preprocessing": _TABLE,
        "t_r": (
            _maybe(lambda v: isinstance(v, list) and all(_positive(one) for one in v)),
            "a list of positive numbers of seconds",
        ),
        "datasets": (
            _maybe(lambda v: isinstance(v, dict) and all(is_count(one) for one in v.values())),
            "numbers of runs by dataset",
        ),
        "training_subjects": _TEXTS,
        "subjects_salt": _TEXT,
        "people": (_maybe(is_count), "a number of people"),
        "fingerprint": (_maybe(_fingerprint), "length, variance, spectrum and correlation as numbers"),
    },
    "decoder": {
        "mode": (lambda v: v in MODES, f"one of {', '.join(MODES)}"),
        "pooling": (lambda v: v in POOLINGS, f"one of {', '.join(POOLINGS)}"),
        "classes": (_classes, "a list of different names of one type"),
        "examples": (is_count, "a whole number from 0"),
        "head": (lambda v: v in MODES, f"one of {', '.join(MODES)}"),
        "bins": (is_count, "a whole number from 1"),
        "layer": (
            _maybe(lambda v: v in ("input", "both", "all") or is_count(v)),
            "a whole number from 0, a name, or null",
        ),
    },
    "decoding": {
        "target": _TEXT,
        "split": _TEXT,
        "hrf_shift": _ONE,
        "interval_over": _TEXT,
        "subjects": _TEXTS,
        "people": (_maybe(is_count), "a number of people"),
        "accuracy": _SCORE,
        "balanced_accuracy": _SCORE,
        "macro_f1": _SCORE,
        "chance": _ONE,
    },
    "estimator": {
        "checkpoint": _TEXT,
        "t_r": (_positive, "a positive number of seconds"),
        "hrf_shift": _ONE,
        "normalise": (lambda v: isinstance(v, bool), "true or false"),
    },
    "legacy": {
        "dtype": (lambda v: v in DTYPES, f"one of {', '.join(DTYPES)}"),
        "names": (_texts, "a list of names"),
        "missing": (_texts, "a list of names"),
    },
    "pretrain": {"store": _TEXT, "out": _TEXT, "model": _TABLE, "data": _RUN_DATA, "train": _TABLE},
}
REQUIRED = {
    "decoder": ("mode", "pooling", "classes", "examples"),
    "decoding": ("split", "interval_over", "accuracy", "balanced_accuracy", "macro_f1", "chance"),
}
TOP: dict[str, Check] = {
    "base_model": (_maybe(_is_text), "the name of a model of the hub"),
    "step": (is_count, "a whole number from 0"),
    "sha256": (_digests, "a SHA-256 of 64 digits, or a list of them, by file"),
}


def check_facts(config: dict[str, Any], where: object) -> None:
    """Check the sections of a model's `config.json`; what is not known here is left alone.

    Raises
    ------
    ValueError
        If a value has another type than whoever reads it expects; `where` it stands and its name are given.
    """
    for name, check in TOP.items():
        if name in config:
            _check(config[name], check, where, name)
    for section, known in SECTIONS.items():
        values = config.get(section)
        if values is None:
            continue
        if not isinstance(values, dict):
            raise ValueError(f"{where}: {section}: got a {type(values).__name__}, expected a table")
        for name in REQUIRED.get(section, ()):
            if name not in values:
                raise ValueError(f"{where}: {section}.{name} is missing; use the file as it was written")
        for name, check in known.items():
            if name in values:
                _check(values[name], check, where, f"{section}.{name}")
    decoder = config.get("decoder")
    if decoder and (decoder["mode"] == "attentive") != (decoder["pooling"] == "tokens"):
        raise ValueError(
            f"{where}: decoder.pooling: got {decoder['pooling']!r} with mode {decoder['mode']}; tokens goes "
            "with attentive, and attentive with nothing else"
        )
    if decoder and not _head_fits(decoder):
        raise ValueError(
            f"{where}: decoder.head: got {decoder['head']!r} with mode {decoder['mode']}, expected that, or "
            "linear with finetune and lora"
        )
    if decoder and decoder["mode"] == "knn" and not decoder["examples"]:
        raise ValueError(
            f"{where}: decoder.examples: got 0 with mode knn, expected the number of its windows"
        )


def _head_fits(decoder: dict[str, Any]) -> bool:
    """Whether a head is one of its mode; a fitted one begins fine-tuning, and older decoders name none."""
    mode, head = decoder["mode"], decoder.get("head")
    return head in (None, mode) or (head == "linear" and mode in ("finetune", "lora"))


def _check(value: Any, check: Check, where: object, name: str) -> None:
    fits, expected = check
    try:
        good = fits(value)
    except TypeError:  # a value that cannot be compared, such as a list among names
        good = False
    if not good:
        shown = ascii(value) if isinstance(value, str | float | bool | None) else f"a {type(value).__name__}"
        raise ValueError(
            f"{where}: {name}: got {shown[:60]}, expected {expected}; use the file as it was written"
        )
