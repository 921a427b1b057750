"""Reading and writing the checkpoints of 2022: `pytorch_model.bin`, a dict of tensors under other names.

The file is read with PyTorch's weights-only loader, which runs no code from it. A published tensor is used
(it becomes one of ours), carried (we have no use for it; it is kept beside the model so that exporting writes
it again) or ignored (constant buffers of old library versions). Where published weights depend on how they
were trained, their config says so: `late_read` and GPT-2's GELU for the BERTs (the loss read one position
late, the pooler at position 0), `chained_states` for the autoencoder. With a decoding head, it is a decoder.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from brainflow.config import ModelConfig
from brainflow.files import open_regular
from brainflow.frameworks import AutoencoderConfig, CSMConfig, NetBERTConfig, SeqBERTConfig, build
from brainflow.pretrained.format import (
    HEAD,
    TensorFile,
    check_digest,
    load_pretrained,
    outline,
    read_config,
    save_pretrained,
)
from brainflow.pretrained.legacy_names import Rule, head_rules, rules
from brainflow.storage.files import replacing

CARRIED = "legacy.safetensors"
BUFFERS = re.compile(r"(\.attn\.(bias|masked_bias)|embeddings\.(position_ids|token_type_ids))$")
OPTIONAL = re.compile(r"(is_next\.|unembedding\.|(mask|cls|sep)_token)")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What an import did.

    Attributes
    ----------
    config
        The model's configuration, as far as the tensors' names and shapes say it.
    used, carried, ignored
        Published names.
    missing
        Our names that the checkpoint has nothing for; they keep their fresh initial values.
    head
        Whether it holds a decoding head.
    """

    config: ModelConfig
    used: list[str]
    carried: list[str]
    ignored: list[str]
    missing: list[str]
    head: bool


def import_checkpoint(
    path: str | os.PathLike[str], out: str | os.PathLike[str], *, heads: int | None = None
) -> Report:
    """Turn a checkpoint of 2022 into a folder that `load_pretrained` reads.

    Parameters
    ----------
    path
        `pytorch_model.bin`.
    out
        Folder to write; a decoding head goes to `head.safetensors` there.
    heads
        Attention heads, which tensors do not tell; None: one a 64 values of width, as published.

    Raises
    ------
    ValueError
        If the file holds anything but tensors, or tensors that fit none of the four frameworks.
    """
    state = read_state(path)
    config = infer_config(state, heads)
    found = rules(config, state.__contains__)
    missing = [rule.ours for rule in found if not state.keys() >= set(rule.theirs)]
    fatal = [name for name in missing if not OPTIONAL.match(name)]
    if fatal:
        raise ValueError(
            f"{path}: looks like {config.framework} with {config.layers} layers, but has nothing for "
            f"{', '.join(fatal[:5])}" + (f" and {len(fatal) - 5} more" if len(fatal) > 5 else "")
        )
    tensors = _convert(state, found, outline(config, str(path)))
    used = {name for rule in found for name in rule.theirs if rule.ours not in missing}
    head = "decoder.decoding_head.0.weight" in state
    if head:
        used |= {name for rule in head_rules(config) for name in rule.theirs if name in state}
    for name in sorted(used):
        if not state[name].is_floating_point():
            raise ValueError(f"{path}: {name}: holds {state[name].dtype}, expected floating-point weights")
    # Built, not outlined: what is missing keeps its initial values.
    module = build(config)
    ignored = sorted(name for name in state if BUFFERS.search(name) and name not in used)
    carried = sorted(state.keys() - used - set(ignored))
    module.load_state_dict({**module.state_dict(), **tensors})
    dtype = str(next(iter(state[name] for name in sorted(used))).dtype).removeprefix("torch.")
    extra: dict[str, Any] = {"legacy": {"dtype": dtype, "missing": missing, "names": sorted(used)}}
    files = {CARRIED: {name: _own(state[name]) for name in carried}} if carried else {}
    if head:  # what brainflow.decoding.persist reads
        classes = list(range(len(state["decoder.decoding_head.0.weight"])))
        mode = "linear" if config.framework == "autoencoder" else "finetune"
        extra["decoder"] = {"mode": mode, "pooling": "cls", "classes": classes, "examples": 0}
        files[HEAD] = _head(config, state)
    folder = save_pretrained(module, out, extra, files)
    for name in {HEAD, CARRIED} - files.keys():  # of an earlier import
        (folder / name).unlink(missing_ok=True)
    return Report(
        config=config, used=sorted(used), carried=carried, ignored=ignored, missing=missing, head=head
    )


def export_checkpoint(directory: str | os.PathLike[str], path: str | os.PathLike[str]) -> list[str]:
    """Write a saved model as `pytorch_model.bin` with the published names, and return these.

    A model that was imported gives back the tensors that it came from, byte for byte; one that was trained
    here gets, under the names that a GPT-2 or BERT of Hugging Face asks for besides, zeros.
    """
    folder = Path(directory)
    module = load_pretrained(folder)
    config: ModelConfig = module.config  # type: ignore[assignment]
    legacy = read_config(folder).get("legacy", {})
    dtype = getattr(torch, legacy.get("dtype", "float32"))
    own, names = module.state_dict(), set(legacy.get("names", ()))
    state: dict[str, Tensor] = {}
    for rule in rules(config, names.__contains__):
        if rule.ours not in legacy.get("missing", ()):
            state.update(zip(rule.theirs, rule.to_theirs(own[rule.ours].to(dtype)), strict=True))
    saved = {name: _saved(folder, name) for name in (HEAD, CARRIED)}
    for rule in head_rules(config):
        if rule.ours in saved[HEAD]:
            state[rule.theirs[0]] = saved[HEAD][rule.ours]
    state.update(saved[CARRIED])
    if not legacy:
        state.update(_placeholders(config))
    with replacing(Path(path)) as file:
        torch.save(state, file)
    return sorted(state)


def _saved(folder: Path, name: str) -> dict[str, Tensor]:
    """Return the tensors of a file beside the weights, none where it is not there."""
    if not (folder / name).exists():
        return {}
    check_digest(folder / name, read_config(folder))
    with TensorFile(folder / name) as tensors:
        return tensors.read(exact=True)


def read_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, read without running any code from it.

    Raises
    ------
    ValueError
        If it holds anything else.
    """
    open_regular(path).close()
    try:
        state = _unpacked(path)
    except OSError:
        raise
    except Exception as error:  # the loader refuses in several types, of modules that we do not import
        # torch's own text goes on to say how to load it all the same.
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it calls {wanted[1]}" if wanted else "damaged, or of another format"
        raise ValueError(
            f"{path}: not a file of plain tensors, so it was not loaded ({reason}); expected a "
            "pytorch_model.bin"
        ) from error
    if not isinstance(state, dict) or not state or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{path}: expected a dict of tensors by name, got something else")
    for name, value in state.items():
        _check_tensor(path, name, value)
    there, said = os.path.getsize(path), sum(v.numel() * v.element_size() for v in state.values())
    if said > 2 * there + 2**20:  # twice: weights may be tied
        raise ValueError(
            f"{path}: has {there} bytes, but its tensors would take {said} (many names for the same values); "
            "expected a pytorch_model.bin"
        )
    # `DataParallel` puts it before each name.
    return {name.removeprefix("module."): value for name, value in state.items()}


def _unpacked(path: str | os.PathLike[str]) -> Any:
    """Return what a file holds; its bytes are mapped, so that nothing is unpacked to more than it is."""
    with open_regular(path) as file:
        zipped = file.read(4) == b"PK\x03\x04"
    # the format before PyTorch 1.6 cannot be mapped
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def _check_tensor(path: str | os.PathLike[str], name: str, value: Any) -> None:
    """Refuse a tensor that is not dense, or says that it is larger than its bytes.

    Raises
    ------
    ValueError
        Naming file and tensor.
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"{path}: expected a dict of tensors by name, got something else for {name!a}")
    plain = value.device.type == "cpu" and value.layout == torch.strided and not value.is_quantized
    if not plain or value.is_complex():
        kind = f"{value.layout}, {value.dtype}, {value.device}"
        raise ValueError(
            f"{path}: {name!a}: got a tensor that is {kind}, expected a dense one of real numbers"
        )
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ValueError(
            f"{path}: {name!a}: has shape {list(value.shape)} but only {value.untyped_storage().nbytes()} "
            "bytes (one value repeated); expected every value in the file"
        )
    if value.is_floating_point() and not torch.isfinite(value).all():
        raise ValueError(f"{path}: {name!a}: holds NaN or infinity; expected finite weights")


def infer_config(state: dict[str, Tensor], heads: int | None = None) -> ModelConfig:
    """Return the configuration that a checkpoint's names and shapes imply.

    Raises
    ------
    ValueError
        If they belong to none of the four frameworks.
    """
    try:
        return _infer_config(state, heads)
    except (KeyError, IndexError) as error:
        raise ValueError(
            f"checkpoint: no tensor {error}; expected the state dict of a model published in 2022 "
            "(one embedding layer, TR embedding)"
        ) from error


def _infer_config(state: dict[str, Tensor], heads: int | None) -> ModelConfig:
    first = state["embedder.embed_model.model.0.weight"]
    if first.dim() != 2:
        raise ValueError(
            f"checkpoint: the embedding has shape {list(first.shape)}, expected [width, networks]"
        )
    width, networks = first.shape
    rows = state["embedder.wt_re.weight"].shape[0]
    # Rows are 0.2 s apart, and the last one is for special tokens.
    common: dict[str, Any] = {"networks": networks, "width": width, "max_seconds": (rows - 1) * 0.2}
    common["heads"] = heads or max(1, width // 64)
    layers = _count(state, r"decoder\.encoder\.lstms\.(\d+)\.")
    if layers:
        return AutoencoderConfig(layers=layers, dropout=0.2, chained_states=True, **common)
    layers = _count(state, r"decoder\.transformer\.h\.(\d+)\.")
    if layers:
        up = state["decoder.transformer.h.0.mlp.c_fc.weight"].shape[1]
        places = state["decoder.transformer.wpe.weight"].shape[0]
        common |= {"layers": layers, "feedforward": up // width, "max_positions": places}
        return CSMConfig(**common)
    layers = _count(state, r"decoder\.transformer\.encoder\.layer\.(\d+)\.")
    if layers:
        up = state["decoder.transformer.encoder.layer.0.intermediate.dense.weight"].shape[0]
        places = state["decoder.transformer.embeddings.position_embeddings.weight"].shape[0]
        common |= {"layers": layers, "feedforward": up // width, "max_positions": places}
        common |= {"late_read": True, "activation": "gelu-tanh"}
        mask = state.get("embedder.msk_embed")
        # Net-BERT's mask token has a value a position, Seq-BERT's one a network.
        by_network = mask is not None and mask.dim() == 3 and mask.shape[1] > 1 and mask.shape[2] == 1
        return (NetBERTConfig if by_network else SeqBERTConfig)(**common)
    raise ValueError(
        "checkpoint: its names belong to none of CSM (decoder.transformer.h.*), BERT "
        "(decoder.transformer.encoder.*) and autoencoder (decoder.encoder.lstms.*)"
    )


def _count(state: dict[str, Tensor], pattern: str) -> int:
    return len({m[1] for name in state if (m := re.match(pattern, name))})


def _convert(state: dict[str, Tensor], found: list[Rule], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return our tensors of those that a checkpoint has, each checked against our shape."""
    return {
        rule.ours: rule.to_ours([state[name] for name in rule.theirs], own[rule.ours].shape).to(torch.float32)
        for rule in found
        if state.keys() >= set(rule.theirs)
    }


def _head(config: ModelConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {r.ours: _own(state[r.theirs[0]]) for r in head_rules(config) if r.theirs[0] in state}


def _own(tensor: Tensor) -> Tensor:
    """Return a copy, which shares no memory with other tensors of the file."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _placeholders(config: ModelConfig) -> dict[str, Tensor]:
    if config.framework == "autoencoder":
        return {}
    name = "wte" if config.framework == "csm" else "embeddings.word_embeddings"
    return {f"decoder.transformer.{name}.weight": torch.zeros(1, config.width)}


def report_json(report: Report) -> str:
    """Return a report as one JSON object."""
    return json.dumps(asdict(report))
