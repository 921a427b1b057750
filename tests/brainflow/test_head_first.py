"""The head first, then head and body: where that begins, who stops it, and what else a table must hold."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from brainflow.config import ModelConfig
from brainflow.decoding import fit
from brainflow.decoding.baselines import half_whitener, make_features, spatially_normalised
from brainflow.decoding.curve import learning_curve
from brainflow.decoding.finetune import frozen_features, probabilities
from brainflow.decoding.fit import AdaptConfig, fit_decoder
from brainflow.decoding.readout import SPREAD, Readout
from brainflow.decoding.result import baseline, gains, judge
from brainflow.decoding.ridge import fit_ridge
from brainflow.decoding.scores import paired_difference, score
from brainflow.decoding.task import TaskConfig, load_task
from brainflow.decoding.windows import ArrayWindows
from brainflow.demo.worth import split_people
from brainflow.frameworks import build
from brainflow.storage import BoldStore, Segment, StoreWriter

NETWORKS, CPU = 6, torch.device("cpu")


def module(**options):
    torch.manual_seed(0)
    sizes = {"networks": NETWORKS, "width": 8, "layers": 2, "heads": 2, "dropout": 0.0}
    return build(ModelConfig(**(sizes | options)))


def people(count=6, *, seed=0, signal=2.0):
    """Each person has two windows of each of three classes, which differ in when networks are active."""
    rng = np.random.default_rng(seed)
    labels, groups = np.tile(np.arange(3), 2 * count), np.repeat(np.arange(count), 6)
    windows = [rng.normal(size=(6, NETWORKS)) for _ in labels]
    for window, label in zip(windows, labels, strict=True):
        window[2 * label : 2 * label + 2] += signal
    return ArrayWindows(windows, t_r=2.0, labels=labels, groups=groups)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Six people, one run each; a class is a pattern of variances, and time points have a common offset."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("store") / "s"
    with StoreWriter.create(str(path), networks=NETWORKS) as writer:
        for person in range(6):
            bold, segments = rng.normal(size=(80, NETWORKS)), []
            for i in range(6):
                bold[2 + 13 * i : 14 + 13 * i, 2 * (i % 3) : 2 * (i % 3) + 2] *= 3
                segments.append(Segment(onset=2 + 13 * i, length=12, labels={"state": "abc"[i % 3]}))
            bold += 20 * rng.normal(size=(80, 1))
            writer.append(bold, t_r=2.0, dataset="toy", subject=str(person), segments=segments)
    return BoldStore.open(str(path))


@pytest.fixture(scope="module")
def task(store):
    return load_task(store, TaskConfig(target="state", split="leave-one-subject-out"))


def test_fine_tuning_begins_at_the_linear_probe(monkeypatch):
    source, windows = people(), np.arange(36)
    probe, _ = fit_decoder(module(), source, windows, AdaptConfig(mode="linear"), classes=3, device=CPU)
    monkeypatch.setattr(fit, "_steps_to_take", lambda *_: (0, []))
    tuned, history = fit_decoder(module(), source, windows, AdaptConfig(), classes=3, device=CPU)
    assert history.losses == []
    expected = probabilities(probe, source, windows, device=CPU)
    np.testing.assert_allclose(probabilities(tuned, source, windows, device=CPU), expected, atol=1e-6)
    assert probe.readout == tuned.readout


def test_body_and_head_train_together_and_the_given_module_stays():
    given, source, windows = module(), people(1), np.arange(6)
    before = {name: value.clone() for name, value in given.state_dict().items()}
    tuned = AdaptConfig(layer=2, steps=5, lr=1e-2)
    decoder, _ = fit_decoder(given, source, windows, tuned, classes=3, device=CPU)
    probe, _ = fit_decoder(given, source, windows, AdaptConfig(mode="linear", layer=2), classes=3, device=CPU)
    assert all(torch.equal(value, before[name]) for name, value in given.state_dict().items())
    assert not torch.equal(decoder.head.weight, probe.head.weight)
    assert not torch.equal(decoder.module.embedding.project.weight, given.embedding.project.weight)


def test_training_stops_where_people_left_out_are_read_best():
    """Labels that no other person shares make every step worse for people who are left out."""
    source = people(signal=0.0)
    source.labels = np.random.default_rng(1).permutation(source.labels)
    _, history = fit_decoder(
        module(), source, np.arange(36), AdaptConfig(steps=20, lr=3e-2), classes=3, device=CPU
    )
    assert [check[0] for check in history.checks] == list(range(0, 21, 2))
    best = min(history.checks, key=lambda check: check[1])[0]
    assert len(history.losses) == best < 20


def test_left_out_people_are_whole_and_do_not_fit_the_first_head(monkeypatch):
    seen, source = [], people()

    def watched(decoder, _, windows, *args, **options):
        seen.append((windows, args[-1]))
        return fit.History(losses=[], rates=[], checks=[(0, 1.0, 0.0)])

    monkeypatch.setattr(fit, "_train", watched)
    fit_decoder(module(), source, np.arange(36), AdaptConfig(), classes=3, device=CPU)
    (rest, held), (everything, none) = seen
    assert len(set(source.groups[held])) == 1
    assert not set(source.groups[held]) & set(source.groups[rest])
    assert len(rest) + len(held) == len(everything) == 36
    assert none is None


def test_one_person_leaves_nobody_out():
    source = people(1)
    _, history = fit_decoder(module(), source, np.arange(6), AdaptConfig(steps=3), classes=3, device=CPU)
    assert len(history.losses) == 3
    assert history.checks == []


def test_the_layer_that_reads_left_out_people_is_taken():
    rng, source = np.random.default_rng(0), people()
    noise = rng.normal(size=(36, 5)).astype(np.float32)
    telling = np.eye(3)[source.labels].astype(np.float32) + 0.1 * noise[:, :3]
    windows = np.arange(36)
    read = [Readout(pooling="mean", layer=layer) for layer in (0, 1, None)]

    def chosen(readouts, features, windows):
        return fit.choose(readouts, features, source, windows, None, classes=3, balance=False)[0]

    for features, place in (([telling, noise], 0), ([noise, telling], 1)):
        assert chosen(read[:2], features, windows) == place
    one = np.flatnonzero(source.groups == 0)[:3]  # one window a class: nothing can be left out
    assert chosen(read, [telling, noise, noise], one) == 2
    # The BOLD's variance has to be clearly better.
    some = np.eye(3)[source.labels] + 0.7 * noise[:, :3]
    little_worse = some + 0.05 * rng.normal(size=some.shape)
    assert chosen(read[:2], [some, little_worse], windows) == 0
    assert chosen([SPREAD, read[0]], [some, little_worse], windows) == 1
    assert chosen([SPREAD, read[0]], [telling, noise], windows) == 0


def variances(count=6):
    """The classes of :func:`people` as patterns of variance over all of a window."""
    source, rng = people(count, signal=0.0), np.random.default_rng(7)
    for start, label in zip(source.starts, source.labels, strict=True):
        window = 5.0 * rng.normal(size=(6, NETWORKS))
        window[:, 2 * label : 2 * label + 2] *= 8
        source.bold[start : start + 6] = window
    return source


@pytest.mark.parametrize("mode", ["finetune", "linear"])
def test_states_that_are_variances_are_read_from_the_variance_of_the_bold(mode):
    source, given = variances(), module()
    config = AdaptConfig(mode=mode, lr=1e-1)
    decoder, history = fit_decoder(given, source, np.arange(30), config, classes=3, device=CPU)
    assert decoder.readout == SPREAD
    assert history is None or history.losses == []  # no weight of the body is read
    torch.testing.assert_close(dict(decoder.module.state_dict()), dict(module().state_dict()))
    said = probabilities(decoder, source, np.arange(30, 36), device=CPU)
    assert (said.argmax(axis=1) == source.labels[30:]).mean() == 1
    bins = AdaptConfig(mode=mode, pooling="bins", lr=1e-1)
    other, _ = fit_decoder(given, source, np.arange(30), bins, classes=3, device=CPU)
    assert other.readout.pooling == "bins"


@pytest.mark.parametrize("mode", ["finetune", "lora"])
def test_a_head_on_whitened_states_is_not_trained_on(mode, monkeypatch):
    """Its weights are those of the probe, and the body stays."""
    real = fit.choose

    def whitened(*args, **options):
        place, ridge = real(*args, **options)
        return place, replace(ridge, whitened=True)

    monkeypatch.setattr(fit, "choose", whitened)
    given, source, windows = module(), people(), np.arange(36)
    config = AdaptConfig(mode=mode, lr=1e-1)
    tuned, history = fit_decoder(given, source, windows, config, classes=3, device=CPU)
    probe, _ = fit_decoder(given, source, windows, AdaptConfig(mode="linear"), classes=3, device=CPU)
    assert history.losses == []
    torch.testing.assert_close(tuned.head.weight, probe.head.weight)
    torch.testing.assert_close(dict(tuned.module.state_dict()), dict(module().state_dict()))


def test_the_last_states_alone_are_whitened_by_their_covariance_over_the_training_windows(monkeypatch):
    asked, real = [], fit.fit_ridge
    monkeypatch.setattr(fit, "fit_ridge", lambda *a, **o: asked.append(o.get("covariance")) or real(*a, **o))
    given, source, windows = module(), people(), np.arange(30)
    fit_decoder(given, source, windows, AdaptConfig(mode="linear"), classes=3, device=CPU)
    (known,) = [one for one in asked if one is not None]
    assert len(asked) == len(AdaptConfig().readouts(given))
    states = Readout(pooling="bins", bins=6, layer=None)
    (read,) = frozen_features(given, source, [states], device=CPU, windows=windows)
    np.testing.assert_allclose(known, np.cov(read.reshape(-1, 8).T, bias=True), atol=1e-6)
    for few, mode in ((windows, "mlp"), (windows[:5], "linear")):
        asked.clear()
        fit_decoder(given, source, few, AdaptConfig(mode=mode), classes=3, device=CPU)
        assert not any(one is not None for one in asked)


def test_the_background_holds_nobody_who_is_tested(task):
    """Whole runs of everybody else are read, in windows as long as the labelled ones."""
    runs = task.store.runs
    for fold in task.folds:
        tested = np.unique(task.subjects[fold.test])
        background = task.background(fold)
        rest = [i for i in range(len(runs)) if f"toy/{runs.subject[i]}" not in tested]
        assert len(rest) == 5
        expected = np.concatenate([task.store.run(i)[:72] for i in rest])
        np.testing.assert_array_equal(background.bold, expected)
        assert set(background.lengths) == {12}
    everybody = task.background()
    assert len(everybody.lengths) == 36
    assert replace(task, folds=[]).background().bold.shape == everybody.bold.shape


def test_a_run_that_is_tested_is_no_background_though_its_person_trains(store):
    task = load_task(store, TaskConfig(target="state", split="leave-one-run-out"))
    one = replace(task, subjects=np.full(len(task.labels), "toy/0"))
    fold = one.folds[0]
    tested = {str(key) for key in one.runs[fold.test]}
    found = one.background(fold).bold
    for i, key in enumerate(store.runs.key):
        inside = (found == store.run(i)[:1]).all(axis=1).any()
        assert inside == (str(key) not in tested)


def test_a_split_file_keeps_its_test_people_out_of_the_background(store, tmp_path):
    split = split_people(store, {"train": ["0", "1", "2"], "validation": ["3"], "test": ["4", "5"]})
    split.save(tmp_path / "split.json")
    task = load_task(store, TaskConfig(target="state", split=str(tmp_path / "split.json")))
    assert len(task.background().lengths) == 6 * 4 == len(task.background(task.folds[0]).lengths)


def test_windows_longer_than_every_run_have_no_background(store, task, monkeypatch):
    monkeypatch.setattr(type(task), "lengths", property(lambda _: np.array([200])))
    assert task.background() is None


def test_one_window_a_class_is_read_at_neighbouring_onsets_of_both_ends(task, monkeypatch):
    """The head then knows the windows as they stand a time point earlier and later, as those of one."""
    seen = []
    monkeypatch.setattr(
        fit, "fit_ridge", lambda x, *args, **options: seen.append(x) or fit_ridge(x, *args, **options)
    )
    windows = np.arange(3)
    decoder, _ = fit_decoder(module(), task, windows, AdaptConfig(mode="linear"), classes=3, device=CPU)
    assert decoder.readout.layer == "all"
    read = [
        frozen_features(module().eval(), task.moved(by), [decoder.readout], device=CPU, windows=windows)[0]
        for by in (0, -1, 1)
    ]
    np.testing.assert_allclose(seen[-1], np.stack(read), atol=1e-5)
    assert not np.allclose(read[0], read[1], atol=1e-2)
    fitted = fit_ridge(np.stack(read), task.labels[windows], classes=3)
    np.testing.assert_allclose(decoder.head.weight.detach(), fitted.weight, atol=1e-5)
    seen.clear()
    fit_decoder(module(), task, np.arange(6), AdaptConfig(mode="linear"), classes=3, device=CPU)
    assert all(x.ndim == 2 for x in seen)


@pytest.mark.parametrize("layer", [0, "both"])
def test_a_head_need_not_see_what_windows_are_over_time(layer, monkeypatch):
    """Where nothing but noise is in the mean over the bins, fine-tuning begins at heads that leave it out."""
    source = people(signal=1.0)
    rng = np.random.default_rng(5)
    source.bold += np.repeat(9 * rng.normal(size=(36, NETWORKS)), 6, axis=0).astype(np.float32)
    heads, train = [], fit._train
    monkeypatch.setattr(
        fit,
        "_train",
        lambda decoder, *args, **options: (
            heads.append(decoder.head.weight.detach().clone()) or train(decoder, *args, **options)
        ),
    )
    config = AdaptConfig(layer=layer, bins=6, steps=1)
    fit_decoder(module(), source, np.arange(36), config, classes=3, device=CPU)
    assert len(heads) == 2
    for head in heads:
        over = head.view(3, 6, -1)
        assert over.mean(dim=1).abs().max() < 1e-6 < over.abs().max()


def test_windows_that_move_stay_in_their_run(task):
    windows = np.arange(36)
    plain, *moved = (
        one.sampler(windows, batch=36, shuffle=False).batch(0)
        for one in (task, task.moved(-3), task.moved(1))
    )
    begin, length = (np.asarray(getattr(task.store.runs, name)) for name in ("start", "length"))
    for by, one in zip((-3, 1), moved, strict=True):
        first = begin[plain.runs]
        np.testing.assert_array_equal(one.starts, np.maximum(plain.starts + by, first))
        np.testing.assert_array_equal(one.lengths, plain.lengths)
        np.testing.assert_array_equal(one.labels, plain.labels)
    last = task.moved(1000).sampler(windows, batch=36, shuffle=False).batch(0)
    np.testing.assert_array_equal(last.starts, (begin + length)[last.runs] - last.lengths)


def test_windows_without_a_run_are_fitted_as_they_are():
    source = people(1)
    assert source.moved(1) is None
    config = AdaptConfig(mode="linear")
    decoder, _ = fit_decoder(module(), source, np.arange(3), config, classes=3, device=CPU)
    features = frozen_features(module(), source, [decoder.readout], device=CPU)[0][:3]
    expected = fit_ridge(features, source.labels[:3], classes=3)
    np.testing.assert_allclose(decoder.head.weight.detach(), expected.weight, atol=1e-5)


def test_fine_tuning_begins_at_both_layers_side_by_side():
    given, config = module(), AdaptConfig(layer="both", steps=3, lr=1e-2)
    decoder, _ = fit_decoder(given, people(1), np.arange(6), config, classes=3, device=CPU)
    assert decoder.head.in_features == 2 * 10 * 8
    assert not torch.equal(decoder.module.embedding.project.weight, given.embedding.project.weight)


def test_a_cosine_is_not_taken_of_two_layers():
    known = module()
    assert [one.layer for one in AdaptConfig(mode="knn").readouts(known)] == [0, 1, None]
    first, *others = AdaptConfig(mode="linear").readouts(known)
    assert first == SPREAD
    assert [one.layer for one in others] == [0, 1, None, "both", "all"]
    assert [one.layer for one in AdaptConfig(pooling="bins").readouts(known)] == [0, 1, None, "both", "all"]


def test_jitter_moves_onsets_by_at_most_so_much_and_stays_in_the_run(task):
    windows = np.arange(36)
    plain = task.sampler(windows, batch=36, shuffle=True, seed=3)
    moved = task.sampler(windows, batch=36, shuffle=True, seed=3, jitter=5)
    again = task.sampler(windows, batch=36, shuffle=True, seed=3, jitter=5)
    starts, lengths = (np.asarray(getattr(task.store.runs, name)) for name in ("start", "length"))
    steps = []
    for step in range(20):
        old, new = plain.batch(step), moved.batch(step)
        np.testing.assert_array_equal(new.starts, again.batch(step).starts)
        np.testing.assert_array_equal(new.labels, old.labels)
        steps.append(new.starts - old.starts)
        assert (new.starts >= starts[new.runs]).all()
        assert (new.starts + new.lengths <= starts[new.runs] + lengths[new.runs]).all()
    assert set(np.unique(steps)) == set(range(-5, 6))
    assert np.min(steps[0]) < 0 < np.max(steps[0])
    with task.loader(windows, batch=36, shuffle=True, seed=3, device=CPU, jitter=5) as batches:
        read = next(batches).bold.numpy()
    first = moved.batch(0)
    np.testing.assert_array_equal(read, task.store.windows(first.starts, first.lengths))


# ---------------------------------------------------------------- baselines, draws


def test_a_common_offset_is_what_spatial_normalisation_removes(task):
    bold = np.random.default_rng(0).normal(size=(10, NETWORKS))
    same = spatially_normalised(bold)
    np.testing.assert_allclose(spatially_normalised(3 * bold + 7), same, atol=1e-5)
    np.testing.assert_allclose(same.mean(axis=1), 0, atol=1e-6)
    np.testing.assert_allclose(same.std(axis=1), 1, atol=1e-5)


def test_half_whitening_takes_the_root_of_the_spread_away(store):
    runs = [np.asarray(store.run(i), np.float64) for i in range(6)]
    centred = np.concatenate([run - run.mean(axis=0) for run in runs])
    half = half_whitener(store, spatial=False)
    before = np.linalg.eigvalsh(centred.T @ centred / len(centred))
    after = np.linalg.eigvalsh(half.T @ (centred.T @ centred / len(centred)) @ half)
    floor = 1e-3 * before.mean()
    kept = before > floor
    np.testing.assert_allclose(after[kept], np.sqrt(before[kept]), rtol=1e-3)


def test_states_that_are_variances_are_seen_by_what_looks_at_variances(task):
    found = {
        name: baseline(task, name).scores.accuracy.value for name in ("means", "tangent", "log-variance")
    }
    assert found["means"] < 0.6 < found["tangent"]
    spatial = make_features("log-variance", spatially_normalised(task.read()[0]), task.read()[1], task.store)
    assert spatial.shape == (36, NETWORKS)


def test_intervals_know_that_other_people_might_have_been_labelled():
    rng = np.random.default_rng(0)
    labels, groups = rng.integers(0, 2, 400), np.repeat(np.arange(20), 20)
    right = np.array([0.55, 0.95] * 4)  # of eight draws
    said = np.where(rng.random((8, 400)) < right[:, None], labels, 1 - labels)
    settings = {"groups": groups, "classes": 2}
    pooled, drawn = (score(labels, said, draws=draws, **settings).accuracy for draws in (1, 8))
    assert pooled.value == drawn.value
    assert drawn.high - drawn.low > 3 * (pooled.high - pooled.low)
    worse = np.where(rng.random(said.shape) < 0.1, 1 - said, said)
    gap = paired_difference(labels, said, worse, draws=8, **settings)
    assert gap.low > 0
    assert gap.high - gap.low < (drawn.high - drawn.low) / 3
    with pytest.raises(ValueError, match="draws: got 3 for 8 rows"):
        score(labels, said, draws=3, **settings)


def test_a_curve_draws_its_people_several_times_and_pairs_the_draws(task):
    seen = []

    def decoders(part):
        seen.append([tuple(sorted(set(part.subjects[fold.train]))) for fold in part.folds])
        named = np.where(np.arange(36) % 7 == len(seen) % 7, (task.labels + 1) % 3, task.labels)
        return [judge(part, name, named) for name in ("model", "scratch", "none")]

    small, full = learning_curve(task, [2, 5], decoders, draws=4)
    assert [len(one[0]) for one in seen] == [2, 5, 2, 2, 2]  # all five training people are one draw
    assert len({one[0] for one in seen if len(one[0]) == 2}) > 1
    assert small.results[0].predictions.shape == (4, 36)
    assert small.results[0].draws == 4
    assert full.results[0].draws == 1
    told = gains(small.task, *small.results[:2], small.results[2:])
    assert told["pretrained - scratch"]["value"] == told["pretrained - best baseline"]["high"] == 0
    with pytest.raises(ValueError, match="draws: got 0"):
        learning_curve(task, [2], decoders, draws=0)


def test_published_way_is_a_random_head_on_the_token():
    config = AdaptConfig(published=True, steps=2)
    decoder, history = fit_decoder(module(), people(), np.arange(36), config, classes=3, device=CPU)
    assert decoder.readout.pooling == "cls"
    assert type(decoder.head).__name__ == "DecodingHead"
    assert len(history.losses) == 2
    assert replace(config, mode="lora").name == "LoRA as published, pretrained"
