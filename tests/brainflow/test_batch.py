import numpy as np
import torch

from brainflow.data.batch import PackedBatch
from brainflow.data.packing import packed_fields
from brainflow.data.windows import Windows


def windows(**more):
    return Windows(
        starts=np.array([5, 0, 9]),
        lengths=np.array([3, 1, 2], np.int32),
        runs=np.array([0, 1, 0], np.int32),
        t_r=np.array([2.0, 0.72, 1.5]),
        **more,
    )


def test_fields_of_a_packed_batch():
    fields = packed_fields(windows(labels=np.array([1, 0, 2])))
    assert fields["cu_seqlens"].tolist() == [0, 3, 4, 6]
    assert fields["times"].tolist() == [0.0, 2.0, 4.0, 0.0, 0.0, 1.5]
    assert {name: str(array.dtype) for name, array in fields.items()} == {
        "times": "float32",
        "cu_seqlens": "int32",
        "labels": "int64",
    }


def test_times_are_rounded_once():
    long = Windows(
        starts=np.zeros(1, np.int64),
        lengths=np.array([400], np.int32),
        runs=np.zeros(1, np.int32),
        t_r=np.array([0.72]),
    )
    assert np.array_equal(packed_fields(long)["times"], (np.arange(400) * 0.72).astype(np.float32))


def test_to_and_cast_keep_the_host_arrays():
    w = windows(is_next=np.array([1.0], np.float32))
    fields = {name: torch.from_numpy(array) for name, array in packed_fields(w).items()}
    batch = PackedBatch(
        bold=torch.zeros(6, 4, dtype=torch.float16),
        max_seqlen=3,
        lengths=w.lengths,
        runs=w.runs,
        step=7,
        **fields,
    )
    assert (batch.tokens, batch.windows) == (6, 3)
    moved = batch.to("meta").cast(torch.float32)
    assert {moved.bold.device.type, moved.times.device.type, moved.is_next.device.type} == {"meta"}
    assert moved.bold.dtype == torch.float32
    assert moved.lengths is w.lengths
    assert (moved.labels, moved.step, moved.max_seqlen) == (None, 7, 3)
