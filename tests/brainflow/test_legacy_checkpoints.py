"""State dicts with exactly the published names and shapes, from Hugging Face and PyTorch modules."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import brainflow
from brainflow.batch import PackedBatch, Windows
from brainflow.cli.main import main
from brainflow.decoding.persist import load_decoder
from brainflow.frameworks import framework_names
from brainflow.pretrained.legacy import export_checkpoint, import_checkpoint, read_state

transformers = pytest.importorskip("transformers")

N, W, LAYERS, HEADS, PLACES, CLASSES = 6, 16, 2, 4, 20, 3


class Published(nn.Module):
    """A model of 2022: attribute paths spell the published names."""

    def __init__(self, framework, decoding=False, pooler=True):
        super().__init__()
        self.framework = framework
        self.embedder, self.decoder, self.unembedder = nn.Module(), nn.Module(), nn.Module()
        e, d = self.embedder, self.decoder
        by_network = framework == "net-bert"
        e.msk_embed = nn.Parameter(torch.randn(1, PLACES, 1) if by_network else torch.randn(1, 1, N))
        e.cls_embed = nn.Parameter(torch.randn(1, 1, N))
        e.sep_embed = nn.Parameter(torch.randn(1, N))
        e.embed_model = nn.Module()
        e.embed_model.model = nn.Sequential(nn.Linear(N, W), nn.LayerNorm(W), nn.Dropout())
        e.wt_re = nn.Embedding(1501, W)
        self.unembedder.model = nn.Sequential(nn.Linear(W, N))
        if framework == "csm":
            d.transformer = transformers.GPT2Model(
                transformers.GPT2Config(
                    vocab_size=1, n_positions=PLACES, n_embd=W, n_layer=LAYERS, n_head=HEADS, use_cache=False,
                    bos_token_id=0, eos_token_id=0,
                )
            )  # fmt: skip
        elif framework == "autoencoder":
            d.encoder, d.decoder = nn.Module(), nn.Module()
            for part, both in ((d.encoder, True), (d.decoder, False)):
                part.lstms = nn.ModuleList(
                    nn.LSTM(W, W, bidirectional=both, batch_first=True) for _ in range(LAYERS)
                )
                part.layer_norms = nn.ModuleList(
                    nn.Sequential(nn.LayerNorm(W), nn.Dropout()) for _ in range(LAYERS - 1)
                )
            d.encoder.pooler_layer = nn.Sequential(nn.Dropout(), nn.Linear(W, W), nn.Tanh())
            d.decoder.linear_output_layer = nn.Sequential(nn.Dropout(), nn.Linear(W, W))
        else:
            d.transformer = transformers.BertModel(
                transformers.BertConfig(
                    vocab_size=1, hidden_size=W, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
                    intermediate_size=4 * W, max_position_embeddings=PLACES, pad_token_id=0,
                    hidden_act="gelu_new",
                ),
                add_pooling_layer=pooler,
            )  # fmt: skip
            d.is_next_head = nn.Sequential(nn.Linear(W, 1))
        if not pooler or (decoding and framework != "autoencoder"):
            d.pooler_layer = nn.Sequential(nn.Linear(W, W), nn.Tanh(), nn.Dropout())
        if decoding:
            d.decoding_head = nn.Sequential(nn.Linear(W, CLASSES))
        self.eval()

    def embedded(self, bold, seconds):
        index = torch.where(seconds < 0, 1500, (seconds / 0.2).round().long())
        return self.embedder.embed_model.model(bold) + self.embedder.wt_re(index)


def published(framework, *, buffers=False, decoding=False, pooler=True, dtype=torch.float32):
    torch.manual_seed(0)
    model = Published(framework, decoding, pooler)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model = model.to(dtype)
    state = {
        k: v for k, v in model.state_dict().items() if "position_ids" not in k and "token_type_ids" not in k
    }
    if buffers and framework == "csm":
        for i in range(LAYERS):
            square = torch.ones(1, 1, PLACES, PLACES, dtype=torch.uint8)
            state[f"decoder.transformer.h.{i}.attn.bias"] = square.tril()
            state[f"decoder.transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    elif buffers and "bert" in framework:
        state["decoder.transformer.embeddings.position_ids"] = torch.arange(PLACES)[None]
    return model, state


def make_batch(lengths, pairs=False):
    bold = torch.randn(sum(lengths), N, generator=torch.Generator().manual_seed(1))
    is_next = np.array([1.0]) if pairs else None
    return PackedBatch.pack(bold, Windows.end_to_end(lengths, t_r=0.72, is_next=is_next))


def imported(tmp_path, state, **options):
    torch.save(state, tmp_path / "pytorch_model.bin")
    report = import_checkpoint(tmp_path / "pytorch_model.bin", tmp_path / "model", heads=HEADS, **options)
    return report, brainflow.load(tmp_path / "model")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("framework", framework_names())
@pytest.mark.parametrize("buffers", [True, False])
def test_round_trip_is_byte_equal(tmp_path, framework, buffers, dtype):
    _, state = published(framework, buffers=buffers, decoding=buffers, dtype=dtype)
    report, module = imported(tmp_path, state)
    assert report.config.framework == framework
    assert report.missing == []
    assert set(report.used) | set(report.carried) | set(report.ignored) == set(state)
    assert all("bias" in name or "position_ids" in name for name in report.ignored)
    assert getattr(module.config, "late_read", False) == ("bert" in framework)
    assert getattr(module.config, "chained_states", False) == (framework == "autoencoder")
    assert report.head == buffers
    names = export_checkpoint(tmp_path / "model", tmp_path / "again.bin")
    again = read_state(tmp_path / "again.bin")
    assert set(names) == set(state) - set(report.ignored)
    for name, tensor in again.items():
        assert tensor.dtype == state[name].dtype
        assert tensor.shape == state[name].shape
        assert torch.equal(tensor, state[name]), name


def test_csm_forward_equals_the_published_model(tmp_path):
    model, state = published("csm")
    _, module = imported(tmp_path, state)
    batch = make_batch([7, 4])
    values, rows = module.reconstruct(batch, seed=0)
    for start, length in ((0, 7), (7, 4)):
        bold, seconds = batch.bold[None, start : start + length], batch.times[None, start : start + length]
        for i in range(1, length):
            padded = torch.cat([bold[:, :i], model.embedder.msk_embed, torch.zeros(1, 3, N)], 1)
            clock = torch.cat([seconds[:, : i + 1], torch.zeros(1, 3)], 1)
            seen = torch.tensor([[1] * (i + 1) + [0] * 3])
            hidden = model.decoder.transformer(
                inputs_embeds=model.embedded(padded, clock), attention_mask=seen
            ).last_hidden_state
            expected = model.unembedder.model(hidden[0, i])
            torch.testing.assert_close(values[rows == start + i][0], expected, rtol=1e-5, atol=1e-5)


def test_csm_decoding_equals_the_published_head(tmp_path):
    model, state = published("csm", decoding=True)
    report, _ = imported(tmp_path, state)
    decoder, config = load_decoder(tmp_path / "model")
    assert config["decoder"]["classes"] == [0, 1, 2]
    batch = make_batch([5])
    bold = torch.cat([batch.bold[None], model.embedder.cls_embed], 1)
    clock = torch.cat([batch.times, torch.tensor([-1.0])])[None]
    hidden = model.decoder.transformer(inputs_embeds=model.embedded(bold, clock)).last_hidden_state
    expected = model.decoder.decoding_head(model.decoder.pooler_layer(hidden[:, -1]))
    assert report.head
    torch.testing.assert_close(decoder(batch), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("framework", ["seq-bert", "net-bert"])
def test_bert_decoding_equals_the_published_head(tmp_path, framework):
    model, state = published(framework, decoding=True, pooler=False)
    imported(tmp_path, state)
    decoder, _ = load_decoder(tmp_path / "model")
    batch = make_batch([5])
    bold = torch.cat([batch.bold, model.embedder.sep_embed, model.embedder.cls_embed[0]])[None]
    clock = torch.cat([batch.times, torch.tensor([-1.0, -1.0])])[None]
    hidden = model.decoder.transformer(inputs_embeds=model.embedded(bold, clock)).last_hidden_state
    expected = model.decoder.decoding_head(model.decoder.pooler_layer(hidden[:, 0]))
    torch.testing.assert_close(decoder(batch), expected, rtol=1e-5, atol=1e-5)


def test_autoencoder_decoding_equals_the_published_head(tmp_path):
    model, state = published("autoencoder", decoding=True)
    imported(tmp_path, state)
    decoder, _ = load_decoder(tmp_path / "model")
    batch = make_batch([6])
    pooled, _ = encoded(model, model.embedded(batch.bold[None], batch.times[None]))
    expected = model.decoder.decoding_head(pooled)
    torch.testing.assert_close(decoder(batch), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pooler", [True, False])
@pytest.mark.parametrize("framework", ["seq-bert", "net-bert"])
def test_bert_forward_equals_the_published_model(tmp_path, framework, pooler):
    model, state = published(framework, pooler=pooler)
    report, module = imported(tmp_path, state)
    batch = make_batch([5, 4], pairs=True)
    if framework == "seq-bert":
        seed = next(s for s in range(50) if 1 < len(module.reconstruct(batch, seed=s)[1]) < 5)
        values, rows = module.reconstruct(batch, seed=seed)
        masked = batch.bold.clone()
        masked[rows] = model.embedder.msk_embed[0]
    else:
        seed = 1
        values, rows = module.reconstruct(batch, seed=seed)
        token = model.embedder.msk_embed[0, :9].expand(9, N)
        masked = torch.where(values.isnan(), batch.bold, token)
        assert 0 < values.isnan().sum() < values.numel()
    sep, cls = model.embedder.sep_embed, model.embedder.cls_embed[0]
    never = torch.tensor([-1.0])
    inputs = torch.cat([masked[:5], sep, masked[5:], sep, cls])[None]
    clock = torch.cat([batch.times[:5], never, batch.times[5:], never, never])[None]
    types = torch.tensor([[0] * 7 + [1] * 5])
    out = model.decoder.transformer(
        inputs_embeds=model.embedded(inputs, clock), attention_mask=torch.ones(1, 12), token_type_ids=types
    )
    late = torch.where(rows < 5, rows + 1, rows + 2)
    expected = model.unembedder.model(out.last_hidden_state[0, late])
    torch.testing.assert_close(
        values, expected.masked_fill(values.isnan(), torch.nan), rtol=1e-5, atol=1e-5, equal_nan=True
    )
    first = out.last_hidden_state[:, 0]
    pooled = out.pooler_output if pooler else model.decoder.pooler_layer(first)
    logit = model.decoder.is_next_head(pooled).squeeze(-1)
    # Published labels: 1 says that the second half does not follow.
    loss = nn.functional.binary_cross_entropy_with_logits(logit, torch.zeros(1))
    torch.testing.assert_close(module(batch, seed=seed).metrics["is_next"], loss.detach())
    assert report.config.late_read


def encoded(model, x):
    """The encoder of 2022: an LSTM begins with the states that the one below it ended with."""
    d, state = model.decoder, (torch.zeros(2, 1, W), torch.zeros(2, 1, W))
    for i, lstm in enumerate(d.encoder.lstms):
        out, state = lstm(x, state)
        out = out.view(1, x.shape[1], 2, W).mean(2)
        x = d.encoder.layer_norms[i](x + out) if i < LAYERS - 1 else out
    ended = state[0].mean(0)
    return d.encoder.pooler_layer(ended), ended


@pytest.mark.parametrize("forced", [False, True])
def test_autoencoder_forward_equals_the_published_model(tmp_path, forced):
    model, state = published("autoencoder")
    _, module = imported(tmp_path, state)
    batch = make_batch([6, 4, 6])
    expected = []
    for bold, times in zip(batch.bold.split([6, 4, 6]), batch.times.split([6, 4, 6]), strict=True):
        d, x = model.decoder, model.embedded(bold[None], times[None])
        pooled, ended = encoded(model, x)
        state, fed = (ended[None], torch.zeros(1, 1, W)), pooled[None]
        for t in range(len(bold)):
            y = x[:, t : t + 1] if forced else fed
            for i, lstm in enumerate(d.decoder.lstms):
                out, state = lstm(y, state)
                y = d.decoder.layer_norms[i](y + out) if i < LAYERS - 1 else out
            fed = d.decoder.linear_output_layer(y)
            expected.append(model.unembedder.model(fed[0, 0]))
    values = module.unembedding(module._decoded(batch, forced)[0])
    torch.testing.assert_close(values, torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_old_names_of_ours_get_zeros_where_hugging_face_asks_for_more(tmp_path):
    from brainflow.config import ModelConfig
    from brainflow.frameworks import build
    from brainflow.pretrained.format import save_pretrained

    config = ModelConfig(networks=N, width=W, layers=LAYERS, heads=HEADS, max_positions=PLACES)
    save_pretrained(build(config), tmp_path / "run")
    export_checkpoint(tmp_path / "run", tmp_path / "out.bin")
    state = read_state(tmp_path / "out.bin")
    assert state["decoder.transformer.wte.weight"].shape == (1, W)
    missing = Published("csm").load_state_dict(state, strict=False).missing_keys
    assert missing == ["embedder.sep_embed"]


def test_files_with_code_or_other_names_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save({"a": Evil()}, tmp_path / "evil.bin")
    (tmp_path / "noise.bin").write_bytes(b"not a checkpoint at all")
    for name, reason in (("evil.bin", "it calls .*print"), ("noise.bin", "damaged, or of another format")):
        with pytest.raises(ValueError, match=f"not a file of plain tensors.*{reason}") as caught:
            import_checkpoint(tmp_path / name, tmp_path / "out")
        assert "weights_only" not in str(caught.value), "no advice to load it all the same"
    torch.save({"some.weight": torch.zeros(2)}, tmp_path / "other.bin")
    with pytest.raises(ValueError, match=r"no tensor 'embedder"):
        import_checkpoint(tmp_path / "other.bin", tmp_path / "out")
    _, state = published("csm")
    del state["decoder.transformer.h.1.ln_2.weight"]
    torch.save(state, tmp_path / "short.bin")
    with pytest.raises(ValueError, match=r"has nothing for transformer\.blocks\.1\.norm2\.weight"):
        import_checkpoint(tmp_path / "short.bin", tmp_path / "out", heads=HEADS)


def test_command_line(tmp_path, capsys):
    _, state = published("seq-bert", buffers=True)
    torch.save(state, tmp_path / "pytorch_model.bin")
    command = [
        "import-checkpoint",
        str(tmp_path / "pytorch_model.bin"),
        str(tmp_path / "model"),
        "--heads",
        "4",
    ]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "seq-bert: 2 layers, width 16, 4 heads, 6 networks" in text
    assert "late_read is on" in text
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["framework"] == "seq-bert"
    assert main(["export-checkpoint", str(tmp_path / "model"), str(tmp_path / "out.bin")]) == 0
    assert (tmp_path / "out.bin").is_file()
    for out in (tmp_path, tmp_path / "absent" / "out.bin"):
        assert main(["export-checkpoint", str(tmp_path / "model"), str(out)]) == 1
        assert "expected a file in a folder that exists" in capsys.readouterr().err
