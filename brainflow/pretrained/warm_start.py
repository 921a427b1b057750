"""Where training begins: initial weights.

Weights are read from safetensors files only: nothing is unpickled, and no code of a model repository is run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from brainflow.config import ModelConfig
from brainflow.files import is_count, read_json
from brainflow.pretrained.compatibility import check_fits
from brainflow.pretrained.format import CONFIG, WEIGHTS, TensorFile, check_digest, read_config
from brainflow.pretrained.hub import fetch
from brainflow.pretrained.legacy_names import rules
from brainflow.storage import BoldStore

STYLES = {"gpt2": "gpt", "bert": "bert"}
"""Language model → the style of transformer that takes its weights."""


def check_initial(source: str, store: BoldStore) -> list[str]:
    """Log how a store differs from the data that initial weights were trained on, and return it.

    It is no error: the training that follows may be there to get used to other data.

    Parameters
    ----------
    source
        As for `load_initial`; a language model saw no data of ours.
    store
        What is trained on.

    Raises
    ------
    ValueError
        If it has another number of networks.
    """
    folder = fetch(source, files=[CONFIG, WEIGHTS], ownerless=True, argument="init")
    path = folder / CONFIG
    if not path.is_file() or not isinstance(read_json(path).get("model"), dict):
        return []
    return check_fits(folder, store, allow=True)


def load_initial(module: Any, source: str) -> None:
    """Put weights into a framework module, in place.

    Parameters
    ----------
    module
        From `brainflow.frameworks.build`.
    source
        A folder with `config.json` and `model.safetensors`, or the name of such a repository on the hub: a
        brainflow model, or a GPT-2 (for CSM) or BERT (for the BERTs) language model, whose blocks and
        positions are taken and whose vocabulary is left.

    Raises
    ------
    FileNotFoundError
        If there is no such folder, or no safetensors file in it.
    ValueError
        If the weights do not fit the module; the message says which settings do.
    """
    folder = fetch(source, files=[CONFIG, WEIGHTS], ownerless=True, argument="init")
    path = folder / CONFIG
    if not path.is_file() or not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(
            f"init: no {CONFIG} and {WEIGHTS} in {folder}; other files, such as pytorch_model.bin, are not "
            "read (save the model with safetensors, or `brainflow import-checkpoint` the weights of 2022)"
        )
    if isinstance(read_json(path).get("model"), dict):
        config = read_config(folder)
        with TensorFile(folder / WEIGHTS) as tensors:
            tensors.check(module.state_dict())
            check_digest(folder / WEIGHTS, config)
            module.load_state_dict(tensors.read())
    else:
        _load_language(module, folder, source)


def _load_language(module: Any, folder: Path, source: str) -> None:
    c: ModelConfig = module.config
    config = read_json(folder / CONFIG)
    kind = config.get("model_type")
    style = getattr(getattr(module, "transformer", None), "style", None)
    if style is None or STYLES.get(str(kind)) != style:
        raise ValueError(
            f"init: {source} is a {ascii(kind)[:60]} model, but model.framework={c.framework}; expected gpt2 "
            "for csm, bert for seq-bert and net-bert"
        )
    _check_sizes(c, config, source)
    with TensorFile(folder / WEIGHTS) as tensors:
        found = {_plain(name): name for name in tensors.shapes}
        own = module.state_dict()
        for rule in rules(c):
            if not rule.ours.startswith(("transformer.", "is_next.pooler.")):
                continue
            names = [name.removeprefix("decoder.transformer.") for name in rule.theirs]
            if not found.keys() >= set(names):
                if rule.ours.startswith("is_next."):  # a model that was saved without its pooler
                    continue
                raise ValueError(f"init: {source} has nothing for {rule.ours} ({', '.join(rule.theirs)})")
            read = tensors.read(dict.fromkeys(found[name] for name in names))
            values = [read[found[name]] for name in names]
            if rule.ours == "transformer.positions.weight":
                # Ours may be fewer.
                values = [values[0][: c.max_positions]]
            own[rule.ours] = rule.to_ours(values, own[rule.ours].shape)
    module.load_state_dict(own)


def _check_sizes(c: ModelConfig, config: dict[str, Any], source: str) -> None:
    layers, width, heads, places = (
        _size(config, names, source)
        for names in (
            ("n_layer", "num_hidden_layers"),
            ("n_embd", "hidden_size"),
            ("n_head", "num_attention_heads"),
            ("n_positions", "max_position_embeddings"),
        )
    )
    theirs = {"layers": layers, "width": width, "heads": heads}
    wrong = [f"--model.{k} {v}" for k, v in theirs.items() if getattr(c, k) != v]
    if c.max_positions > places:
        wrong.append(f"--model.max-positions {places}")
    for name, published in (("positions", "learned"), ("norm", "layer"), ("activation", "published")):
        if getattr(c, name) != published:
            wrong.append(f"--model.{name} {published}")
    if wrong:
        raise ValueError(f"init: the weights of {source} need {' '.join(wrong)}")


def _size(config: dict[str, Any], names: tuple[str, str], source: str) -> int:
    """Return a size of a language model that GPT-2 calls by the first name and BERT by the second."""
    value = next((config[name] for name in names if name in config), None)
    if not isinstance(value, int) or not is_count(value):
        raise ValueError(
            f"init: {CONFIG} of {source} has no whole number for {names[0]} or {names[1]}; expected the "
            "config.json of a GPT-2 or BERT"
        )
    return value


def _plain(name: str) -> str:
    """Return a tensor's name without the task model's prefix, and with today's names in LayerNorms."""
    for prefix in ("transformer.", "bert."):
        name = name.removeprefix(prefix)
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
