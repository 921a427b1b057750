"""Trained models on disk: `model.safetensors` beside a `config.json` that says how to build and feed them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from brainflow.config import ModelConfig
from brainflow.files import digest, is_count, is_number, open_regular, read_json
from brainflow.frameworks import build, model_config
from brainflow.frameworks.settings import without_foreign
from brainflow.storage.files import replacing, write_text

WEIGHTS, HEAD, CONFIG, CARD = "model.safetensors", "head.safetensors", "config.json", "README.md"
DIGESTS = "sha256"
FORMAT = 1
SHIPPED = Path(__file__).parent / "shipped"
"""Models that come with the package: a folder each, under the name that they are asked for by."""
FLOATS = {"F64", "F32", "F16", "BF16"}
"""Element types of weights in safetensors files; all of ours are F32."""


def save_pretrained(
    module: nn.Module,
    directory: str | os.PathLike[str],
    extra: Mapping[str, Any] | None = None,
    files: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Path:
    """Write a framework module in release form; files of an earlier save are replaced one by one.

    Parameters
    ----------
    module
        A module from `brainflow.frameworks.build`.
    directory
        Folder; made if absent.
    extra
        JSON-ready facts that whoever uses the weights needs: TR, normalisation, parcellation, training data.
        They stand in `config.json` beside "model", "format" and "sha256".
    files
        More safetensors files for the folder, by name: the head of a decoder.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ValueError
        If `extra` has a key "model", "format" or "sha256".
    OSError
        If a file cannot be written, as on a full disk; it is named.
    """
    extra = dict(extra or {})
    for key in ("model", "format", DIGESTS):
        if key in extra:
            raise ValueError(f"extra: got a key {key!r}, which config.json uses itself; rename it")
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"format": FORMAT, "model": asdict(module.config), **extra}  # type: ignore[call-overload]
    earlier = _earlier_digests(folder)
    new: dict[str, str] = {}
    with ExitStack() as renames:  # all files are whole on disk before the first is renamed
        for name, tensors in {WEIGHTS: module.state_dict(), **(files or {})}.items():
            partial = Path(renames.enter_context(replacing(folder / name)).name)
            _save_tensors(partial, tensors, folder / name)
            new[name] = digest(partial)
        # whoever is killed between two renames leaves a folder that loads, with the old weights or the new
        both = {name: [new[name], *earlier.get(name, ())] for name in new}
        write_text(folder / CONFIG, _config_text({**config, DIGESTS: both}))
    write_text(folder / CONFIG, _config_text({**config, DIGESTS: new}))
    return folder


def _config_text(config: dict[str, Any]) -> str:
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def _save_tensors(path: Path, tensors: Mapping[str, Tensor], target: Path) -> None:
    # safetensors takes contiguous tensors alone.
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    try:
        # By this the hub's loaders tell PyTorch's files from TensorFlow's.
        save_file(plain, path, metadata={"format": "pt"})
        with path.open("rb") as file:  # save_file renames a file of its own, which nobody has flushed
            os.fsync(file.fileno())
    except SafetensorError as error:  # its way to say that the disk is full
        raise OSError(
            f"{target}: could not be written ({error}); free space, then run the same command again"
        ) from error


def _earlier_digests(folder: Path) -> dict[str, list[str]]:
    """Return the digests of the files that an earlier save left, none where it recorded none."""
    try:
        found = read_config(folder).get(DIGESTS, {})
    except (ValueError, OSError):  # nothing there that could be loaded
        return {}
    return {name: [one] if isinstance(one, str) else one for name, one in found.items()}


def located(name: str | os.PathLike[str]) -> Path:
    """Return the folder of a model on this machine: a path, or else that of a model that ships by this name.

    Examples
    --------
    >>> located("story-small").is_dir(), located("./story-small").is_dir()
    (True, False)
    """
    path = Path(name)
    shipped = SHIPPED / path.name
    if os.fspath(name) == path.name and not path.exists() and (shipped / CONFIG).is_file():
        return shipped
    return path


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Return `config.json` of a model, saved or shipped: "model", "format" and what `extra` held.

    Raises
    ------
    FileNotFoundError
        If the folder holds no saved model.
    ValueError
        If the file is no model configuration that this version reads; the message names what is wrong in it.
    """
    path = located(directory) / CONFIG
    if not path.exists():
        raise FileNotFoundError(
            f"{directory}: no {CONFIG} there; expected a folder that `brainflow pretrain` or "
            "`brainflow import-checkpoint` wrote"
        )
    config = read_json(path)
    if not isinstance(config.get("model"), dict):
        raise ValueError(f"{path}: no 'model' section; expected the config.json of a brainflow model")
    if config.get("format") != FORMAT:
        raise ValueError(
            f"{path}: got format {ascii(config.get('format'))[:60]}, but this version reads format {FORMAT}; "
            "use the version of brainflow that wrote it"
        )
    check_facts(config, path)
    try:
        model = model_config(**without_foreign(config["model"]))
    except ValueError as error:
        raise ValueError(f"{path}: {error}; use the file as it was written") from None
    return {**config, "model": asdict(model)}  # with the defaults of settings that are younger than the file


def load_pretrained(directory: str | os.PathLike[str]) -> nn.Module:
    """Return the framework module of a folder or a shipped model, on the CPU and in evaluation mode.

    Raises
    ------
    FileNotFoundError
        If the folder holds no saved model.
    ValueError
        If configuration and weights do not fit together, or the weights are not those that the configuration
        was written with; the message names the tensors or the file.
    """
    folder = located(directory)
    saved = read_config(folder)
    config = model_config(**saved["model"])
    path = folder / WEIGHTS
    if not path.exists():
        raise FileNotFoundError(f"{folder}: no {WEIGHTS} beside {CONFIG}; copy both files of a model")
    with TensorFile(path) as tensors:
        # Before `outline`, which would build as many layers as the configuration says.
        if config.layers > len(tensors.shapes):
            raise ValueError(
                f"{path}: weights do not fit the model's configuration: {len(tensors.shapes)} tensors for "
                f"{config.layers} layers"
            )
        # Cheap ones first: shapes are in the header, the digest reads the whole file.
        tensors.check(outline(config, str(path)))
        check_digest(path, saved)
        weights = tensors.read()
    module = build(config)
    module.load_state_dict(weights)
    return module.eval()


def outline(config: ModelConfig, origin: str) -> dict[str, Tensor]:
    """Return a model's state without values, which needs no memory however large it says that it is.

    Raises
    ------
    ValueError
        If there can be no such model; `origin` is named.
    """
    try:
        with torch.device("meta"):
            return build(config).state_dict()
    except (RuntimeError, TypeError, OverflowError) as error:
        raise ValueError(f"{origin}: no model can be as large as the configuration says ({error})") from None


def check_digest(path: Path, config: Mapping[str, Any]) -> None:
    """Compare a file with its SHA-256 in `config.json`; models of older versions have none.

    Raises
    ------
    ValueError
        If it is another file.
    """
    wanted = config.get(DIGESTS, {}).get(path.name)
    if wanted is None:
        return
    if digest(path) not in ([wanted] if isinstance(wanted, str) else wanted):
        raise ValueError(
            f"{path}: is not the file that {CONFIG} was written with (another SHA-256): it was damaged or "
            f"replaced; copy {path.name} and {CONFIG} again from where they came"
        )


class TensorFile:
    """A safetensors file, of which the header is read and compared before any tensor is.

    Parameters
    ----------
    path
        The file; its header says names, shapes and element types, which must add up to its size.

    Attributes
    ----------
    shapes
        Name → shape.

    Raises
    ------
    ValueError
        If it is no regular file or no safetensors file.
    """

    def __init__(self, path: Path) -> None:
        # `safe_open` would wait for a pipe.
        open_regular(path).close()
        self.path = path
        try:
            self._file = safe_open(path, "pt")
            # `keys`, since a safetensors file cannot be iterated over.
            slices = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118
            self.shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            self._types = {name: str(part.get_dtype()) for name, part in slices.items()}
        except (SafetensorError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}: not a readable safetensors file ({error}); copy it again") from error

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)

    def check(self, expected: Mapping[str, Tensor]) -> None:
        """Compare the header with a model's state.

        Raises
        ------
        ValueError
            Naming what is missing, unknown or of another shape.
        """
        found = self.shapes
        problems = [f"missing {name}" for name in sorted(expected.keys() - found.keys())]
        problems += [f"unknown {name}" for name in sorted(found.keys() - expected.keys())]
        for name in sorted(expected.keys() & found.keys()):
            shape = tuple(expected[name].shape)
            if found[name] != shape:
                problems.append(f"{name} has shape {list(found[name])}, expected {list(shape)}")
        if problems:
            _do_not_fit(self.path, problems)

    def read(self, names: Mapping[str, Any] | None = None, *, exact: bool = False) -> dict[str, Tensor]:
        """Return the tensors, or those of some names: weights as float32, or all as they are (`exact`).

        Raises
        ------
        ValueError
            If one holds a value that is not finite, or is not of floating-point numbers.
        """
        tensors, problems = {}, []
        for name in self.shapes if names is None else names:
            if exact:
                tensors[name] = self._file.get_tensor(name)
                continue
            if self._types[name] not in FLOATS:
                problems.append(f"{name} has type {self._types[name]}, expected F32")
                continue
            tensors[name] = self._file.get_tensor(name).float()
            if not torch.isfinite(tensors[name]).all():
                problems.append(f"{name} holds NaN or infinity")
        if problems:
            _do_not_fit(self.path, problems)
        return tensors


def _do_not_fit(origin: object, problems: list[str]) -> NoReturn:
    shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
    raise ValueError(f"{origin}: weights do not fit the model's configuration: {shown}")


# What config.json may say beside the architecture, and the check that it says it in these types.

Check = tuple[Callable[[Any], bool], str]
"""Whether a value fits, and what is expected in words."""
MODES = ("finetune", "lora", "attentive", "linear", "mlp", "knn")
POOLINGS = ("bins", "moments", "spread", "cls", "last", "mean", "first", "tokens")
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
    # Not isinstance, by which True is a whole number.
    return kind in (str, int, float, bool) and all(type(item) is kind for item in value) and _distinct(value)


def _distinct(value: list[Any]) -> bool:
    return len(set(value)) == len(value)


def _score(value: Any) -> bool:
    if not isinstance(value, dict) or not value.keys() >= {"value", "low", "high"}:
        return False
    ends = (value["low"], value["high"])
    # Of a single group there is no interval.
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
# What the card and the decoder read without asking whether it is there.
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
