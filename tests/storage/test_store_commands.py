"""`brainflow ingest`, `info` and `verify`: exit codes, what they print, and one real process."""

import json
import pickle  # noqa: TID251  writes the released form
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from brainflow.cli.main import main
from brainflow.data.splits import Split
from brainflow.storage import BoldStore, StoreWriter


@pytest.fixture
def tars(tmp_path):
    for subject in "12":
        key = f"ds-d_sub-{subject}_task-rest"
        members = {"bold.pyd": np.random.default_rng(0).standard_normal((9, 3)), "t_r.pyd": 2.0}
        with tarfile.open(tmp_path / f"{key}.tar", "w") as tar:
            for name, value in members.items():
                file = tmp_path / f"{key}.{name}"
                file.write_bytes(pickle.dumps(value))
                tar.add(file, file.name)
    return sorted(map(str, tmp_path.glob("*.tar")))


def test_from_tars_to_a_verified_store(tars, tmp_path, capsys):
    store = str(tmp_path / "s")
    assert main(["ingest", "tar", *tars, store, "--parcellation", "three"]) == 0
    assert "2 runs written" in capsys.readouterr().out
    assert main(["verify", store]) == 0
    assert "good" in capsys.readouterr().out
    assert main(["info", store]) == 0
    shown = capsys.readouterr().out
    assert "three" in shown
    assert "float16" in shown
    assert main(["info", store, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["runs"], facts["networks"], facts["datasets"][0]["subjects"]) == (2, 3, 2)
    assert main(["ingest", "tar", tars[0], store, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert "already" in report["failures"][tars[0]]
    assert main(["ingest", "tar", tars[0], "--store", store, "--overwrite"]) == 0
    assert len(BoldStore.open(store).runs) == 1


def test_a_split_by_subject_is_made_with_the_store(tars, tmp_path, capsys):
    store, file = str(tmp_path / "s"), tmp_path / "split.json"
    assert main(["ingest", "tar", *tars, store, "--split", str(file), "--test-subjects", "1"]) == 0
    opened = BoldStore.open(store)
    split = Split.load(file, snapshot=opened.snapshot)
    assert split.by == "subject"
    parts = {name: opened.runs.subject[split.part(name, opened.runs)].tolist() for name in split.parts}
    assert sorted(parts["train"] + parts["test"]) == ["1", "2"]
    for wrong in (["--test-subjects", "1"], ["--split", str(file)]):
        assert main(["ingest", "tar", *tars, str(tmp_path / "t"), *wrong]) == 2
        assert not (tmp_path / "t").exists()
    many = ["--split", str(file), "--test-subjects", "2", "--overwrite"]
    assert main(["ingest", "tar", *tars, store, *many]) == 1
    assert "leaves none for training" in capsys.readouterr().err


def test_verify_names_damage_and_exits_with_1(tars, tmp_path, capsys):
    store = tmp_path / "s"
    main(["ingest", "tar", *tars, str(store)])
    shard = store / "bold" / "c" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[5] ^= 1
    shard.write_bytes(data)
    capsys.readouterr()
    assert main(["verify", str(store)]) == 1
    assert "ds-d_sub-1_task-rest" in capsys.readouterr().out
    assert main(["verify", str(store), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["bad_chunks"] == [0]
    shard.write_bytes(data[:-1])
    assert main(["verify", str(store)]) == 1
    out = capsys.readouterr().out
    assert "bold/c/0/0" in out
    assert "ds-d_sub-1_task-rest" in out
    assert "runs are touched" in out
    assert main(["info", str(store)]) == 1
    assert "bold/c/0/0" in capsys.readouterr().err


def test_info_of_a_model_says_where_to_look(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert main(["info", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert f"{tmp_path}: holds a model, expected a store" in said
    assert "brainflow report" in said


def test_arrays(tmp_path, capsys):
    np.save(tmp_path / "sub-1.npy", np.zeros((4, 2)))
    (tmp_path / "c.toml").write_text("[[files]]\nglob = '*.npy'\ndataset = 'd'\nt_r = 1.0\n")
    assert main(["ingest", "arrays", str(tmp_path / "c.toml"), "--store", str(tmp_path / "s")]) == 0
    assert "1 run written" in capsys.readouterr().out
    assert main(["ingest", "tar", str(tmp_path / "s")]) == 2
    assert "SRC" in capsys.readouterr().err


def test_as_a_process_without_torch(tars, tmp_path):
    code = (
        "import sys; from brainflow.cli.main import main; "
        f"status = main(['ingest', 'tar', *{tars!r}, {str(tmp_path / 's')!r}]); "
        "assert 'torch' not in sys.modules; sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "2 runs written" in done.stdout
    assert "tars: 100 %" in done.stderr


def test_info_of_a_damaged_store_shows_what_is_whole_and_says_so(tmp_path, capsys):
    path = tmp_path / "s"
    with StoreWriter.create(path, networks=2) as writer:
        writer.append(np.zeros((4, 2)), t_r=1.0, dataset="d", subject="1")
    (path / "zarr.json").write_bytes(b"{")
    assert main(["info", str(path)]) == 0
    shown = capsys.readouterr()
    assert shown.err.startswith("brainflow info: warning: ")
    assert shown.err.count("\n") == 1
    assert "manifest.json" in shown.err
    assert main(["info", str(path), "--json"]) == 0
    assert "manifest.json" in json.loads(capsys.readouterr().out)["damage"]
    assert main(["verify", str(path)]) == 1
