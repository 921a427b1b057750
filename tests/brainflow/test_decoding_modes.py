"""Ways to adapt against plain specifications of what they are; traps of labels, splits and copied data."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from brainflow.cli.main import main
from brainflow.config import ModelConfig
from brainflow.decoding import adapt as adapting
from brainflow.decoding.adapt import adapt
from brainflow.decoding.baselines import BASELINES
from brainflow.decoding.finetune import Decoder, frozen_features, probabilities
from brainflow.decoding.fit import AdaptConfig, fit_decoder
from brainflow.decoding.heads import AttentiveHead, class_weights, fit_probe, make_head
from brainflow.decoding.lora import add_lora, has_blocks, merge_lora
from brainflow.decoding.persist import load_decoder, save_decoder
from brainflow.decoding.readout import Readout
from brainflow.decoding.result import baselines
from brainflow.decoding.splits import Fold
from brainflow.decoding.task import TaskConfig, load_task
from brainflow.decoding.windows import ArrayWindows
from brainflow.frameworks import build
from brainflow.pretrained.compatibility import LeakWarning
from brainflow.pretrained.format import save_pretrained
from brainflow.storage import BoldStore, Segment, StoreWriter

NETWORKS, CLASSES = 6, ("cat", "face", "house")
CPU = torch.device("cpu")


def module(**changes):
    torch.manual_seed(0)
    return build(
        ModelConfig(**{"networks": NETWORKS, "width": 16, "layers": 2, "heads": 2, **changes})
    ).eval()


def write_store(path, subjects, *, seed=0, code=lambda label: label):
    """Each subject has one run with two segments of each class; subjects may be (name, seed of its data)."""
    with StoreWriter.create(str(path), networks=NETWORKS) as writer:
        for name, own in subjects:
            rng = np.random.default_rng([seed, own])
            bold = rng.normal(size=(26, NETWORKS))
            segments = [
                Segment(
                    onset=1 + 4 * i, length=4, labels={"state": CLASSES[i % 3], "task": f"t{code(i % 3)}"}
                )
                for i in range(6)
            ]
            for i in range(6):
                bold[1 + 4 * i : 5 + 4 * i, i % 3] += 2
            writer.append(bold, t_r=2.0, dataset="toy", subject=name, task="t", run="0", segments=segments)
    return BoldStore.open(str(path))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    data = {"training_subjects": ["toy/s0", "toy/elsewhere"]}
    return save_pretrained(module(), tmp_path_factory.mktemp("model"), {"data": data})


# ---------------------------------------------------------------- heads


def test_attentive_head_is_attention_within_each_window():
    torch.manual_seed(1)
    head = AttentiveHead(8, 3).double().eval()
    lengths = np.array([1, 5, 2])
    hidden = torch.randn(8, 8, dtype=torch.float64) * 3
    expected = []
    for window in torch.split(hidden, lengths.tolist()):
        x = head.norm(window)
        keys, values = (part(x).view(len(x), head.heads, -1) for part in (head.key, head.value))
        score = torch.einsum("thd,hd->ht", keys, head.query) / head.query.shape[1] ** 0.5
        read = torch.einsum("ht,thd->hd", score.softmax(dim=-1), values)
        expected.append(head.output(read.flatten()))
    torch.testing.assert_close(head(hidden, lengths), torch.stack(expected))
    assert torch.autograd.gradcheck(lambda h: head(h, lengths), hidden.requires_grad_())


def test_nearest_neighbours_vote_by_cosine_similarity():
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(50, 7)).astype(np.float32), rng.integers(0, 4, 50)
    head = fit_probe("knn", x, labels, classes=4)
    query = rng.normal(size=(5, 7)).astype(np.float32)
    unit = (x - x.mean(0)) / np.linalg.norm(x - x.mean(0), axis=1, keepdims=True)
    for q, said in zip(query, head(torch.from_numpy(query)).exp().numpy(), strict=True):
        q = (q - x.mean(0)) / np.linalg.norm(q - x.mean(0))
        near = np.argsort(-(unit @ q))[:20]
        votes = np.bincount(labels[near], np.exp((unit @ q)[near] / 0.07), minlength=4)
        np.testing.assert_allclose(said, votes / votes.sum(), atol=1e-4)


def test_lora_changes_the_blocks_by_a_low_rank_alone_and_merges_exactly():
    plain, tuned = module(), module()
    add_lora(tuned, rank=2)
    trained = [p for p in tuned.parameters() if p.requires_grad]
    assert 0 < sum(p.numel() for p in trained) < 0.3 * sum(p.numel() for p in plain.parameters())
    with torch.no_grad():
        for p in trained:
            p.normal_(std=0.1)
    source = ArrayWindows([np.random.default_rng(0).normal(size=(5, NETWORKS))], t_r=2.0)
    with source.loader(np.arange(1), batch=1, shuffle=False, seed=0, device=CPU) as batches:
        batch = next(batches)
    changed = tuned.features(batch, "mean")
    merge_lora(tuned)
    torch.testing.assert_close(tuned.features(batch, "mean"), changed)
    assert tuned.state_dict().keys() == plain.state_dict().keys()
    ranks = {
        name: int(torch.linalg.matrix_rank(value - plain.state_dict()[name], atol=1e-5))
        for name, value in tuned.state_dict().items()
        if not torch.equal(value, plain.state_dict()[name])
    }
    assert ranks
    assert set(ranks.values()) == {2}
    assert all("blocks" in name for name in ranks)


def test_a_model_without_blocks_takes_no_lora():
    lstm = module(framework="autoencoder")
    assert not has_blocks(lstm)
    with pytest.raises(ValueError, match="no transformer blocks"):
        add_lora(lstm)


@pytest.mark.parametrize("framework", ["csm", "seq-bert", "net-bert", "autoencoder"])
def test_attentive_probe_leaves_the_model_as_it_is(framework):
    rng, labels = np.random.default_rng(0), np.arange(60) % 3
    windows = [rng.normal(size=(4 + i % 3, NETWORKS)) for i in range(60)]
    for window, label in zip(windows, labels, strict=True):
        window[1, label] += 6  # one time point carries the class
    pretrained = module(framework=framework, dropout=0.3)
    before = {name: value.clone() for name, value in pretrained.state_dict().items()}
    config = AdaptConfig(mode="attentive", steps=150, batch_size=30, lr=5e-3)
    source = ArrayWindows(windows, t_r=2.0, labels=labels)
    fitted, history = fit_decoder(pretrained, source, np.arange(60), config, classes=3, device=CPU)
    for name, value in fitted.module.state_dict().items():
        assert torch.equal(value, before[name])
    assert len(history.losses) == 150
    assert np.mean(history.losses[-15:]) < 0.8 * history.losses[0]


def test_balance_weighs_classes_to_one_sum_each():
    labels = np.array([0] * 8 + [2] * 2)
    weights = class_weights(labels, 3)
    assert weights[1] == 0
    assert weights[0] * 8 == pytest.approx(weights[2] * 2)
    assert weights[labels].mean() == pytest.approx(1.0)


def test_balance_raises_the_recall_of_a_rare_class():
    rng = np.random.default_rng(0)
    labels = (rng.random(400) < 0.08).astype(np.int64)
    x = (rng.normal(size=(400, 3)) + labels[:, None]).astype(np.float32)
    recall = {}
    for balance in (False, True):
        head = fit_probe("linear", x, labels, classes=2, balance=balance)
        named = head(torch.from_numpy(x)).argmax(dim=1).numpy()
        recall[balance] = (named == labels)[labels == 1].mean()
    assert recall[True] > recall[False] + 0.2


def test_label_smoothing_keeps_probabilities_away_from_one():
    labels = np.arange(40) % 2
    windows = [np.full((3, NETWORKS), float(label)) for label in labels]
    source = ArrayWindows(windows, t_r=2.0, labels=labels)
    top = []
    for smoothing in (0.0, 0.4):
        config = AdaptConfig(published=True, steps=100, lr=5e-3, dropout=0.0, label_smoothing=smoothing)
        decoder, _ = fit_decoder(module(), source, np.arange(40), config, classes=2, device=CPU)
        with source.loader(np.arange(40), batch=40, shuffle=False, seed=0, device=CPU) as batches:
            top.append(float(decoder(next(batches)).detach().softmax(dim=1).amax(dim=1).mean()))
    assert top[0] > 0.95
    assert top[1] == pytest.approx(0.8, abs=0.06)  # 1 - 0.4 + 0.4 / 2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mode": "knn", "label_smoothing": 0.1}, "takes no smoothed labels"),
        ({"mode": "attentive", "pooling": "mean"}, "attentive with nothing else"),
        ({"mode": "linear", "pooling": "tokens"}, "tokens goes with attentive"),
        ({"mode": "prompt"}, "got 'prompt', expected one of finetune, lora, attentive"),
        ({"lr": 0.0}, "lr: got 0.0"),
        ({"steps": 0}, "steps: got 0"),
        ({"bins": 0}, "bins: got 0"),
        ({"layer": -1}, "layer: got -1"),
        ({"mode": "linear", "published": True}, "published: got True with mode linear"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        AdaptConfig(**changes)


# ---------------------------------------------------------------- traps


def test_wrong_label_column_is_caught_and_the_right_one_named(tmp_path):
    """Three states of two tasks: who asks for 3 classes of the column `task` meant `state`."""
    store = write_store(tmp_path / "s", [("a", 0), ("b", 1)], code=lambda label: min(label, 1))
    with pytest.raises(ValueError, match=r"got 3, but column 'task' holds 2: t0, t1; .*'state' holds 3"):
        load_task(store, TaskConfig(target="task", classes=3))
    assert load_task(store, TaskConfig(target="state", classes=3)).classes == CLASSES


def test_a_subject_that_is_stored_under_two_names_is_caught(tmp_path):
    honest = write_store(tmp_path / "a", [("a", 0), ("b", 1), ("c", 2)])
    assert len(load_task(honest, TaskConfig(target="state", split="leave-one-subject-out")).folds) == 3
    leaky = write_store(tmp_path / "b", [("a", 0), ("b", 1), ("c", 0)])
    says = r"6 of 6 windows .* are copies of windows that it trains on"
    with pytest.raises(ValueError, match=says):
        load_task(leaky, TaskConfig(target="state", split="leave-one-subject-out"))
    for seed in range(6):
        config = TaskConfig(target="state", split="subject-wise", test_subjects=1, split_seed=seed)
        if load_task(honest, config).subjects[load_task(honest, config).folds[0].test[0]] == "toy/b":
            continue
        with pytest.raises(ValueError, match=says):
            load_task(leaky, config)


def test_constant_time_points_are_no_copies(tmp_path):
    with StoreWriter.create(str(tmp_path / "s"), networks=NETWORKS) as writer:
        for run in range(3):
            segments = [Segment(onset=4 * i, length=4, labels={"state": CLASSES[i % 2]}) for i in range(4)]
            writer.append(np.zeros((16, NETWORKS)), t_r=2.0, dataset="d", subject=str(run), segments=segments)
    assert load_task(BoldStore.open(str(tmp_path / "s")), TaskConfig(target="state")).classes == CLASSES[:2]


def test_what_pretraining_saw_is_said(tmp_path, model):
    task = load_task(write_store(tmp_path / "s", [("s0", 0), ("s1", 1)]), TaskConfig(target="state"))
    with pytest.warns(LeakWarning, match="read the BOLD, not the labels, of toy/s0: 1 of the 2 tested"):
        result = adapt(task, model, AdaptConfig(mode="knn"), device="cpu")
    assert result.to_dict()["pretraining_saw"] == ["toy/s0"]
    assert sum(result.to_dict()["read"].values()) == len(task.folds), "one readout a fold"
    fresh = adapt(task, model, AdaptConfig(mode="knn", scratch=True), device="cpu")
    assert "pretraining_saw" not in fresh.to_dict()


def test_probabilities_of_baselines_agree_with_what_they_name(tmp_path):
    task = load_task(write_store(tmp_path / "s", [("a", 0), ("b", 1), ("c", 2)]), TaskConfig(target="state"))
    results = {result.name: result for result in baselines(task)}
    with_chances = {name for name, result in results.items() if result.probabilities is not None}
    assert set(results) - with_chances == {"nilearn"}
    for name in with_chances:
        chances = results[name].probabilities
        np.testing.assert_allclose(chances.sum(axis=1), 1, atol=1e-5)
        assert (chances.argmax(axis=1) == results[name].predictions).all()
        assert 0 <= results[name].calibration.error <= 1


def test_baselines_that_too_few_windows_do_not_allow_are_left_out(tmp_path):
    task = load_task(write_store(tmp_path / "s", [("a", 0), ("b", 1), ("c", 2)]), TaskConfig(target="state"))
    first = np.unique(task.labels, return_index=True)[1]  # one window a class
    folds = [Fold(name=f.name, train=np.setdiff1d(first, f.test), test=f.test) for f in task.folds[1:]]
    names = [result.name for result in baselines(replace(task, folds=folds))]
    assert names == [name for name in BASELINES if name != "nilearn"]


def test_validation_windows_choose_and_their_course_is_kept(tmp_path, model):
    subjects = [(f"s{i}", i) for i in range(5)]
    config = TaskConfig(target="state", split="subject-wise", validation_subjects=1, test_subjects=1)
    task = load_task(write_store(tmp_path / "s", subjects), config)
    result = adapt(task, model, AdaptConfig(steps=20, lr=5e-3), device="cpu")
    ((seed, _, history),) = result.histories
    assert seed == 0
    assert [check[0] for check in history.checks] == list(range(0, 21, 2))
    assert history.rates[1] == max(history.rates)
    assert history.losses[-1] < history.losses[0]


# ---------------------------------------------------------------- the command


def test_frozen_features_are_computed_once_for_all_calls_on_the_same_windows(tmp_path, model, monkeypatch):
    store = write_store(tmp_path / "s", [(f"new{i}", i) for i in range(4)])
    task = load_task(store, TaskConfig(target="state", split="leave-one-subject-out"))
    other = load_task(store, TaskConfig(target="state", split="leave-one-subject-out", hrf_shift=2.0))
    passes, known = [], {}

    def counted(*args, **settings):
        passes.append(1)
        return frozen_features(*args, **settings)

    monkeypatch.setattr(adapting, "frozen_features", counted)
    configs = [
        AdaptConfig(mode="linear", seed=seed, scratch=scratch) for scratch in (False, True) for seed in (0, 1)
    ]
    for config in configs:
        first = adapt(task, model, config, device="cpu", known=known)
        again = adapt(replace(task, folds=task.folds[:2]), model, config, device="cpu", known=known)
        alone = adapt(task, model, config, device="cpu")
        np.testing.assert_array_equal(first.probabilities, alone.probabilities)
        tested = np.concatenate([fold.test for fold in task.folds[:2]])
        np.testing.assert_array_equal(again.probabilities[tested], first.probabilities[tested])
    assert len(passes) == len(known) + len(configs) == 3 + 4  # the pretrained once, a fresh one for each seed
    moved = adapt(other, model, configs[0], device="cpu", known=known)
    assert len(known) == 4
    assert not np.allclose(moved.probabilities, alone.probabilities)


@pytest.mark.parametrize("mode", ["linear", "attentive", "mlp"])
def test_a_decoder_of_two_layers_comes_back_as_it_was(tmp_path, mode):
    pooling = "tokens" if mode == "attentive" else "moments"
    source = ArrayWindows(np.random.default_rng(0).normal(size=(9, 5, NETWORKS)), t_r=2.0)
    readout = Readout(pooling=pooling, layer="both")
    head = make_head(mode, width=readout.width(module().config), classes=2)
    decoder = Decoder(module(), head, readout).eval()
    save_decoder(decoder, tmp_path / "d", mode=mode, kind=mode, classes=("a", "b"))
    loaded, config = load_decoder(tmp_path / "d")
    assert config["decoder"]["layer"] == "both"
    found, expected = (probabilities(one, source, np.arange(9), device=CPU) for one in (loaded, decoder))
    np.testing.assert_array_equal(found, expected)


def test_numbers_of_subjects_ask_for_the_subject_wise_split(tmp_path, model, capsys):
    store = write_store(tmp_path / "s", [(f"s{i}", i) for i in range(4)])
    command = ["adapt", store.path, "--from", str(model), "--target", "state", "--mode", "knn", "--json"]
    out, asked = ["--out", str(tmp_path / "out")], ["--n-train-subjects", "2", "--n-test-subjects", "1"]
    assert main([*command, *asked, "--out", store.path]) == 1
    assert "is a store or a file" in capsys.readouterr().err
    command += out
    assert main([*command, "--n-test-subjects", "9"]) == 1
    assert "9 test subjects, but 4 subjects have labels" in capsys.readouterr().err
    command += asked
    assert main(command) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["split"] == "subject-wise"
    assert printed["tested"] == 6
    assert main([*command, "--split", "k-fold"]) == 2
    assert "got k-fold with numbers of subjects" in capsys.readouterr().err


def test_one_command_from_raw_arrays_to_a_report_of_every_adaptation(tmp_path, capsys, model):
    rng = np.random.default_rng(0)
    for run in range(3):
        bold = rng.normal(size=(26, NETWORKS)).astype(np.float32)
        rows = ["onset,length,state"]
        for i, label in enumerate(rng.permutation(np.resize(CLASSES, 6)).tolist()):
            bold[1 + 4 * i : 5 + 4 * i, CLASSES.index(label)] += 3
            rows.append(f"{1 + 4 * i},4,{label}")
        np.save(tmp_path / f"run-{run}.npy", bold)
        (tmp_path / f"run-{run}.csv").write_text("\n".join(rows))
    (tmp_path / "runs.toml").write_text(
        '[defaults]\nt_r = 2.0\ndataset = "toy"\nsubject = "1"\nsegments = "{stem}.csv"\n'
        '[[files]]\nglob = "run-*.npy"\n'
    )
    command = ["adapt", str(tmp_path / "runs.toml"), "--from", str(model), "--target", "state"]
    command += ["--mode", "all", "--steps", "3", "--report", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    printed = capsys.readouterr()
    assert "chance 0.333; classes: cat, face, house" in printed.out
    assert "\nread: " in printed.out or "\nread, as people left out" in printed.out
    assert printed.err.endswith("fits: 100 %\n")
    saved = json.loads((tmp_path / "out" / "scores.json").read_text())
    names = [entry["name"] for entry in (saved["decoder"], *saved["baselines"])]
    modes = ("fine-tuned", "nearest neighbours", "MLP probe", "linear probe", "attentive probe", "LoRA")
    assert names[:6] == [f"{mode}, pretrained" for mode in modes]
    assert names[6:] == ["fine-tuned, from scratch", *BASELINES]
    page = (tmp_path / "out" / "report" / "index.html").read_text()
    for words in itertools.chain(modes, ("Data", "cat", "no model", "Configuration")):
        assert words in page
    (tmp_path / "run-1.csv").write_text("onset,state\n1,cat\n")
    assert main(command) == 1
    assert "run-1.csv" in capsys.readouterr().err
