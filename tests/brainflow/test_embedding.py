import numpy as np
import pytest
import torch

from brainflow.batch import PackedBatch, Windows, upload
from brainflow.config import ModelConfig
from brainflow.decoding.heads import DecodingHead
from brainflow.frameworks import NetBERTConfig
from brainflow.frameworks.net_bert import NetBERT
from brainflow.models.embedding import BoldEmbedding


def make(**changes):
    return BoldEmbedding(ModelConfig(networks=4, width=8, heads=2, dropout=0.0, **changes))


def test_time_index_rounds_to_the_resolution_and_ends_before_the_dummy():
    embedding = make(max_seconds=300.0)
    assert embedding.time.weight.shape == (1501, 8)
    assert embedding.dummy == 1500
    seconds = torch.tensor([0.0, 0.72, 1.44, 299.8, 1000.0])
    assert embedding.clock(seconds).tolist() == [0, 4, 7, 1499, 1499]


def test_half_precision_input_is_cast_and_special_tokens_share_the_projection():
    embedding = make()
    bold = torch.randn(3, 4).half()
    special = torch.randn(2, 4)
    both = embedding(bold, special)
    assert both.dtype == torch.float32
    torch.testing.assert_close(both[:3], embedding(bold.float()))
    torch.testing.assert_close(both[3:], embedding(special))


def test_upload_keeps_types_shapes_and_empty_arrays():
    arrays = {
        "a": np.arange(3),
        "b": np.array([[1.5], [2.5]], np.float32),
        "none": np.zeros(0, np.int64),
        "c": np.array([7], np.int32),
    }
    sent = upload(torch.device("cpu"), **arrays)
    for name, array in arrays.items():
        assert sent[name].numpy().dtype == array.dtype
        assert np.array_equal(sent[name].numpy(), array)


def test_a_head_needs_two_classes():
    with pytest.raises(ValueError, match="classes: got 1"):
        DecodingHead(8, 1)


def test_a_store_of_float16_trains_a_mask_token_as_one_of_float32_does_under_bf16():
    """What autocast casts anyway is cast before the token is put in: float16 lacks its gradient's range."""
    torch.manual_seed(0)
    config = NetBERTConfig(networks=4, width=8, layers=1, heads=2, dropout=0.0)
    module, bold = NetBERT(config), torch.randn(12, 4).half()
    grads = []
    for store in (bold, bold.float()):
        batch = PackedBatch.pack(store, Windows.end_to_end([5, 7], t_r=2.0))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = module(batch, seed=3).loss
        (1e-6 * loss).backward()
        grads.append(module.mask_token.grad.clone())
        module.zero_grad()
    assert grads[0].any()
    assert torch.equal(*grads)
