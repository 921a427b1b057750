"""Released tars: both forms are read, hostile and damaged ones refused, nothing partial is written."""

import io
import os
import pickle  # noqa: TID251  the tests write what the reader must refuse
import tarfile

import numpy as np
import pytest

from brainflow.storage import BoldStore, StoreError, verify
from brainflow.storage.ingest.unpickle import restricted_loads
from brainflow.storage.ingest.webdataset import ingest_tar, parse_key, read_tar

NETWORKS = 3


def tar_bytes(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def upstream(key, bold, t_r=2.0, protocol=4):
    return {f"{key}.bold.pyd": pickle.dumps(bold, protocol), f"{key}.t_r.pyd": pickle.dumps(t_r, protocol)}


def noise(rows, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, NETWORKS)).astype(np.float32)


def downstream(key, trials=3):
    members = {}
    for n in range(trials, 0, -1):
        name = f"{key}_sample_{n:03d}"
        members |= upstream(name, noise(5 + n, seed=n), np.float64(0.72), protocol=2 + n % 4)
        members[f"{name}.task_label.pyd"] = pickle.dumps(n)
        members[f"{name}.label_across_tasks.pyd"] = pickle.dumps(np.int64(10 + n))
        members[f"{name}.mental_state"] = f"state {n}".encode()
        members[f"{name}.task_name"] = b"MOTOR"
    return members


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("order", ["C", "F"])
def test_numpy_pickles_of_every_protocol_are_read(protocol, order):
    for dtype in ("<f4", ">f8", "<f2", "i8", "u1", "?"):
        array = np.asarray(noise(4) > 0 if dtype == "?" else noise(4) * 50, order=order).astype(
            dtype, order=order
        )
        got = restricted_loads(pickle.dumps(array, protocol), "x")
        assert np.array_equal(got, array)
        assert got.dtype == array.dtype
    for old in (b"numpy._core.multiarray", b"numpy.core.multiarray"):
        data = pickle.dumps(noise(4), 0).replace(b"numpy._core.multiarray", old)
        assert np.array_equal(restricted_loads(data, "x"), noise(4))
    for value in (3, -(2**70), 1.5, "text", np.float64(2.5), np.int32(7), np.array(4)):
        assert restricted_loads(pickle.dumps(value, protocol), "x") == value


class Payload:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def hostile(touched):
    command = f"touch {touched}"
    array = pickle.dumps(noise(3), 2)
    yield "posix.system", pickle.dumps(Payload(os.system, command))
    yield "builtins.eval", pickle.dumps(Payload(eval, f"open({str(touched)!r}, 'w')"))
    yield "posix.system", f"cposix\nsystem\n(S'{command}'\ntR.".encode()
    yield "numpy.load", b"cnumpy\nload\n(S'x'\ntR."
    yield "INST", f"(S'{command}'\niposix\nsystem\n.".encode()
    yield "BINPERSID", b"\x80\x02K\x01Q."
    yield "EXT1", b"\x80\x02\x82\x01."
    yield (
        "os.system",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c" + bytes([len(command)]) + command.encode() + b"\x85R.",
    )
    yield "dtype 'O", pickle.dumps(np.array([1, "x"], dtype=object), 2)
    yield "declares", array.replace(b"K\x03K\x03\x86", b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86")
    yield "memo slot", b"\x80\x02K\x01r\xff\xff\xff\x7f."
    yield "not a readable pickle", b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f."
    yield "not a readable pickle", array[:-20]
    yield "not a readable pickle", b""
    yield "tuple", pickle.dumps((1, 2))
    yield "holds the opcode", pickle.dumps({"a": 1})
    yield "NoneType", pickle.dumps(None)
    yield "kind other", b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\ndtype\n(I0\ntS'b'\ntR."
    yield "state of a function", b"cnumpy.core.multiarray\nscalar\n(I1\ntb."


def test_hostile_pickles_are_refused_by_name_and_run_nothing(tmp_path):
    touched = tmp_path / "touched"
    for expected, data in hostile(touched):
        with pytest.raises(StoreError, match=r"member\.pyd") as caught:
            restricted_loads(data, "member.pyd")
        assert expected in str(caught.value), (expected, str(caught.value))
        assert len(str(caught.value)) < 400
    assert not touched.exists()


def test_upstream_and_downstream_tars(tmp_path):
    (tmp_path / "up.tar").write_bytes(
        tar_bytes(upstream("ds-ds01_sub-03_ses-a_task-rest_acq-b_run-2", noise(20)))
    )
    (tmp_path / "down.tar").write_bytes(tar_bytes(downstream("ds-HCP_sub-100307_task-MOTOR_run-LR")))
    report = ingest_tar([tmp_path / "up.tar", tmp_path / "down.tar"], tmp_path / "s", parcellation="DiFuMo")
    assert report.ok
    assert report.sources == 2
    store = BoldStore.open(tmp_path / "s")
    assert store.runs.key.tolist() == report.runs
    assert store.runs.key[0] == "ds-ds01_sub-03_ses-a_task-rest_acq-b_run-2"
    assert store.runs.subject.tolist() == ["03", "100307"]
    assert store.runs.run.tolist() == ["2", "LR"]
    assert store.runs.t_r.tolist() == [2.0, 0.72]
    assert store.attributes["parcellation"] == "DiFuMo"
    assert np.array_equal(
        store.run(1), np.concatenate([noise(6, 1), noise(7, 2), noise(8, 3)]).astype(np.float16)
    )
    segments = store.segments
    assert segments.run.tolist() == [1, 1, 1]
    assert segments.onset.tolist() == [0, 6, 13]
    assert segments.length.tolist() == [6, 7, 8]
    columns = {name: values.tolist() for name, values in segments.columns.items()}
    assert columns == {
        "label_across_tasks": [11, 12, 13],
        "mental_state": ["state 1", "state 2", "state 3"],
        "sample": [1, 2, 3],
        "task_label": [1, 2, 3],
        "task_name": ["MOTOR"] * 3,
    }


def test_a_bad_tar_does_not_stop_the_others_and_leaves_nothing(tmp_path):
    good = "ds-d_sub-1_task-rest"
    files = {
        "a.tar": upstream(good, noise(9)),
        "evil.tar": upstream("ds-d_sub-2_task-rest", Payload(os.system, f"touch {tmp_path}/touched")),
        "nan.tar": {
            **upstream("ds-d_sub-3_task-a", noise(9)),
            **upstream("ds-d_sub-3_task-b", noise(9) * np.nan),
        },
        "networks.tar": upstream("ds-d_sub-4_task-rest", noise(9).T),
        "twice.tar": upstream(good, noise(9)),
        "nokey.tar": upstream("run7", noise(9)),
        "no_t_r.tar": {"ds-d_sub-5_task-r.bold.pyd": pickle.dumps(noise(9))},
        "t_rs.tar": upstream("ds-d_sub-6_task-r_sample_1", noise(9))
        | upstream("ds-d_sub-6_task-r_sample_2", noise(9), 3.0),
        "z.tar": upstream("ds-d_sub-9_task-rest", noise(4)),
    }
    for name, members in files.items():
        (tmp_path / name).write_bytes(tar_bytes(members))
    data = tar_bytes(downstream("ds-d_sub-7_task-r"))
    (tmp_path / "cut.tar").write_bytes(data[: len(data) // 2 // 512 * 512])
    paths = [tmp_path / name for name in [*files, "cut.tar", "missing.tar"]]
    report = ingest_tar(paths, tmp_path / "s")
    assert BoldStore.open(tmp_path / "s").runs.subject.tolist() == ["1", "9"]
    reasons = {os.path.basename(path): reason for path, reason in report.failures.items()}
    expected = {
        "evil.tar": "system",
        "nan.tar": "not finite",
        "networks.tar": "networks",
        "twice.tar": "already",
        "nokey.tar": "run7",
        "no_t_r.tar": "t_r.pyd",
        "t_rs.tar": "different repetition times",
        "cut.tar": "",
        "missing.tar": "missing.tar",
    }
    assert reasons.keys() == expected.keys()
    for name, text in expected.items():
        assert text in reasons[name]
    assert not (tmp_path / "touched").exists()
    for bad in ("evil.tar", "nan.tar"):
        assert ingest_tar([tmp_path / bad], tmp_path / "none").failures
        assert not (tmp_path / "none").exists()
        assert ingest_tar([tmp_path / bad], tmp_path / "s", overwrite=True).failures
        assert len(BoldStore.open(tmp_path / "s").runs) == 2, "a bad tar has replaced a store"
    (tmp_path / "narrow.tar").write_bytes(tar_bytes(upstream("ds-d_sub-8_task-r", noise(9)[:, :2] * np.nan)))
    report = ingest_tar([tmp_path / "narrow.tar", tmp_path / "a.tar"], tmp_path / "t")
    assert report.runs == [good], "a bad tar has said how many networks there are"


def mutated(data, kind, rng):
    """Flipped bits, a cut, or eight random bytes."""
    data = bytearray(data)
    if not data:
        return b""
    if kind == "flip":
        for at in rng.integers(len(data), size=int(rng.integers(1, 4))):
            data[at] ^= 1 << int(rng.integers(8))
    elif kind == "cut":
        del data[int(rng.integers(len(data))) :]
    elif kind == "random":
        at = int(rng.integers(len(data)))
        data[at : at + 8] = rng.bytes(8)
    return bytes(data)


def test_1000_mutated_tars_run_nothing_and_are_ingested_whole_or_refused(tmp_path):
    """250 tars and 750 single pickles, in a quarter of which stands something hostile."""
    rng = np.random.default_rng(0)
    touched = tmp_path / "touched"
    payloads = [data for _, data in hostile(touched)]
    original = downstream("ds-d_sub-1_task-t", trials=2)
    sound = tar_bytes(original)
    whole = {run["key"]: len(run["bold"]) for run in _read(tmp_path, sound)}
    rows = {13, 6, 7}  # both trials, or one of them under its own key where a flipped bit has renamed it
    read = 0
    for i in range(250):
        kind = ("flip", "cut", "random", "hostile")[i % 4]
        members = dict(original)
        if kind == "hostile":
            members[list(members)[int(rng.integers(12))]] = payloads[int(rng.integers(len(payloads)))]
        data = tar_bytes(members) if kind == "hostile" else mutated(sound, kind, rng)
        file = tmp_path / f"mutated-{i:03d}.tar"
        file.write_bytes(data)
        report = ingest_tar([file], tmp_path / "s", overwrite=True)
        if report.ok:
            read += 1
            store = BoldStore.open(tmp_path / "s")
            assert store.runs.key.tolist() == report.runs
            assert set(store.runs.length.tolist()) <= rows
            if kind == "cut":
                assert dict(zip(report.runs, store.runs.length.tolist(), strict=True)) == whole
        else:
            assert report.runs == []
            (reason,) = report.failures.values()
            assert str(file) in reason
            assert len(reason) < 500
        file.unlink()
    assert verify(tmp_path / "s").ok
    assert 0 < read < 190
    pickles = [
        pickle.dumps(value, protocol) for protocol in range(6) for value in (noise(4), 2.0, np.int64(3))
    ]
    read = 0
    for i in range(750):
        kind = ("flip", "cut", "random", "hostile")[i % 4]
        source = payloads if kind == "hostile" else pickles
        data = mutated(source[int(rng.integers(len(source)))], "flip" if kind == "hostile" else kind, rng)
        value, reason = _value_or_reason(data)
        assert reason.startswith("member.pyd: ") or isinstance(value, np.ndarray | int | float | str)
        assert len(reason) < 400
        read += not reason
    assert not touched.exists()
    assert 0 < read < 560


def _value_or_reason(data):
    try:
        return restricted_loads(data, "member.pyd"), ""
    except StoreError as error:
        return None, str(error)


def _read(folder, data):
    (folder / "mutated.tar").write_bytes(data)
    return list(read_tar(folder / "mutated.tar"))


def test_keys():
    assert parse_key("ds-a_sub-b_task-c") == {"dataset": "a", "subject": "b", "task": "c"}
    with pytest.raises(ValueError, match="sub-<subject>"):
        parse_key("ds-a_task-c")
