"""From a labelled store by commands to scores, a learning curve, a saved decoder, maps, a page, a card."""

import inspect
import json
import re
import shutil
import sys
import types

import nibabel
import numpy as np
import pytest
import torch

import brainflow
from brainflow.cli.main import main
from brainflow.config import DataConfig, ModelConfig, PretrainConfig, TrainConfig
from brainflow.decoding.baselines import BASELINES
from brainflow.decoding.curve import learning_curve, reduce_task
from brainflow.decoding.persist import check_decoder_classes
from brainflow.decoding.result import baseline, baselines
from brainflow.decoding.splits import Fold, check_folds
from brainflow.decoding.task import TaskConfig, load_task
from brainflow.decoding.windows import ArrayWindows
from brainflow.frameworks import build
from brainflow.pretrained import compatibility
from brainflow.pretrained.card import write_card
from brainflow.pretrained.format import save_pretrained
from brainflow.pretrained.hub import from_pretrained
from brainflow.report.page import render
from brainflow.report.reconstruction import reconstruct
from brainflow.report.run_page import run_page
from brainflow.storage import BoldStore, Segment, StoreWriter
from brainflow.training.loop import pretrain
from brainflow.training.metrics import read_metrics

NETWORKS, CLASSES, SUBJECTS = 8, ("cat", "face", "house"), 6


def write_store(path, *, classes=CLASSES, t_r=2.0, scale=1.0, seed=0):
    """Six subjects with two runs of 6 labelled segments of 4 time points; every class has a pattern."""
    rng = np.random.default_rng(seed)
    patterns = 2.0 * rng.normal(size=(len(classes), NETWORKS))
    names = [f"area {i}" for i in range(NETWORKS)]
    attributes = {"parcellation": "eight", "network_names": names}
    with StoreWriter.create(str(path), networks=NETWORKS, **attributes) as writer:
        for run in range(2 * SUBJECTS):
            bold = rng.normal(size=(26, NETWORKS))
            order = rng.permutation(np.resize(np.arange(len(classes)), 6))
            segments = []
            for place, label in enumerate(order):
                bold[1 + place * 4 : 5 + place * 4] += patterns[label]
                segments.append(Segment(onset=1 + place * 4, length=4, labels={"state": classes[label]}))
            writer.append(
                scale * bold,
                t_r=t_r,
                dataset="toy",
                subject=str(run % SUBJECTS),
                task="t",
                run=str(run // SUBJECTS),
                segments=segments,
            )
    return BoldStore.open(str(path))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("store") / "s")


@pytest.fixture(scope="module")
def model(tmp_path_factory, store):
    torch.manual_seed(0)
    config = ModelConfig(networks=NETWORKS, width=16, layers=1, heads=2, dropout=0.0)
    data = {"parcellation": "eight", "t_r": [2.0], "fingerprint": compatibility.fingerprint(store)}
    return save_pretrained(build(config), tmp_path_factory.mktemp("model"), {"data": data})


@pytest.fixture(scope="module")
def decoding(store, model, tmp_path_factory):
    """One command: scores, learning curve, saved decoder, attributions."""
    out = tmp_path_factory.mktemp("decoding") / "out"
    options = ["--split", "subject-wise", "--n-train-subjects", "3", "--n-val-subjects", "1"]
    options += ["--n-test-subjects", "2", "--learning-curve", "1,3", "--seeds", "2", "--steps", "20"]
    options += ["--lr", "5e-3", "--save", "--attribute", "integrated-gradients", "--device", "cpu", "--json"]
    command = ["adapt", store.path, "--from", str(model), "--target", "state", "--out", str(out), *options]
    assert main(command) == 0
    return out


def test_subjects_are_dealt_as_asked(store):
    config = TaskConfig(
        target="state", split="subject-wise", train_subjects=3, validation_subjects=1, test_subjects=2
    )
    task = load_task(store, config)
    (fold,) = task.folds
    parts = [set(task.subjects[rows]) for rows in (fold.train, fold.validation, fold.test)]
    assert [len(part) for part in parts] == [3, 1, 2]
    assert len(set.union(*parts)) == 6
    fewer = load_task(store, TaskConfig(**{**vars(config), "train_subjects": 1}))
    np.testing.assert_array_equal(fewer.folds[0].test, fold.test)
    with pytest.raises(ValueError, match="but 6 subjects have labels"):
        load_task(store, TaskConfig(**{**vars(config), "train_subjects": 9}))


def test_a_leak_through_validation_is_caught():
    fold = Fold(name="x", train=np.array([0]), test=np.array([1]), validation=np.array([2]))
    with pytest.raises(ValueError, match=r"the subjects \['b'\]"):
        check_folds([fold], np.array(["a", "b", "b"]), unit="subject", once=False)


def test_learning_curve_keeps_the_test_windows_and_nests_the_training_subjects(store):
    task = load_task(store, TaskConfig(target="state", split="leave-one-subject-out"))
    one, three = reduce_task(task, 1), reduce_task(task, 3)
    for small, large, full in zip(one.folds, three.folds, task.folds, strict=True):
        np.testing.assert_array_equal(small.test, full.test)
        assert set(small.train) < set(large.train) < set(full.train)
        assert len(set(task.subjects[small.train])) == 1
    with pytest.raises(ValueError, match="got 6 training subjects, expected 1 to 5"):
        reduce_task(task, 6)


def test_a_decoder_that_a_draw_does_not_allow_is_left_out_of_the_curve(store):
    task = load_task(store, TaskConfig(target="state", split="leave-one-subject-out"))
    one, other = (baseline(task, name) for name in ("means", "log-variance"))
    draws = iter([[one, other], [one], [one, other]])
    (point,) = learning_curve(task, [2], lambda part: next(draws), draws=3)
    assert [(result.name, result.draws) for result in point.results] == [("means", 3)]


def test_a_notebook_shows_results_points_and_stores_as_tables(store):
    task = load_task(store, TaskConfig(target="state", split="leave-one-subject-out"))
    result = baseline(task, "means")
    shown = result._repr_html_()
    assert f"<td>means</td><td>{result.scores.accuracy.value:.3f} [" in shown
    assert f"<td>{result.scores.permutation_p:.3f}</td>" in shown
    (point,) = learning_curve(task, [1], lambda part: [baseline(part, "means"), baseline(part, "ridge")])
    shown = point._repr_html_()
    assert "<caption>1 training subject</caption>" in shown
    assert shown.count("<tr>") == 3
    shown = store._repr_html_()
    assert f"<td>runs</td><td>{len(store.runs)} of 6 people</td>" in shown
    assert f"<td>networks</td><td>{store.networks}</td>" in shown


def test_command_writes_scores_curve_decoder_and_attributions(decoding):
    saved = json.loads((decoding / "scores.json").read_text())
    assert saved["tested"] == 24
    assert saved["groups"] == {"kind": "subject", "count": 2}
    assert saved["learning_curve"]["unit"] == "subject"
    points = [(p["decoder"], p["train"]) for p in saved["learning_curve"]["points"]]
    assert [count for name, count in points if name == "ridge"] == [1, 3]
    both = {"fine-tuned, pretrained", "fine-tuned, from scratch"}
    assert {name for name, _ in points} == both | set(BASELINES)
    assert saved["learning_curve"]["too_narrow"]
    assert saved["gains"].keys() == {"pretrained - scratch", "pretrained - best baseline"}
    assert saved["learning_curve"]["gains"].keys() == {"1", "3"}
    assert len((decoding / "learning_curve.csv").read_text().splitlines()) == 1 + 2 * (2 + len(BASELINES))
    assert saved["data"]["windows"] == dict.fromkeys(CLASSES, 24)
    checks = (decoding / "eval_history.csv").read_text().splitlines()
    assert checks[0] == "step,loss,accuracy,seed,fold"
    assert len(checks) == 1 + 2 * 11
    assert sum(saved["decoder"]["confusion"][0]) % 2 == 0  # two seeds, pooled
    assert 0 <= saved["decoder"]["calibration"]["error"] <= 1
    assert sum(saved["decoder"]["read"].values()) == 2  # one readout a fold and seed
    with np.load(decoding / "attributions.npz") as found:
        assert found["mean"].shape == (3, 4, NETWORKS)
        assert np.isfinite(found["error"]).all()
        assert found["network_names"].tolist() == [f"area {i}" for i in range(NETWORKS)]
        assert found["groups"].tolist() == [2, 2, 2]  # the test subjects alone
        np.testing.assert_allclose(found["network_mean"], found["mean"].sum(axis=1), atol=1e-6)


def test_a_saved_decoder_is_loaded_by_the_estimator(decoding, store):
    decoder = brainflow.MentalStateDecoder.load(decoding / "decoder")
    task = load_task(store, TaskConfig(target="state"))
    bold, lengths = task.read()
    windows = np.split(bold.astype(np.float32), np.cumsum(lengths)[:-1])
    assert decoder.score(windows, np.array(CLASSES)[task.labels]) > 0.6
    assert decoder.get_params()["t_r"] == 2.0


def test_every_baseline_sees_the_planted_signal(store):
    task = load_task(store, TaskConfig(target="state", split="k-fold", folds=2))
    found = {entry.name: entry.scores.accuracy.value for entry in baselines(task)}
    assert set(found) == set(BASELINES)
    of_order = {"connectome", "tangent", "log-variance"}
    assert min(value for name, value in found.items() if name not in of_order) > 0.6


def test_a_head_of_other_classes_is_refused_by_name(decoding, tmp_path):
    other = write_store(tmp_path / "s", classes=("cat", "face", "shoe", "chair"))
    task = load_task(other, TaskConfig(target="state"))
    with pytest.raises(ValueError, match=r"missing in the column: house; not expected: chair, shoe"):
        check_decoder_classes(decoding / "decoder", task)
    with pytest.raises(ValueError, match=r"expected 2 classes.*not expected: chair, face, shoe"):
        load_task(other, TaskConfig(target="state", classes=("cat", "dog")))


def test_report_holds_every_figure(decoding, tmp_path, capsys):
    affine = np.diag([30.0, 30.0, 30.0, 1.0])
    affine[:3, 3] = (-15, -40, 0)
    nibabel.save(nibabel.Nifti1Image(np.ones((2, 2, 2), np.uint8), affine), tmp_path / "mask.nii.gz")
    command = ["report", str(decoding), "--mask", str(tmp_path / "mask.nii.gz"), "--out", str(tmp_path / "r")]
    assert main(command) == 0
    names = {path.stem for path in (tmp_path / "r").glob("*.png")}
    maps = {f"attribution_{i:02d}_attribution-to-{name}" for i, name in enumerate(CLASSES)}
    brains = {f"{file}_{kind}" for file in maps for kind in ("glass", "surface")}
    drawn = {"decoders", "confusion", "subjects", "reliability", "fits", "learning_curve", "attribution_time"}
    assert names == drawn | brains
    saved = {path.name for path in (tmp_path / "r").glob("*.nii.gz")}
    assert saved == {f"{file}{end}.nii.gz" for file in maps for end in ("", "_error")}
    image = nibabel.load(tmp_path / "r" / "attribution_00_attribution-to-cat.nii.gz")
    with np.load(decoding / "attributions.npz") as found:
        np.testing.assert_allclose(image.get_fdata().ravel(), found["network_mean"][0], atol=1e-5)
    html = (tmp_path / "r" / "index.html").read_text()
    assert "Learning curve" in html
    assert "area 3" in html
    assert "The decoder read" in html
    assert html.count("<iframe ") == 3
    assert not re.search(r"""(src|href)=["'&#;0-9quot]*(https?:)?//""", html)
    assert str(tmp_path / "r" / "index.html") in capsys.readouterr().out


def test_report_of_a_pretraining_run_maps_the_reconstruction_error(store, tmp_path):
    run = tmp_path / "run"
    config = PretrainConfig(
        store=store.path,
        out=str(run),
        model=ModelConfig(networks=NETWORKS, width=16, layers=1, heads=2),
        data=DataConfig(seq_min=4, seq_max=13, batch_size=4, validation_batches=1),
        train=TrainConfig(steps=2, checkpoint_every=2, validate_every=2),
        device="cpu",
    )
    pretrain(config, resume="never", quiet=True)
    nibabel.save(nibabel.Nifti1Image(np.ones((2, 2, 2), np.uint8), 30 * np.eye(4)), tmp_path / "mask.nii.gz")
    assert main(["report", str(run), "--mask", str(tmp_path / "mask.nii.gz")]) == 0
    html = (run / "report" / "index.html").read_text()
    for words in ("Masked reconstruction", "validation runs", "eight", "toy"):
        assert words in html
    with np.load(run / "reconstruction.npz") as found:
        assert found["error"].shape == (NETWORKS,)
        image = nibabel.load(run / "report" / "reconstruction_00_reconstruction-error-L1-.nii.gz")
        np.testing.assert_allclose(image.get_fdata().ravel(), found["error"], atol=1e-5)
    card = write_card(run).read_text()
    last = read_metrics(run)[-1]
    for words in ("## Validation after 2 steps", f"held-out runs: {last['val_l1']:.3f}", "- toy: 10 runs"):
        assert words in card
    config_path = run / "config.json"
    config_path.write_text(config_path.read_text().replace(str(store.path), str(tmp_path / "gone")))
    assert "nothing was predicted" in render(run_page(run))


@pytest.mark.parametrize("framework", ["csm", "seq-bert", "net-bert", "autoencoder"])
def test_reconstruction_error_is_what_a_plain_loop_finds(store, framework):
    torch.manual_seed(0)
    sizes = {"networks": NETWORKS, "width": 16, "layers": 1, "heads": 2}
    module = build(ModelConfig(framework=framework, **sizes)).eval()
    runs = tuple(str(key) for key in store.runs.key[:3])
    result = reconstruct(store, module, runs, length=13)
    assert result.windows == 6
    known = np.isfinite(result.prediction)
    assert known.any()
    windows = [store.run(i)[13 * half : 13 * half + 13] for i in range(3) for half in range(2)]
    source = ArrayWindows([np.asarray(w, np.float32) for w in windows], t_r=2.0)
    with source.loader(np.arange(6), batch=6, shuffle=False, seed=0, device=torch.device("cpu")) as batches:
        batch = next(batches)
    with torch.no_grad():
        values, rows = module.reconstruct(batch, seed=0)
    gap = np.abs(batch.bold[rows].numpy() - values.numpy())
    expected = np.nansum(gap, axis=0) / np.maximum(np.isfinite(gap).sum(axis=0), 1)
    never = ~np.isfinite(gap).any(axis=0)
    np.testing.assert_allclose(result.error, np.where(never, np.nan, expected), rtol=1e-4)
    with pytest.raises(ValueError, match="holds none of the 1 run"):
        reconstruct(store, module, ("nowhere",), length=13)


def test_report_of_logs_alone(tmp_path):
    lines = [
        {"step": 10, "loss": 0.9, "lr": 1e-4},
        {"step": 10, "val_loss": 0.8, "val_mse": 0.4, "val_mean_mse": 1.0, "val_last_mse": 0.21},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "0.790" in render(run_page(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"neither metrics\.jsonl nor scores\.json"):
        run_page(tmp_path / "nothing")


def test_differences_are_named_and_can_be_allowed(store, model, tmp_path):
    assert compatibility.check_fits(model, store) == []
    slow = write_store(tmp_path / "s", t_r=3.0)
    with pytest.raises(ValueError, match=r"TR: the model saw 2 s, the data have 3 s.*--allow-mismatch"):
        compatibility.check_fits(model, slow)
    assert len(compatibility.check_fits(model, slow, allow=True)) == 1
    with pytest.raises(ValueError, match=r"normalisation: .* mean square of about .* z-score each network"):
        compatibility.check_fits(model, write_store(tmp_path / "raw", scale=30.0))
    names = {"network_names": ["a", "b", "c"], "preprocessing": {"standardize": "z-score", "filter": "x"}}
    ours = {"network_names": ["a", "c", "b"], "preprocessing": {"standardize": "psc", "filter": "y"}}
    found = compatibility.differences(names, ours, [])
    assert "from place 1 of 3" in found[0]
    assert found[1].startswith("normalisation: the model saw")
    assert len(found) == 2


def test_doctor_says_what_differs_and_what_to_do(store, model, tmp_path, capsys):
    assert main(["doctor", store.path, "--for", str(model), "--json"]) == 0
    rows = {row["what"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert {row["verdict"] for row in rows.values()} <= {"fine", "unknown"}
    other = write_store(tmp_path / "s", t_r=4.0, scale=5.0)
    assert main(["doctor", other.path, "--for", str(model), "--json"]) == 1
    rows = {row["what"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["TR (s)"]["verdict"] == "differs"
    assert rows["variance (median of networks)"]["verdict"] == "look"
    assert "z-score" in rows["variance (median of networks)"]["advice"]
    assert main(["doctor", other.path, "--for", str(model)]) == 1
    assert "resample" in capsys.readouterr().out.replace("\n", " ")


def test_adapt_warns_of_what_the_doctor_finds(store, tmp_path, capsys):
    """Windows of 5 time points, runs of twice the variance, of which the model saw neither."""
    data = {"t_r": [2.0], "fingerprint": compatibility.fingerprint(store)}
    data["fingerprint"]["variance"] /= 2
    torch.manual_seed(0)
    module = build(ModelConfig(networks=NETWORKS, width=16, layers=1, heads=2))
    drawn = {"data": {"seq_min": 2, "seq_max": int(store.segments.length.max())}}
    model = save_pretrained(module, tmp_path / "m", {"data": data, "pretrain": drawn})
    command = ["adapt", store.path, "--from", str(model), "--target", "state", "--mode", "knn"]
    assert main([*command, "--out", str(tmp_path / "out"), "--device", "cpu", "--json"]) == 0
    out, error = capsys.readouterr()
    assert "warning: window length (time points): the model saw 2 to" in error
    assert f"pretrain with --data.seq-max {store.segments.length.max() + 1}" in error
    assert "warning: variance (median of networks): the model saw" in error
    assert {row["what"] for row in json.loads(out)["doctor"]} == {
        "window length (time points)",
        "variance (median of networks)",
    }
    assert main(["doctor", store.path, "--for", str(model), "--json"]) == 0
    rows = {row["what"]: row["verdict"] for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["window length (time points)"] == "look"


def test_doctor_knows_the_library_of_the_same_name(monkeypatch, capsys):
    from brainflow.cli import doctor

    assert doctor.run(doctor.Args(json=True)) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["environment"]["torch"].startswith(torch.__version__)
    assert not found["namesake"]
    plain = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: "5.0" if name == "brainflow" else plain(name))
    assert doctor.run(doctor.Args()) == 1
    assert "brain–computer-interface library" in capsys.readouterr().out


def test_card_and_download(decoding, monkeypatch, tmp_path):
    folder = shutil.copytree(decoding / "decoder", tmp_path / "d")
    asked = inspect.signature(pytest.importorskip("huggingface_hub").snapshot_download)

    def download(name, **options):
        asked.bind(name, **options)
        assert not {"*.py", "*.bin", "*.pt"} & set(options["allow_patterns"])
        return str(folder)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=download))
    card = (folder / "README.md").read_text()
    for words in ("eight", "| repetition time | 2 s |", "cat, face, house", "accuracy", "95 % interval"):
        assert words in card
    assert from_pretrained("me/decoder").config.networks == NETWORKS
    with pytest.raises(FileNotFoundError, match="owner/name"):
        from_pretrained("nowhere")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="d/mistyped: no config"):
        from_pretrained("d/mistyped")  # beside a folder that is there: not a repository
    assert main(["share", str(folder), "me/decoder", "--dry-run"]) == 0
    assert main(["share", str(folder), "me/../decoder", "--dry-run"]) == 1
