import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brainflow.storage import tables
from brainflow.storage.tables import Intervals


@given(
    st.lists(st.sampled_from([0, 1, 2, 3, 50, 10_000]), min_size=2, max_size=60),
    st.integers(-5, 10**12),
    st.lists(st.integers(-70, 700_000), max_size=40),
)
@settings(max_examples=200, deadline=None)
def test_the_table_finds_what_a_search_finds(steps, first, offsets):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "_FEW", 1)
        starts = first + np.cumsum(steps)
        found = Intervals(starts)
    assert found._table is not None
    numbers = np.concatenate([first + np.array(offsets, np.int64), starts - 1, starts, starts + 1])
    assert np.array_equal(found.begun(numbers), starts.searchsorted(numbers, "right"))


def test_few_intervals_need_no_table():
    assert Intervals(np.array([0, 7]))._table is None
    assert Intervals(np.zeros(0, np.int64)).begun(np.array([3])).tolist() == [0]
    assert Intervals(np.array([0, 7])).begun(np.array([-1, 0, 6, 7])).tolist() == [0, 1, 1, 2]
