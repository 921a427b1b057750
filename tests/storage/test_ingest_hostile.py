"""A corpus of hostile and damaged sources: each is its own failure, named, and the good ones beside it go in.

Every family of cases is one ingestion, good sources first and last; nothing outside the store may change.
"""

import io
import itertools
import math
import os
import pickle  # noqa: TID251  the tests write what the reader must refuse
import struct
import subprocess
import sys
import tarfile
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from brainflow.storage import BoldStore, StoreError, StoreWriter, verify
from brainflow.storage.ingest import foreign
from brainflow.storage.ingest.arrays import ingest_arrays
from brainflow.storage.ingest.loading import load_array
from brainflow.storage.ingest.unpickle import restricted_loads
from brainflow.storage.ingest.webdataset import ingest_tar

BOLD = np.random.default_rng(0).standard_normal((20, 4)).astype(np.float32)
CANARY = "hostile-canary"


def files_of(folder):
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}


def check(report, store, bad, good):
    """Every bad source failed in one printable line with its name; the good ones are in a good store."""
    assert sorted(report.failures) == sorted(map(str, bad))
    for source, reason in report.failures.items():
        assert os.path.basename(source) in reason
        assert reason.isprintable(), reason
        assert len(reason) < len(source) + 600
        assert reason.rstrip(" :") != source, f"{source}: no reason"
    assert verify(store).ok
    assert sorted(BoldStore.open(store).runs.subject.tolist()) == sorted(good)


# --- pickles and tars ---------------------------------------------------------------------------------------


class Gadget:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def gadgets():
    command = f"touch {CANARY}"
    objects = (
        Gadget(os.system, command),
        Gadget(eval, f"open({CANARY!r}, 'w')"),
        Gadget(exec, f"open({CANARY!r}, 'w')"),
        Gadget(subprocess.call, ["touch", CANARY]),
        Gadget(getattr, "text", "join"),
        np.array([[Gadget(os.system, command)]], object),
        [Gadget(os.system, command)],
        {"bold": BOLD},
        (BOLD, BOLD),
        {1, 2},
        b"bytes",
        1j,
        True,
        None,
        np.array(["text"]),
        np.array([1j]),
        np.array(["2020"], "M8[D]"),
        np.zeros(2, [("a", "f4")]),
    )
    for value, protocol in itertools.product(objects, range(6)):
        yield pickle.dumps(value, protocol)


def opcodes():
    array = pickle.dumps(BOLD, 2)
    dtype = b"cnumpy\ndtype\n(S'f8'\ntR"
    state = b"cnumpy\nndarray\n(tR(I1\n%s" + dtype + b"I00\nS'%s'\ntb."
    yield from (
        b"",
        b"N",
        b"N.N.",
        array[:100],
        array[:-1],
        b"(S'x'\nios\nsystem\n.",
        b"(cos\nsystem\nS'x'\no.",
        b"\x80\x02cos\nsystem\n(S'x'\nt\x81.",
        b"\x80\x04cbuiltins\nexec\n(S'1'\nt}\x92.",
        b"Pfoo\n.",
        b"S'x'\nQ.",
        b"\x80\x02\x82\x01.",
        b"\x80\x02\x83\x01\x00.",
        b"\x80\x02\x84\x01\x00\x00\x00.",
        b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
        b"\x80\x04]]\x93.",
        b"cnumpy ndarray x\nsystem\n.",
        "cοs\nsystem\n.".encode(),
        b"cnumpy\nload\n(S'x'\ntR.",
        b"cnumpy\nndarray\n(NNtb.",
        b"cnumpy\ndtype\n(S'x'\nS'y'\ntb.",
        b"cnumpy.core.multiarray\n_reconstruct\n(NNtb.",
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\ndtype\n(I0\ntS'b'\ntR.",
        b"cnumpy\nndarray\n(tR(NNtb.",
        b"I1\n(tR.",
        b"S'os'\n(tR.",
        *(
            b"cnumpy\ndtype\n(S'%s'\ntR." % code
            for code in (b"O", b"V8", b"i4,O", b"U9", b"M8", b"f8\\n", b"c16")
        ),
        b"cnumpy\ndtype\n(]tR.",
        state % (b"(I5\nt", b"A"),
        state % (b"(L1000000000000000000L\nt", b"A"),
        state % (b"(I-1\nt", b""),
        state % (b"(I0\nL1000000000000000000L\nt", b""),
        state % (b"(I0\nL1" + b"0" * 30 + b"L\nt", b""),
        b"\x80\x02Nr\xff\xff\xff\xff.",
        b"Np999999999999\n.",
        b"g9\n.",
        b"\x80\x02\x8b\xff\xff\xff\x7f.",
        *(
            b"\x80\x05" + code + struct.pack("<Q", 2**62) + b"."
            for code in (b"\x8e", b"\x96", b"\x8d", b"\x95")
        ),
        b"\x80\x05\x97.",
        b"\x80\x05\x96" + struct.pack("<Q", 1) + b"A\x98.",
        b"L" + b"9" * 100_000 + b"L\n.",
        b"I" + b"9" * 100_000 + b"\n.",
        b"\x80\x02\x8b" + struct.pack("<i", 10**5) + b"\x7f" * 10**5 + b".",
        b"]q\x00h\x00a.",
        b")" + b"\x85" * 100_000 + b".",
        b"(" * 100_000 + b"t" * 100_000 + b".",
        b"N0" * 100_000 + b"N.",
    )


def amplified(name, call, uses, size):
    """One text of `size` bytes, kept in the memo and handed to a function `uses` times."""
    text = b"X" + struct.pack("<i", size) + b"a" * size + b"q\x000"
    return b"\x80\x02" + text + b"c" + name + b"q\x010(" + call * uses + b"t."


AMPLIFIED = (
    amplified(b"_codecs\nencode\n", b"h\x01h\x00X\x06\x00\x00\x00latin1\x86R", 150, 10**5),
    amplified(
        b"numpy.core.numeric\n_frombuffer\n",
        b"h\x01(h\x00cnumpy\ndtype\nX\x02\x00\x00\x00u1\x85RJ"
        + struct.pack("<i", 10**5)
        + b"\x85X\x01\x00\x00\x00CtR",
        60,
        10**5,
    ),
)


def tar_bytes(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def run_of(key, bold=None, t_r=None):
    return [
        (f"{key}.bold.pyd", pickle.dumps(BOLD) if bold is None else bold),
        (f"{key}.t_r.pyd", pickle.dumps(2.0) if t_r is None else t_r),
    ]


def special(name, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info, b""


def header(name, size):
    """A tar header with a size field of one's own."""
    block = bytearray(512)
    block[: len(name)] = name
    block[100:108], block[124:136], block[156:157], block[257:265] = b"0000644\0", size, b"0", b"ustar\00000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(key, value):
    record = b" " + key + b"=" + value + b"\n"
    body = next(b"%d" % n + record for n in range(200) if len(b"%d" % n + record) == n)
    block = bytearray(header(b"p", b"%011o\0" % len(body)))
    block[156:157] = b"x"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return (
        bytes(block)
        + body.ljust(512, b"\0")
        + header(b"a.bold.pyd", b"%011o\0" % 4)
        + b"AAAA".ljust(512, b"\0")
    )


def tars():
    """Name and bytes of tars, each with one thing wrong."""
    key = "ds-a_sub-bad_task-x"
    for i, data in enumerate((*gadgets(), *opcodes(), *AMPLIFIED)):
        yield f"bold-{i:03d}", tar_bytes(run_of(key, bold=data))
    for i, data in enumerate(opcodes()):
        yield f"t_r-{i:03d}", tar_bytes(run_of(key, t_r=data))
    for i, value in enumerate((math.nan, math.inf, -1.0, 0, 10**400, "two", BOLD)):
        yield f"t_r-value-{i}", tar_bytes(run_of(key, t_r=pickle.dumps(value)))
    odd = (
        BOLD[0],
        BOLD[None],
        BOLD[:0],
        BOLD[:, :0],
        BOLD * np.nan,
        BOLD > 0,
        BOLD * 1e6,
        np.float32(1),
        3,
        "text",
        np.zeros((1, 2**18 + 1), np.int8),
    )
    for i, value in enumerate(odd):
        yield f"bold-value-{i}", tar_bytes(run_of(key, bold=pickle.dumps(value)))
    yield "beside-narrow", tar_bytes(run_of(key, bold=pickle.dumps(BOLD[:, :3])))
    kinds = (b"1", b"2", b"3", b"4", b"6", b"S", b"Z")
    for i, kind in enumerate(kinds):
        yield f"kind-{i}", tar_bytes([special(f"{key}.x.pyd", kind), *run_of(key)])
    names = (
        "../../x",
        "/etc/passwd.bold.pyd",
        f"../{key}.bold.pyd",
        "a\0b",
        "\udcff.bold.pyd",
        "." * 300,
        "",
        "/",
        f"{key}.bold.pyd/../x",
        f"{key}_sample_1.bold.pyd",
        "\x1b]0;x\x07.bold.pyd",
        f"{key}.bold.pyd",
    )
    for i, name in enumerate(names):
        yield f"name-{i}", tar_bytes([*run_of(key), (name, pickle.dumps(1))])
    for i, label in enumerate(("", ".", "..", "zarr.json", "x" * 300, "é" * 43, "\udcff", "\U0001f600" * 30)):
        yield f"label-{i}", tar_bytes([*run_of(key), (f"{key}.{label}.pyd", pickle.dumps(1))])
    for i, value in enumerate((2**63, -(2**63), 10**5000, "a\0b", "x" * 1025, "é" * 600, BOLD, 1j, True)):
        yield f"value-{i}", tar_bytes([*run_of(key), (f"{key}.lab.pyd", pickle.dumps(value, 2))])
    for label, value in (("number", "a text"), ("long", 0.5)):
        yield f"beside-{label}", tar_bytes([*run_of(key), (f"{key}.{label}.pyd", pickle.dumps(value))])
    yield "surrogate", tar_bytes([*run_of(key), (f"{key}.lab.pyd", b"V\\ud800\n.")])
    yield "latin1", tar_bytes([*run_of(key), (f"{key}.lab.txt", b"\xff\xfe")])
    yield "columns", tar_bytes([*run_of(key), *((f"{key}.l{i}.txt", b"x") for i in range(1001))])
    other = "ds-a_sub-bad_task-y"
    yield (
        "kinds",
        tar_bytes([*run_of(key), *run_of(other), (f"{key}.z.txt", b"x"), (f"{other}.z.pyd", b"K\x01.")]),
    )
    escape = "\x1b]0;x\x07.bold.pyd"
    yield "escape", tar_bytes([(escape, b"K\1."), (escape, b"K\1.")])
    sound = tar_bytes(run_of(key))
    for cut in (0, 1, 511, 512, 700, 1600):
        yield f"cut-{cut}", sound[:cut]
    yield "garbage", np.random.default_rng(1).bytes(5000)
    yield "packed", zlib.compress(sound)
    yield "behind", sound + b"junk" * 500
    sizes = (b"\xff" * 12, b"\xff" * 10 + b"\xfe\0", b"\x80" + b"\x7f" * 11, b"77777777777\0")
    for i, size in enumerate(sizes):
        yield f"size-{i}", header(b"a.bold.pyd", size) + b"\0" * 1024
    pairs = (
        (b"size", b"-512"),
        (b"size", b"99999999999999"),
        (b"size", b"abc"),
        (b"GNU.sparse.map", b"0,9999"),
        (b"GNU.sparse.size", b"-5"),
        (b"path", b"../../x"),
        (b"mtime", b"1e999"),
        (b"uid", b"nan"),
    )
    for i, pair in enumerate(pairs):
        yield f"pax-{i}", pax(*pair) + sound


def test_a_bad_tar_harms_only_itself(tmp_path, monkeypatch):
    folder = tmp_path / "tars"
    folder.mkdir()
    monkeypatch.chdir(folder)
    bad = []
    for name, data in tars():
        bad.append(folder / f"{name}.tar")
        bad[-1].write_bytes(data)
    assert len(bad) > 240
    os.mkfifo(folder / "fifo.tar")
    bad += [folder / "fifo.tar", folder / "missing.tar", folder, Path("/dev/zero"), folder / "long.tar"]
    bad[-1].write_bytes(tar_bytes(run_of("ds-a_sub-bad_task-x")))
    os.truncate(bad[-1], 2**40)  # sparse
    good = []
    for number in ("1", "2", "3"):
        key = f"ds-a_sub-{number}_task-x"
        labels = [(f"{key}.number.pyd", pickle.dumps(1)), (f"{key}.long.pyd", pickle.dumps(2**53 + 1))]
        good.append(folder / f"good-{number}.tar")
        good[-1].write_bytes(tar_bytes([*run_of(key), *labels]))
    before = files_of(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # escapes in damaged texts
        report = ingest_tar([good[0], *bad, *good[1:]], tmp_path / "s")
    check(report, tmp_path / "s", bad, "123")
    assert BoldStore.open(tmp_path / "s").segments.columns["long"].tolist() == [2**53 + 1] * 3
    after = {
        path: time for path, time in files_of(tmp_path).items() if path.parts[len(tmp_path.parts)] != "s"
    }
    assert after == before
    assert "0%" not in report.failures[str(bad[-1])]
    before = files_of(tmp_path)
    alone = [path for path in bad if not path.name.startswith("beside")]
    assert sorted(ingest_tar(alone, tmp_path / "none").failures) == sorted(map(str, alone))
    assert files_of(tmp_path) == before, "bad sources alone have made something"


def test_a_pickle_of_many_steps_is_not_taken():
    """A hundred million lists of one byte each would take 64 times their pickle."""
    with pytest.raises(StoreError, match="more than 1000 opcodes"):
        restricted_loads(b"(" + b"]" * 5000 + b"t.", "x")


@pytest.mark.parametrize("data", AMPLIFIED)
def test_a_pickle_cannot_become_many_times_its_size(data):
    with pytest.raises(StoreError, match="far more bytes than it holds"):
        restricted_loads(data, "x")


# --- arrays -------------------------------------------------------------------------------------------------


def npy(shape=(20, 4), descr="<f4", body=b"\0" * 320, fortran=False, version=1, text=None, length=None):
    text = text or repr({"descr": descr, "fortran_order": fortran, "shape": shape}).encode()
    text = text.ljust(117) + b"\n"
    size = struct.pack("<H" if version == 1 else "<I", len(text) if length is None else length)
    return b"\x93NUMPY" + bytes([version, 0]) + size + text + body


def npz(*members, kind=zipfile.ZIP_DEFLATED):
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", kind) as archive:
        warnings.simplefilter("ignore")  # a name that is there twice
        for name, data in members:
            archive.writestr(name, data)
    return buffer.getvalue()


def arrays():
    """File name and bytes of array files, each with one thing wrong."""
    shapes = (
        (10**12, 4),
        (10**9, 4),
        (-1, 4),
        (2**62, 4),
        (0, 2**62),
        (20,),
        (),
        (2, 2, 2),
        (1,) * 60,
        (1.5, 4),
        ("x", 4),
        (20, 4, None),
        (5, 4),
        (65_537, 65_537),
        (1, 2**18 + 1),
        (2**31, 2**31),
    )
    for i, shape in enumerate(shapes):
        yield f"shape-{i}.npy", npy(shape)
        yield f"shape-{i}.npz", npz(("bold.npy", npy(shape)))
    kinds = (
        "|O",
        "<c8",
        "<U5",
        "|V4",
        "<M8[s]",
        "<m8[s]",
        "<f16",
        "|b1",
        "|S3",
        [("a", "<f4")],
        "evil",
        ("<f4", (9,)),
        3,
    )
    for i, kind in enumerate(kinds):
        yield f"kind-{i}.npy", npy(descr=kind)
    texts = (
        b"{'descr':__import__('os').system('touch x'),'fortran_order':False,'shape':(1,1)}",
        b"(" * 2000,
        b"",
        b"{}",
        b"\xff",
        b"{'descr': '<f4'",
        b"[" * 90 + b"]" * 90,
    )
    for i, text in enumerate(texts):
        yield f"text-{i}.npy", npy(text=text or b" ")
    for i, length in enumerate((0, 1, 60_000)):
        yield f"length-{i}.npy", npy(length=length)
    yield "length.npy", npy(version=2, length=2**32 - 1)
    for version in (0, 3, 4, 255):
        yield f"version-{version}.npy", npy(version=version)
    yield "long.npy", npy(body=b"\0" * 321)
    yield "short.npy", npy(body=b"\0" * 319)
    yield "empty.npy", b""
    yield "pickle.npy", pickle.dumps(Gadget(os.system, f"touch {CANARY}"))
    buffer = io.BytesIO()
    np.save(buffer, np.array([[Gadget(os.system, f"touch {CANARY}")]], object), allow_pickle=True)
    yield "object.npy", buffer.getvalue()
    yield "object.npz", npz(("bold.npy", buffer.getvalue()))
    yield "nan.npy", npy(body=b"\xff" * 320)
    yield "two.npz", npz(("a.npy", npy()), ("b.npy", npy()))
    yield "twice.npz", npz(("a.npy", npy()), ("a.npy", npy()))
    yield "both.npz", npz(("a.npy", npy()), ("a", npy()))
    yield "text.npz", npz(("a", b"hello"))
    yield "nothing.npz", npz()
    yield "lzma.npz", npz(("a.npy", npy()), kind=zipfile.ZIP_LZMA)
    yield "bzip2.npz", npz(("a.npy", npy()), kind=zipfile.ZIP_BZIP2)
    sound = npz(("a.npy", npy()))
    for cut in (0, 10, 40, len(sound) - 30):
        yield f"cut-{cut}.npz", sound[:cut]
    for i, at in enumerate((0, 40, sound.index(b"PK\1\2") + 8, sound.index(b"PK\1\2") + 24)):
        yield f"flip-{i}.npz", sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :]
    tables = (
        "",
        "a,b,c,d\n",
        "1,2,3,4\n1,2\n",
        "1,2,3,x\n",
        "nan,1,1,1\n",
        "1e400,1,1,1\n",
        "1j,1,1,1\n",
        "1_0,1,1,1\n2,2,2,2\n",
        "0x10,1,1,1\n",
        "1,2,3,4\0\n",
        "1\n" * 70_000,
        "1 2 3 4\n",
        "\n" * 100,
        "1,2,3\n",
    )
    for i, table in enumerate(tables):
        yield f"table-{i}.csv", table.encode()
        yield f"table-{i}.tsv", table.replace(",", "\t").encode()
    yield "utf16.csv", "1,2,3,4\n".encode("utf-16")
    yield "latin1.csv", b"\xe9,2,3,4\n1,2,3,4\n"
    for suffix in ("h5", "mat", "parquet"):
        yield f"empty.{suffix}", b""
    yield "noise.h5", b"\x89HDF\r\n\x1a\n" + b"x" * 500
    yield "noise.mat", b"MATLAB 5.0".ljust(124) + b"\0\1IM" + b"x" * 500
    yield "kind.doc", b"x"


def test_a_bad_array_harms_only_itself(tmp_path):
    folder = tmp_path / "arrays"
    folder.mkdir()
    for number in "19":
        np.save(folder / f"{'az'[number == '9']}_sub-{number}.npy", BOLD)
    bad = []
    for name, data in arrays():
        bad.append(folder / f"m_sub-bad_{name}")
        bad[-1].write_bytes(data)
    assert len(bad) > 110
    (folder / "m_sub-bad_link.npy").symlink_to("/dev/zero")
    (folder / "m_sub-bad_folder.npy").mkdir()
    os.mkfifo(folder / "m_sub-bad_fifo.npy")
    os.mkfifo(folder / "m_sub-bad_fifo.csv")
    (folder / "m_sub-bad_nowhere.npy").symlink_to("nowhere")
    bad += [folder / f"m_sub-bad_{name}" for name in ("link.npy", "folder.npy", "fifo.npy", "fifo.csv")]
    (tmp_path / "r.toml").write_text(
        '[defaults]\ndataset = "d"\nt_r = 2.0\n[[files]]\nglob = "arrays/*_sub-*"\n'
    )
    before = files_of(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy: no data in a table
        report = ingest_arrays(tmp_path / "r.toml", tmp_path / "s")
    report.failures.pop(str(folder / "m_sub-bad_nowhere.npy"), None)  # some Pythons' globs leave it out
    check(report, tmp_path / "s", bad, "19")
    after = {
        path: time for path, time in files_of(tmp_path).items() if path.parts[len(tmp_path.parts)] != "s"
    }
    assert after == before


def hdf5_files(folder):
    h5py = pytest.importorskip("h5py")
    secret = folder / "secret"
    secret.write_bytes(b"SECRET" * 20)
    with h5py.File(folder / "other.h5", "w") as file:
        file["x"] = BOLD

    def virtual(file):
        layout = h5py.VirtualLayout((20, 4), "f4")
        layout[:] = h5py.VirtualSource(folder / "other.h5", "x", shape=(20, 4))
        file.create_virtual_dataset("bold", layout)

    makers = {
        "external link": lambda f: f.__setitem__("bold", h5py.ExternalLink(str(folder / "other.h5"), "x")),
        "link in the way": lambda f: f.__setitem__("g", h5py.ExternalLink(str(folder / "other.h5"), "/")),
        "soft link": lambda f: f.__setitem__("bold", h5py.SoftLink("/bold")),
        "dangling": lambda f: f.__setitem__("bold", h5py.SoftLink("/nowhere")),
        "external": lambda f: f.create_dataset("bold", (20, 4), "u1", external=[(str(secret), 0, 80)]),
        "virtual": virtual,
        "fill": lambda f: f.create_dataset("bold", (65_000, 200_000), "f4", chunks=(100, 100)),
        "long": lambda f: f.create_dataset("bold", (10**15, 4), "f4", chunks=(100, 4)),
        "text": lambda f: f.create_dataset("bold", (2, 2), h5py.string_dtype()),
        "references": lambda f: f.create_dataset("bold", (2, 2), h5py.ref_dtype),
        "compound": lambda f: f.create_dataset("bold", (2, 2), [("a", "f4")]),
        "opaque": lambda f: f.create_dataset("bold", (2, 2), "V3"),
        "null": lambda f: f.create_dataset("bold", data=h5py.Empty("f4")),
        "scalar": lambda f: f.create_dataset("bold", data=1.0),
        "vector": lambda f: f.create_dataset("bold", data=np.zeros(5)),
        "group": lambda f: f.create_group("bold"),
        "type": lambda f: f.__setitem__("bold", np.dtype("f4")),
        "two": lambda f: (f.create_dataset("a", data=BOLD), f.create_dataset("b", data=BOLD)),
    }
    for name, make in makers.items():
        path = folder / f"{name}.h5"
        with h5py.File(path, "w") as file:
            make(file)
        yield path


def matlab_files(folder):
    io_ = pytest.importorskip("scipy.io")
    sparse = pytest.importorskip("scipy.sparse")
    cells = np.array([[1, "text"]], object)
    values = (
        cells,
        {"a": 1},
        "text",
        BOLD * 1j,
        BOLD[:, 0] > 0,
        sparse.csc_matrix(BOLD),
        np.zeros((2, 2, 2)),
    )
    for i, value in enumerate(values):
        io_.savemat(folder / f"{i}.mat", {"bold": value})
        yield folder / f"{i}.mat"
    io_.savemat(folder / "two.mat", {"a": BOLD, "b": BOLD})
    yield folder / "two.mat"
    with open(folder / "bomb.mat", "wb") as file:  # a matrix of 70,000 × 70,000 that is deflated
        io_.savemat(file, {"bold": BOLD}, do_compression=True)
    data = bytearray((folder / "bomb.mat").read_bytes())
    inside = bytearray(zlib.decompress(bytes(data[136:])))
    at = inside.index(struct.pack("<ii", 20, 4))
    inside[at : at + 8] = struct.pack("<ii", 70_000, 70_000)
    packed = zlib.compress(bytes(inside))
    (folder / "bomb.mat").write_bytes(bytes(data[:132]) + struct.pack("<I", len(packed)) + packed)
    yield folder / "bomb.mat"


def parquet_files(folder):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    tables = (
        {"a": ["x"]},
        {"a": [[1, 2]]},
        {"a": [True]},
        {"a": [1.0], "b": [b"x"]},
        {"a": [{"b": 1}]},
        {},
        {"a": np.zeros(2**18 + 1)},
    )
    for i, table in enumerate(tables):
        parquet.write_table(pyarrow.table(table), folder / f"{i}.parquet")
        yield folder / f"{i}.parquet"


@pytest.mark.parametrize("family", [hdf5_files, matlab_files, parquet_files])
def test_libraries_are_asked_for_shapes_and_places_first(tmp_path, family):
    """The reader of the child process, in this one: a process a case would take a minute."""
    for path in family(tmp_path):
        kind = {".h5": "hdf5"}.get(path.suffix, path.suffix[1:])
        with pytest.raises((ValueError, TypeError, OSError)) as caught:
            foreign.READERS[kind](str(path), "", 2**28)
        assert str(caught.value), path


def test_a_link_is_not_followed_and_a_crash_is_the_files_own(tmp_path, monkeypatch):
    [link] = [path for path in hdf5_files(tmp_path) if path.name == "external link.h5"]
    with pytest.raises(StoreError, match=r"external link\.h5: array 'bold' is a link to elsewhere"):
        load_array(link)
    script = tmp_path / "foreign.py"
    monkeypatch.setattr("brainflow.storage.ingest.loading.__file__", str(tmp_path / "loading.py"))
    script.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    with pytest.raises(
        StoreError, match=r"other\.h5: cannot be read: its reader died \(Segmentation fault\)"
    ):
        load_array(tmp_path / "other.h5")
    script.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr("brainflow.storage.ingest.loading._SECONDS", 0.1)
    with pytest.raises(StoreError, match=r"other\.h5: cannot be read within"):
        load_array(tmp_path / "other.h5")


def test_the_child_has_a_limit_of_memory(tmp_path):
    """A reader that takes more than the file may become is told no by the system."""
    script = (
        "import numpy, sys\n"
        f"sys.path.insert(0, {os.path.dirname(foreign.__file__)!r})\n"
        "import foreign\n"
        "foreign.READERS['hdf5'] = lambda *_: numpy.ones((50, 2**20))\n"
        f"foreign._LIBRARIES['hdf5'] = 'json'\n"
        f"sys.exit(foreign._main('hdf5', 'x', '', {str(tmp_path / 'out.npy')!r}, str(2**26), '60'))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "needs more memory than a file of its size may take")


BOMBS = """
import io, resource, sys, zipfile, zlib
from pathlib import Path
import numpy as np
from brainflow.storage import StoreError
from brainflow.storage.ingest.loading import load_array
from brainflow.prepare.records import Unusable
from brainflow.prepare.surfaces import check_gifti

folder = Path(sys.argv[1])
shape = (60_000, 4_000)
head = io.BytesIO()
np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": shape})
with zipfile.ZipFile(folder / "deflate.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
    with archive.open("bold.npy", "w") as member:
        member.write(head.getvalue())
        for _ in range(60):
            member.write(bytes(16_000_000))
import base64
array = '<DataArray DataType="NIFTI_TYPE_FLOAT32" Encoding="GZipBase64Binary" Dim0="9"><Data>'
packed = base64.b64encode(zlib.compress(bytes(2**28), 1)).decode()
(folder / "deflate.func.gii").write_text(f"<GIFTI>{array}{packed}</Data></DataArray></GIFTI>")
del packed
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sorted(folder.iterdir()):
    try:
        check_gifti(path) if path.suffix == ".gii" else load_array(path)
    except (StoreError, Unusable) as error:
        assert path.name in str(error), error
    else:
        raise SystemExit(f"{path} was read")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_bombs_are_refused_before_they_take_memory(tmp_path):
    """Files of a few MB that would become 0.3 to 0.9 GB; the figure is MiB above what making them took."""
    done = subprocess.run(
        [sys.executable, "-c", BOMBS, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 64


# --- the TOML file, and tables of segments ------------------------------------------------------------------

HEAD = '[defaults]\ndataset = "d"\nt_r = 2.0\n[[files]]\nglob = "*.npy"\n'
TOMLS = (
    *(
        HEAD + f'{name} = "{text}"\n'
        for name in ("key", "segments")
        for text in (
            "{foo}",
            "{}",
            "{0}",
            "{subject.x}",
            "{subject[0]}",
            "{subject.__class__.__mro__}",
            "{subject!r}",
            "{subject:>2000000000}",
            "{subject:{run}}",
            "{",
            "}",
            "{subject",
        )
    ),
    *(
        HEAD + f'pattern = "{text}"\n'
        for text in ("(", "[", "(?P<1>x)", "*", "(?P<subject>a)(?P<subject>b)", "a{99999999999}")
    ),
    *(HEAD.replace("*.npy", glob) for glob in ("/etc/*", "", "nothing", "***/x", "a\\u0000b")),
    *(HEAD.replace('"*.npy"', value) for value in ("5", '["*.npy"]', "true", "1979-05-27", "{a = 1}")),
    *(
        HEAD.replace("2.0", value)
        for value in ('"x"', "[1]", "nan", "inf", "-inf", "0", "-1.0", "true", "1979-05-27", "{}")
    ),
    *(
        HEAD + f"{name} = {value}\n"
        for name in ("layout", "array", "pattern", "key", "segments")
        for value in ("3", "true", "[]", "1979-05-27", "nan")
    ),
    HEAD + 'layout = "network"\n',
    *(HEAD.replace('"d"', value) for value in ("{a = 1}", "true", "[1]", "1979-05-27", "1.5")),
    *(
        f"[store]\n{line}\n" + HEAD
        for line in (
            "network_names = 5",
            "network_names = [1, 2]",
            'dtype = "object"',
            "dtype = 5",
            'compression = ["zstd"]',
            'compression = "gzip"',
            'network_coordinates = "x"',
            "network_coordinates = [[1, 2], [3]]",
            "network_coordinates = [[1, 2, nan]]",
            "preprocessing = {a = 1979-05-27}",
            "preprocessing = {a = nan}",
            'preprocessing = "x"',
            "parcellation = 5",
            "parcellation = [1]",
            "normalisation = 1979-05-27",
            "provenance = [1]",
            'network_names = ["a"]\nnetwork_coordinates = [[1, 2, 3], [1, 2, 3]]',
            "networks = 4",
        )
    ),
    "x = " + "[" * 5000 + "]" * 5000,
    "files = 3",
    "defaults = [1]\n[[files]]\nglob = '*.npy'",
    "files = [1, 2]",
    "store = 3\n" + HEAD,
    "[[defaults]]\n" + HEAD,
    "nonsense",
    "",
    "a = 1\n" + HEAD,
)


def test_what_is_wrong_in_the_toml_is_one_error_before_anything_is_written(tmp_path):
    assert len(TOMLS) > 90
    np.save(tmp_path / "sub-1.npy", BOLD)
    config = tmp_path / "r.toml"
    config.write_text("")
    before = set(files_of(tmp_path))
    for text in TOMLS:
        config.write_text(text)
        with pytest.raises(StoreError, match=r"r\.toml: ") as caught:
            ingest_arrays(config, tmp_path / "s")
        assert len(str(caught.value)) < 1000
        assert set(files_of(tmp_path)) == before
    for data in (b"\xff\xfe", b"\0"):
        config.write_bytes(data)
        with pytest.raises(StoreError, match=r"r\.toml: "):
            ingest_arrays(config, tmp_path / "s")
    config.unlink()
    os.mkfifo(config)
    with pytest.raises(StoreError, match="no regular file"):
        ingest_arrays(config, tmp_path / "s")


SEGMENTS = (
    "",
    "a,b\n1,2\n",
    "onset\n1\n",
    "onset,length\n-1,5\n",
    "onset,length\n0,99999999999999999999\n",
    "onset,length\n0.5,1\n",
    "onset,length\n0\n",
    "onset,length\nx,1\n",
    "onset,length\n1_0,1\n",
    "onset,length\n0,21\n",
    "onset,length\n0,0\n",
    "onset,length,a,a\n0,5,1,2\n",
    "onset,length\n0,5,9\n",
    "onset,length,a\n0,5,\0\n",
    "onset,length,a\n0,5," + "9" * 30 + "\n",
    "onset,length,a\n0,5," + "9" * 5000 + "\n",
    "onset,length,..\n0,5,x\n",
    "onset,length,.\n0,5,x\n",
    "onset,length,zarr.json\n0,5,x\n",
    "onset,length,\n0,5,x\n",
    "onset,length," + "y" * 300 + "\n0,5,x\n",
    "onset,length,a\n0,5," + "z" * 200_000 + "\n",
    "onset,length,a\n0,5," + "z" * 1025 + "\n",
    "onset,length,a\n0,5,x\n5,5,3\n",
    "onset,length,a\n0,5,0.5\n5,5,9007199254740993\n",
    "onset,length," + ",".join(f"c{i}" for i in range(1001)) + "\n",
    "onset,length,a\n0,5,\xff\n".encode("latin1"),
    b"\xff\xfe",
    "onset,length\n" + "0,1\n" * (2**18 + 1),
    "onset,length\n" + "0,1\n" * 2**21 + "\n",
)


def test_a_bad_table_of_segments_harms_only_its_run(tmp_path):
    for i, table in enumerate(SEGMENTS):
        (tmp_path / f"{i:02d}.csv").write_bytes(table if isinstance(table, bytes) else table.encode())
    os.mkfifo(tmp_path / "90.csv")
    (tmp_path / "91.csv").symlink_to("/dev/zero")
    (tmp_path / "92.csv").mkdir()
    numbers = [*range(len(SEGMENTS)), 90, 91, 92, 93]
    for number in numbers:
        np.save(tmp_path / f"sub-b_{number:02d}.npy", BOLD)
    for number, table in (("94", "onset,length,a\n0,5,1_0\n5,5,x\n"), ("95", "\ufeffonset,length\n0,5\n")):
        (tmp_path / f"{number}.csv").write_text(table)
        np.save(tmp_path / f"sub-b_{number}.npy", BOLD)
    config = "pattern = 'b_(?P<subject>..)'\nkey = '{subject}'\nsegments = '{subject}.csv'\n"
    (tmp_path / "r.toml").write_text(HEAD + config)
    report = ingest_arrays(tmp_path / "r.toml", tmp_path / "s")
    check(report, tmp_path / "s", [tmp_path / f"sub-b_{number:02d}.npy" for number in numbers], ["94", "95"])
    assert BoldStore.open(tmp_path / "s").segments.columns["a"].tolist() == ["1_0", "x", ""]
    for number in numbers:
        assert (
            f"{number:02d}.csv" in report.failures[f"{tmp_path}/sub-b_{number:02d}.npy"]
            or "segment" in (report.failures[f"{tmp_path}/sub-b_{number:02d}.npy"])
        )


def test_what_stops_the_program_is_not_a_failure_of_a_source(tmp_path, monkeypatch):
    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("brainflow.storage.ingest.webdataset.read_tar", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ingest_tar(["x.tar"], tmp_path / "s")


def test_a_store_that_cannot_be_made_is_an_error_and_not_every_sources_failure(tmp_path):
    np.save(tmp_path / "sub-1.npy", BOLD)
    (tmp_path / "r.toml").write_text(HEAD)
    (tmp_path / "s").mkdir()
    with pytest.raises(StoreError, match="not a brainflow store"):
        ingest_arrays(tmp_path / "r.toml", tmp_path / "s", overwrite=True)


def test_memory_that_runs_out_is_the_sources_failure(tmp_path, monkeypatch):
    for number in "12":
        (tmp_path / f"{number}.tar").write_bytes(tar_bytes(run_of(f"ds-a_sub-{number}_task-x")))
    prepare = StoreWriter.prepare

    def greedy(self, bold, **others):
        if others["subject"] == "1":
            raise MemoryError
        return prepare(self, bold, **others)

    monkeypatch.setattr(StoreWriter, "prepare", greedy)
    report = ingest_tar([tmp_path / "1.tar", tmp_path / "2.tar"], tmp_path / "s")
    assert list(report.failures.values()) == [f"{tmp_path}/1.tar: needs more memory than there is"]
    assert BoldStore.open(tmp_path / "s").runs.subject.tolist() == ["2"]


def test_rounding_is_said(tmp_path):
    for name, bold in {
        "scored": BOLD,
        "raw": 1e4 + 100 * BOLD.astype(np.float64),
        "constant": np.full((20, 4), 2049),
        "tiny": 1e-12 * BOLD,
    }.items():
        np.save(tmp_path / f"sub-{name}.npy", bold)
    (tmp_path / "r.toml").write_text(HEAD)
    report = ingest_arrays(tmp_path / "r.toml", tmp_path / "s")
    assert report.rounded.keys() == {"ds-d_sub-constant", "ds-d_sub-raw", "ds-d_sub-tiny"}
    assert "a constant" in report.rounded["ds-d_sub-constant"]
    assert "80 values of the run became 0" in report.rounded["ds-d_sub-tiny"]
    for dtype in ("float32", "int16"):
        (tmp_path / "r.toml").write_text(f"[store]\ndtype = '{dtype}'\n{HEAD}")
        assert not ingest_arrays(tmp_path / "r.toml", tmp_path / dtype).rounded
