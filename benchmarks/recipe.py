"""The training recipe of 2022, made again independently from its description, and our steps against it.

Hugging Face's GPT-2 and BERT on batches padded to 50 time points; int64 masks of the data's size;
`masked_select` on input and prediction after projecting every position; positions drawn and special tokens
inserted sample by sample, with lengths that are counted entry by entry in the mask; LSTMs over the padding,
and a decoder that runs one step at a time, also under teacher forcing. For a batch of 64 that is 3,734
operators and 129 host reads for CSM's masking, 6,356 and 192 for SEP and CLS (the recipe itself was counted
at 3,922 and 193, 5,516 and 768). Today's attention (SDPA) and a fused AdamW are on its side.

CSM is compared by predicted time points a second, since dense CSM predicts every time point of a window and
the recipe one; the others by steps a second. The autoencoder's step time is the mean of a step with and one
without teacher forcing, which is what a training run consists of.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brainflow.batch import PackedBatch
from brainflow.frameworks import SeqBERTConfig, build, framework_spec, model_config

from . import timing
from .baselines import missing
from .timing import Row, Timing, peak_bytes, speed_rows
from .training import T_R, loss_of, random_batch, train_step

PADDED = 50
"""Time points that every window is padded to."""


def measurements(quick: bool, device: str) -> dict[str, Callable[[], list[Row]]]:
    """Return framework → what measures it, nothing without `transformers`; `quick` takes a quarter batch."""
    if reason := missing("transformers"):
        print(f"frameworks: the recipe of 2022 is left out, transformers {reason}", file=sys.stderr)
        return {}
    sizes = Sizes(batch=16) if quick else Sizes()
    return {name: partial(_against_recipe, name, sizes, device) for name in RECIPES}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of model and batch in the comparison with the recipe."""

    networks: int = 1024
    width: int = 256
    layers: int = 4
    heads: int = 4
    batch: int = 64
    dropout: float = 0.1


def padded(batch: PackedBatch, windows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a batch in the recipe's form; where it holds pairs their halves lie end to end.

    Returns
    -------
    tuple
        bold [windows, 50, networks], seconds, int64 attention mask and token types [windows, 50].
    """
    device = batch.bold.device
    parts = batch.lengths.reshape(windows, -1)
    bold = batch.bold.new_zeros(windows, PADDED, batch.bold.shape[1])
    attention = torch.zeros(windows, PADDED, dtype=torch.int64, device=device)
    for i, window in enumerate(batch.bold.split(parts.sum(1).tolist())):
        bold[i, : len(window)] = window
        attention[i, : len(window)] = 1
    seconds = (torch.arange(PADDED, device=device) * T_R).expand(windows, PADDED)
    types = (torch.arange(PADDED) >= torch.from_numpy(parts[:, :1])).long().to(device)
    return bold, seconds, attention, types


Steps = dict[str, list[Callable[[], None]]]


def _against_recipe(name: str, sizes: Sizes, device: str) -> list[Row]:
    """Measure speed and memory of one framework; with dense CSM also those of `csm-single`."""
    batch = random_batch(sizes.batch, sizes.networks, pairs=framework_spec(name).paired, device=device)
    torch.manual_seed(0)
    steps, targets = RECIPES[name](_Case(name, sizes, batch, device))
    parts = {f"{who} {i}": step for who, both in steps.items() for i, step in enumerate(both)}
    timed = timing.interleave(parts, repeats=2, device=device)
    times = {who: _mean([timed[f"{who} {i}"] for i in range(len(both))]) for who, both in steps.items()}
    peak = {who: max(peak_bytes(step, device) for step in both) for who, both in steps.items()}
    work: dict[str, dict[str, int]] = {
        "steps": dict.fromkeys(steps, 1),
        "targets": targets,
        "tokens": dict.fromkeys(steps, batch.tokens),
    }
    cases = {name: "ours"} | ({"csm-single": "single"} if "single" in steps else {})
    found = []
    for case, ours in cases.items():
        others = [who for who in steps if who not in (ours, "ours")]
        for what, amount in work.items():
            found += speed_rows(
                "frameworks", case, times, ours=ours, baselines=others, metric=f"{what}_per_s",
                unit=f"{what}/s", work=amount,
            )  # fmt: skip
        found += [
            Row(
                suite="frameworks", case=case, metric="peak_memory", value=peak[ours] / 2**20, unit="MiB",
                baseline=other, ratio=peak[other] / peak[ours],
            )
            for other in others
        ]  # fmt: skip
    return found


@dataclass(frozen=True)
class _Case:
    """A framework beside its published recipe, on one batch."""

    name: str
    sizes: Sizes
    batch: PackedBatch
    device: str

    @property
    def common(self) -> dict[str, Any]:
        """Sizes that both take."""
        s = self.sizes
        return {"networks": s.networks, "width": s.width, "layers": s.layers, "dropout": s.dropout}

    def ours(self, **changes: Any) -> Callable[[], None]:
        """Return our training step."""
        config = model_config(self.name, heads=self.sizes.heads, **self.common, **changes)
        module = build(config).to(self.device)
        return train_step(module, partial(loss_of, module, self.batch))

    def theirs(self, module: nn.Module, *inputs: Any) -> Callable[[], None]:
        """Return the recipe's training step."""
        return train_step(module.to(self.device), partial(module, *inputs))


def _csm(case: _Case) -> tuple[Steps, dict[str, int]]:
    bold, seconds, attention, _ = padded(case.batch, case.sizes.batch)
    published = case.theirs(PublishedCSM(**case.common, heads=case.sizes.heads), bold, seconds, attention)
    steps = {"ours": [case.ours()], "published": [published], "single": [case.ours(masking="single")]}
    windows = case.sizes.batch
    # Dense CSM predicts every time point but a window's first, the others one a window.
    return steps, {"ours": case.batch.tokens - windows, "published": windows, "single": windows}


def _bert(case: _Case, by: str) -> tuple[Steps, dict[str, int]]:
    recipe = PublishedBERT(**case.common, heads=case.sizes.heads, by=by)
    inputs = (*padded(case.batch, case.sizes.batch), case.batch.is_next)
    steps = {"ours": [case.ours()], "published": [case.theirs(recipe, *inputs)]}
    return steps, dict.fromkeys(steps, round(SeqBERTConfig().mask_rate * case.batch.tokens))


def _autoencoder(case: _Case) -> tuple[Steps, dict[str, int]]:
    bold, seconds, attention, _ = padded(case.batch, case.sizes.batch)
    recipe = PublishedAutoencoder(**case.common)
    steps = {
        "ours": [case.ours(teacher_forcing=p) for p in (1.0, 0.0)],
        "published": [case.theirs(recipe, bold, seconds, attention, forced) for forced in (True, False)],
    }
    return steps, dict.fromkeys(steps, case.batch.tokens)


RECIPES: dict[str, Callable[[_Case], tuple[Steps, dict[str, int]]]] = {
    "csm": _csm,
    "seq-bert": partial(_bert, by="time"),
    "net-bert": partial(_bert, by="network"),
    "autoencoder": _autoencoder,
}
"""Framework → name → training steps (ours, the published recipe's, …), and name → targets of one step.

A target is a predicted time point; Net-BERT's are the share of the time points' values that it predicts."""


def _mean(parts: list[Timing]) -> Timing:
    """Return the mean step, round by round."""
    return Timing(seconds=tuple(float(np.mean(s)) for s in zip(*(t.seconds for t in parts), strict=True)))


DUMMY_TIME = 1500


class _Published(nn.Module):
    """Embedder and unembedder that all four share."""

    def __init__(self, networks: int, width: int, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(networks, width), nn.LayerNorm(width), nn.Dropout(dropout))
        self.times = nn.Embedding(DUMMY_TIME + 1, width)
        self.unembed = nn.Linear(width, networks)
        self.networks = networks

    def embedded(self, bold: Tensor, seconds: Tensor) -> Tensor:
        """Return [batch, time, width]; negative seconds mark special tokens."""
        index = torch.where(seconds < 0, DUMMY_TIME, torch.round(seconds / 0.2).long())
        return self.embed(bold) + self.times(index)

    def loss(self, hidden: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """Return the L1 mean of the predictions where the int64 mask is 1; `target` holds those alone."""
        return F.l1_loss(torch.masked_select(self.unembed(hidden), mask.to(torch.bool)), target)


def counted(row: Tensor) -> int:
    """Return how many entries of a mask row are 1, one entry at a time."""
    return int(sum(row == 1))


class PublishedCSM(_Published):
    """One masked time point a sequence, everything after it hidden."""

    def __init__(self, networks: int, width: int, layers: int, heads: int, dropout: float) -> None:
        import transformers

        super().__init__(networks, width, dropout)
        self.mask_token = nn.Parameter(torch.randn(1, 1, networks))
        self.model = transformers.GPT2Model(
            transformers.GPT2Config(
                vocab_size=1,
                n_positions=512,
                n_embd=width,
                n_layer=layers,
                n_head=heads,
                resid_pdrop=dropout,
                attn_pdrop=dropout,
                embd_pdrop=dropout,
                use_cache=False,
                bos_token_id=0,
                eos_token_id=0,
            )
        )

    def forward(self, bold: Tensor, seconds: Tensor, attention: Tensor) -> Tensor:
        """Return the loss of a padded batch [batch, time, networks]."""
        masked, mask, target, attention = self.masked(bold, attention)
        hidden = self.model(
            inputs_embeds=self.embedded(masked, seconds), attention_mask=attention
        ).last_hidden_state
        return self.loss(hidden, target, mask)

    def masked(self, bold: Tensor, attention: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return masked input, int64 mask, what it hides, attention mask up to the masked position."""
        batch, time, _ = bold.shape
        device = bold.device
        drawn = [torch.randint(1, counted(row), (1,), device=device) for row in attention]
        positions = torch.cat(drawn)
        mask = torch.zeros_like(bold)
        mask[torch.arange(batch, device=device), positions] = 1
        mask = mask.to(torch.int64)
        target = torch.masked_select(bold, mask.to(torch.bool)).detach().clone()
        masked = torch.where(mask == 1, self.mask_token.repeat(batch, time, 1), bold)
        seen = []
        for i in positions:
            end = int(i) + 1
            ones, zeros = torch.ones(1, end, device=device), torch.zeros(1, time - end, device=device)
            seen.append(torch.cat([ones, zeros], 1))
        attention = torch.cat(seen).to(torch.int64)
        shown = attention[:, :, None].repeat(1, 1, self.networks)
        return torch.where(shown == 1, masked, torch.zeros_like(masked)), mask, target, attention


class PublishedBERT(_Published):
    """Masked time points (`by="time"`) or networks (`by="network"`), two halves, is-next."""

    def __init__(self, networks: int, width: int, layers: int, heads: int, dropout: float, by: str) -> None:
        import transformers

        super().__init__(networks, width, dropout)
        self.by = by
        shape = (1, 1, networks) if by == "time" else (1, 512, 1)
        self.mask_token = nn.Parameter(torch.randn(*shape))
        self.cls_token = nn.Parameter(torch.randn(1, networks))
        self.sep_token = nn.Parameter(torch.randn(1, networks))
        self.model = transformers.BertModel(
            transformers.BertConfig(
                vocab_size=1,
                hidden_size=width,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                intermediate_size=4 * width,
                hidden_dropout_prob=dropout,
                attention_probs_dropout_prob=dropout,
                max_position_embeddings=512,
            )
        )
        self.is_next = nn.Linear(width, 1)

    def forward(
        self, bold: Tensor, seconds: Tensor, attention: Tensor, types: Tensor, label: Tensor
    ) -> Tensor:
        """Return the loss of a padded batch whose rows are two halves (token types 0, 1) end to end."""
        masked, mask, target = self.masked(bold, attention)
        parts = self.with_sep(masked, seconds, attention, types, mask)
        inputs, times, seen, kinds, mask = self.with_cls(*parts)
        hidden = self.model(
            inputs_embeds=self.embedded(inputs, times), attention_mask=seen, token_type_ids=kinds
        )
        guess = self.is_next(hidden.pooler_output).squeeze(-1)
        loss = self.loss(hidden.last_hidden_state, target, mask)
        return loss + F.binary_cross_entropy_with_logits(guess, label)

    def masked(self, bold: Tensor, attention: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return masked input, int64 mask [batch, time, networks] and what it hides."""
        batch, time, networks = bold.shape
        shown = attention[:, :, None].repeat(1, 1, networks)
        shape = (batch, time, 1) if self.by == "time" else (batch, 1, networks)
        drawn = torch.rand(shape, device=bold.device).ge(0.8).expand(batch, time, networks)
        mask = torch.where(shown == 1, drawn, torch.zeros_like(drawn)).to(torch.int64)
        target = torch.masked_select(bold, mask.to(torch.bool)).detach().clone()
        if self.by == "time":
            token = self.mask_token.repeat(batch, time, 1)
        else:
            token = self.mask_token[:, :time].repeat(batch, 1, networks)
        return torch.where(mask == 1, token, bold), mask, target

    def with_sep(
        self, inputs: Tensor, times: Tensor, attention: Tensor, types: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return everything with a SEP after each half, inserted sample by sample."""
        device, never, zero = inputs.device, times.new_full((1,), -1.0), times.new_zeros(1)
        columns: list[list[Tensor]] = [[], [], [], []]
        gap = torch.zeros(1, self.networks, device=device)
        for i in range(len(inputs)):
            kinds = torch.masked_select(types[i], attention[i].to(torch.bool))
            a, b = counted(1 - kinds), counted(kinds)
            end, rest = a + b, inputs.shape[1] - a - b
            sep, pad = self.sep_token, torch.zeros(rest, self.networks, device=device)
            columns[0].append(torch.cat([inputs[i, :a], sep, inputs[i, a:end], sep, pad]))
            columns[1].append(torch.cat([times[i, :a], never, times[i, a:end], never, zero.repeat(rest)]))
            kind = [types[i, :a], zero, types[i, a:end], zero + 1, zero.repeat(rest)]
            columns[2].append(torch.cat(kind))
            columns[3].append(torch.cat([mask[i, :a], gap, mask[i, a:end], gap, pad]))
        inputs, times, types, mask = (torch.stack(column) for column in columns)
        return inputs, times, _padded_left(attention, 2, 1), types, mask

    def with_cls(
        self, inputs: Tensor, times: Tensor, attention: Tensor, types: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return everything with CLS before each sample, inserted sample by sample."""
        never = times.new_full((1,), -1.0)
        rows = [torch.cat([self.cls_token, inputs[i]]) for i in range(len(inputs))]
        clocks = [torch.cat([never, times[i]]) for i in range(len(times))]
        return (
            torch.stack(rows),
            torch.stack(clocks),
            _padded_left(attention, 1, 1),
            _padded_left(types, 1, 0),
            _padded_left(mask, 1, 0),
        )


def _padded_left(x: Tensor, count: int, value: int) -> Tensor:
    filling = torch.ones(x.shape[0], count, *x.shape[2:], device=x.device) * value
    return torch.cat([filling, x], 1).to(torch.int64)


class PublishedAutoencoder(_Published):
    """LSTM encoder over the padded batch; the decoder runs step by step."""

    def __init__(self, networks: int, width: int, layers: int, dropout: float) -> None:
        super().__init__(networks, width, dropout)
        self.encoder = nn.ModuleList(
            nn.LSTM(width, width, bidirectional=True, batch_first=True) for _ in range(layers)
        )
        self.encoder_norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers - 1))
        self.pooler = nn.Sequential(nn.Dropout(dropout), nn.Linear(width, width), nn.Tanh())
        self.decoder = nn.ModuleList(nn.LSTM(width, width, batch_first=True) for _ in range(layers))
        self.decoder_norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers - 1))
        self.output = nn.Sequential(nn.Dropout(dropout), nn.Linear(width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, bold: Tensor, seconds: Tensor, attention: Tensor, forced: bool) -> Tensor:
        """Return the loss of a padded batch, decoded with or without teacher forcing."""
        batch, time, networks = bold.shape
        x = embedded = self.embedded(bold, seconds)
        for i, lstm in enumerate(self.encoder):
            out, (final, _) = lstm(x)
            out = out.view(batch, time, 2, -1).mean(2)
            x = self.dropout(self.encoder_norms[i](x + out)) if i < len(self.encoder_norms) else out
        pooled = self.pooler(final.mean(0))
        states = [(pooled[None].contiguous(), torch.zeros_like(pooled)[None])] * len(self.decoder)
        step, outputs = torch.zeros_like(pooled), []
        for t in range(time):
            y = step[:, None]
            for i, lstm in enumerate(self.decoder):
                out, states[i] = lstm(y, states[i])
                y = self.dropout(self.decoder_norms[i](y + out)) if i < len(self.decoder_norms) else out
            produced = self.output(y[:, 0])
            outputs.append(produced)
            step = embedded[:, t] if forced else produced
        mask = attention[..., None].repeat(1, 1, networks)
        target = torch.masked_select(bold, mask.to(torch.bool))
        return self.loss(torch.stack(outputs, 1), target, mask)
