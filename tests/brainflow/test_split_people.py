"""People kept for the test: `brainflow split`, and that nobody else reads them, whatever came in between."""

import json
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from brainflow.cli.main import main
from brainflow.cli.score_tables import curve_table
from brainflow.config import ModelConfig
from brainflow.data.splits import Split, SplitWarning, _checksum, split_people
from brainflow.decoding.adapt import adapt
from brainflow.decoding.estimator import MentalStateDecoder
from brainflow.decoding.fit import AdaptConfig
from brainflow.decoding.task import TaskConfig, load_task
from brainflow.frameworks import build
from brainflow.pretrained.compatibility import LeakWarning, check_unseen
from brainflow.pretrained.format import read_config, save_pretrained
from brainflow.pretrained.privacy import published
from brainflow.storage import BoldStore, Segment, StoreWriter
from brainflow.storage.layout import CHUNK_ROWS

NETWORKS, CLASSES = 6, ("cat", "face")
TINY = [  # of `pretrain`
    *("--model.width", "16", "--model.layers", "1", "--model.heads", "2", "--device", "cpu"),
    *("--data.batch-size", "2", "--data.seq-min", "6", "--data.seq-max", "12", "--data.loader", "host"),
    *("--data.validation-batches", "1", "--train.steps", "2", "--train.validate-every", "2"),
]


def add(writer, people, *, run="1", labels=True, time_points=CHUNK_ROWS):
    """Runs of one chunk each, so that damage to one is damage to nobody else."""
    patterns = 2.0 * np.random.default_rng(0).normal(size=(len(CLASSES), NETWORKS))
    for person in people:
        bold = np.random.default_rng([int(person), int(run)]).normal(size=(time_points, NETWORKS))
        segments = []
        for place in range(8 if labels else 0):
            bold[place * 6 : place * 6 + 5] += patterns[place % 2]
            segments.append(Segment(onset=place * 6, length=5, labels={"state": CLASSES[place % 2]}))
        writer.append(
            bold, t_r=2.0, dataset="toy", subject=f"{int(person):02}", task="t", run=run, segments=segments
        )


def write(path, people=range(1, 7), **options):
    with StoreWriter.create(path, networks=NETWORKS, parcellation="six") as writer:
        add(writer, people, **options)
    return BoldStore.open(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A store of six people, a split that keeps two of them, and a model pretrained by it."""
    folder = tmp_path_factory.mktemp("split")
    write(folder / "store")
    out = ["--out", str(folder / "split.json")]
    assert main(["split", str(folder / "store"), "--test", "sub-05", "06", "--validation", "1", *out]) == 0
    given = ["--data.split", str(folder / "split.json")]
    assert main(["pretrain", str(folder / "store"), "--out", str(folder / "run"), *TINY, *given]) == 0
    return folder


def seen_model(folder, people, **more):
    """An untrained model that says it was trained on some people."""
    torch.manual_seed(0)
    config = ModelConfig(networks=NETWORKS, width=16, layers=1, heads=2)
    save_pretrained(build(config), folder, {"data": {"training_subjects": people}, **more})
    return folder


def task_of(place, split="split.json", store="store"):
    return load_task(BoldStore.open(place / store), TaskConfig(target="state", split=str(place / split)))


class Table:
    def __init__(self, rows):
        self.key = np.array([f"k{i}" for i in range(len(rows))])
        self.dataset, self.subject = (np.array([str(row[i]) for row in rows]) for i in (0, 1))

    def __len__(self):
        return len(self.key)


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 9)), min_size=30, max_size=60),
    st.one_of(st.integers(1, 2), st.floats(0.05, 0.5)),
    st.sets(st.integers(0, 9), max_size=10),
    st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_whole_people_are_drawn_among_those_with_labels(rows, test, labelled, seed):
    rows += [(d, i) for d in "ab" for i in range(10)]
    runs, with_labels = Table(rows), {f"{d}/{i}" for d in "ab" for i in labelled}
    if isinstance(test, int) and 0 < len(labelled) < test:
        with pytest.raises(ValueError, match="ask for fewer"):
            split_people(runs, test=test, labelled=with_labels, seed=seed)
        return
    split = split_people(runs, test=test, labelled=with_labels, seed=seed)
    everybody = {f"{d}/{i}" for d, i in rows}
    assert set(split.people) == everybody
    assert sorted(k for keys in split.parts.values() for k in keys) == sorted(runs.key)
    if labelled:
        assert split.test_people <= with_labels
    asked = test if isinstance(test, int) else max(1, int(test * len(labelled or range(10)) + 0.5))
    assert len(split.test_people) == 2 * min(asked, 9)
    assert split == split_people(runs, test=test, labelled=with_labels, seed=seed)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--test", "sub-09"], "test: 'sub-09' is nobody in the store, which holds toy/01, toy/02"),
        (["--test", "6"], "test: got 6 people of each dataset, but dataset 'toy' has 6 to draw from"),
        (["--test", "0"], "test: got 0, expected a share in"),
        (["--test", "1.5"], "test: got 1.5, expected a share in"),
        (["--test", "-1"], "test: got -1, expected a share in"),
        (["--test", "nan"], "test: got nan, expected a share in"),
        (["--test", "05", "--validation", "sub-05"], "validation: 'toy/05' is in test already"),
        (["--test", *(f"sub-0{i}" for i in range(1, 7))], "split: leaves nobody to train"),
        (["--test", "split.json"], "check the path"),
    ],
)
def test_wrong_names_and_numbers_are_refused_by_name(place, tmp_path, monkeypatch, capsys, options, says):
    monkeypatch.chdir(tmp_path)
    assert main(["split", str(place / "store"), "--out", "new.json", *options]) == 1
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_there_and_a_lonely_person_are_refused(place, tmp_path, capsys):
    before = (place / "split.json").read_bytes()
    again = ["split", str(place / "store"), "--test", "1", "--out", str(place / "split.json")]
    assert main(again) == 1
    assert "is there already; choose another file, or --overwrite" in capsys.readouterr().err
    assert (place / "split.json").read_bytes() == before
    write(tmp_path / "one", [1])
    assert main(["split", str(tmp_path / "one"), "--test", "1", "--out", str(tmp_path / "s.json")]) == 1
    assert "holds one person (toy/01), expected at least 2" in capsys.readouterr().err


def test_a_name_that_two_datasets_have_must_name_its_dataset(tmp_path, capsys):
    with StoreWriter.create(tmp_path / "s", networks=NETWORKS) as writer:
        for dataset in "ab":
            for subject in ("1", "2", "3"):
                writer.append(np.ones((8, NETWORKS)), t_r=2.0, dataset=dataset, subject=subject)
    command = ["split", str(tmp_path / "s"), "--out", str(tmp_path / "s.json"), "--json", "--test"]
    assert main([*command, "sub-1"]) == 1
    assert "'sub-1' may be a/1 or b/1; name it so" in capsys.readouterr().err
    assert main([*command, "b/1"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["parts"]["test"] == {"people": ["b/1"], "runs": 1}
    assert told["checksum"] == Split.load(tmp_path / "s.json").checksum
    assert main([*command, "b/1", "b/2", "b/3", "--validation", "1", "--overwrite"]) == 0  # all of a dataset
    told = json.loads(capsys.readouterr().out)
    assert [len(told["parts"][name]["people"]) for name in ("train", "validation", "test")] == [2, 1, 3]


def test_what_is_no_split_is_refused_and_nothing_else_is_raised(place, tmp_path):
    body = json.loads((place / "split.json").read_text())
    del body["checksum"]
    path = tmp_path / "s.json"
    bad: dict = {"by": ["x", 3, None], "seed": ["x", None], "snapshot": [3, None], "format": [2, "1"]}
    bad |= {
        "subjects": [None, [], {}, {"k": 3}],
        "parts": [None, [], {"a": 3}, {"a": [[]]}, {"a": ["nobody"]}],
    }
    for name, values in bad.items():
        for value in values:
            changed = {**body, name: value}
            path.write_text(json.dumps({**changed, "checksum": _checksum(changed)}))
            with pytest.raises(ValueError, match=r"split: .*(is not a split file|has format)"):
                Split.load(path)


def test_pretraining_never_reads_a_test_person(place, tmp_path):
    """Every chunk of the test people is damaged: whoever reads one is told."""
    store = write(tmp_path / "store")
    kept = Split.load(place / "split.json").part("test", store.runs)
    shard = tmp_path / "store" / "bold" / "c" / "0" / "0"
    data = bytearray(shard.read_bytes())
    for run in kept:
        data[int(store.runs.start[run]) * NETWORKS * 2] ^= 255
    shard.write_bytes(data)
    command = ["pretrain", str(tmp_path / "store"), *TINY, "--train.steps", "12"]
    assert main([*command, "--out", str(tmp_path / "all"), "--train.seed", "3"]) == 1  # the plant is found
    given = ["--data.split", str(place / "split.json")]
    assert main([*command, "--out", str(tmp_path / "run"), *given]) == 0
    people = read_config(tmp_path / "run")["data"]["training_subjects"]
    assert len(people) == 4  # validation reads, too
    assert not {"toy/05", "toy/06"} & set(people)


def test_who_comes_later_is_used_by_nobody_until_a_new_file_says_so(place, tmp_path, capsys):
    write(tmp_path / "store")
    with StoreWriter.append_to(tmp_path / "store") as writer:
        add(writer, [7])
        add(writer, [1, 5], run="2")
    old, new = str(place / "split.json"), str(tmp_path / "new.json")
    command = ["pretrain", str(tmp_path / "store"), *TINY]
    assert main([*command, "--out", str(tmp_path / "run"), "--data.split", old]) == 0
    said = capsys.readouterr().err
    assert "does not know toy/07: nothing of theirs is read. To train on them, make a new file" in said
    saved = Split.load(tmp_path / "run" / "split.json", snapshot=BoldStore.open(tmp_path / "store").snapshot)
    assert saved.left_out == ["toy/07"]
    assert saved.test_people == {"toy/05", "toy/06"}
    assert "ds-toy_sub-05_task-t_run-2" in saved.parts["test"]  # a new run stands where its person does
    with pytest.warns(SplitWarning, match="toy/07: their labelled windows neither train nor test"):
        task = load_task(BoldStore.open(tmp_path / "store"), TaskConfig(target="state", split=old))
    assert set(task.subjects[task.tested]) == {"toy/05", "toy/06"}
    assert "toy/07" not in task.subjects
    assert main(["split", str(tmp_path / "store"), "--test", old, "--out", new]) == 0
    assert main([*command, "--out", str(tmp_path / "other"), "--data.split", new]) == 0
    assert "does not know" not in capsys.readouterr().err
    both = Split.load(new)
    assert both.test_people == {"toy/05", "toy/06"}
    assert "toy/07" in both.people


def test_a_split_of_other_people_is_refused(place, tmp_path, capsys):
    with StoreWriter.create(tmp_path / "store", networks=NETWORKS) as writer:
        add(writer, [11, 12])
    given = ["--data.split", str(place / "split.json")]
    assert main(["pretrain", str(tmp_path / "store"), "--out", str(tmp_path / "run"), *TINY, *given]) == 1
    assert "puts no run of" in capsys.readouterr().err
    with pytest.raises(ValueError, match="the file knows nobody who has labels in this store"):
        load_task(
            BoldStore.open(tmp_path / "store"), TaskConfig(target="state", split=str(place / "split.json"))
        )


def test_test_people_test_and_the_others_train(place, tmp_path, capsys):
    command = ["adapt", str(place / "store"), "--from", str(place / "run"), "--target", "state"]
    command += ["--split", str(place / "split.json"), "--mode", "linear", "--device", "cpu"]
    curve = ["--learning-curve", "1,4", "--draws", "2"]
    assert main([*command, *curve, "--out", str(tmp_path / "out"), "--save", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["split"] == "split file"
    assert found["split_file"]["test"] == ["toy/05", "toy/06"]
    assert found["split_file"]["train"] == ["toy/01", "toy/02", "toy/03", "toy/04"]
    assert found["split_file"]["checksum"] == Split.load(place / "split.json").checksum
    assert found["tested"] == 16
    assert set(found["decoder"]["per_subject"]) == {"toy/05", "toy/06"}
    assert {point["train"] for point in found["learning_curve"]["points"]} == {1, 4}
    title = str(curve_table(found["learning_curve"]).title)
    assert title.endswith("over 2 subjects and draws of training ones; below 5 they are too narrow")
    assert read_config(tmp_path / "out" / "decoder")["decoding"]["subjects"] == found["split_file"]["train"]


def test_a_model_that_has_seen_a_test_person_is_refused_unless_allowed(place, tmp_path, capsys):
    leaky = seen_model(tmp_path / "m", ["toy/01", "toy/05"])
    command = ["adapt", str(place / "store"), "--from", str(leaky), "--target", "state", "--mode", "knn"]
    command += ["--device", "cpu", "--out", str(tmp_path / "out")]
    given = ["--split", str(place / "split.json")]
    assert main([*command, *given]) == 1
    assert "read the BOLD, not the labels, of toy/05, whom the split file keeps" in capsys.readouterr().err
    assert not (tmp_path / "out" / "scores.json").exists()
    allowed = [*given, "--allow-seen"]
    for more, of in ((allowed, "1 of the 2"), (["--split", "k-fold", "--folds", "2"], "2 of the 6")):
        assert main([*command, *more, "--json"]) == 0
        out, error = capsys.readouterr()
        assert f"warning: pretraining of {leaky} read the BOLD" in error
        assert f"{of} tested subjects" in error
        assert json.loads(out)["decoder"]["pretraining_saw"][-1] == "toy/05"


def test_people_of_a_model_on_the_hub_that_another_began_from_are_found(place, tmp_path, monkeypatch):
    task = task_of(place)
    grandparent = seen_model(tmp_path / "g", ["toy/06"])
    parent = seen_model(tmp_path / "p", ["toy/02"], pretrain={"train": {"init": "me/grandparent"}})
    asked = []

    def download(name, *, revision=None, allow_patterns=None):
        asked.append((name, allow_patterns))
        if name not in on_hub:
            raise OSError("offline")
        return str(on_hub[name])

    on_hub = {"me/parent": parent, "me/grandparent": grandparent}
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=download))
    child = seen_model(tmp_path / "c", ["toy/01"], pretrain={"train": {"init": "me/parent"}})
    with pytest.raises(ValueError, match="of toy/06"):
        check_unseen(child, task)
    assert asked == [("me/parent", ["config.json"]), ("me/grandparent", ["config.json"])]  # no weights
    silent = seen_model(tmp_path / "s", [], base_model="me/grandparent")
    with pytest.raises(ValueError, match="of toy/06"):
        check_unseen(silent, task)
    on_hub.pop("me/grandparent")
    with pytest.warns(LeakWarning, match="me/grandparent does not name the people"):
        assert check_unseen(child, task) == []


def test_every_way_to_have_seen_somebody_is_found(place, tmp_path):
    task = task_of(place)
    hashed = published({"data": {"training_subjects": ["toy/06"]}}, "hash").config
    grandchild = seen_model(
        tmp_path / "c",
        ["toy/01"],
        pretrain={"train": {"init": str(seen_model(tmp_path / "p", ["toy/05"]))}},
    )
    score = {"value": 1.0, "low": None, "high": None}
    decoding = {"split": "k-fold", "interval_over": "subjects", "chance": 0.5, "subjects": ["toy/06"]}
    decoding |= dict.fromkeys(("accuracy", "balanced_accuracy", "macro_f1"), score)
    decoder = {"pooling": "mean", "classes": ["cat", "face"], "examples": 0, "head": "linear"}
    for name, model, says in (
        ("hashed", seen_model(tmp_path / "h", [], **hashed), "of toy/06"),
        ("init", grandchild, "of toy/05"),
        (
            "labels",
            seen_model(
                tmp_path / "d", ["toy/01"], decoding=decoding, decoder={**decoder, "mode": "finetune"}
            ),
            "fitted to the labels of toy/06",
        ),
    ):
        with pytest.raises(ValueError, match=says):
            check_unseen(model, task)
        assert name
    probe = seen_model(tmp_path / "l", ["toy/01"], decoding=decoding, decoder={**decoder, "mode": "linear"})
    assert check_unseen(probe, task) == []  # a probe leaves no label in the weights that are taken
    silent = seen_model(tmp_path / "s", [])
    with pytest.warns(LeakWarning, match="does not name the people that it was trained on"):
        adapt(task, silent, AdaptConfig(mode="knn"), device="cpu")


def test_splits_that_keep_nobody_are_refused(place, tmp_path):
    with pytest.raises(ValueError, match="got 'leave-one-subjekt-out', expected one of leave-one-run-out"):
        load_task(BoldStore.open(place / "store"), TaskConfig(target="state", split="leave-one-subjekt-out"))
    by_run = Split(by="run", seed=0, snapshot="", parts={"test": ("k",)}, subjects={"k": "toy/05"})
    by_run.save(tmp_path / "run.json")
    with pytest.raises(ValueError, match="puts runs into parts"):
        load_task(
            BoldStore.open(place / "store"), TaskConfig(target="state", split=str(tmp_path / "run.json"))
        )


def test_a_sweep_reads_the_file(place, tmp_path, capsys):
    pytest.importorskip("optuna", reason="optuna is not installed")
    (tmp_path / "space.toml").write_text("[train]\nlr = [1e-3]\n")
    command = ["sweep", str(place / "store"), "--space", str(tmp_path / "space.toml"), *TINY]
    given = ["--data.split", str(place / "split.json")]
    assert main([*command, "--out", str(tmp_path / "sweep"), *given]) == 0
    people = read_config(tmp_path / "sweep" / "trial-0000")["data"]["training_subjects"]
    assert set(people) == set(read_config(place / "run")["data"]["training_subjects"])
    assert main([*command, "--out", str(tmp_path / "bad"), "--data.split", str(tmp_path / "space.toml")]) == 1
    assert "is not a split file" in capsys.readouterr().err


def test_estimators_read_the_file(place, tmp_path):
    rng = np.random.default_rng(0)
    windows = rng.normal(size=(12, 5, NETWORKS)).astype(np.float32)
    names, people = np.array(CLASSES * 6), np.array([f"toy/0{i // 2 + 1}" for i in range(12)])
    train, test = Split.load(place / "split.json").sides(people)
    assert people[test].tolist() == ["toy/05", "toy/05", "toy/06", "toy/06"]
    decoder = MentalStateDecoder(place / "run", split=place / "split.json")
    decoder.fit(windows[train], names[train], groups=people[train]).predict(windows[test])
    with pytest.raises(ValueError, match="toy/05, toy/06 would train, but the split file keeps them"):
        decoder.fit(windows, names, groups=people)
    leaky = seen_model(tmp_path / "m", ["toy/05"])
    with pytest.raises(ValueError, match="has seen toy/05, whom the split file keeps"):
        MentalStateDecoder(leaky, split=place / "split.json").fit(windows[train], names[train])
