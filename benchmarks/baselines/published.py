"""The training recipe of 2022, made again independently from its description: what `frameworks` runs against.

Hugging Face's GPT-2 and BERT on batches padded to 50 time points; int64 masks of the data's size;
`masked_select` on input and prediction after projecting every position; positions drawn and special tokens
inserted sample by sample, with lengths that are counted entry by entry in the mask; LSTMs over the padding,
and a decoder that runs one step at a time, also under teacher forcing. For a batch of 64 that is 3,734
operators and 129 host reads for CSM's masking, 6,356 and 192 for SEP and CLS (the recipe itself was counted
at 3,922 and 193, 5,516 and 768). Today's attention (SDPA) and a fused AdamW are on its side. Needs the
package `transformers`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

DUMMY_TIME = 1500


class Base(nn.Module):
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


class CSM(Base):
    """One masked time point a sequence, everything after it hidden."""

    def __init__(self, networks: int, width: int, layers: int, heads: int, dropout: float) -> None:
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


class BERT(Base):
    """Masked time points (`by="time"`) or networks (`by="network"`), two halves, is-next."""

    def __init__(self, networks: int, width: int, layers: int, heads: int, dropout: float, by: str) -> None:
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


class Autoencoder(Base):
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
