"""Targets of people: a planted trait is read, a permuted one is not, and a site is not taken for a trait."""

import csv
import json

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, r2_score, roc_auc_score

from brainflow.batch import PackedBatch, Windows
from brainflow.cli.main import main
from brainflow.config import ModelConfig
from brainflow.data.splits import split_people
from brainflow.decoding.participants import read_participants
from brainflow.decoding.people import ConfoundWarning, PeopleConfig, load_people
from brainflow.decoding.people_decoders import cut_runs, people_baselines, states_of_people
from brainflow.decoding.people_scores import difference, score_classes, score_numbers
from brainflow.decoding.readout import Readout
from brainflow.decoding.ridge import fit_numbers
from brainflow.frameworks import build
from brainflow.pretrained.format import load_pretrained, save_pretrained
from brainflow.report.run_page import run_page
from brainflow.storage import BoldStore, StoreWriter

NETWORKS, PEOPLE, TIME = 12, 100, 90
SCANNERS = dict(zip("ABCD", np.random.default_rng(7).normal(size=(4, NETWORKS)), strict=True))


def write_cohort(folder, coupling, site, *, runs=1):
    """A store of people whose networks share so much of one signal, and an artefact of their scanner."""
    rng = np.random.default_rng(0)
    loading = rng.normal(size=NETWORKS)
    with StoreWriter.create(str(folder / "store"), networks=NETWORKS, parcellation="twelve") as writer:
        for i, (one, where) in enumerate(zip(coupling, site, strict=True)):
            for run in range(runs):
                bold = rng.normal(size=(TIME, NETWORKS)) + np.exp(one) * rng.normal(size=(TIME, 1)) * loading
                bold[1:] += 0.6 * bold[:-1]
                bold += SCANNERS[where] * rng.normal(size=(TIME, 1))
                bold = (bold - bold.mean(axis=0)) / bold.std(axis=0)
                writer.append(bold, t_r=2.0, dataset="toy", subject=f"{i:03d}", task="rest", run=str(run))
    return BoldStore.open(str(folder / "store"))


def write_table(path, columns):
    names = [f"sub-{i:03d}" for i in range(len(next(iter(columns.values()))))]
    rows = zip(names, *columns.values(), strict=True)
    text = ["\t".join(["participant_id", *columns]), *("\t".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(text) + "\n")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory, no_flushing):
    torch.manual_seed(5)
    config = ModelConfig(networks=NETWORKS, width=16, layers=1, heads=2, dropout=0.0)
    folder = tmp_path_factory.mktemp("model")
    save_pretrained(build(config), folder, {"pretrain": {"data": {"seq_max": 41}}})
    return str(folder)


@pytest.fixture(scope="module")
def planted(tmp_path_factory, no_flushing):
    """Age scales the coupling of the networks; 2 people have no age."""
    folder = tmp_path_factory.mktemp("planted")
    rng = np.random.default_rng(1)
    trait = rng.normal(size=PEOPLE)
    write_cohort(folder, 0.5 * trait - 0.5, ["A"] * PEOPLE)
    age = [f"{50 + 10 * one:.1f}" for one in trait]
    age[3] = age[40] = "n/a"
    ill = np.where(trait + 0.3 * rng.normal(size=PEOPLE) > 0.7, "patient", "control")
    columns = {"age": age, "shuffled": rng.permutation(age), "group": ill, "fd": rng.random(PEOPLE).round(3)}
    write_table(folder / "participants.tsv", columns)
    return folder


@pytest.fixture(scope="module")
def confounded(tmp_path_factory, no_flushing):
    """Four sites differ in noise and in age; within a site nothing tells age."""
    folder = tmp_path_factory.mktemp("confounded")
    rng = np.random.default_rng(3)
    site = np.array(list("ABCD"))[np.arange(PEOPLE) % 4]
    age = 40 + 8 * np.arange(4)[np.arange(PEOPLE) % 4] + 3 * rng.normal(size=PEOPLE)
    write_cohort(folder, np.full(PEOPLE, -0.3), site)
    write_table(folder / "participants.tsv", {"age": age.round(1), "site": site})
    return folder


def adapted(folder, model, out, *options):
    command = ["adapt", folder / "store", "--from", model, "--level", "subject", "--out", out, *options]
    assert main([*map(str, command), "--device", "cpu", "--json"]) == 0
    return json.loads((out / "scores.json").read_text())


def lows(summary, name="r2"):
    return {one["name"]: one[name]["low"] for one in (summary["decoder"], *summary["baselines"])}


def test_a_planted_trait_is_read_with_an_interval_above_0(planted, model, tmp_path):
    found = adapted(planted, model, tmp_path / "out", "--target", "age", "--report")
    low = lows(found)
    assert low["linear probe, pretrained"] > 0
    assert low["linear probe, from scratch"] > 0
    assert low["connectome"] > 0
    assert low["tangent"] > 0
    same = found["baselines"][-1]
    assert same["name"] == "the same for everybody"
    assert same["r2"]["value"] == pytest.approx(0, abs=1e-12)
    assert found["left_out"] == {"age is n/a": 2}
    assert found["tested"] == PEOPLE - 2
    assert set(found["gains"]) == {"pretrained - scratch", "pretrained - best baseline"}
    with (tmp_path / "out" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == PEOPLE - 2
    said = np.array([[float(row[name]) for name in ("target", "expected", "prediction")] for row in rows])
    value = 1 - np.square(said[:, 0] - said[:, 2]).sum() / np.square(said[:, 0] - said[:, 1]).sum()
    assert value == pytest.approx(found["decoder"]["r2"]["value"])
    # R² against the mean of all people, which no fold knows, is less by what that is worth
    assert value == pytest.approx(r2_score(said[:, 0], said[:, 2]), abs=0.05)
    page = run_page(tmp_path / "out")
    assert page.facts[0][0] == f"{value:.3f}"
    assert [picture.name for picture in page.sections[0].pictures] == ["decoders", "predictions"]


def test_a_permuted_trait_is_not(planted, model, tmp_path):
    found = adapted(planted, model, tmp_path / "out", "--target", "shuffled")
    assert max(lows(found).values()) <= 0
    assert min(one["permutation_p"] for one in (found["decoder"], *found["baselines"])) > 0.01


def test_classes_of_people(planted, model, tmp_path):
    found = adapted(planted, model, tmp_path / "out", "--target", "group", "--confounds", "fd", "--report")
    assert found["classes"] == ["control", "patient"]
    assert lows(found, "auc")["linear probe, pretrained"] > 0.5
    assert found["decoder"]["balanced_accuracy"]["value"] > 0.6  # though 3 of 4 are controls
    assert found["baselines"][-1]["auc"]["value"] == 0.5
    assert found["confounds"] == {"fd": "number"}
    assert np.sum(found["decoder"]["confusion"]) == PEOPLE


def test_a_site_is_not_taken_for_a_trait(confounded, model, tmp_path):
    """It looks so under plain splits; site-wise ones, and the site as a confound, say that it is none."""
    plain = adapted(confounded, model, tmp_path / "plain", "--target", "age")
    assert lows(plain)["connectome"] > 0
    assert lows(plain)["linear probe, pretrained"] > 0
    by_site = adapted(confounded, model, tmp_path / "site", "--target", "age", "--split-by", "site")
    assert by_site["split"] == "leave-one-site-out"
    assert by_site["groups"] == {"kind": "site", "count": 4}
    assert max(lows(by_site).values()) <= 0
    assert by_site["decoder"]["permutation_p"] > 0.01
    freed = adapted(confounded, model, tmp_path / "freed", "--target", "age", "--confounds", "site")
    assert max(lows(freed).values()) <= 0
    # people whose features sum to 0 within a site would tell who is left out of the choice of the penalty
    assert min(one["r2"]["value"] for one in (freed["decoder"], *freed["baselines"])) > -0.1


def test_a_model_that_has_seen_test_people_is_refused(planted, model, tmp_path, capsys):
    store = BoldStore.open(str(planted / "store"))
    split_people(store.runs, test=["toy/004", "toy/007"], snapshot=store.snapshot).save(
        tmp_path / "split.json"
    )
    seen = tmp_path / "seen"
    save_pretrained(load_pretrained(model), seen, {"data": {"training_subjects": ["toy/001", "toy/007"]}})
    command = [
        "adapt",
        store.path,
        "--level",
        "subject",
        "--target",
        "age",
        "--split",
        tmp_path / "split.json",
    ]
    command += ["--from", seen, "--out", tmp_path / "out"]
    assert main([*map(str, command)]) == 1
    assert "read the BOLD, not the labels, of toy/007, whom the split file keeps" in capsys.readouterr().err
    assert not (tmp_path / "out" / "scores.json").exists()
    assert main([*map(str, command), "--allow-seen"]) == 0
    found = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert found["decoder"]["pretraining_saw"] == ["toy/007"]
    assert found["tested"] == 2


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--target", "age", "--mode", "finetune"], 2, "got subject with --mode"),
        (["--target", "age", "--learning-curve", "3"], 2, "got subject with --learning-curve"),
        (["--target", "height"], 1, "target: got 'height', expected a column of"),
        (["--target", "age", "--confounds", "iq"], 1, "confounds: got 'iq', expected a column of"),
        (
            ["--target", "age", "--split", "leave-one-run-out"],
            1,
            "expected k-fold, leave-one-subject-out or a",
        ),
        (["--target", "age", "--participants", "nowhere.tsv"], 1, "nowhere.tsv"),
        (
            ["--target", "age", "--split-by", "group", "--confounds", "group"],
            1,
            "is what --split-by keeps whole",
        ),
        (["--target", "group", "--classes", "3"], 1, "classes: got 3, but column 'group' holds 2"),
        (["--target", "participant_id"], 1, "have one person each"),
        (["--target", "age", "--confounds", "fd,age"], 1, "'age' is the target itself"),
    ],
)
def test_what_cannot_be_is_refused_by_name(planted, model, tmp_path, capsys, options, code, says):
    command = ["adapt", planted / "store", "--from", model, "--level", "subject", "--out", tmp_path / "out"]
    assert main([*map(str, command), *options]) == code
    error = capsys.readouterr().err
    assert says in error
    assert "Traceback" not in error
    assert main(["adapt", "s", "--from", "m", "--target", "t", "--out", "o", "--confounds", "fd"]) == 2
    assert "level: got segment with --confounds" in capsys.readouterr().err


def test_people_without_a_row_are_counted_and_doubtful_codes_are_said(planted, tmp_path):
    store = BoldStore.open(str(planted / "store"))
    rows = [f"toy/{i:03d},{i},{i % 3}" for i in range(60)]
    (tmp_path / "p.csv").write_text("\n".join(["\ufeffparticipant_id,score,scanner", *rows]))
    config = PeopleConfig(target="score", participants=str(tmp_path / "p.csv"), confounds=("scanner",))
    with pytest.warns(ConfoundWarning, match=r"'scanner' holds a few whole numbers \(0, 1, 2\)"):
        task = load_people(store, config)
    assert task.left_out == {"no row in p.csv": PEOPLE - 60}
    assert task.confounds.shape == (60, 1)
    (tmp_path / "p.json").write_text(
        json.dumps({"scanner": {"Levels": {"0": "old", "1": "new", "2": "other"}}})
    )
    task = load_people(store, config)
    assert task.confound_kinds == {"scanner": "category of 3"}
    assert task.confounds.shape == (60, 2)
    for fold in task.folds:
        assert not np.intersect1d(fold.train, fold.test).size
    rest = task.without_confounds(task.target, task.folds[0])
    for scanner in range(3):  # nothing of the scanner is left in the training people
        mine = [i for i in task.folds[0].train if i % 3 == scanner]
        assert rest[mine].mean() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("subject\tage\n01\t3\n", "has the columns subject, age, expected participant_id among them"),
        ("participant_id\tage\nsub-01\t3\nsub-01\t4\n", "two rows for a/01"),
        ("participant_id\tage\nsub-01\t3\nsub-02\n", "line 3 .* has 1 values, expected 2"),
        ("participant_id\tage\nsub-03\t3\n", "'sub-03' .* may be a/03 or b/03; name it so"),
        ("participant_id\tage\nsub-77\t3\n", "knows nobody of the store, which holds a/01"),
        ("", "has the columns none"),
    ],
)
def test_tables_that_may_be_read_in_two_ways_are_refused(tmp_path, text, says):
    path = tmp_path / "participants.tsv"
    path.write_text(text)
    with pytest.raises(ValueError, match=says):
        read_participants(path, ["a/01", "a/02", "a/03", "b/03"])


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["NA", "20"], "target: 'x' holds numbers, and NA, which is none"),
        (["89+", "31.5"], r"and 89\+, which is none"),
        (["20,5", "31,0", "31,5"], "and 20,5, 31,0, 31,5, which is none"),
        (["1_0", "20", "30"], "and 1_0, which is none"),
        (["1e200", "20", "30"], r"got '1e200', expected finite numbers below 1e\+100"),
    ],
)
def test_numbers_with_something_else_among_them_are_no_classes(planted, tmp_path, texts, says):
    path = write_table(tmp_path / "p.tsv", {"x": [texts[i % len(texts)] for i in range(60)], "n": range(60)})
    store = BoldStore.open(str(planted / "store"))
    with pytest.raises(ValueError, match=says):
        load_people(store, PeopleConfig(target="x", participants=str(path)))
    with pytest.raises(ValueError, match=says.replace("target", "confounds")):
        load_people(store, PeopleConfig(target="n", confounds=("x",), participants=str(path)))
    if "1e200" not in texts:
        config = PeopleConfig(target="x", classes=len(texts), participants=str(path))
        assert load_people(store, config).classes == tuple(sorted(texts))


def test_long_numbers_are_different_classes(planted, tmp_path):
    path = write_table(tmp_path / "p.tsv", {"x": [20210101 + i % 2 for i in range(60)]})
    task = load_people(
        BoldStore.open(str(planted / "store")), PeopleConfig(target="x", participants=str(path))
    )
    assert task.classes == ("20210101", "20210102")
    assert task.target.tolist() == [0, 1] * 30


def test_a_dataset_tells_two_people_of_one_label(tmp_path):
    path = tmp_path / "participants.tsv"
    path.write_text('participant_id\tdataset\tname\nsub-03\tb\t"x\na/sub-03\tn/a\tN/A\n05\tn/a\ty\n')
    table = read_participants(path, ["a/03", "b/03", "b/04", "b/05"])
    assert table.people.tolist() == ["a/03", "b/03", "b/05"]
    assert table.column("name", "target") == [None, '"x', "y"]  # a quotation mark in a TSV is one
    assert table.absent == ("b/04",)


def test_a_person_with_two_names_is_refused(tmp_path, no_flushing):
    rng = np.random.default_rng(0)
    bold = rng.normal(size=(5, 40, 3))
    with StoreWriter.create(str(tmp_path / "s"), networks=3) as writer:
        for i in range(6):
            writer.append(bold[i % 5], t_r=2.0, dataset="d", subject=str(i))
    (tmp_path / "participants.tsv").write_text(
        "participant_id\tage\n" + "".join(f"{i}\t{i * i}\n" for i in range(6))
    )
    config = PeopleConfig(target="age", split="leave-one-subject-out")
    with pytest.raises(ValueError, match="repeats run"):
        load_people(BoldStore.open(str(tmp_path / "s")), config)


def test_states_of_a_person_do_not_depend_on_where_runs_are_cut(model):
    rng = np.random.default_rng(0)
    runs = [rng.normal(size=(length, NETWORKS)).astype(np.float32) for length in (50, 31, 40)]
    person = np.array([0, 1, 0])
    module = load_pretrained(model)
    found = []
    for longest in (50, 7):
        run, lengths = cut_runs(np.array([50, 31, 40]), longest)
        assert lengths.max() <= longest
        windows = Windows.end_to_end(lengths, t_r=2.0)
        batch = PackedBatch.pack(torch.from_numpy(np.concatenate(runs)), windows, device=torch.device("cpu"))
        readout = [Readout(pooling="moments", layer="input")]
        found.append(states_of_people(module, [batch], person[run], readout)[0])
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)
    whole = np.concatenate([runs[0], runs[2]]).astype(np.float64)
    whole = (whole - whole.mean(axis=1, keepdims=True)) / whole.std(axis=1, keepdims=True)
    expected = np.concatenate([whole.mean(axis=0), np.log(whole.std(axis=0))])
    np.testing.assert_allclose(found[0][0], expected, atol=1e-4)


def test_scores_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 60)
    logits = rng.normal(size=(60, 3)).round(1) + np.eye(3)[labels]  # with ties
    units = np.arange(60)
    scores = score_classes(labels, logits, units=units)
    areas = [roc_auc_score(labels == c, logits[:, c]) for c in range(3)]
    assert scores.intervals["auc"].value == pytest.approx(np.mean(areas))
    expected = balanced_accuracy_score(labels, logits.argmax(axis=1))
    assert scores.intervals["balanced_accuracy"].value == pytest.approx(expected)
    weights = rng.multinomial(60, np.full(60, 1 / 60)).astype(float)
    again = np.mean([roc_auc_score(labels == c, logits[:, c], sample_weight=weights) for c in range(3)])
    assert scores.metrics["auc"](weights[None])[0] == pytest.approx(again)
    truth = rng.normal(size=60)
    truth -= truth.mean()
    said = truth + rng.normal(size=60)
    found = score_numbers(truth, said, units=units)
    assert found.intervals["r2"].value == pytest.approx(r2_score(truth, said))
    assert found.intervals["r"].value == pytest.approx(np.corrcoef(truth, said)[0, 1])
    assert found.intervals["mae"].value == pytest.approx(np.abs(truth - said).mean())
    assert found.permutation_p < 0.01 < score_numbers(truth, rng.normal(size=60), units=units).permutation_p
    assert difference(found, found, units=units).to_dict() == {"value": 0, "low": 0, "high": 0}


def test_people_change_places_within_their_site():
    """What only tells sites apart is no better than permuted; those who are alone change with each other."""
    site = np.repeat(["a", "b"], 20)
    truth = np.repeat([-1.0, 1.0], 20) + 0.1 * np.random.default_rng(0).normal(size=40)
    said = np.repeat([-1.0, 1.0], 20)
    assert score_numbers(truth, said, units=site).permutation_p == 1.0
    assert score_numbers(truth, said, units=np.arange(40)).permutation_p < 0.01


def test_a_fold_does_not_read_whom_it_leaves_out_from_the_others_of_their_site(tmp_path, no_flushing):
    """276 edges of 48 people sum to 0 within sites, as targets do; whoever falls for that reads noise."""
    rng = np.random.default_rng(0)
    site = np.arange(48) % 3
    artefact, age = rng.normal(size=(3, 24)), 10 * site + rng.normal(size=48)
    with StoreWriter.create(str(tmp_path / "store"), networks=24) as writer:
        for i in range(48):
            bold = rng.normal(size=(40, 24)) + rng.normal(size=(40, 1)) * artefact[site[i]]
            writer.append(bold, t_r=2.0, dataset="toy", subject=f"{i:03d}")
    write_table(tmp_path / "participants.tsv", {"age": age, "site": np.array(list("ABC"))[site]})
    config = PeopleConfig(target="age", confounds=("site",))
    connectome = people_baselines(load_people(BoldStore.open(str(tmp_path / "store")), config))[0]
    assert connectome.scores.main.value > -0.2


def test_penalty_is_chosen_as_if_confounds_had_been_fitted_without_the_one_left_out():
    """The shortcut in closed form against fits without each person in turn, confounds beside the features."""
    rng = np.random.default_rng(0)
    people, confounds = 24, np.column_stack([np.eye(3)[np.arange(24) % 3][:, 1:], rng.normal(size=24)])
    design = np.column_stack([np.ones(people), confounds])
    x, y = rng.normal(size=(people, 40)), rng.normal(size=people)
    x, y = (v - design @ np.linalg.lstsq(design, v, rcond=None)[0] for v in (x, y))
    x /= x.std(axis=0)
    ridge = fit_numbers(x, y, confounds=confounds)
    unit = np.square(x).sum() / people
    losses = []
    for penalty in (0.001, 0.1, 10.0):
        errors = []
        for part in np.random.default_rng(0).permutation(people).reshape(-1, 1):
            rest = np.setdiff1d(np.arange(people), part)
            both = np.column_stack([design, x])
            shrink = np.diag(np.r_[np.zeros(design.shape[1]), np.full(40, penalty * unit)])
            weight = np.linalg.solve(both[rest].T @ both[rest] + shrink, both[rest].T @ y[rest])
            errors.append(y[part] - both[part] @ weight)
        losses.append(np.mean(np.square(errors)))
    assert losses[0] > 0.5 * y.var()  # without the confounds' share small penalties seem to read everything
    assert ridge.loss <= min(losses) * 1.2
    assert ridge.loss > 0.5 * y.var()
    assert fit_numbers(x, y).loss < 0.1 * y.var()
