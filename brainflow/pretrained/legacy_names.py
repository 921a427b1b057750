"""Names and shapes of the tensors in the checkpoints released in 2022, beside ours."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from brainflow.config import ModelConfig


@dataclass(frozen=True)
class Rule:
    """One of our tensors and the published one, or three, that it is made of.

    `kind` "same": equal up to the shape, `shape` is the published one (None: equal); "transposed": GPT-2's
    Conv1D holds [in, out]; "stacked": BERT's query, key and value, one below the other.
    """

    ours: str
    theirs: tuple[str, ...]
    kind: Literal["same", "transposed", "stacked"] = "same"
    shape: tuple[int, ...] | None = None

    def to_ours(self, tensors: list[Tensor], shape: torch.Size) -> Tensor:
        """Return our tensor of `shape`, or raise ValueError if the published ones do not give it."""
        value = torch.cat(tensors) if self.kind == "stacked" else tensors[0]
        value = value.t() if self.kind == "transposed" else value
        fits = value.numel() == shape.numel() and (self.shape is not None or value.shape == shape)
        if not fits:
            names = ", ".join(self.theirs)
            raise ValueError(
                f"{names}: got shape {list(value.shape)}, expected {list(shape)} for {self.ours}"
            )
        return value.reshape(shape).contiguous()

    def to_theirs(self, tensor: Tensor) -> list[Tensor]:
        """Return the published tensors of ours."""
        if self.kind == "stacked":
            return [part.clone() for part in tensor.chunk(3)]
        if self.kind == "transposed":
            return [tensor.t().contiguous()]
        return [tensor.reshape(self.shape or tensor.shape).clone()]


def rules(config: ModelConfig, present: Callable[[str], bool] = lambda name: False) -> list[Rule]:
    """Return the rules of a framework.

    Parameters
    ----------
    config
        The framework and its sizes.
    present
        Whether a checkpoint holds a name; decides which of the two published names the BERT pooler has.
    """
    n = config.networks
    found = [Rule("embedding.time.weight", ("embedder.wt_re.weight",))]
    found += _pair("embedding.project", "embedder.embed_model.model.0")
    found += _pair("embedding.norm", "embedder.embed_model.model.1")
    found += _pair("unembedding", "unembedder.model.0")
    if config.framework == "autoencoder":
        return [*found, *_autoencoder(config)]
    mask = (1, config.max_positions, 1) if config.framework == "net-bert" else (1, 1, n)
    found.append(Rule("mask_token", ("embedder.msk_embed",), shape=mask))
    found.append(Rule("cls_token", ("embedder.cls_embed",), shape=(1, 1, n)))
    if config.framework == "csm":
        return [*found, *_gpt(config)]
    found.append(Rule("sep_token", ("embedder.sep_embed",), shape=(1, n)))
    own = "decoder.pooler_layer.0"
    pooler = own if present(f"{own}.weight") else "decoder.transformer.pooler.dense"
    found += [*_pair("is_next.pooler", pooler), *_pair("is_next.output", "decoder.is_next_head.0")]
    return [*found, *_bert(config)]


def head_rules(config: ModelConfig) -> list[Rule]:
    """Return the rules of the decoding head; the autoencoder's is one layer on the pooled vector."""
    if config.framework == "autoencoder":
        return [Rule(part, (f"decoder.decoding_head.0.{part}",)) for part in ("weight", "bias")]
    return [*_pair("pooler", "decoder.pooler_layer.0"), *_pair("output", "decoder.decoding_head.0")]


def _pair(ours: str, theirs: str, weight: Literal["same", "transposed"] = "same") -> Iterator[Rule]:
    yield Rule(f"{ours}.weight", (f"{theirs}.weight",), weight)
    yield Rule(f"{ours}.bias", (f"{theirs}.bias",))


def _gpt(config: ModelConfig) -> Iterable[Rule]:
    yield Rule("transformer.positions.weight", ("decoder.transformer.wpe.weight",))
    yield from _pair("transformer.norm", "decoder.transformer.ln_f")
    transposed = partial(_pair, weight="transposed")
    for i in range(config.layers):
        ours, theirs = f"transformer.blocks.{i}", f"decoder.transformer.h.{i}"
        yield from _pair(f"{ours}.norm1", f"{theirs}.ln_1")
        yield from transposed(f"{ours}.attention.qkv", f"{theirs}.attn.c_attn")
        yield from transposed(f"{ours}.attention.out", f"{theirs}.attn.c_proj")
        yield from _pair(f"{ours}.norm2", f"{theirs}.ln_2")
        yield from transposed(f"{ours}.feedforward.up", f"{theirs}.mlp.c_fc")
        yield from transposed(f"{ours}.feedforward.down", f"{theirs}.mlp.c_proj")


def _bert(config: ModelConfig) -> Iterable[Rule]:
    inputs = "decoder.transformer.embeddings"
    yield Rule("transformer.positions.weight", (f"{inputs}.position_embeddings.weight",))
    yield Rule("transformer.token_types.weight", (f"{inputs}.token_type_embeddings.weight",))
    yield from _pair("transformer.norm", f"{inputs}.LayerNorm")
    for i in range(config.layers):
        ours, theirs = f"transformer.blocks.{i}", f"decoder.transformer.encoder.layer.{i}"
        for part in ("weight", "bias"):
            names = tuple(f"{theirs}.attention.self.{k}.{part}" for k in ("query", "key", "value"))
            yield Rule(f"{ours}.attention.qkv.{part}", names, "stacked")
        yield from _pair(f"{ours}.attention.out", f"{theirs}.attention.output.dense")
        yield from _pair(f"{ours}.norm1", f"{theirs}.attention.output.LayerNorm")
        yield from _pair(f"{ours}.feedforward.up", f"{theirs}.intermediate.dense")
        yield from _pair(f"{ours}.feedforward.down", f"{theirs}.output.dense")
        yield from _pair(f"{ours}.norm2", f"{theirs}.output.LayerNorm")


def _autoencoder(config: ModelConfig) -> Iterable[Rule]:
    parts = [f"{kind}_{which}_l0" for kind in ("weight", "bias") for which in ("ih", "hh")]
    yield from _pair("encoder.pooler", "decoder.encoder.pooler_layer.1")
    yield from _pair("decoder.output", "decoder.decoder.linear_output_layer.1")
    for i in range(config.layers):
        for part in (*parts, *(f"{p}_reverse" for p in parts)):
            yield Rule(f"encoder.lstms.{i}.{part}", (f"decoder.encoder.lstms.{i}.{part}",))
        for part in parts:
            yield Rule(f"decoder.lstms.{i}.{part}", (f"decoder.decoder.lstms.{i}.{part}",))
    for i in range(config.layers - 1):
        yield from _pair(f"encoder.norms.{i}", f"decoder.encoder.layer_norms.{i}.0")
        yield from _pair(f"decoder.norms.{i}", f"decoder.decoder.layer_norms.{i}.0")
