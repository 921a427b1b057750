"""Hostile BIDS trees, surfaces and parts: what cannot be used is named and counted, the rest goes in."""

import base64
import gzip
import json
import os
import struct
import sys
import zlib

import nibabel
import numpy as np
import pytest

from brainflow.cli import export, prepare
from brainflow.prepare import Query, find_runs
from brainflow.prepare.records import Unusable
from brainflow.prepare.surfaces import read_cifti, read_gifti
from brainflow.storage import BoldStore, StoreWriter
from brainflow.storage.parts import part_path, read_part, write_part


def spoil_image(offset, kind, *values):
    def spoil(image):
        data = bytearray(gzip.decompress(image.read_bytes()))
        struct.pack_into(kind, data, offset, *values)
        image.write_bytes(gzip.compress(bytes(data), 1))

    return spoil


def replaced(pattern, data):
    """Other content for a file beside the image."""

    def spoil(image):
        root = next(parent for parent in image.parents if (parent / "derivatives").is_dir())
        [path] = [
            path for path in root.rglob(pattern) if path.name.startswith(image.name.split("_")[0] + "_")
        ]
        path.unlink()
        if callable(data):
            data(path)
        else:
            path.write_bytes(data if isinstance(data, bytes) else data.encode())

    return spoil


def events(text):
    return replaced("*events.tsv", "onset\tduration\ttrial_type\n" + text)


def sidecar(text):
    return replaced("*bold.json", text)


def confounds(text):
    return replaced("*confounds*.tsv", text)


SPOILS = {
    "no dimension": spoil_image(40, "<8h", -1, 6, 6, 6, 60, 1, 1, 1),
    "negative dimension": spoil_image(40, "<8h", 4, -6, 6, 6, 60, 1, 1, 1),
    "huge": spoil_image(40, "<8h", 4, *[32767] * 4, 1, 1, 1),
    "unknown type": spoil_image(70, "<h", 9999),
    "complex": spoil_image(70, "<2h", 32, 64),
    "intercept": spoil_image(116, "<f", np.nan),
    "affine nan": spoil_image(280, "<12f", *[np.nan] * 12),
    "affine zero": spoil_image(280, "<12f", *[0.0] * 12),
    "offset far": spoil_image(108, "<f", 1e9),
    "offset nan": spoil_image(108, "<f", np.nan),
    "magic": spoil_image(344, "<4s", b"zzzz"),
    "cut": lambda image: image.write_bytes(image.read_bytes()[:3000]),
    "not packed": lambda image: image.write_bytes(b"x" * 500),
    "image FIFO": replaced("*bold.nii.gz", os.mkfifo),
    "image device": replaced("*bold.nii.gz", lambda path: path.symlink_to("/dev/zero")),
    "image nowhere": replaced("*bold.nii.gz", lambda path: path.symlink_to("nowhere")),
    "sidecar FIFO": sidecar(os.mkfifo),
    "sidecar device": sidecar(lambda path: path.symlink_to("/dev/zero")),
    "sidecar nested": sidecar("[" * 100_000),
    "sidecar long": sidecar('{"a": "' + "x" * 2**23 + '"}'),
    "sidecar latin1": sidecar(b"\xff"),
    **{
        f"TR {text[:9]}": sidecar(f'{{"RepetitionTime": {text}}}')
        for text in ("1e999", "1e-300", "9" * 400, "9" * 5000, "NaN", "-1", '"x"', "true", "[1]", "{}")
    },
    "confounds FIFO": confounds(os.mkfifo),
    "confounds device": confounds(lambda path: path.symlink_to("/dev/zero")),
    "confounds utf16": confounds("trans_x\n1\n".encode("utf-16")),
    "confounds latin1": confounds(b"\xe9\n1\n"),
    "confounds text": confounds("framewise_displacement\n" + "x\n" * 121),
    "confounds flags": confounds("non_steady_state_outlier00\n" + "x\n" * 121),
    "confounds empty": confounds(""),
    "confounds huge": confounds("trans_x\n" + "9" * 400 + "\n" * 121),
    "events FIFO": replaced("*events.tsv", os.mkfifo),
    "events device": replaced("*events.tsv", lambda path: path.symlink_to("/dev/zero")),
    "events inf": events("inf\t10\ta\n"),
    "events inf duration": events("0\tinf\ta\n"),
    "events NUL": events("0\t10\ta\0b\n"),
    "events text": events("x\t10\ta\n"),
    "events label": events("0\t10\t" + "x" * 1025 + "\n"),
    "events long label": events("0\t10\t" + "x" * 200_000 + "\n"),
    "events quote": events('0\t10\t"a\n'),
    "events utf16": replaced("*events.tsv", "onset\n".encode("utf-16")),
    "events empty": replaced("*events.tsv", ""),
    "events long": replaced("*events.tsv", "\n" * (2**23 + 1)),
}


def test_a_spoiled_run_is_named_and_the_others_are_gathered(tree, tmp_path, run_verb, capsys):
    """One participant a way of spoiling a run, and two good ones."""
    small = tree.bold[..., :60]
    for sub in ("1", "9"):
        tree.run(sub, "rest", data=small, events=[(0, 10, "=1+1")])
    for i, spoil in enumerate(SPOILS.values()):
        spoil(tree.run(f"bad{i}", "rest", data=small, events=[(0, 10, "a")]))
    out = tmp_path / "out"
    options = ("--atlas", tree.atlas(), "--smoothing-fwhm", "0", "--allow-space-mismatch", "--no-report")
    assert run_verb(prepare, tree.root, out, "participant", "group", *options) == 1
    [path] = out.glob("*.zarr")
    assert BoldStore.open(path).runs.subject.tolist() == ["1", "9"]
    assert BoldStore.open(path).segments.columns["mental_state"].tolist() == ["=1+1"] * 2
    lines = (out / "runs.tsv").read_text().splitlines()
    failed = {line.split("\t")[0]: line.split("\t")[2] for line in lines if line.split("\t")[1] == "failed"}
    for i, name in enumerate(SPOILS):
        assert f"sub-bad{i}_" in failed[f"ds-{tree.root.name.replace('-', '')}_sub-bad{i}_task-rest"], name
    assert len(failed) == len(SPOILS) > 45
    printed = capsys.readouterr()
    assert "Traceback" not in printed.out + printed.err
    assert f"{len(SPOILS)} failed" in printed.out


def test_links_devices_and_names_in_the_tree_stop_nothing(tree, caplog):
    tree.run("1", "rest", data=tree.bold[..., :60])
    sub = tree.fmriprep / "sub-1"
    (sub / "loop").symlink_to(tree.root)
    (tree.fmriprep / "sub-2").symlink_to(tree.fmriprep / "sub-2")
    (tree.fmriprep / "sub-3").symlink_to("/nowhere")
    (tree.fmriprep / "sub-proc").symlink_to("/proc/self/fd")
    os.mkfifo(tree.fmriprep / "sub-4")
    os.mkfifo(sub / "func" / "sub-1_task-fifo_bold.json")
    (tree.root / os.fsdecode(b"sub-\xff\xfe")).mkdir()
    for name in (
        "sub-..%2f_task-x_bold.json",
        "sub-1_task-a\nb_bold.json",
        "sub-1_task-\x1b[31m_bold.nii.gz",
    ):
        (sub / "func" / name).touch()
    (sub / "func" / os.fsdecode(b"sub-1_\xff_bold.json")).touch()
    assert [run.entities["sub"] for run in find_runs(tree.root, Query())] == ["1"]
    assert "sub-2: is passed over" in caplog.text


def test_a_folder_that_cannot_be_read_is_warned_of(tree, monkeypatch, caplog):
    for sub in "12":
        tree.run(sub, "rest", data=tree.bold[..., :60])
    scandir = os.scandir

    def guarded(path):
        if str(path).endswith("sub-1"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    assert [run.entities["sub"] for run in find_runs(tree.root, Query())] == ["2"]
    assert "sub-1: cannot be read (Permission denied); runs in it are not found" in caplog.text


def test_a_part_that_cannot_go_in_is_a_failed_run(tree, tmp_path, run_verb, capsys):
    """As another version may have written it: parts are files, too."""
    for sub in "123456":
        tree.run(sub, "rest", data=tree.bold[..., :60], events=[(0, 10, "a")])
    out = tmp_path / "out"
    options = ("--atlas", tree.atlas(), "--smoothing-fwhm", "0", "--allow-space-mismatch", "--no-report")
    assert run_verb(prepare, tree.root, out, "participant", *options) == 0
    [folder] = (out / "work" / "parts").iterdir()
    keys = [run.key for run in find_runs(tree.root, Query())]

    def rewrite(key, **changes):
        part = read_part(part_path(folder, key))
        part_path(folder, key).unlink()
        write_part(folder, **{**part, **changes})

    part = read_part(part_path(folder, keys[1]))
    segment = part["segments"][0]
    rewrite(keys[1], segments=[type(segment)(onset=0, length=2, labels={"mental_state": "a\0b"})])
    rewrite(keys[2], bold=part["bold"] * np.nan)
    rewrite(keys[3], bold=part["bold"][:, :3])
    part_path(folder, keys[4]).unlink()
    (out / "work" / "runs" / f"{keys[5]}.json").write_text("{")
    capsys.readouterr()
    assert run_verb(prepare, tree.root, out, "group", *options) == 1
    [path] = out.glob("*.zarr")
    assert BoldStore.open(path).runs.key.tolist() == keys[:1]
    printed = capsys.readouterr().out
    for key, reason in zip(
        keys[1:], ("zero byte", "not finite", "networks", "part", "record is damaged"), strict=True
    ):
        [line] = [line for line in printed.splitlines() if line.startswith(f"failed    {key}")]
        assert reason in line
        assert f"{key}\tfailed" in (out / "runs.tsv").read_text()


# --- GIFTI and CIFTI ----------------------------------------------------------------------------------------


def gifti(arrays, head="", attributes=""):
    return (
        f'<?xml version="1.0"?>{head}<GIFTI Version="1.0" NumberOfDataArrays="2"{attributes}>{arrays}</GIFTI>'
    )


def data_array(data="1 2 3", encoding="ASCII", kind="NIFTI_TYPE_FLOAT32", dims='Dim0="3"', more=""):
    return (
        f'<DataArray Intent="NIFTI_INTENT_TIME_SERIES" DataType="{kind}" ArrayIndexingOrder="RowMajorOrder" '
        f'Dimensionality="1" {dims} Encoding="{encoding}" Endian="LittleEndian" {more}>'
        f"<Data>{data}</Data></DataArray>"
    )


def packed(data):
    return base64.b64encode(zlib.compress(data)).decode()


def entities(depth):
    nested = "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 20}">' for i in range(1, depth))
    return f'<!DOCTYPE GIFTI [<!ENTITY a0 "{"x" * 50}">{nested}]>'


OUTSIDE = 'ExternalFileName="{}" ExternalFileOffset="0"'
GIFTIS = (
    gifti("<MetaData><MD><Name>&a8;</Name></MD></MetaData>", entities(9)),
    gifti("<MetaData>" + "&a1;" * 5000 + "</MetaData>", entities(2).replace("x" * 50, "x" * 10**6)),
    gifti("<MetaData>&e;</MetaData>", '<!DOCTYPE GIFTI [<!ENTITY e SYSTEM "file:///etc/passwd">]>'),
    *(gifti(2 * data_array(dims=f'Dim0="{n}"')) for n in (10**12, -5, "x", "", "9" * 5000, 2**30, 1.5)),
    gifti(2 * data_array(dims=" ".join(f'Dim{i}="9"' for i in range(9)))),
    gifti(70_000 * data_array("1", dims='Dim0="1"', more="")),
    *(
        gifti(2 * data_array("", code, more=OUTSIDE.format("SECRET")))
        for code in ("ExternalFileBinary", "GIFTI_ENCODING_EXTBIN", "External", "ASCII", "Base64Binary")
    ),
    *(
        gifti(2 * data_array("", code))
        for code in ("ExternalFileBinary", "evil", "", "4", "B64GZ", "GIFTI_ENCODING_B64GZ")
    ),
    gifti(2 * data_array(packed(bytes(2**24)), "GZipBase64Binary")),
    gifti(2 * data_array(packed(bytes(12))[:-9], "GZipBase64Binary")),
    gifti(2 * data_array("!!!!", "GZipBase64Binary")),
    gifti(2 * data_array("!!!!", "Base64Binary")),
    gifti(2 * data_array(kind="evil")),
    gifti(2 * data_array("x y z")),
    gifti(data_array() + data_array("1 2", dims='Dim0="2"')),
    gifti(""),
    gifti("<DataArray/>"),
    gifti("<Data>x</Data>"),
    "<GIFTI",
    "",
    "\x00",
    "x" * 500,
    "<x></x>",
    gifti("<" + "a" * 10**5 + "/>"),
    "<GIFTI>" * 10**5,
)


def test_a_bad_gifti_is_refused_and_nothing_outside_is_read(tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"SECRET" * 100)
    path = tmp_path / "hostile.func.gii"
    for number, text in enumerate(GIFTIS):
        path.write_text(text.replace("SECRET", str(secret)))
        with pytest.raises(Unusable, match=r"hostile\.func\.gii") as caught:
            pytest.fail(f"{number} was read: {read_gifti([path, path])}")
        assert len(str(caught.value)) < 2000, number
    path.write_text(gifti(2 * data_array(packed(np.arange(3, dtype="<f4").tobytes()), "GZipBase64Binary")))
    assert read_gifti([path, path]).data.tolist() == [[0, 1, 2, 0, 1, 2]] * 2
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(Unusable, match="no regular file"):
        read_gifti([path, path])


def test_a_bad_cifti_is_refused(tmp_path):
    path = tmp_path / "hostile.dtseries.nii"
    series = nibabel.cifti2.SeriesAxis(0, 2, 10)
    models = nibabel.cifti2.BrainModelAxis.from_mask(np.ones((3, 3, 3), bool), affine=np.eye(4))
    nibabel.save(nibabel.Cifti2Image(np.zeros((10, 27), np.float32), (series, models)), path)
    sound = path.read_bytes()
    begin, end = sound.index(b"<CIFTI"), sound.index(b"</CIFTI>") + 8
    xml = sound[begin:end].decode()
    assert read_cifti(path).data.shape == (10, 27)

    def with_xml(text):
        return sound[:begin] + text.encode()[: end - begin].ljust(end - begin) + sound[end:]

    cases = [
        with_xml(text)
        for text in (
            "<CIFTI",
            '<CIFTI Version="2"><Matrix></Matrix></CIFTI>',
            '<!DOCTYPE C [<!ENTITY a "x"><!ENTITY b "&a;&a;">]><CIFTI Version="2">&b;</CIFTI>',
            xml.replace('IndexCount="27"', 'IndexCount="9999999999"'),
            xml.replace('IndexCount="27"', 'IndexCount="26"'),
            xml.replace('IndexCount="27"', 'IndexCount="x"'),
            xml.replace("CIFTI_INDEX_TYPE_SERIES", "CIFTI_INDEX_TYPE_SCALARS"),
            xml.replace("CIFTI_INDEX_TYPE_BRAIN_MODELS", "CIFTI_INDEX_TYPE_EVIL"),
            "",
        )
    ]
    cases += [sound[:n] for n in (0, 100, 540, 600, len(sound) - 10)]
    for offset, kind, values in (
        (16, "<8q", (6, 1, 1, 1, 1, 10**9, 10**9, 1)),
        (16, "<8q", (6, 1, 1, 1, 1, -10, 27, 1)),
        (16, "<8q", (6, 1, 1, 1, 1, 10, 28, 1)),
        (168, "<q", (2**62,)),
        (12, "<h", (9999,)),
    ):
        data = bytearray(sound)
        struct.pack_into(kind, data, offset, *values)
        cases.append(bytes(data))
    path.write_bytes(with_xml(xml.replace('IndexCount="27"', 'IndexCount="9999999"')))
    with pytest.raises(Unusable, match="declares 9999999 points"):
        read_cifti(path)  # before nibabel makes arrays of the declared length
    for number, data in enumerate(cases):
        path.write_bytes(data)
        with pytest.raises(Unusable, match=r"hostile\.dtseries\.nii") as caught:
            read_cifti(path)
        assert len(str(caught.value)) < 2000, number


# --- export -------------------------------------------------------------------------------------------------

NAMES = (
    "/etc/x",
    "../../x",
    "..",
    ".",
    "../",
    "a/b",
    "/",
    "\\x",
    "~",
    "$(touch x)",
    "a b",
    "-x",
    "a\nb",
    "\x1b[2J",
    "é",
    "a_b",
    "%2F",
    "con",
)


def test_export_writes_inside_its_folder_only(tmp_path, run_verb):
    home, out = tmp_path / "home", tmp_path / "home" / "out"
    home.mkdir()
    (home / "settings.json").write_text("mine")
    store, bold = tmp_path / "store", np.random.default_rng(0).standard_normal((20, 2)).astype(np.float32)
    cells = ["=cmd|x", "+1\x1b[2J"]
    space = {"space": "/../../../up"}
    with StoreWriter.create(
        store, networks=2, parcellation="../x", network_names=cells, preprocessing=space
    ) as writer:
        for i, name in enumerate(NAMES):
            one = {"t_r": 2.0, "dataset": "d"}
            writer.append(bold, **one, subject=name, session="s", task="t", key=f"subject {i}")
            writer.append(bold, **one, subject="1", session=name, task="t", key=f"session {i}")
            writer.append(bold, **one, subject="1", task="t", key=f"{name}{i}")
        writer.append(bold, **one, subject="1", task="t", key=str(home / "settings."))
        for dataset in "ab":
            writer.append(bold, t_r=2.0, dataset=dataset, subject="both", task="t")
    assert run_verb(export, store, out) == 0
    written = list(tmp_path.rglob("*_timeseries.tsv"))
    assert len(written) == 3 * len(NAMES) + 3, "two runs have become one file"
    assert all(path.is_relative_to(out) and len(path.relative_to(out).parts) in (3, 4) for path in written)
    assert sorted(path.name for path in home.iterdir()) == ["out", "settings.json"]
    assert (home / "settings.json").read_text() == "mine"
    assert written[0].read_text().splitlines()[0] == "'=cmd|x\t'+1\\x1b[2J"
    assert run_verb(export, store, out) == 0, "its own files are replaced"


def test_an_export_that_is_stopped_within_a_run_goes_on(tmp_path, run_verb, monkeypatch):
    store, out = tmp_path / "store", tmp_path / "out"
    with StoreWriter.create(store, networks=2, parcellation="a") as writer:
        writer.append(np.ones((20, 2)), t_r=2.0, dataset="d", subject="1", task="t")
    exporting = sys.modules["brainflow.prepare.export"]  # the package has a function of that name
    real = exporting.replace_durably
    for stop in (".json", ".tsv"):

        def stopped(path, data, stop=stop):
            if path.name.endswith(f"timeseries{stop}"):
                raise KeyboardInterrupt
            real(path, data)

        monkeypatch.setattr(exporting, "replace_durably", stopped)
        with pytest.raises(KeyboardInterrupt):
            run_verb(export, store, out)
        monkeypatch.setattr(exporting, "replace_durably", real)
        assert run_verb(export, store, out) == 0
        (out / "sub-1" / "func" / "sub-1_task-t_atlas-a_stat-mean_timeseries.tsv").unlink()


def test_export_follows_no_links_and_replaces_nothing_of_others(tmp_path, run_verb):
    store, out, victim = tmp_path / "store", tmp_path / "out", tmp_path / "victim"
    with StoreWriter.create(store, networks=2, parcellation="a") as writer:
        writer.append(np.ones((20, 2)), t_r=2.0, dataset="d", subject="1", task="t")
    victim.mkdir()
    out.mkdir()
    (out / "sub-1").symlink_to(victim)
    with pytest.raises(ValueError, match="a link leads out of"):
        run_verb(export, store, out)
    assert list(victim.iterdir()) == []
    (out / "sub-1").unlink()
    func, stem = out / "sub-1" / "func", "sub-1_task-t_atlas-a_stat-mean_timeseries"
    func.mkdir(parents=True)
    for name in (f"{stem}.tsv", f"{stem}.json"):
        (func / name).write_text("theirs")
        with pytest.raises(ValueError, match="was not written by this command"):
            run_verb(export, store, out)
        assert (func / name).read_text() == "theirs"
        (func / name).unlink()
        (func / name).symlink_to(tmp_path / "target")
        with pytest.raises(ValueError, match="was not written by this command"):
            run_verb(export, store, out)
        assert not (tmp_path / "target").exists()
        (func / name).unlink()
    (out / "dataset_description.json").write_text('{"Name": "theirs"}')
    assert run_verb(export, store, out) == 0
    assert json.loads((out / "dataset_description.json").read_text()) == {"Name": "theirs"}
