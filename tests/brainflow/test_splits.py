import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brainflow.data.splits import Split, split_runs


class Runs(SimpleNamespace):
    def __len__(self):
        return len(self.key)


def table(subjects, dataset="a"):
    n = len(subjects)
    return Runs(
        key=np.array([f"{dataset}-{i}" for i in range(n)]),
        dataset=np.array([dataset] * n),
        subject=np.array([str(s) for s in subjects]),
        length=np.full(n, 100, np.int32),
    )


@given(st.lists(st.integers(0, 8), min_size=12, max_size=60), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_no_subject_stands_in_two_parts(subjects, seed):
    subjects = [*range(9), *subjects]
    runs = table(subjects)
    split = split_runs(runs, sizes={"validation": 2, "test": 0.2}, by="subject", seed=seed)
    parts = {name: split.part(name, runs) for name in ("train", "validation", "test")}
    assert np.array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(len(runs)))
    seen = {name: set(runs.subject[ids]) for name, ids in parts.items()}
    assert not seen["train"] & seen["validation"]
    assert not seen["train"] & seen["test"]
    assert not seen["validation"] & seen["test"]
    assert len(seen["validation"]) == len(seen["test"]) == 2


def test_at_least_two_runs_of_each_dataset():
    one, two = table(range(10), "a"), table(range(200), "b")
    runs = Runs(**{k: np.concatenate([getattr(one, k), getattr(two, k)]) for k in vars(one)})
    ids = split_runs(runs, sizes={"validation": 0.05}).part("validation", runs)
    assert np.bincount(ids >= 10).tolist() == [2, 10]


def test_same_subject_name_in_two_datasets_is_two_subjects():
    one, two = table(["1", "2"], "a"), table(["1", "2"], "b")
    runs = Runs(**{k: np.concatenate([getattr(one, k), getattr(two, k)]) for k in vars(one)})
    split = split_runs(runs, sizes={"test": 1}, by="subject", seed=3)
    assert len(split.part("test", runs)) == 2


def test_a_dataset_is_split_alike_whatever_else_is_in_the_store():
    one, two = table(range(30), "a"), table(range(30), "b")
    both = Runs(**{k: np.concatenate([getattr(two, k), getattr(one, k)]) for k in vars(one)})
    alone = split_runs(one, sizes={"test": 5}).parts["test"]
    assert tuple(k for k in split_runs(both, sizes={"test": 5}).parts["test"] if k[0] == "a") == alone


def test_a_leak_cannot_be_built():
    split = split_runs(table([0, 0, 1, 1]), sizes={"test": 1}, by="subject")
    leaky = {"train": split.parts["train"], "test": (*split.parts["test"], split.parts["train"][0])}
    with pytest.raises(ValueError, match="stands in the parts 'train' and 'test'"):
        Split(by="subject", seed=0, snapshot="", parts=leaky, subjects=split.subjects)
    half = {"train": split.parts["train"][:1], "test": (*split.parts["test"], *split.parts["train"][1:])}
    with pytest.raises(ValueError, match="subject 'a/"):
        Split(by="subject", seed=0, snapshot="", parts=half, subjects=split.subjects)
    with pytest.raises(ValueError, match="names a run twice"):
        Split(by="run", seed=0, snapshot="", parts={"train": ("a-0", "a-0")}, subjects=split.subjects)


def test_saved_and_read_back(tmp_path):
    runs = table(range(20))
    split = split_runs(runs, sizes={"validation": 0.1}, seed=4, snapshot="abc")
    path = tmp_path / "split.json"
    split.save(path)
    again = Split.load(path, snapshot="abc")
    assert again == split
    assert [p.name for p in tmp_path.iterdir()] == ["split.json"]
    with pytest.raises(ValueError, match="was made for snapshot 'abc', this store is 'abd'"):
        Split.load(path, snapshot="abd")


def test_an_edited_file_is_refused(tmp_path):
    split_runs(table(range(20)), sizes={"validation": 0.1}).save(path := tmp_path / "split.json")
    body = json.loads(path.read_text())
    body["parts"]["train"].append(body["parts"]["validation"].pop())
    path.write_text(json.dumps(body))
    with pytest.raises(ValueError, match="checksum"):
        Split.load(path)
    for text in ("not json", "[]", "{}"):
        path.write_text(text)
        with pytest.raises(ValueError, match="is not a split file"):
            Split.load(path)


def test_errors_say_what_to_do():
    runs = table(range(3))
    split = split_runs(runs, sizes={"test": 1})
    with pytest.raises(ValueError, match="part: got 'val', expected one of 'train', 'test'"):
        split.part("val", runs)
    with pytest.raises(ValueError, match="is not in this store"):
        split.part("train", table(range(3), "b"))
    with pytest.raises(ValueError, match="which leaves none for training"):
        split_runs(runs, sizes={"test": 3})
    for sizes in ({"test": 1.5}, {"test": 0}, {"train": 2}):
        with pytest.raises(ValueError, match="sizes"):
            split_runs(runs, sizes=sizes)
    with pytest.raises(ValueError, match="by: got 'session'"):
        split_runs(runs, sizes={"test": 1}, by="session")
    doubled = table(range(3))
    doubled.key[1] = doubled.key[0]
    with pytest.raises(ValueError, match="same key"):
        split_runs(doubled, sizes={"test": 1})
