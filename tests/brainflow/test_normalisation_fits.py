"""How training data were normalised travels with the weights; data normalised otherwise are refused."""

import json

import numpy as np
import pytest
import torch

import brainflow
from brainflow.cli.main import main
from brainflow.config import ModelConfig, PretrainConfig
from brainflow.data.splits import split_runs
from brainflow.frameworks import build
from brainflow.pretrained import compatibility
from brainflow.pretrained.format import save_pretrained
from brainflow.storage import BoldStore, Segment, StoreWriter
from brainflow.storage.ingest.stores import ingest_store
from brainflow.storage.normalise import APPLIED, normalise
from brainflow.training.checkpoint import facts

NETWORKS = 12
TABLE = {"onset": [0.0, 20.0, 40.0, 60.0], "duration": [16.0] * 4, "trial_type": ["a", "b", "a", "b"]}


def raw_runs(number=4):
    """Runs with a strong global signal and labels in single networks."""
    rng = np.random.default_rng(0)
    runs = []
    for _ in range(number):
        bold = rng.standard_normal((40, NETWORKS)) + 2 * rng.standard_normal((40, 1))
        bold[0:8, 0] += 4
        bold[20:28, 0] += 4
        runs.append((100 + 7 * bold).astype(np.float32))
    return runs


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    path = tmp_path_factory.mktemp("raw") / "s"
    with StoreWriter.create(path, networks=NETWORKS, dtype="float32") as writer:
        for i, bold in enumerate(raw_runs()):
            segments = [
                Segment(onset=int(onset / 2), length=8, labels={"state": label})
                for onset, label in zip(TABLE["onset"], TABLE["trial_type"], strict=True)
            ]
            writer.append(bold, t_r=2.0, dataset="d", subject=str(i), segments=segments)
    return path


@pytest.fixture(scope="module")
def stores(raw, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    for kind in APPLIED:
        ingest_store(raw, folder / kind, normalise=kind)
    return {"none": raw, **{kind: folder / kind for kind in APPLIED}}


@pytest.fixture(scope="module")
def models(stores, tmp_path_factory):
    """A model for each store, whose `config.json` is what pretraining writes."""
    folder, found = tmp_path_factory.mktemp("models"), {}
    torch.manual_seed(0)
    module = build(ModelConfig(networks=NETWORKS, width=16, layers=1, heads=2, dropout=0.0))
    for kind, path in stores.items():
        store = BoldStore.open(path)
        split = split_runs(store.runs, sizes={"validation": 0.25}, seed=0, snapshot=store.snapshot)
        config = PretrainConfig(store=str(path), out="run")
        found[kind] = save_pretrained(module, folder / kind, facts(config, store, split, 1))
    return found


def test_the_normalisation_travels_with_the_weights(models):
    for kind, folder in models.items():
        data = json.loads((folder / "config.json").read_text())["data"]
        assert data["normalisation"] == APPLIED.get(kind, "")


@pytest.mark.parametrize("kind", ["none", "zscore", "spatial", "gsr"])
def test_a_model_meets_data_of_its_own_normalisation_only(stores, models, kind):
    for other, path in stores.items():
        store = BoldStore.open(path)
        if other == kind:
            assert compatibility.check_fits(models[kind], store) == []
            continue
        with pytest.raises(ValueError, match="normalisation: the model saw") as error:
            compatibility.check_fits(models[kind], store)
        again = f"brainflow ingest store {path} NEW --normalise {kind}" in str(error.value)
        assert again == (kind != "none" and other in ("none", "zscore"))
        assert ("cannot be put back" in str(error.value)) == (kind != "none" and other in ("spatial", "gsr"))
        assert compatibility.check_fits(models[kind], store, allow=True)


def test_the_commands_say_it_and_the_remedy_works(stores, models, tmp_path, capsys):
    model, raw, new = str(models["spatial"]), str(stores["none"]), str(tmp_path / "new")
    adapt = ["--target", "state", "--split", "leave-one-subject-out", "--out", str(tmp_path / "out")]
    assert main(["adapt", raw, "--from", model, *adapt]) == 1
    *warnings, said = capsys.readouterr().err.splitlines()
    assert all(": warning: " in line for line in warnings)
    assert "the data have no word about it" in said
    assert f"brainflow ingest store {raw} NEW --normalise spatial" in said
    assert main(["doctor", raw, "--for", model, "--json"]) == 1
    rows = {row["what"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["normalisation"]["verdict"] == "differs"
    assert (rows["normalisation"]["model"], rows["normalisation"]["store"]) == ("spatial", "unknown")
    assert rows["normalisation"]["advice"] == f"brainflow ingest store {raw} NEW --normalise spatial"
    assert main(["ingest", "store", raw, new, "--normalise", "spatial"]) == 0
    capsys.readouterr()
    main(["doctor", new, "--for", model, "--json"])
    rows = {row["what"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["normalisation"]["verdict"] == "fine"


@pytest.mark.parametrize("kind", ["zscore", "spatial", "gsr"])
def test_estimators_normalise_whole_runs_as_the_model_saw_them(models, kind, tmp_path):
    runs, tables = raw_runs(), [TABLE] * 4
    done = [normalise(run, kind) for run in runs]
    expected = brainflow.MentalStateDecoder(models[kind]).fit(done, tables).predict_proba(done, tables)
    decoder = brainflow.MentalStateDecoder(models[kind], normalise=True).fit(runs, tables)
    np.testing.assert_allclose(decoder.predict_proba(runs, tables), expected, atol=1e-6)
    decoder.save(tmp_path / "d")
    loaded = brainflow.MentalStateDecoder.load(tmp_path / "d")
    np.testing.assert_allclose(loaded.predict_proba(runs, tables), expected, atol=1e-6)
    encoder = brainflow.BoldEncoder(models[kind], normalise=True).fit(runs, tables)
    plain = brainflow.BoldEncoder(models[kind]).fit(done, tables)
    np.testing.assert_allclose(encoder.transform(runs, tables), plain.transform(done, tables), atol=1e-6)


def test_estimators_refuse_windows_of_another_normalisation(models):
    windows = [normalise(run, "zscore")[i : i + 8] for run in raw_runs() for i in (0, 10, 20)]
    names = ["a", "b", "a"] * 4
    for kind in ("spatial", "gsr"):
        with pytest.raises(ValueError, match=f"still be removed; normalise each run .* {kind!r}.*=True"):
            brainflow.MentalStateDecoder(models[kind]).fit(windows, names)
        allowed = brainflow.MentalStateDecoder(models[kind], allow_mismatch=True).fit(windows, names)
        assert allowed.predict(windows).shape == (12,)
        good = [normalise(run, kind)[i : i + 8] for run in raw_runs() for i in (0, 10, 20)]
        brainflow.MentalStateDecoder(models[kind]).fit(good, names)
    with pytest.raises(ValueError, match="normalise: got True with windows, expected whole runs"):
        brainflow.MentalStateDecoder(models["spatial"], normalise=True).fit(windows, names)
    for checkpoint in (None, models["none"]):
        with pytest.raises(ValueError, match="normalise: got True, but the checkpoint does not say"):
            brainflow.MentalStateDecoder(checkpoint, normalise=True).fit(raw_runs(), [TABLE] * 4)
