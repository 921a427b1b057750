"""What `bench learning` says: differences the right way round, linear predictors that see nothing hidden."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from brainflow.benchmarks import ablation, command, coverage, forecast, learning, peers, people, plan, quality
from brainflow.config import ModelConfig
from brainflow.decoding.curve import Point
from brainflow.decoding.result import judge
from brainflow.demo import cohort, story
from brainflow.frameworks import build

NETWORKS = 6
DEVELOPMENT = {"people": range(6), "test_people": range(4, 6)}


@pytest.fixture(scope="module")
def recordings():
    """Ten runs [200, 6] with memory of two volumes, and neighbours that move together."""
    rng = np.random.default_rng(0)
    mixing = np.eye(NETWORKS) + 0.5 * np.eye(NETWORKS, k=1)
    runs = []
    for _ in range(10):
        x = np.zeros((250, NETWORKS))
        noise = rng.normal(size=x.shape) @ mixing
        for t in range(2, len(x)):
            x[t] = 0.9 * x[t - 1] - 0.5 * x[t - 2] + noise[t]
        x = x[50:]
        runs.append((x - x.mean(0)) / x.std(0))
    return runs


class Runs:
    """Runs in memory, as much of a store as forecasts read."""

    def __init__(self, runs):
        self.bold = np.concatenate(runs)
        lengths = np.array([len(run) for run in runs])
        self.runs = SimpleNamespace(
            start=np.cumsum(lengths) - lengths, length=lengths, t_r=np.full(len(runs), 2.0)
        )

    def windows(self, starts, lengths):
        return np.concatenate([self.bold[s : s + n] for s, n in zip(starts, lengths, strict=True)])


class Module:
    """A framework whose predictions are a function of the truth; rows and NaN are as the real ones'."""

    linear_path = None

    def __init__(self, framework, say):
        self.config = SimpleNamespace(framework=framework, width=4)
        self.real, self.say = build(ModelConfig(framework=framework, networks=NETWORKS, **TINY)), say

    def eval(self):
        self.real.eval()

    def score(self, batch, *, seed):
        output, values, rows = self.real.score(batch, seed=seed)
        guess = self.say(batch)[rows]
        return output, torch.where(values.isnan(), values, guess.to(values.dtype)), rows


TINY = {"width": 8, "layers": 1, "heads": 1}


@pytest.mark.parametrize("framework", plan.FRAMEWORKS)
def test_truth_mean_and_noise_explain_all_nothing_and_less(recordings, framework):
    store = Runs(recordings[:3])
    known = recordings[3:]
    mean = torch.from_numpy(np.concatenate(known).mean(0))

    def explained(say):
        return forecast.explained(Module(framework, say), known, store, range(3), 20)

    best = explained(lambda batch: batch.bold)
    assert best["ev"].value == pytest.approx(1)
    assert best["ev_minus_linear"].low > 0
    none = explained(lambda batch: mean.expand_as(batch.bold))
    assert none["ev"].value == pytest.approx(0, abs=1e-6)
    assert none["ev_linear"].value == pytest.approx(best["ev_linear"].value)
    assert none["ev_minus_linear"].value == pytest.approx(-none["ev_linear"].value, abs=1e-6)
    assert none["ev_minus_linear"].high < 0
    wrong = explained(lambda batch: -batch.bold)
    assert wrong["ev"].value == pytest.approx(-3, abs=0.05)


def test_linear_predictors_reach_what_can_be_known(recordings):
    store, known = Runs(recordings[:3]), recordings[3:]

    def linear(framework, length=40):
        module = Module(framework, lambda batch: batch.bold)
        return forecast.explained(module, known, store, range(3), length)["ev_linear"].value

    x = np.concatenate([run[2:] for run in recordings[:3]])
    innovation = np.concatenate([run[2:] - 0.9 * run[1:-1] + 0.5 * run[:-2] for run in recordings[:3]])
    assert linear("csm", 100) == pytest.approx(1 - innovation.var() / x.var(), abs=0.02)
    assert linear("seq-bert") > linear("csm") + 0.03, "both sides tell more than one"
    assert 0.1 < linear("net-bert") < 0.4
    few, many = (
        forecast.from_components(known, width)(recordings[0][:20], np.ones((20, NETWORKS), bool))
        for width in (4, 120)
    )
    errors = [np.square(found - recordings[0][:20]).sum() for found in (few, many)]
    assert errors[1] < 1e-3 < errors[0]


@pytest.mark.parametrize("framework", ["csm", "seq-bert", "net-bert"])
def test_a_linear_predictor_sees_nothing_that_is_hidden(recordings, framework):
    """What is hidden is NaN in a copy: the prediction is finite and the same."""
    predict = forecast.LINEAR[framework](recordings[3:], 4)
    window = recordings[0][:30]
    rng = np.random.default_rng(1)
    hidden = np.zeros(window.shape, bool)
    if framework == "seq-bert":
        hidden[rng.permutation(30)[:12]] = True
        hidden[0] = True
    elif framework == "net-bert":
        hidden[:, [1, 4]] = True
    else:
        hidden[20] = True
        after = window.copy()
        after[20:] = np.nan
        np.testing.assert_array_equal(predict(after, hidden)[20], predict(window, hidden)[20])
        return
    blind = np.where(hidden, np.nan, window)
    found = predict(blind, hidden)
    assert np.isfinite(found[hidden]).all()
    np.testing.assert_array_equal(found[hidden], predict(window, hidden)[hidden])


def test_windows_tile_a_run_and_pairs_leave_one_time_point_out(recordings):
    store = Runs(recordings[:2])
    single = forecast.tiled(store, 1, 30, paired=False, step=0)
    assert single.lengths.tolist() == [30] * 6
    np.testing.assert_allclose(single.bold.numpy(), recordings[1][:180], rtol=1e-6)
    paired = forecast.tiled(store, 1, 30, paired=True, step=0)
    assert paired.lengths.tolist() == [15, 14] * 6
    np.testing.assert_allclose(paired.bold[15:29].numpy(), recordings[1][16:30], rtol=1e-6)


def test_intervals_over_people_are_those_of_a_mean():
    values = np.random.default_rng(0).normal(0.2, 0.1, 30)
    found = forecast.over_people(lambda w: w @ values / w.sum(-1), 30)
    assert found.value == pytest.approx(values.mean())
    half = 1.96 * values.std(ddof=1) / np.sqrt(30)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.15)
    assert found.low < found.value < found.high
    assert np.isnan(forecast.over_people(lambda w: w.sum(-1), 1).low)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    store = story.write_store(story.read(), DEVELOPMENT["people"], tmp_path_factory.mktemp("s") / "store")
    return story.task(store, DEVELOPMENT["test_people"])


def test_rows_of_a_curve_have_the_names_and_signs_that_others_read(task):
    """Pretrained right in all windows, random weights in none, ridge in some people's: known differences."""
    right = task.labels
    wrong = (right + 1) % len(task.classes)
    first = task.subjects == "pieman/05"

    def result(name, named):
        return judge(task, name, named)

    results = [
        result("fine-tuned, pretrained", right),
        result("fine-tuned, from scratch", wrong),
        result("ridge", wrong),
        result("means", np.where(first, right, wrong)),
    ]
    rows = plan.curve_rows("story", [Point(groups=4, task=task, results=results)])
    assert {one.case for one in rows} == {"story/4"}
    found = {one.metric: one for one in rows}
    assert set(found) == {
        *("pretrained", "scratch", "ridge", "means", "best_baseline"),
        *("pretrained_minus_scratch", "pretrained_minus_ridge", "pretrained_minus_best"),
        *("pretrained_minus_scratch_low", "pretrained_minus_ridge_low", "pretrained_minus_best_low"),
    }
    assert (found["pretrained"].value, found["scratch"].value, found["best_baseline"].value) == (1, 0, 0.5)
    assert found["best_baseline"].note == "means"
    assert found["pretrained_minus_scratch"].value == 1
    assert found["pretrained_minus_best"].value == 0.5
    assert found["pretrained_minus_best_low"].value == found["pretrained_minus_best"].low == 0
    other = plan.curve_rows(
        "story", [Point(groups=4, task=task, results=[results[1], results[0], *results[2:]])]
    )
    assert {one.metric: one.value for one in other}["pretrained_minus_scratch_low"] == -1
    one = found["pretrained"].to_dict({"seeds": 1})
    assert {
        "suite": "learning",
        "case": "story/4",
        "metric": "pretrained",
        "value": 1.0,
    }.items() <= one.items()
    assert {"low", "high", "env"} < one.keys()
    json.dumps([row.to_dict({}) for row in rows], allow_nan=False)


@pytest.fixture
def short(monkeypatch):
    """Few steps and decoders, wherever something is adapted."""
    monkeypatch.setattr("brainflow.decoding.fit.STEPS", 2)
    monkeypatch.setattr(plan.Plan, "without", ("ridge", "log-variance"))


def test_the_story_part_has_all_rows(tmp_path, monkeypatch, short):
    """Really pretrained and decoded, one step long; the people who test are in no training."""
    monkeypatch.setattr(people, "COUNTS", (1, 4, 8))  # of four people who train
    tiny = plan.make_plan(quick=True, draws=1, frameworks=("csm", "net-bert"), story_steps=1, **DEVELOPMENT)
    found = {(one.case, one.metric): one for one in people.story_part(tiny, tmp_path / "a", "csm")}
    cases = {"story/1", "story/4"}
    assert {case for case, _ in found} == {"story/csm", *cases}
    for case in cases:
        for metric in ("pretrained", "scratch", "ridge", "log-variance", "best_baseline"):
            assert 0 <= found[case, metric].value <= 1
        for metric in ("scratch", "ridge", "best"):
            low, whole = (found[case, f"pretrained_minus_{metric}{end}"] for end in ("_low", ""))
            assert low.value == whole.low <= whole.value <= whole.high
    for before in ("", "long_"):
        ev, linear, gain = (
            found["story/csm", before + name].value for name in ("ev", "ev_linear", "ev_minus_linear")
        )
        assert gain == pytest.approx(ev - linear)
        assert 0.3 < linear < 0.6
        assert 0 < found["story/csm", f"{before}ev_path"].value < linear + 0.05, "its path had fewer people"
    assert found["story/4", "ridge"].value > 2 / 13
    other = {(one.case, one.metric) for one in people.story_part(tiny, tmp_path / "b", "net-bert")}
    assert {(case, "net-bert") for case in cases} < other
    assert ("story/net-bert", "ev_minus_linear") in other
    assert not any(metric == "pretrained" for _, metric in other)


def test_labels_that_mean_nothing_are_permuted_within_people(tmp_path, monkeypatch, short):
    seen = []

    def curve(task, runs, counts, **settings):
        seen.append(task)
        return []

    monkeypatch.setattr(people.worth, "curve", curve)
    tiny = plan.make_plan(quick=True, draws=1, story_steps=1, **DEVELOPMENT)
    assert people.permuted_part(tiny, tmp_path) == []
    true, found = story.task(seen[0].store, DEVELOPMENT["test_people"]), seen[0]
    for person in np.unique(true.subjects):
        windows = true.subjects == person
        assert sorted(found.labels[windows]) == sorted(true.labels[windows])
        assert 0 <= (found.labels[windows] == true.labels[windows]).mean() < 0.5
    assert [(one.train.tolist(), one.test.tolist()) for one in found.folds] == [
        (one.train.tolist(), one.test.tolist()) for one in true.folds
    ]


def test_the_order_part_has_all_rows(tmp_path, monkeypatch, short):
    monkeypatch.setattr(people, "COUNTS", (1,))
    monkeypatch.setattr(people, "FIXED", 1)
    for part in ("LABELLED", "TESTED"):
        monkeypatch.setattr(cohort, part, 6)
    sizes = {"order_people": (4, 6), "steps": 1, "draws": 1}
    tiny = plan.make_plan(quick=True, **sizes)
    few = people.order_part(tiny, tmp_path / "few", 4, "csm")
    assert [(one.case, one.metric) for one in few] == [
        ("order/people", "people_4"),
        *(("order/people", f"{name}_4") for name in ("ev", "ev_linear", "ev_minus_linear", "ev_path")),
    ]
    most = {(one.case, one.metric): one for one in people.order_part(tiny, tmp_path / "most", 6, "csm")}
    assert most["order/people", "people_6"].value == most["order/1", "pretrained"].value
    assert ("order/1", "pretrained_minus_scratch_low") in most
    assert most["order/csm", "ev_minus_linear"] is not None


def test_coverage_counts_intervals_that_hold_the_truth(tmp_path, monkeypatch):
    monkeypatch.setattr(coverage, "GROUPS", (5,))
    monkeypatch.setattr(coverage, "TRAINED", 2)
    monkeypatch.setattr(coverage, "SIZES", {True: (20, 40)})
    (row,) = coverage.coverage_part(plan.make_plan(quick=True), tmp_path)
    assert (row.case, row.metric) == ("coverage/5", "coverage")
    assert 0.7 < row.value <= 1
    real = coverage.score

    def shifted(*given, **named):
        found = real(*given, **named)
        low, high = found.accuracy.low + 2, found.accuracy.high + 2
        return SimpleNamespace(accuracy=SimpleNamespace(low=low, high=high))

    monkeypatch.setattr(coverage, "score", shifted)
    (row,) = coverage.coverage_part(plan.make_plan(quick=True), tmp_path / "shifted")
    assert row.value == 0


class Architecture:
    """A peer that keeps what it saw and is right about one of two people."""

    @staticmethod
    def prepare_dataloader(windows, labels, shuffle):
        return windows, labels

    def __init__(self, input_size, output_size):
        assert (input_size, output_size) == (100, story.SEGMENTS)

    def train_model(self, train, validation, test, **settings):
        self.seen.append((train, validation, test))
        return (
            None,
            None,
            {"y_pred": (test[1] + (np.arange(len(test[1])) >= story.SEGMENTS)) % story.SEGMENTS},
        )


def test_a_peer_gets_the_same_windows_and_people(tmp_path, monkeypatch, capsys):
    tiny = plan.make_plan(quick=True, **DEVELOPMENT)
    monkeypatch.setattr(peers, "missing", lambda package: "cannot be imported")
    assert peers.peers_part(tiny, tmp_path, "LR") == []
    assert "peers/LR: left out, ml4fmri cannot be imported" in capsys.readouterr().err
    Architecture.seen = []
    monkeypatch.setattr(peers, "missing", lambda package: "")
    monkeypatch.setattr(peers, "architecture", lambda name: Architecture)
    monkeypatch.setattr(peers, "version", lambda package: "0")
    (row,) = peers.peers_part(tiny, tmp_path, "LR")
    assert (row.case, row.metric, row.value) == ("peers/LR", "accuracy", 0.5)
    ((train, validation, test),) = Architecture.seen
    bold = story.read()
    for part, person in ((train, 0), (validation, 2), (test, 4)):
        windows, labels = part
        assert labels.tolist() == [*range(story.SEGMENTS)] * 2
        np.testing.assert_allclose(windows[0], bold[person, 20:40], atol=5e-3)  # float16


class Here(ThreadPoolExecutor):
    """Runs parts in this process."""

    def __init__(self, workers, context, *, initializer, initargs, max_tasks_per_child):
        super().__init__(1)


def test_rows_are_written_after_each_part_and_a_failure_is_named(tmp_path, monkeypatch, capsys):
    file = tmp_path / "rows.json"

    def good(plan_, folder):
        assert folder.is_dir()
        return [plan.Row(case="good", metric="a", value=1.0)]

    def bad(plan_, folder):
        end = time.monotonic() + 60
        while not file.exists() and time.monotonic() < end:
            time.sleep(0.01)
        assert json.loads(file.read_text())[0]["case"] == "good"
        raise ValueError("no such thing")

    monkeypatch.setattr(learning, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(learning, "parts", lambda plan_: {"good": good, "bad": bad})
    rows, failures = learning.measure(plan.make_plan(quick=True), env={"cpu": "x"}, json_file=file)
    assert [one.case for one in rows] == ["good"]
    assert failures == ["bad: failed, so no row: ValueError: no such thing"]
    (written,) = json.loads(file.read_text())
    assert written["env"]["cpu"] == "x"
    assert written["env"]["test_people"] == "17–24"
    assert "learning: good: 0 s" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--only: got 'x'"):
        learning.measure(plan.make_plan(quick=True), only="x")


def test_the_command_passes_its_sizes_on(monkeypatch, capsys):
    given = {}
    row = plan.Row(case="story/1", metric="pretrained", value=0.25, low=0.2, high=0.3)

    def measure(plan_, **named):
        given.update(plan=plan_, **named)
        return [row], ["story/csm: failed"]

    monkeypatch.setattr(learning, "measure", measure)
    args = command.Args(suite="learning", quick=True, frameworks=("csm",), seeds=2, draws=3, only="story/*")
    assert command.run(args) == 1
    assert (given["plan"].frameworks, given["plan"].seeds, given["plan"].draws) == (("csm",), 2, 3)
    assert given["only"] == "story/*"
    out = capsys.readouterr()
    assert "0.250" in out.out
    assert "story/csm: failed" in out.err
    with pytest.raises(ValueError, match="--frameworks: got 'gpt'"):
        command.run(command.Args(suite="learning", frameworks=("gpt",)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"suite": "loader", "seeds": 2}, "--seeds: got the suite loader"),
        ({"suite": "learning", "draws": 0}, "--draws: got 0"),
        ({"suite": "learning", "gate": True}, "times nothing"),
    ],
)
def test_what_does_not_go_together_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        command.Args(**given)


def test_a_full_run_has_every_part():
    full, quick = (learning.parts(plan.make_plan(quick=quick)) for quick in (False, True))
    assert {f"story/{name}" for name in plan.FRAMEWORKS} < set(quick) < set(full)
    assert {f"order/{name}" for name in plan.FRAMEWORKS[1:]} | {"transfer", "permuted", "peers/BolT"} < set(
        full
    )
    assert {f"order/people/{n}" for n in (10, 50, 300, 1_000)} < set(full)
    assert {"ablation/story", "ablation/order"} < set(full)
    assert len([name for name in full if name.startswith("peers/")]) == 13


def test_an_ablation_costs_what_the_defaults_have_above_it(tmp_path, monkeypatch):
    """Adapting is a stand-in that is right but where the model or the adaptation was changed."""
    pretrained = {}

    def pretrained_on(store, split, out, *, steps, model):
        pretrained[out.name] = model
        return out

    def adapted(task, checkpoints, config=None, *, scratch=False):
        wrong = scratch or config is not None or checkpoints[0].name != "defaults"
        said = (task.labels + wrong) % len(task.classes)
        return judge(task, "fine-tuned", said)

    monkeypatch.setattr(ablation.worth, "pretrained_on", pretrained_on)
    monkeypatch.setattr(ablation.worth, "adapted", adapted)
    monkeypatch.setattr(ablation, "saved_config", lambda run: {"model": {"layers": 3}})
    rows = ablation.ablation_part(plan.make_plan(quick=False, draws=2, **DEVELOPMENT), tmp_path, "story")
    assert {row.case for row in rows} == {"ablation/story"}
    values = {row.metric: row.value for row in rows}
    assert values["defaults_1"] == 1
    assert {value for name, value in values.items() if name.endswith("_costs")} == {1}
    assert values["random weights_1"] == values["dense, not next_1"] == values["last states alone_1"] == 0
    assert pretrained["without linear path"] == {"linear": False}
    assert pretrained["defaults"] == {}


def lines_of(network, model):
    """Validation lines of a run, one a step, in which the mean's error is 1."""
    return [
        {
            "step": step,
            "val_mean_mse": 1.0,
            "val_mse": 1 - whole,
            "val_network_mse": 1 - alone,
            "val_explained_variance": whole,
            "val_linear_explained_variance": 0.5,
        }
        for step, (alone, whole) in enumerate(zip(network, model, strict=True), start=1)
    ]


def test_quality_is_what_ours_costs_until_the_recipe_is_reached(tmp_path, monkeypatch):
    """Four steps of ours take 20 s, all of the recipe 40 s."""
    trained = []

    def fake(config):
        trained.append(config)
        recipe = config.out.endswith("then")
        return (
            (lines_of([0.1, 0.2], [0.1, 0.2]), 40.0)
            if recipe
            else (lines_of([0.0, 0.1, 0.3, 0.4], [0.1, 0.6, 0.6, 0.6]), 20.0)
        )

    monkeypatch.setattr(quality, "_trained", fake)
    small = plan.make_plan(quick=True, story_steps=4, **DEVELOPMENT)
    rows = {one.metric: one.value for one in quality.quality_part(small, tmp_path, "csm")}
    assert rows["recipe_share"] == pytest.approx(20 * 2 / 4 / 40)
    assert rows["recipe_network_share"] == pytest.approx(20 * 3 / 4 / 40)
    assert rows["linear_network_not_reached"] == 0.4
    then, now = trained
    assert (then.model.masking, then.model.linear, then.model.loss) == ("single", False, "l1")
    assert (then.model.width, then.model.layers) == (now.model.width, now.model.layers)
    assert then.data == now.data
    assert then.train.steps == now.train.steps == 4
    assert now.model.linear


def test_quality_is_measured_on_two_people_of_those_who_train(tmp_path):
    small = plan.make_plan(quick=True, story_steps=2, **DEVELOPMENT)
    rows = {one.metric: one for one in quality.quality_part(small, tmp_path, "csm")}
    assert all(one.case == "quality/csm" for one in rows.values())
    assert rows["recipe_ev"].value < rows["ev"].value
    assert rows["recipe_cpu_seconds"].value > 0
    kept = json.loads((tmp_path / "split.json").read_text())["parts"]
    assert {name: len(keys) for name, keys in kept.items()} == {"train": 2, "validation": 2, "test": 2}
