import numpy as np
import pytest
import torch

from brainflow.batch import offsets, positions
from brainflow.config import ModelConfig
from brainflow.models.transformer import Layout, Transformer
from brainflow.pretrained.legacy_names import rules

transformers = pytest.importorskip("transformers")

WIDTH, HEADS, PLACES = 32, 4, 24
LENGTHS = np.array([7, 1, 12, 5])


def reference(style, layers):
    torch.manual_seed(layers)
    if style == "gpt":
        config = transformers.GPT2Config(
            vocab_size=1, n_positions=PLACES, n_embd=WIDTH, n_layer=layers, n_head=HEADS, use_cache=False,
            bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        model = transformers.GPT2Model(config)
    else:
        model = transformers.BertModel(
            transformers.BertConfig(
                vocab_size=1, hidden_size=WIDTH, num_hidden_layers=layers, num_attention_heads=HEADS,
                intermediate_size=4 * WIDTH, max_position_embeddings=PLACES, pad_token_id=0,
            )
        )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def same_weights(style, layers, model):
    config = ModelConfig(
        framework="csm" if style == "gpt" else "seq-bert", networks=4, width=WIDTH, layers=layers,
        heads=HEADS, max_positions=PLACES,
    )  # fmt: skip
    ours = Transformer(style, config)
    theirs = {f"decoder.transformer.{k}": v for k, v in model.state_dict().items()}
    own, state = ours.state_dict(), {}
    for rule in rules(config):
        name = rule.ours.removeprefix("transformer.")
        if rule.ours.startswith("transformer."):
            state[name] = rule.to_ours([theirs[k] for k in rule.theirs], own[name].shape)
    ours.load_state_dict(state)
    return ours.eval()


@pytest.mark.parametrize("layers", [1, 2, 4])
@pytest.mark.parametrize("style", ["gpt", "bert"])
def test_transformer_equals_hugging_face_on_padded_batches(style, layers):
    model = reference(style, layers)
    ours = same_weights(style, layers, model)
    longest = LENGTHS.max()
    padded = torch.randn(len(LENGTHS), longest, WIDTH)
    seen = torch.from_numpy((np.arange(longest) < LENGTHS[:, None]).astype(np.int64))
    types = torch.randint(0, 2, seen.shape)
    extra = {"token_type_ids": types} if style == "bert" else {}
    inside = seen.bool()
    x = padded[inside].requires_grad_()
    layout = Layout(
        cu_seqlens=torch.from_numpy(offsets(LENGTHS).astype(np.int32)),
        max_seqlen=int(longest),
        positions=torch.from_numpy(positions(LENGTHS)),
        token_types=types[inside] if extra else None,
    )
    packed = ours(x, layout)
    reference_input = padded.clone().requires_grad_()
    expected = model(inputs_embeds=reference_input, attention_mask=seen, **extra).last_hidden_state[inside]
    torch.testing.assert_close(packed, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(packed)
    (packed * weights).sum().backward()
    (expected * weights).sum().backward()
    scale = reference_input.grad.abs().max()
    torch.testing.assert_close(x.grad / scale, reference_input.grad[inside] / scale, rtol=1e-4, atol=1e-5)


def test_recompute_changes_neither_output_nor_gradient():
    model = reference("gpt", 2)
    ours = same_weights("gpt", 2, model).train()
    for module in ours.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for block in ours.blocks:
        block.attention.dropout = 0.0
    layout = Layout(
        cu_seqlens=torch.tensor([0, 5], dtype=torch.int32), max_seqlen=5, positions=torch.arange(5)
    )
    x = torch.randn(5, WIDTH)
    grads = []
    for recompute in (False, True):
        ours.recompute = recompute
        ours.zero_grad()
        ours(x, layout).square().sum().backward()
        grads.append([p.grad.clone() for p in ours.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_long_windows_and_wrong_streams_are_named():
    ours = Transformer("bert", ModelConfig(width=8, layers=1, heads=2, max_positions=4))
    layout = Layout(
        cu_seqlens=torch.tensor([0, 5], dtype=torch.int32), max_seqlen=5, positions=torch.arange(5)
    )
    with pytest.raises(ValueError, match="max_positions"):
        ours(torch.randn(5, 8), layout)
    short = Layout(
        cu_seqlens=torch.tensor([0, 3], dtype=torch.int32), max_seqlen=3, positions=torch.arange(3)
    )
    with pytest.raises(ValueError, match="two_streams"):
        ours(torch.randn(2, 3, 8), short, two_streams=True)
