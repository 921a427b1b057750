import numpy as np
import pytest
import torch

from brainflow.config import ModelConfig
from brainflow.models.embedding import BoldEmbedding
from brainflow.models.heads import DecodingHead
from brainflow.upload import upload


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
