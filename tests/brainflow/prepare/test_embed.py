"""`brainflow embed`: real BOLD from images, tables, stores and URLs to the same vectors; what is refused."""

import functools
import http.server
import json
import shutil
import subprocess
import sys
import threading
from importlib.resources import as_file, files
from itertools import pairwise
from pathlib import Path

import nibabel
import numpy as np
import pandas
import pyarrow.parquet
import pytest
import torch
from nibabel.cifti2 import BrainModelAxis, LabelAxis, SeriesAxis

import brainflow
from brainflow.batch import PackedBatch, Windows
from brainflow.cli import embed as verb
from brainflow.cli.main import main
from brainflow.config import ModelConfig
from brainflow.decoding.embed import FILE, PREPARING, embed
from brainflow.decoding.embeddings import Embeddings
from brainflow.frameworks import build, framework_names
from brainflow.prepare import CleanSettings, extract
from brainflow.prepare.pool import prepare_runs
from brainflow.pretrained.format import save_pretrained
from brainflow.report.embedding_page import principal_components
from brainflow.storage import StoreError, StoreWriter, remote
from brainflow.storage.normalise import APPLIED

NAMES = [f"stripe {i}" for i in range(1, 13)]
CLEAN = {"confounds": "motion", "detrend": True, "high_pass": 0.01, "smoothing_fwhm": None}


def save_model(folder, framework="csm", names=NAMES, **data):
    torch.manual_seed(0)
    module = build(
        ModelConfig(framework=framework, networks=len(names), width=16, layers=2, heads=2, max_positions=64)
    )
    facts = {"parcellation": "grid", "network_names": names, "normalisation": APPLIED["zscore"], "t_r": [2.5]}
    extra = {"data": facts | {"preprocessing": {"clean": CLEAN}} | data}
    return save_pretrained(module, folder, {**extra, "pretrain": {"data": {"seq_min": 4, "seq_max": 31}}})


@pytest.fixture
def model(tmp_path):
    return save_model(tmp_path / "model")


@pytest.fixture
def image(tree):
    return str(tree.run("01", "rest", ses="a"))


@pytest.fixture
def atlas(tree):
    return str(tree.atlas())


def series(image, confounds_of=None):
    """The cleaned time series, by way of the Python function."""
    table = pandas.read_csv(confounds_of, sep="\t") if confounds_of else None
    motion = [f"{kind}_{axis}" for kind in ("trans", "rot") for axis in "xyz"]
    clean = CleanSettings(**{**CLEAN, "confounds": "none"})
    return image, None if table is None else table[motion], clean


def test_a_folder_that_is_no_store_is_called_so(tree, image, model, capsys, tmp_path):
    folder = str(Path(image).parent)
    assert main(["embed", folder, "--from", str(model), "--out", str(tmp_path / "e.csv")]) == 1
    error = capsys.readouterr().err
    assert f"{folder}: is a folder, but no store; name the files in it, as in {folder}/*_bold.nii.gz" in error
    assert "damaged" not in error


def test_progress_counts_images_files_and_the_runs_of_a_store(tree, image, atlas, model, tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "a.npy", rng.standard_normal((30, 12)).astype(np.float32))
    (tmp_path / "broken.npy").write_bytes(b"nothing")
    with StoreWriter.create(
        tmp_path / "store", networks=12, dtype="float32", parcellation="grid", network_names=NAMES,
        normalisation=APPLIED["zscore"],
    ) as writer:  # fmt: skip
        for run in range(4):
            bold = rng.standard_normal((30, 12))
            bold = (bold - bold.mean(0)) / bold.std(0)
            writer.append(bold.astype(np.float32), t_r=2.5, dataset="d", subject=str(run), task="rest")
    told = []
    files = [image, tmp_path / "store", tmp_path / "broken.npy", tmp_path / "a.npy"]
    found = embed(files, model, atlas=atlas, t_r=2.5, progress=lambda *step: told.append(step))
    assert set(found.failures) == {str(tmp_path / "broken.npy")}
    [total] = {total for _, total in told}
    assert total == PREPARING + 4 * FILE
    done = [step for step, _ in told]
    assert done == sorted(done)
    quarters = [FILE * k // 4 for k in (1, 2, 3, 4)]
    assert [one - PREPARING - FILE for one in done if PREPARING + FILE < one <= PREPARING + 2 * FILE][
        :4
    ] == quarters
    assert done[0] == PREPARING  # the image is prepared, but nothing embedded
    assert done[-1] == total


def test_an_image_becomes_windows_that_the_model_reads(tree, image, atlas, model):
    found = embed(image, model, atlas=atlas, layer="last")
    _, confounds, clean = series(image, next(tree.func("01", "a").glob("*confounds_timeseries.tsv")))
    bold = extract(image, atlas, confounds=confounds, settings=clean)
    bounds = [0, 24, 48, 73, 97, 121]  # five windows of at most 30 time points
    module = brainflow.load(model)
    expected = [module.embed(bold[a:b], 2.5)[0].numpy() for a, b in pairwise(bounds)]
    np.testing.assert_allclose(found.vectors, expected, atol=1e-5)
    first = {"path": image, "subject": "01", "session": "a", "task": "rest", "run": "", "confounds": "motion"}
    assert first.items() <= found.rows[0].items()
    assert found.rows[0]["key"] == "sub-01_ses-a_task-rest_space-MNI152NLin2009cAsym_desc-preproc_bold"
    assert [row["onset"] for row in found.rows] == [2.5 * a for a in bounds[:-1]]
    assert sum(row["duration"] for row in found.rows) == 121 * 2.5
    assert (found.failures, found.notes) == ({}, [])
    whole = brainflow.embed(image, model, atlas=atlas, layer="last", per="run")
    weights = np.diff(bounds)
    np.testing.assert_allclose(whole.vectors[0], np.average(expected, axis=0, weights=weights), atol=1e-5)
    assert [(row["onset"], row["duration"]) for row in whole.rows] == [(0.0, 302.5)]
    assert embed(image, model, atlas=atlas, window=10).vectors.shape == (
        31,
        32,
    )  # of 4 time points; both layers


@pytest.mark.parametrize("framework", framework_names())
def test_a_models_own_method(framework):
    torch.manual_seed(0)
    config = ModelConfig(framework=framework, networks=5, width=8, layers=1, heads=2, dropout=0.5)
    module = build(config).train()
    bold = torch.randn(3, 7, 5)
    vectors = module.embed(bold.numpy(), 0.72)
    assert module.training
    batch = PackedBatch.pack(bold.reshape(21, 5), Windows.end_to_end([7, 7, 7], t_r=0.72))
    with torch.no_grad():
        torch.testing.assert_close(vectors, module.eval().features(batch, "tokens").reshape(3, 7, 8).mean(1))
    torch.testing.assert_close(module.embed(bold[1], 0.72), vectors[1:2])
    for wrong, t_r in (
        (bold[..., :4], 1.0),
        (bold[:, :0], 1.0),
        (bold[0, 0], 1.0),
        (bold / 0, 1.0),
        (bold, 0),
    ):
        with pytest.raises(ValueError, match="bold"):
            module.embed(wrong, t_r)


@pytest.mark.parametrize("framework", framework_names())
def test_every_framework_is_embedded_by_default(tmp_path, framework):
    path = tmp_path / "sub-7_task-x_timeseries.npy"
    np.save(path, np.random.default_rng(0).normal(size=(45, 12)).astype(np.float32))
    found = embed(path, save_model(tmp_path / "m", framework), t_r=2.5)
    assert found.vectors.shape == (2, 32)
    assert np.isfinite(found.vectors).all()


def test_tables_and_stores_give_the_vectors_of_their_image(tree, image, atlas, model, tmp_path):
    _, confounds, clean = series(image, next(tree.func("01", "a").glob("*confounds_timeseries.tsv")))
    bold = extract(image, atlas, confounds=confounds, settings=clean)
    tables = [
        tmp_path / name for name in ("sub-01_ses-a_task-rest_timeseries.npy", "b.npz", "c.tsv", "turned.npy")
    ]
    np.save(tables[0], bold)
    np.savez(tables[1], 3 * bold + 5)  # is normalised
    np.savetxt(tables[2], bold, delimiter="\t", header="\t".join(NAMES), comments="")
    np.save(tables[3], bold.T)
    (tmp_path / "c.json").write_text('{"RepetitionTime": 2.5}')
    with StoreWriter.create(
        tmp_path / "store", networks=12, dtype="float32", parcellation="grid", network_names=NAMES,
        normalisation=APPLIED["zscore"],
    ) as writer:  # fmt: skip
        writer.append(bold, t_r=2.5, dataset="d", subject="01", session="a", task="rest", run="2")
    names = [image, *tables[:2], tables[3], tmp_path / "store"]
    found = embed(names, model, atlas=atlas, t_r=2.5)
    expected = found.vectors[:5]
    np.testing.assert_allclose(found.vectors.reshape(5, 5, -1), np.stack([expected] * 5), atol=1e-4)
    np.testing.assert_allclose(embed(tables[2], model).vectors, expected, atol=1e-4)  # TR from the sidecar
    assert found.rows[5]["task"] == "rest"
    assert {"key": "ds-d_sub-01_ses-a_task-rest_run-2", "dataset": "d", "run": "2"}.items() <= found.rows[
        -1
    ].items()
    assert found.notes == [f"{tables[3]}: was turned, its rows are networks"]
    with pytest.raises(ValueError, match=r"no repetition time.*--t-r"):
        embed(tables[0], model)


def test_what_tables_say_is_not_overruled(model, tmp_path):
    bold = np.random.default_rng(0).normal(size=(40, 12))
    bold[:, 3] = 7
    np.save(tmp_path / "a.npy", bold)
    assert embed(tmp_path / "a.npy", model, t_r=2.5).notes == [f"{tmp_path}/a.npy: 1 network is constant"]
    (tmp_path / "a.json").write_text('{"RepetitionTime": 2.5}')
    assert len(embed(tmp_path / "a.npy", model, t_r=2.5).rows) == 2
    with pytest.raises(ValueError, match=r"t_r: got 2 s, but its sidecar says 2\.5 s"):
        embed(tmp_path / "a.npy", model, t_r=2.0)
    pandas.DataFrame(bold).to_csv(tmp_path / "b.csv", index=False)  # the names are 0, 1, 2, …
    found = embed([tmp_path / "a.npy", tmp_path / "b.csv"], model, t_r=2.5).vectors
    np.testing.assert_allclose(found[:2], found[2:], atol=1e-6)
    text = "\n".join(",".join(map(repr, row)) for row in bold.tolist())
    (tmp_path / "b.csv").write_text(text, encoding="utf-8-sig")  # as Excel begins a file
    np.testing.assert_array_equal(embed(tmp_path / "b.csv", model, t_r=2.5).vectors, found[2:])


def test_volumes_of_which_nothing_was_recorded_are_refused(tree, atlas, model):
    bold = tree.bold[..., :121].astype(np.float32)
    bold[:3, ..., 4:] = np.nan  # outside of what was recorded
    bold[..., 70] = np.nan
    image = str(tree.run("04", "rest", data=bold))
    with pytest.raises(ValueError, match=r"1 volume holds no finite value \(first: volume 70\)"):
        embed(image, model, atlas=atlas)
    assert embed(str(tree.run("04", "rest", data=bold[..., :70])), model, atlas=atlas).failures == {}


def test_what_does_not_fit_is_refused_by_file_and_can_be_allowed(tree, image, atlas, model, tmp_path):
    slow = str(tree.run("02", "rest", t_r=4.0))
    damaged = tree.root.parent / "sub-03_bold.nii.gz"
    damaged.write_bytes(b"no image")
    odd = tmp_path / "odd.tsv"
    rows = np.random.default_rng(0).normal(size=(40, 12))
    np.savetxt(odd, rows, delimiter="\t", header="\t".join([*NAMES[1:], NAMES[0]]), comments="")
    text = tmp_path / "notes.txt"
    text.write_text("no table")
    files = [image, slow, str(damaged), str(odd), str(text), "absent.nii.gz"]
    found = embed(files, model, atlas=atlas, t_r=2.5)
    assert {row["path"] for row in found.rows} == {image}
    said = {
        slow: "TR: the model saw 2.5 s, the data have 4 s",
        str(damaged): "cannot be opened",
        str(odd): "network names: the model saw",
        str(text): "is of no kind that is read",
        "absent.nii.gz": "no such file",
    }
    assert found.failures.keys() == said.keys()
    assert all(said[name] in reason for name, reason in found.failures.items())
    allowed = embed(slow, model, atlas=atlas, allow_mismatch=True)
    assert any("the data have 4 s" in note for note in allowed.notes)
    with pytest.raises(ValueError, match=r"atlas x: has 11 networks, the model .* was trained on 12"):
        embed(image, model, atlas=f"x={tree.atlas('other_dseg.nii.gz', labels=11)}")
    with pytest.raises(ValueError, match="images need the parcellation of the model"):
        embed(image, model)
    with pytest.raises(ValueError, match="layer: got 2, but the model has 1 blocks between"):
        embed(image, model, atlas=atlas, layer=2)
    with pytest.raises(ValueError, match="expected 1 to 64"):
        embed(image, model, atlas=atlas, window=1000.0)
    elsewhere = tree.atlas("atlas-grid_space-MNI152NLin6Asym_dseg.nii.gz")
    with pytest.raises(ValueError, match=r"images in MNI152NLin2009cAsym, .* with --allow-mismatch$"):
        embed(image, model, atlas=str(elsewhere))
    allowed = embed(image, model, atlas=str(elsewhere), allow_mismatch=True)
    assert allowed.notes == [f"{image}: is in MNI152NLin2009cAsym, the atlas in MNI152NLin6Asym"]
    other = save_model(tmp_path / "other", parcellation="other")
    with pytest.raises(ValueError, match="parcellation: the model saw 'other', the data have 'grid'"):
        embed(image, other, atlas=atlas)


def test_images_are_normalised_as_the_models_data_were_and_confounds_are_said(tree, atlas, tmp_path):
    image = str(tree.run("01", "rest", confounds=False))
    model = save_model(tmp_path / "gsr", normalisation=APPLIED["gsr"])
    found = embed(image, model, atlas=atlas, layer="input")
    clean = CleanSettings(**{**CLEAN, "confounds": "none", "normalise": "gsr"})
    bold = torch.from_numpy(extract(image, atlas, settings=clean))
    expected = torch.nn.functional.layer_norm(bold, (12,))[:24].mean(0)
    np.testing.assert_allclose(found.vectors[0], expected, atol=1e-5)
    assert found.rows[0]["confounds"] == "none"
    assert found.notes == [f"{image}: no table of confounds lies beside it, so nothing was regressed out"]
    with pytest.raises(ValueError, match="no confounds table"):
        embed(image, model, atlas=atlas, confounds="published")


def test_dropped_volumes_move_the_onset(image, atlas, tmp_path):
    model = save_model(tmp_path / "m", preprocessing={"clean": {**CLEAN, "dummy_scans": 3}})
    assert (
        embed(image, model, atlas=atlas, per="run").rows[0].items()
        >= {"onset": 7.5, "duration": 295.0}.items()
    )


def test_surfaces(tmp_path, haxby):
    bold, _, mask = haxby
    series = np.ascontiguousarray(bold[mask][:, :121].T)[:, :48]
    cortex = BrainModelAxis.from_surface(np.arange(48), 32_492, "CORTEX_LEFT")
    cifti = tmp_path / "sub-01_space-fsLR_den-91k_bold.dtseries.nii"
    nibabel.save(nibabel.Cifti2Image(series, header=(SeriesAxis(0, 2.5, 121), cortex)), cifti)
    table = {0: ("???", (0, 0, 0, 0))} | {i: (NAMES[i - 1], (1, 0, 0, 1)) for i in range(1, 13)}
    labels = (np.arange(48) // 4 + 1).astype(np.float32)
    dlabel = tmp_path / "atlas-grid_dseg.dlabel.nii"
    nibabel.save(nibabel.Cifti2Image(labels[None], header=(LabelAxis(["x"], [table]), cortex)), dlabel)
    for side, part in (("L", slice(24)), ("R", slice(24, 48))):
        arrays = [nibabel.gifti.GiftiDataArray(row[part]) for row in series]
        nibabel.save(
            nibabel.GiftiImage(darrays=arrays),
            tmp_path / f"sub-01_hemi-{side}_space-fsaverage5_bold.func.gii",
        )
        own = nibabel.gifti.GiftiDataArray(labels[part].astype(np.int32), intent="NIFTI_INTENT_LABEL")
        keys = nibabel.gifti.GiftiLabelTable()
        for value, (name, _) in table.items():
            label = nibabel.gifti.GiftiLabel(key=value)
            label.label = name
            keys.labels.append(label)
        nibabel.save(
            nibabel.GiftiImage(darrays=[own], labeltable=keys),
            tmp_path / f"atlas-grid_hemi-{side}_dseg.label.gii",
        )
    (tmp_path / "sub-01_hemi-L_space-fsaverage5_bold.json").write_text('{"RepetitionTime": 2.5}')
    model = save_model(tmp_path / "m")
    first = embed(cifti, model, atlas=str(dlabel))
    gifti = tmp_path / "sub-01_hemi-L_space-fsaverage5_bold.func.gii"
    second = embed(gifti, model, atlas=str(tmp_path / "atlas-grid_hemi-L_dseg.label.gii"))
    np.testing.assert_allclose(first.vectors, second.vectors, atol=1e-4)
    with pytest.raises(ValueError, match="labels, which does not fit --input cifti"):
        embed(cifti, model, atlas=str(write_volume_atlas(tmp_path)))
    lost = series.astype(np.float32)
    lost[7] = np.nan
    nibabel.save(nibabel.Cifti2Image(lost, header=(SeriesAxis(0, 2.5, 121), cortex)), cifti)
    with pytest.raises(ValueError, match=r"1 volume holds no finite value \(first: volume 7\)"):
        embed(cifti, model, atlas=str(dlabel))


def write_volume_atlas(tmp_path):
    path = tmp_path / "atlas-v_dseg.nii.gz"
    values = np.arange(1, 13, dtype=np.int16).reshape(3, 4, 1)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)
    return path


def test_a_parcel_series(tmp_path, model):
    values = np.random.default_rng(0).normal(size=(40, 12)).astype(np.float32)
    grid = [BrainModelAxis.from_surface([i], 12, "CORTEX_LEFT") for i in range(12)]
    parcels = nibabel.cifti2.ParcelsAxis.from_brain_models(list(zip(NAMES, grid, strict=True)))
    path = tmp_path / "sub-01_timeseries.ptseries.nii"
    nibabel.save(nibabel.Cifti2Image(values, header=(SeriesAxis(0, 2.5, 40), parcels)), path)
    np.save(tmp_path / "x.npy", values)
    np.testing.assert_allclose(
        embed(path, model).vectors, embed(tmp_path / "x.npy", model, t_r=2.5).vectors, atol=1e-6
    )


object_server = pytest.importorskip("object_server", reason="moto[server] is not installed")
pytest.importorskip("obstore", reason="obstore (extra `remote`) is not installed")


@pytest.fixture
def bucket(monkeypatch):
    """A public bucket on an S3 server, and the URL of a proxy before it that fails as it is told."""
    boto3 = pytest.importorskip("boto3")
    with object_server.running() as proxy:
        for name, value in object_server.environment_variables(proxy).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(remote, "FIRST_WAIT", 0.002)
        object_server.Proxy.faults, object_server.Proxy.everything = [], True
        host, port = object_server.Proxy.backend
        keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", **keys)
        client.create_bucket(Bucket="runs")
        allow = {"Effect": "Allow", "Principal": "*", "Action": "s3:*", "Resource": "arn:aws:s3:::runs/*"}
        policy = {"Version": "2012-10-17", "Statement": [allow]}
        client.put_bucket_policy(Bucket="runs", Policy=json.dumps(policy))
        yield client, proxy


def test_s3_http_and_the_hub_give_what_the_file_gives_whatever_fails(
    tree, image, atlas, model, bucket, monkeypatch
):
    client, proxy = bucket
    folder = tree.func("01", "a")
    hub = "datasets/o/n/resolve/main/data"
    for path in folder.iterdir():
        for key in (f"data/{path.name}", f"{hub}/{path.name}"):
            client.upload_file(str(path), "runs", key)
    name = image.rpartition("/")[2]
    expected = embed(image, model, atlas=atlas)
    monkeypatch.setattr(remote, "_LARGEST_REQUEST", 4_096)
    monkeypatch.setenv("HF_ENDPOINT", f"{proxy}/runs")
    faults = object_server.Proxy
    for url in (f"s3://runs/data/{name}", f"{proxy}/runs/data/{name}", f"hf://datasets/o/n/data/{name}"):
        faults.faults = ["500", "drop", "", "truncate", "500", "", "", "truncate", "drop", "500", "", "500"]
        found = embed(url, model, atlas=atlas)
        assert faults.faults == []
        np.testing.assert_array_equal(found.vectors, expected.vectors)
        assert found.rows[0] == {**expected.rows[0], "path": url}
    faults.faults = [""] * 4 + ["corrupt"] * 8
    assert np.array_equal(embed(url, model, atlas=atlas).vectors, expected.vectors)  # its checksum tells
    with pytest.raises(ValueError, match=r"absent.nii.gz: does not exist"):
        embed("s3://runs/data/absent.nii.gz", model, atlas=atlas)
    with pytest.raises(ValueError, match=r"\? or # are not read"):
        embed(f"{proxy}/runs/data/{name}?signed=1", model, atlas=atlas)
    with pytest.raises(StoreError, match="expected hf://datasets/owner/name"):
        remote.RemoteFiles("hf://owner")


def test_a_server_without_parts_and_a_table_on_it(tmp_path, model, monkeypatch):
    www = tmp_path / "www"
    www.mkdir()
    np.save(www / "x.npy", np.random.default_rng(0).normal(size=(40, 12)))
    (www / "x.json").write_text('{"RepetitionTime": 2.5}')
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(www))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/x.npy"
        assert np.array_equal(embed(url, model).vectors, embed(www / "x.npy", model).vectors)
        server.shutdown()


def test_an_image_is_prepared_once_and_again_when_it_changes(image, atlas, model, tmp_path, monkeypatch):
    prepared = []

    def prepare(jobs, processes):
        prepared.append([job.files.images[0].name for job in jobs])
        return prepare_runs(jobs, processes)

    options = {"atlas": atlas, "work": tmp_path / "work", "prepare": prepare}
    first = embed(image, model, **options)
    embed(image, model, layer=1, **options)
    assert len(prepared) == 1
    shutil.copy(image, tmp_path / "copy.nii.gz")
    shutil.move(tmp_path / "copy.nii.gz", image)  # another time stamp
    assert np.array_equal(embed(image, model, **options).vectors, first.vectors)
    assert len(prepared) == 2
    [record] = (tmp_path / "work" / "runs").iterdir()
    record.write_text("{}")  # damaged
    assert np.array_equal(embed(image, model, **options).vectors, first.vectors)
    assert len(prepared) == 3


def test_jobs_of_a_cluster_prepare_what_the_command_embeds(
    tree, image, atlas, model, tmp_path, run_verb, monkeypatch, capsys
):
    other = tree.run("02", "rest")
    damaged = tree.root.parent / "damaged.nii.gz"
    damaged.write_bytes(b"no image")
    started = []

    def submit(commands, folder, cluster, *, gigabytes):
        for name, words in commands.items():
            started.append(words)
            assert cluster == "slurm"
            if name != str(other):  # whose job is killed
                assert run_verb(verb, *words[4:]) == (name == str(damaged))
            yield name

    monkeypatch.setattr("brainflow.prepare.cluster.submit", submit)
    out = tmp_path / "emb.csv"
    words = [image, other, damaged, "--from", model, "--atlas", atlas, "--out", out, "--no-report"]
    assert run_verb(verb, *words, "--submit", "slurm") == 1
    text = capsys.readouterr().out
    assert f"failed: {other}: its job ended without a record" in text
    assert f"failed: {damaged}: damaged.nii.gz: cannot be opened" in text
    assert len(started) == 3
    assert len(out.read_text().splitlines()) == 1 + 5
    assert run_verb(verb, *words) == 1  # the killed one is prepared here
    assert len(out.read_text().splitlines()) == 1 + 10


def test_one_command_from_an_image_to_a_table_and_a_page(tmp_path, haxby):
    """The image that the package ships, on which no test had a hand."""
    _, affine, mask = haxby
    labels = np.zeros(mask.shape, np.int16)
    labels[mask] = 1 + np.arange(mask.sum()) * 12 // mask.sum()
    nibabel.save(nibabel.Nifti1Image(labels, affine), tmp_path / "atlas-grid_dseg.nii.gz")
    model = save_model(tmp_path / "m", names=[str(i) for i in range(1, 13)])
    with as_file(files("brainflow") / "demo_data" / "haxby2001" / "bold.nii.gz") as path:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "brainflow", "embed", str(path), "--from", str(model)),
                *(
                    "--atlas",
                    str(tmp_path / "atlas-grid_dseg.nii.gz"),
                    "--out",
                    str(tmp_path / "emb.parquet"),
                ),
                "--json",
            ],
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["rows"], said["width"], said["failures"]) == (49, 32, {})
    table = pyarrow.parquet.read_table(tmp_path / "emb.parquet")
    assert table.column_names[7:13] == ["onset", "duration", "t_r", "confounds", "e0000", "e0001"]
    assert table.num_rows == 49
    page = (tmp_path / "emb-report" / "index.html").read_text()
    assert "PCA of 49 rows" in page
    assert "<script" not in page


def test_what_is_written_is_read_back(tmp_path):
    row = dict.fromkeys(("path", "key", "dataset", "subject", "session", "task", "run", "confounds"), "=1+1")
    rows = [{**row, "onset": 2.5 * i, "duration": 2.5, "t_r": 2.5} for i in range(3)]
    vectors = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    table = Embeddings(rows=rows, vectors=vectors, model={"layer": "both"})
    frame = table.to_frame()
    for name, read in (("a.parquet", pandas.read_parquet), ("a.csv", pandas.read_csv)):
        table.save(tmp_path / name)
        again = read(tmp_path / name)
        assert list(again) == list(frame)
        np.testing.assert_allclose(again.iloc[:, -4:], vectors, rtol=1e-6)
    assert again["path"][0] == "'=1+1"  # no spreadsheet takes it for a formula
    table.save(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as found:
        np.testing.assert_array_equal(found["embeddings"], vectors)
        assert found["onset"].tolist() == [0.0, 2.5, 5.0]
    with pytest.raises(ValueError, match=r"ends in .parquet, .csv, .tsv, .npz"):
        table.save(tmp_path / "a.pkl")
    (tmp_path / "b.csv").mkdir()
    with pytest.raises(ValueError, match=r"b\.csv is a folder, expected a file"):
        table.save(tmp_path / "b.csv")


def test_principal_components_are_those_of_the_covariance():
    values = np.random.default_rng(0).normal(size=(30, 5)) @ np.diag([3, 2, 1, 1, 1])
    points, share = principal_components(values)
    spread, axes = np.linalg.eigh(np.cov(values.T))
    expected = (values - values.mean(0)) @ axes[:, [-1, -2]]
    np.testing.assert_allclose(np.abs(points), np.abs(expected), atol=1e-9)
    np.testing.assert_allclose(share, spread[[-1, -2]] / spread.sum())


def test_a_damaged_run_of_a_store_stops_no_other(tmp_path):
    rng = np.random.default_rng(0)
    with StoreWriter.create(tmp_path / "s", networks=12, chunk_rows=64, shard_rows=64) as writer:
        for run in range(3):
            writer.append(rng.normal(size=(64, 12)), t_r=2.5, dataset="d", subject=str(run))
    shards = [path for path in (tmp_path / "s" / "bold" / "c").rglob("*") if path.is_file()]
    shard = sorted(shards)[1]
    data = bytearray(shard.read_bytes())
    data[5] ^= 1
    shard.write_bytes(data)
    found = embed(
        tmp_path / "s", save_model(tmp_path / "m", parcellation="", network_names=[], normalisation="")
    )
    assert {row["subject"] for row in found.rows} == {"0", "2"}
    [(name, reason)] = found.failures.items()
    assert name.endswith("ds-d_sub-1")
    assert "wrong checksum" in reason
