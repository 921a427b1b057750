"""Array files become runs; what is missing or unreadable is said by file and key."""

import sys

import numpy as np
import pytest

from brainflow.storage import BoldStore, StoreError
from brainflow.storage.ingest.arrays import ingest_arrays, load_array

BOLD = np.random.default_rng(0).standard_normal((12, 3))


def test_files_of_several_kinds_become_runs(tmp_path):
    scipy_io = pytest.importorskip("scipy.io")
    np.save(tmp_path / "sub-1_task-rest_run-1.npy", BOLD)
    np.savez(tmp_path / "sub-2_task-rest.npz", bold=BOLD.T, other=BOLD)
    scipy_io.savemat(tmp_path / "sub-3_task-rest.mat", {"bold": BOLD.T})
    np.savetxt(tmp_path / "sub-4_task-rest.csv", BOLD, delimiter=",", header="a,b,c", comments="")
    np.savetxt(tmp_path / "sub-5_task-rest.tsv", BOLD, delimiter="\t")
    (tmp_path / "1_events.csv").write_text("onset,length,state,score\n0,4,face,1.5\n6,2,house,\n")
    (tmp_path / "runs.toml").write_text(
        """
        [store]
        dtype = "float32"
        parcellation = "three"
        preprocessing = {detrend = true}
        [defaults]
        dataset = "mine"
        t_r = 2.5
        [[files]]
        glob = "*run-1.npy"
        segments = "{subject}_events.csv"
        [[files]]
        glob = "*.[nm][pa][zt]"
        array = "bold"
        layout = "network time"
        [[files]]
        glob = "sub-*.[ct]sv"
        pattern = 'sub-(?P<subject>\\d+)'
        task = "other"
        key = "{dataset}/{stem}"
        """
    )
    seen = []
    report = ingest_arrays(tmp_path / "runs.toml", tmp_path / "s", progress=lambda *both: seen.append(both))
    assert report.failures == {}
    assert seen[-1] == (5, 5)
    store = BoldStore.open(tmp_path / "s")
    assert sorted(store.runs.subject.tolist()) == ["1", "2", "3", "4", "5"]
    assert store.runs.key.tolist()[-1] == "mine/sub-5_task-rest"
    assert set(store.runs.task.tolist()) == {"rest", "other"}
    assert all(np.allclose(store.run(i), BOLD, atol=1e-6) for i in range(5))
    assert store.segments.columns["state"].tolist() == ["face", "house"]
    assert np.isnan(store.segments.columns["score"][1])
    again = ingest_arrays(tmp_path / "runs.toml", tmp_path / "s")
    assert len(again.failures) == 5
    assert all("already" in reason for reason in again.failures.values())
    text = (tmp_path / "runs.toml").read_text()
    for other, name in (('"int8"', "dtype"), ('"float32"\ncompression = "zstd"', "compression")):
        (tmp_path / "runs.toml").write_text(text.replace('"float32"', other))
        with pytest.raises(StoreError, match=f"{name}: got .* but the store"):
            ingest_arrays(tmp_path / "runs.toml", tmp_path / "s")
    assert ingest_arrays(tmp_path / "runs.toml", tmp_path / "s", overwrite=True).ok
    assert BoldStore.open(tmp_path / "s").attributes["compression"] == "zstd"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[[files]]\nglob = 'sub-1.npy'\nt_r = 1", "dataset"),
        ("[[files]]\nglob = 'sub-1.npy'\nt_r = 1\ndataset = 'd'\npattern = 'no'", "pattern"),
        (
            "[[files]]\nglob = 'pickled.npy'\nt_r = 1\ndataset = 'd'\nsubject = '1'",
            "pickled.npy: holds object",
        ),
        ("[[files]]\nglob = 'two.npz'\nt_r = 1\ndataset = 'd'\nsubject = '1'", "choose one of a, b"),
        ("[[files]]\nglob = 'sub-1.npy'\nt_r = 1\ndataset = 'd'\nsegments = 'bad.csv'", "bad.csv"),
    ],
)
def test_a_file_that_cannot_be_used_is_reported(tmp_path, text, reason):
    np.save(tmp_path / "sub-1.npy", BOLD)
    np.save(tmp_path / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "two.npz", a=BOLD, b=BOLD)
    (tmp_path / "bad.csv").write_text("start,length\n1,2\n")
    (tmp_path / "c.toml").write_text(text)
    report = ingest_arrays(tmp_path / "c.toml", tmp_path / "s")
    assert [reason in text for text in report.failures.values()] == [True]
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("nonsense", "TOML"),
        ("", "at least one"),
        ("[[files]]\nglob = '*.nothing'\nt_r = 1", "finds no file"),
        ("[[files]]\nglob = 'sub-1.npy'\ndataset = 'd'", "t_r: the repetition time in seconds is not given"),
        ("[[files]]\nglob = 'sub-1.npy'\nt_r = 1\nlayout = 'x'", "layout: got 'x'"),
        ("[[files]]\nglob = '*'\ntr = 2", "unknown key 'tr'"),
        ("[store]\nnetworks = 3", "unknown key 'networks'"),
    ],
)
def test_a_wrong_toml_file_is_an_error(tmp_path, text, reason):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(StoreError, match=reason):
        ingest_arrays(tmp_path / "c.toml", tmp_path / "s")


def test_one_table_of_segments_for_everybody_gives_each_run_its_own_rows(tmp_path):
    for name in ("sub-01_run-1", "sub-01_run-2", "sub-02_run-1", "sub-03_run-1"):
        np.save(tmp_path / f"{name}.npy", BOLD)
    rows = ["sub-01,1,0,4,face", "sub-01,2,2,4,cat", "02,1,4,4,house"]
    (tmp_path / "all.csv").write_text("subject,run,onset,length,state\n" + "\n".join(rows) + "\n")
    (tmp_path / "seconds.csv").write_text("onset,duration\n0,4\n")
    toml = '[defaults]\ndataset = "d"\nt_r = 2.0\nsegments = "{}"\n[[files]]\nglob = "*.npy"\n'
    (tmp_path / "runs.toml").write_text(toml.format("all.csv"))
    report = ingest_arrays(tmp_path / "runs.toml", tmp_path / "s")
    (reason,) = report.failures.values()
    assert "has no row of subject '03' (it has 01, 02)" in reason
    store = BoldStore.open(tmp_path / "s")
    runs = store.segments.run
    of_runs = zip(
        store.runs.subject[runs], store.runs.run[runs], store.segments.columns["state"], strict=True
    )
    assert set(of_runs) == {("01", "1", "face"), ("01", "2", "cat"), ("02", "1", "house")}
    (tmp_path / "runs.toml").write_text(toml.format("seconds.csv"))
    report = ingest_arrays(tmp_path / "runs.toml", tmp_path / "t")
    assert all("divided by t_r" in reason for reason in report.failures.values())


def test_hdf5_and_matlab_7_3(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "one.h5", "w") as file:
        file["bold"] = BOLD
    with h5py.File(tmp_path / "two.hdf5", "w") as file:
        file["group/bold"] = BOLD
        file["other"] = BOLD + 1
    assert np.array_equal(load_array(tmp_path / "one.h5"), BOLD)
    assert np.array_equal(load_array(tmp_path / "two.hdf5", "group/bold"), BOLD)
    with pytest.raises(StoreError, match="'none' is not among group, other"):
        load_array(tmp_path / "two.hdf5", "none")
    # MATLAB 7.3: HDF5 behind a block of 512 bytes, axes reversed.
    with h5py.File(tmp_path / "new.mat", "w", userblock_size=512) as file:
        file["bold"] = BOLD.T
    with open(tmp_path / "new.mat", "r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file".ljust(124) + bytes([0, 2]) + b"IM")
    assert np.array_equal(load_array(tmp_path / "new.mat", "bold"), BOLD)
    (tmp_path / "broken.h5").write_bytes(b"\x89HDF\r\n\x1a\nnothing")
    with pytest.raises(StoreError, match=r"broken\.h5: cannot be read"):
        load_array(tmp_path / "broken.h5")


def test_parquet_has_a_column_a_network(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({f"network {i}": BOLD[:, i] for i in range(3)})
    parquet.write_table(table, tmp_path / "sub-1.parquet")
    assert np.array_equal(load_array(tmp_path / "sub-1.parquet"), BOLD)
    (tmp_path / "c.toml").write_text("[[files]]\nglob = '*.parquet'\ndataset = 'd'\nt_r = 1.0\n")
    assert ingest_arrays(tmp_path / "c.toml", tmp_path / "s").ok
    assert np.array_equal(BoldStore.open(tmp_path / "s").run(0), BOLD.astype(np.float16))
    parquet.write_table(pyarrow.table({"a": ["x"], "b": ["y"]}), tmp_path / "sub-1.parquet")
    report = ingest_arrays(tmp_path / "c.toml", tmp_path / "t")
    assert "real numbers" in next(iter(report.failures.values()))
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(("suffix", "package"), [(".h5", "h5py"), (".parquet", "pyarrow")])
def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, suffix, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.parquet", None)
    with pytest.raises(ImportError, match=f"needs {package}: pip install"):
        load_array(tmp_path / f"x{suffix}")
    with pytest.raises(StoreError, match="unknown kind"):
        load_array(tmp_path / "x.doc")
