"""The training recipe of 2022, made again independently from its description: what `frameworks` runs against.

Hugging Face's GPT-2 and BERT on batches padded to 50 time points; int64 masks of the data's size;
`masked_select` on prediction and target after projecting every position; special tokens inserted sample by
sample; an LSTM decoder that runs one step at a time, also under teacher forcing. It has the sizes that it is
given, and today's attention (SDPA) inside the Hugging Face models. Needs the package `transformers`.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

DUMMY_TIME = 1500


class Base(nn.Module):
    """Embedder and unembedder that all four share."""

    def __init__(self, networks: int, width: int, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(networks, width), nn.LayerNorm(width), nn.Dropout(dropout))
        self.times = nn.Embedding(DUMMY_TIME + 1, width)
        self.unembed = nn.Linear(width, networks)
        self.networks = networks
        self.random = np.random.default_rng(0)

    def embedded(self, bold: Tensor, seconds: Tensor) -> Tensor:
        """Return [batch, time, width]; negative seconds mark special tokens."""
        index = torch.where(seconds < 0, DUMMY_TIME, torch.round(seconds / 0.2).long())
        return self.embed(bold) + self.times(index)

    def loss(self, hidden: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """Return the L1 mean over the entries where the int64 mask is 1."""
        predicted = self.unembed(hidden)
        chosen = mask.to(torch.bool)
        return F.l1_loss(torch.masked_select(predicted, chosen), torch.masked_select(target, chosen))


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

    def forward(self, bold: Tensor, seconds: Tensor, attention: Tensor, lengths: list[int]) -> Tensor:
        """Return the loss of a padded batch [batch, time, networks]."""
        mask = torch.zeros_like(bold, dtype=torch.int64)
        attention = attention.clone()
        for i, length in enumerate(lengths):
            position = int(self.random.integers(1, length))
            mask[i, position] = 1
            attention[i, position + 1 :] = 0
        tokens = self.mask_token.expand_as(bold)
        masked = torch.where(mask == 1, tokens, bold) * attention[..., None]
        hidden = self.model(
            inputs_embeds=self.embedded(masked, seconds), attention_mask=attention
        ).last_hidden_state
        return self.loss(hidden, bold, mask)


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
        self, bold: Tensor, seconds: Tensor, attention: Tensor, halves: list[tuple[int, int]], label: Tensor
    ) -> Tensor:
        """Return the loss of a padded batch whose rows are two halves end to end."""
        batch, time, networks = bold.shape
        if self.by == "time":
            drawn = torch.from_numpy(self.random.random((batch, time, 1)) < 0.2)
        else:
            drawn = torch.from_numpy(self.random.random((batch, 1, networks)) < 0.2)
        mask = drawn.to(bold.device).expand(batch, time, networks).to(torch.int64) * attention[..., None]
        token = self.mask_token if self.by == "time" else self.mask_token[:, :time]
        masked = torch.where(mask == 1, token.expand_as(bold), bold)
        gap, never = torch.zeros_like(mask[0, :1]), torch.full_like(seconds[0, :1], -1.0)
        one = torch.ones_like(attention[0, :1])
        rows, times, masks, seen, targets, kinds = [], [], [], [], [], []
        for i, (a, b) in enumerate(halves):
            end = a + b
            parts = [self.cls_token, masked[i, :a], self.sep_token, masked[i, a:end], self.sep_token]
            rows.append(torch.cat([*parts, masked[i, end:]]))
            clock = [never, seconds[i, :a], never, seconds[i, a:end], never, seconds[i, end:]]
            times.append(torch.cat(clock))
            masks.append(torch.cat([gap, mask[i, :a], gap, mask[i, a:end], gap, mask[i, end:]]))
            empty = self.cls_token.detach()
            whole = [empty, bold[i, :a], empty, bold[i, a:end], empty, bold[i, end:]]
            targets.append(torch.cat(whole))
            seen.append(torch.cat([one, one, one, attention[i]]))
            kind = torch.zeros(time + 3, dtype=torch.int64, device=bold.device)
            kind[a + 2 : end + 3] = 1
            kinds.append(kind)
        hidden = self.model(
            inputs_embeds=self.embedded(torch.stack(rows), torch.stack(times)),
            attention_mask=torch.stack(seen),
            token_type_ids=torch.stack(kinds),
        )
        guess = self.is_next(hidden.pooler_output).squeeze(-1)
        loss = self.loss(hidden.last_hidden_state, torch.stack(targets), torch.stack(masks))
        return loss + F.binary_cross_entropy_with_logits(guess, label)


class Autoencoder(Base):
    """LSTM encoder and decoder; the decoder runs step by step."""

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

    def forward(
        self, bold: Tensor, seconds: Tensor, attention: Tensor, lengths: list[int], forced: bool
    ) -> Tensor:
        """Return the loss of a padded batch, decoded with or without teacher forcing."""
        batch, time, networks = bold.shape
        x = embedded = self.embedded(bold, seconds)
        for i, lstm in enumerate(self.encoder):
            packed = pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, enforce_sorted=False)
            out, (final, _) = lstm(packed)
            out = pad_packed_sequence(out, batch_first=True, total_length=time)[0]
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
        mask = attention[..., None].expand(batch, time, networks)
        return self.loss(torch.stack(outputs, 1), bold, mask)
