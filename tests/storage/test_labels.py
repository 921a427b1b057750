"""Labels that are taken come back exactly; those that a column cannot hold are refused before the commit."""

import contextlib
import math
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brainflow.storage import BoldStore, StoreWriter
from brainflow.storage.columns import MISSING_INTEGER, PendingRuns, check_segments, column_name
from brainflow.storage.tables import Segment

VALUES = (
    st.integers(-(2**63) + 1, 2**63 - 1)
    | st.sampled_from([2**53, 2**53 + 1, -(2**53) - 1, 2**60, 0])
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
)
ENTITIES = dict.fromkeys(("dataset", "subject", "session", "task", "run"), "")
ROWS = st.lists(st.dictionaries(st.sampled_from("ab"), VALUES, max_size=2), min_size=1, max_size=3)


def label_of(column, row):
    """What a reader sees, None for an absent label."""
    if column.dtype == np.uint8:
        return column[row].tobytes().rstrip(b"\0").decode() or None
    value = column[row].item()
    return None if value == MISSING_INTEGER or (isinstance(value, float) and math.isnan(value)) else value


@given(st.lists(st.tuples(ROWS, st.booleans()), min_size=1, max_size=4))
@settings(deadline=None)  # each example writes a store
def test_what_is_taken_comes_back_exactly(runs):
    """Runs with labels of any kind, some of them behind a commit: refused when checked, or exact."""
    pending, taken = PendingRuns(), []
    for number, (rows, commit) in enumerate(runs):
        segments = [Segment(onset=0, length=1, labels=labels) for labels in rows]
        run = {"key": str(number), "t_r": 1.0, "censor": None, "length": 9, "segments": segments}
        with contextlib.suppress(ValueError):
            check_segments(segments, "k", 9)
            pending.check(**run)
            pending.add(**run, start=9 * number, slot=number, **ENTITIES)
            taken += rows
        if commit:
            pending = PendingRuns(pending.merge())
    columns = pending.merge()["labels"]
    for row, labels in enumerate(taken):
        for name in "ab":
            value = labels.get(name)
            if name in columns:
                assert label_of(columns[name], row) == (None if value == "" else value)
            else:
                assert value is None


@given(st.text(max_size=60))
def test_a_name_that_is_taken_is_one_directory(name):
    """Of any text: refused, or a directory name that a file system takes and that means nothing else."""
    try:
        check_segments([Segment(onset=0, length=1, labels={name: 1})], "k", 9)
    except ValueError:
        return
    column = column_name(name)
    assert column not in ("", ".", "..", "zarr.json")
    assert not set("/\0") & set(column)
    assert len(column.encode()) <= 255


@pytest.mark.parametrize("name", ["", ".", "..", "zarr.json", "\ud800", "é" * 43, "x" * 256, 3])
def test_a_name_that_cannot_be_a_directory_is_refused(name):
    with pytest.raises((ValueError, TypeError), match="label"):
        check_segments([Segment(onset=0, length=1, labels={name: 1})], "k", 9)


@pytest.mark.parametrize(
    ("onset", "length"),
    [(0.5, 1), (True, 1), ("0", 1), (0, 1.0), (0, None), pytest.param(10**5000, 1, id="huge")],
)
def test_an_onset_that_is_no_whole_number_is_refused(onset, length):
    with pytest.raises((ValueError, TypeError), match="run k: segment 0"):
        check_segments([Segment(onset=onset, length=length)], "k", 9)


def test_the_longest_names_and_texts_are_written_and_read(tmp_path):
    labels = {"x" * 255: "y" * 1024, "é" * 42: 2**63 - 1, " ": "é" * 512, "...": -0.5, "%2E": ""}
    with StoreWriter.create(tmp_path / "s", networks=1) as writer:
        segment = Segment(onset=0, length=1, labels=labels)
        writer.append(np.zeros((9, 1)), t_r=1.0, dataset="d", subject="1", segments=[segment])
    columns = BoldStore.open(tmp_path / "s").segments.columns
    assert {name: values.tolist()[0] for name, values in columns.items()} == labels


def test_tables_as_data_frames(tmp_path):
    pytest.importorskip("pandas", reason="pandas (extra `bids`) is not installed")
    labels = [{"state": "face", "n": 3, "run": 1.5}, {"state": "house"}, {"n": 2**60}]
    with StoreWriter.create(tmp_path / "s", networks=2) as writer:
        for subject in ("1", "2"):
            segments = [Segment(onset=i, length=2, labels=one) for i, one in enumerate(labels)]
            writer.append(
                np.zeros((5, 2)), t_r=2.0, dataset="d", subject=subject, task="x", segments=segments
            )
    store = BoldStore.open(tmp_path / "s")
    runs = store.runs.to_frame()
    assert runs["key"].tolist() == store.runs.key.tolist()
    assert runs.loc[1, ["subject", "task", "length", "t_r"]].tolist() == ["2", "x", 5, 2.0]
    frame = store.segments.to_frame()
    assert frame["run"].tolist() == [0, 0, 0, 1, 1, 1]
    assert frame["onset"].tolist() == [0, 1, 2] * 2
    assert frame["n"].isna().tolist() == [False, True, False] * 2
    assert frame["n"].dropna().tolist() == [3, 2**60] * 2
    assert frame["state"].isna().tolist() == [False, False, True] * 2
    assert frame["label_run"].tolist()[:1] == [1.5]
    assert frame.merge(runs, left_on="run", right_index=True)["subject"].tolist() == ["1"] * 3 + ["2"] * 3


def test_data_frames_need_pandas(tmp_path, monkeypatch):
    with StoreWriter.create(tmp_path / "s", networks=2) as writer:
        writer.append(np.zeros((5, 2)), t_r=2.0, dataset="d", subject="1")
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"to_frame needs pandas.*brainflow-fmri\[bids\]"):
        BoldStore.open(tmp_path / "s").runs.to_frame()
