import numpy as np
import pytest
import torch

from brainflow.batch import PackedBatch, Windows


def windows(**more):
    return Windows(
        starts=np.array([5, 0, 9]),
        lengths=np.array([3, 1, 2], np.int32),
        runs=np.array([0, 1, 0], np.int32),
        t_r=np.array([2.0, 0.72, 1.5]),
        step=7,
        **more,
    )


def test_columns_of_a_packed_batch():
    columns = windows(labels=np.array([1, 0, 2])).columns()
    assert columns["cu_seqlens"].tolist() == [0, 3, 4, 6]
    assert columns["times"].tolist() == [0.0, 2.0, 4.0, 0.0, 0.0, 1.5]
    assert {name: str(array.dtype) for name, array in columns.items()} == {
        "times": "float32",
        "cu_seqlens": "int32",
        "labels": "int64",
    }


def test_rows_of_the_store_in_the_order_of_the_batch():
    assert windows().rows().tolist() == [5, 6, 7, 0, 9, 10]


def test_times_are_rounded_once():
    long = Windows.end_to_end([400], t_r=0.72)
    assert np.array_equal(long.columns()["times"], (np.arange(400) * 0.72).astype(np.float32))


def test_windows_end_to_end_are_the_rows_of_an_array():
    w = Windows.end_to_end([3, 2], t_r=[2.0, 0.5], step=4)
    assert np.array_equal(w.rows(), np.arange(5))
    batch = PackedBatch.pack(torch.zeros(5, 1), w)
    assert batch.times.tolist() == [0.0, 2.0, 4.0, 0.0, 0.5]
    assert (batch.step, batch.max_seqlen, batch.runs.tolist()) == (4, 3, [0, 0])


def test_the_same_columns_by_one_upload_as_by_the_host():
    w = windows(labels=np.array([1, 0, 2]), is_next=np.array([1.0], np.float32))
    host = PackedBatch.pack(torch.zeros(6, 4), w)
    sent = PackedBatch.pack(torch.zeros(6, 4), w, device="meta")
    for name in ("times", "cu_seqlens", "labels", "is_next"):
        one, other = getattr(host, name), getattr(sent, name)
        assert (one.shape, one.dtype, other.device.type) == (other.shape, other.dtype, "meta")


@pytest.mark.parametrize(("rows", "lengths"), [(5, [3, 1]), (3, [3, 1]), (3, [3, 0])])
def test_bold_that_is_not_the_windows_is_refused(rows, lengths):
    with pytest.raises(ValueError, match=f"bold: got {rows} rows for 2 windows"):
        PackedBatch.pack(torch.zeros(rows, 2), Windows.end_to_end(lengths, t_r=1.0))


def test_to_and_cast_keep_the_host_arrays():
    w = windows(is_next=np.array([1.0], np.float32))
    batch = PackedBatch.pack(torch.zeros(6, 4, dtype=torch.float16), w)
    assert (batch.tokens, batch.windows) == (6, 3)
    moved = batch.to("meta").cast(torch.float32)
    assert {moved.bold.device.type, moved.times.device.type, moved.is_next.device.type} == {"meta"}
    assert moved.bold.dtype == torch.float32
    assert moved.lengths is w.lengths
    assert (moved.labels, moved.step, moved.max_seqlen) == (None, 7, 3)
